#include "name_hash.hpp"

#include <random>

namespace kvindex {
namespace {

uint64_t chosen() {
  std::random_device random;
  return static_cast<uint64_t>(random()) << 32 | random();
}

}  // namespace

uint64_t name_seed() {
  static const uint64_t seed = chosen();
  return seed;
}

}  // namespace kvindex
