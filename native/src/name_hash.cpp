#include "name_hash.hpp"

#include <cstdint>
#include <random>

#include "xxh3.hpp"

namespace kvindex {
namespace {

uint64_t chosen() {
  std::random_device random;
  return static_cast<uint64_t>(random()) << 32 | random();
}

}  // namespace

size_t NameHash::operator()(std::string_view name) const noexcept {
  static const uint64_t seed = chosen();
  return xxh3_64(name.data(), name.size(), seed);
}

}  // namespace kvindex
