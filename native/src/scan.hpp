// Packed numbers straight from an encoded protobuf request, without an object per number.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace kvindex {

enum class Scan { kFound, kAbsent, kMalformed, kOutOfRange };

// Values of field `inner` of submessage `outer` (the last occurrence wins, as protobuf's oneof does, and its own
// occurrences merge): width 4 = varints as u32 LE, width 8 = fixed64 as u64 LE.
Scan scan_packed(std::string_view message, uint32_t outer, uint32_t inner, int width, std::string& out);

}  // namespace kvindex
