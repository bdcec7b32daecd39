// XXH3-64 with a seed, written from the algorithm's specification and checked against the reference library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvindex {
namespace xxh3_detail {

inline constexpr uint64_t kP32_1 = 0x9E3779B1U, kP32_2 = 0x85EBCA77U, kP32_3 = 0xC2B2AE3DU;
inline constexpr uint64_t kP64_1 = 0x9E3779B185EBCA87ULL, kP64_2 = 0xC2B2AE3D27D4EB4FULL,
                          kP64_3 = 0x165667B19E3779F9ULL, kP64_4 = 0x85EBCA77C2B2AE63ULL,
                          kP64_5 = 0x27D4EB2F165667C5ULL;
inline constexpr uint64_t kMx1 = 0x165667919E3779F9ULL, kMx2 = 0x9FB21C651E98DF25ULL;

inline constexpr size_t kSecretSize = 192, kStripe = 64, kConsume = 8, kSecretMin = 136;
inline constexpr uint8_t kSecret[kSecretSize] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

inline uint32_t read32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
inline uint64_t read64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}
inline uint64_t rotl(uint64_t x, int r) { return (x << r) | (x >> (64 - r)); }
inline uint64_t mul_fold(uint64_t a, uint64_t b) {
  __extension__ using u128 = unsigned __int128;
  const u128 product = static_cast<u128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}
inline uint64_t xxh64_avalanche(uint64_t h) {
  h ^= h >> 33;
  h *= kP64_2;
  h ^= h >> 29;
  h *= kP64_3;
  return h ^ (h >> 32);
}
inline uint64_t avalanche(uint64_t h) {
  h ^= h >> 37;
  h *= kMx1;
  return h ^ (h >> 32);
}
inline uint64_t mix16(const uint8_t* in, const uint8_t* secret, uint64_t seed) {
  return mul_fold(read64(in) ^ (read64(secret) + seed), read64(in + 8) ^ (read64(secret + 8) - seed));
}

inline uint64_t up_to_16(const uint8_t* in, size_t len, uint64_t seed) {
  if (len > 8) {
    const uint64_t flip_lo = (read64(kSecret + 24) ^ read64(kSecret + 32)) + seed;
    const uint64_t flip_hi = (read64(kSecret + 40) ^ read64(kSecret + 48)) - seed;
    const uint64_t lo = read64(in) ^ flip_lo, hi = read64(in + len - 8) ^ flip_hi;
    return avalanche(len + __builtin_bswap64(lo) + hi + mul_fold(lo, hi));
  }
  if (len >= 4) {
    seed ^= static_cast<uint64_t>(__builtin_bswap32(static_cast<uint32_t>(seed))) << 32;
    const uint64_t flip = (read64(kSecret + 8) ^ read64(kSecret + 16)) - seed;
    uint64_t h = (read32(in + len - 4) + (static_cast<uint64_t>(read32(in)) << 32)) ^ flip;
    h ^= rotl(h, 49) ^ rotl(h, 24);
    h *= kMx2;
    h ^= (h >> 35) + len;
    h *= kMx2;
    return h ^ (h >> 28);
  }
  if (len > 0) {
    const uint32_t combined = (static_cast<uint32_t>(in[0]) << 16) | (static_cast<uint32_t>(in[len >> 1]) << 24) |
                              in[len - 1] | (static_cast<uint32_t>(len) << 8);
    return xxh64_avalanche(combined ^ ((read32(kSecret) ^ read32(kSecret + 4)) + seed));
  }
  return xxh64_avalanche(seed ^ read64(kSecret + 56) ^ read64(kSecret + 64));
}

inline uint64_t up_to_128(const uint8_t* in, size_t len, uint64_t seed) {
  uint64_t acc = len * kP64_1;
  const size_t rounds = (len - 1) / 32;
  for (size_t i = rounds + 1; i-- > 0;) {
    acc += mix16(in + 16 * i, kSecret + 32 * i, seed);
    acc += mix16(in + len - 16 * (i + 1), kSecret + 32 * i + 16, seed);
  }
  return avalanche(acc);
}

inline uint64_t up_to_240(const uint8_t* in, size_t len, uint64_t seed) {
  uint64_t acc = len * kP64_1;
  for (size_t i = 0; i < 8; ++i) acc += mix16(in + 16 * i, kSecret + 16 * i, seed);
  acc = avalanche(acc);
  for (size_t i = 8; i < len / 16; ++i) acc += mix16(in + 16 * i, kSecret + 16 * (i - 8) + 3, seed);
  acc += mix16(in + len - 16, kSecret + kSecretMin - 17, seed);
  return avalanche(acc);
}

inline void accumulate(uint64_t acc[8], const uint8_t* in, const uint8_t* secret) {
  for (size_t i = 0; i < 8; ++i) {
    const uint64_t value = read64(in + 8 * i), key = value ^ read64(secret + 8 * i);
    acc[i ^ 1] += value;
    acc[i] += (key & 0xFFFFFFFFU) * (key >> 32);
  }
}

inline uint64_t above_240(const uint8_t* in, size_t len, uint64_t seed) {
  uint8_t custom[kSecretSize];
  const uint8_t* secret = kSecret;
  if (seed != 0) {
    for (size_t i = 0; i < kSecretSize; i += 16) {
      const uint64_t lo = read64(kSecret + i) + seed, hi = read64(kSecret + i + 8) - seed;
      std::memcpy(custom + i, &lo, 8);
      std::memcpy(custom + i + 8, &hi, 8);
    }
    secret = custom;
  }
  uint64_t acc[8] = {kP32_3, kP64_1, kP64_2, kP64_3, kP64_4, kP32_2, kP64_5, kP32_1};
  constexpr size_t kStripesPerBlock = (kSecretSize - kStripe) / kConsume;
  constexpr size_t kBlock = kStripe * kStripesPerBlock;
  const size_t blocks = (len - 1) / kBlock;
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t s = 0; s < kStripesPerBlock; ++s) accumulate(acc, in + b * kBlock + s * kStripe, secret + s * kConsume);
    for (size_t i = 0; i < 8; ++i) {
      acc[i] ^= acc[i] >> 47;
      acc[i] ^= read64(secret + kSecretSize - kStripe + 8 * i);
      acc[i] *= kP32_1;
    }
  }
  const size_t stripes = ((len - 1) - kBlock * blocks) / kStripe;
  for (size_t s = 0; s < stripes; ++s) accumulate(acc, in + blocks * kBlock + s * kStripe, secret + s * kConsume);
  accumulate(acc, in + len - kStripe, secret + kSecretSize - kStripe - 7);
  uint64_t h = len * kP64_1;
  for (size_t i = 0; i < 4; ++i)
    h += mul_fold(acc[2 * i] ^ read64(secret + 11 + 16 * i), acc[2 * i + 1] ^ read64(secret + 11 + 16 * i + 8));
  return avalanche(h);
}

}  // namespace xxh3_detail

// Little-endian hosts only (x86-64, arm64), as every other part of the core.
inline uint64_t xxh3_64(const void* data, size_t len, uint64_t seed = 0) {
  const auto* in = static_cast<const uint8_t*>(data);
  if (len <= 16) return xxh3_detail::up_to_16(in, len, seed);
  if (len <= 128) return xxh3_detail::up_to_128(in, len, seed);
  if (len <= 240) return xxh3_detail::up_to_240(in, len, seed);
  return xxh3_detail::above_240(in, len, seed);
}

}  // namespace kvindex
