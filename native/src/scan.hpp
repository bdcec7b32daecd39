// Packed numbers straight from an encoded protobuf request, without an object per number.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvindex {

enum class Scan { kFound, kAbsent, kMalformed, kOutOfRange };

// Values of field `inner` of submessage `outer` (the last occurrence wins, as protobuf's oneof does, and its own
// occurrences merge): width 4 = varints as u32 LE, width 8 = fixed64 as u64 LE.
Scan scan_packed(std::string_view message, uint32_t outer, uint32_t inner, int width, std::string& out);

// The distinct tags (field number << 3 | wire type) of the message, or (outer != 0) of its submessages `outer`, in
// order of appearance. False when it is malformed, holds a group, or more than kMaxTags of them.
inline constexpr size_t kMaxTags = 256;
bool scan_tags(std::string_view message, uint32_t outer, std::vector<uint32_t>& tags);

}  // namespace kvindex
