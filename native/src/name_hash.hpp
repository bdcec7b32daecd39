// A hash of names that clients choose: of a seed that changes with every process, so that nobody can make names whose
// hashes are equal, and cheap for short ones, since an answer looks every candidate up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "xxh3.hpp"

namespace kvindex {

uint64_t name_seed();

class NameHash {
 public:
  using is_transparent = void;

  size_t operator()(std::string_view name) const noexcept { return xxh3_64(name.data(), name.size(), seed_); }

 private:
  uint64_t seed_ = name_seed();
};

}  // namespace kvindex
