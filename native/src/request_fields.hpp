// Fields that encoded read requests have in common. Each reader is false for what only the reference path may judge.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace kvindex {

constexpr size_t kMaxName = 1024;
constexpr uint64_t kU32 = 0xFFFFFFFFULL;

// Well-formed UTF-8 as protobuf demands it of strings.
bool is_utf8(std::string_view text);

// The same, for names of 8 to 16 bytes without a call: most pods have such, and all of them are ASCII.
inline bool is_utf8_name(std::string_view name) {
  if (name.size() < 8 || name.size() > 16) return is_utf8(name);
  uint64_t first = 0, last = 0;
  std::memcpy(&first, name.data(), 8);
  std::memcpy(&last, name.data() + name.size() - 8, 8);
  return ((first | last) & 0x8080808080808080ULL) == 0 || is_utf8(name);
}

// A model, a LoRA name, a salt or a hash.
bool read_name(std::string_view value, std::string& out);

// A message whose only field is `repeated fixed64 = 1`, packed; at most `limit` values in `out` together.
bool read_packed(std::string_view nested, uint64_t limit, std::vector<uint64_t>& out);

}  // namespace kvindex
