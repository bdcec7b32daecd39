// Numbers as networks write them: the most significant byte first.
#pragma once

#include <cstdint>

namespace kvindex {

// Of at most eight bytes, signed or not.
template <typename Bytes>
uint64_t big_endian(const Bytes& bytes) {
  uint64_t value = 0;
  for (const auto each : bytes) value = value << 8 | static_cast<uint8_t>(each);
  return value;
}

}  // namespace kvindex
