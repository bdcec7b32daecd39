// The characters of valid UTF-8, and the class that a tokenizer's plan puts each of them into.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvindex {

// The character that starts at `at`, and its size in bytes.
inline uint32_t point_at(const char* at, size_t& size) {
  const auto* byte = reinterpret_cast<const uint8_t*>(at);
  const uint32_t first = byte[0];
  if (first < 0x80) {
    size = 1;
    return first;
  }
  if (first < 0xE0) {
    size = 2;
    return (first & 0x1F) << 6 | (byte[1] & 0x3F);
  }
  if (first < 0xF0) {
    size = 3;
    return (first & 0x0F) << 12 | (byte[1] & 0x3F) << 6 | (byte[2] & 0x3F);
  }
  size = 4;
  return (first & 0x07) << 18 | (byte[1] & 0x3F) << 12 | (byte[2] & 0x3F) << 6 | (byte[3] & 0x3F);
}

// The start of the last character before `at`, which is not the text's start.
inline size_t point_before(std::string_view text, size_t at) {
  --at;
  while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) --at;
  return at;
}

class CharClasses {
 public:
  CharClasses() = default;
  // The class of each code point.
  explicit CharClasses(const std::string& classes);

  uint8_t at(const char* at, size_t& size) const {
    const uint32_t point = point_at(at, size);
    return pages_[static_cast<size_t>(page_of_[point >> 8]) << 8 | (point & 0xFF)];
  }

 private:
  std::vector<uint16_t> page_of_;  // pages of 256 code points; equal ones are kept once
  std::vector<uint8_t> pages_;
};

}  // namespace kvindex
