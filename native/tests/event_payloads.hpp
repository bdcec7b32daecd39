// Messages of an engine for the tests: chains of blocks of 4 tokens, stored and removed.
#pragma once

#include <cstdint>
#include <string>

#include "stream.hpp"

namespace kvindex {

// The least of a msgpack writer that events need.
struct Pack {
  std::string bytes;
  Pack& array(uint8_t n) { return bytes.push_back(static_cast<char>(0x90 | n)), *this; }
  Pack& nil() { return bytes.push_back(static_cast<char>(0xc0)), *this; }
  Pack& text(const std::string& s) {
    bytes.push_back(static_cast<char>(0xa0 | s.size()));
    bytes += s;
    return *this;
  }
  Pack& u64(uint64_t v) {
    bytes.push_back(static_cast<char>(0xcf));
    for (int shift = 56; shift >= 0; shift -= 8) bytes.push_back(static_cast<char>(v >> shift));
    return *this;
  }
  Pack& many(size_t n) {
    bytes.push_back(static_cast<char>(0xdc));
    bytes.push_back(static_cast<char>(n >> 8));
    bytes.push_back(static_cast<char>(n));
    return *this;
  }
};

inline constexpr size_t kBlock = 4;

inline uint32_t token(uint64_t chain, size_t position) { return static_cast<uint32_t>(chain * 1000 + position); }

inline std::string stored(uint64_t chain, size_t begin, size_t end) {
  Pack pack;
  pack.array(3).u64(1).array(1).array(7).text("BlockStored").many(end - begin);
  for (size_t i = begin; i < end; ++i) pack.u64(chain << 32 | i);
  if (begin == 0) {
    pack.nil();
  } else {
    pack.u64(chain << 32 | (begin - 1));
  }
  pack.many((end - begin) * kBlock);
  for (size_t i = begin * kBlock; i < end * kBlock; ++i) pack.u64(token(chain, i));
  pack.u64(kBlock).nil().text("GPU").u64(0);
  return pack.bytes;
}

inline std::string removed(uint64_t chain, size_t block) {
  return Pack()
      .array(3)
      .u64(1)
      .array(1)
      .array(3)
      .text("BlockRemoved")
      .many(1)
      .u64(chain << 32 | block)
      .text("GPU")
      .u64(0)
      .bytes;
}

inline void apply(Stream& stream, const std::string& payload, Applied& applied) {
  stream.apply(reinterpret_cast<const uint8_t*>(payload.data()), payload.size(), 0, applied);
}

}  // namespace kvindex
