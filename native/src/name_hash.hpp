// A hash of names that clients choose: of a seed that changes with every process, so that nobody can make names whose
// hashes are equal, and cheap for short ones, since an answer looks every candidate up several times.
#pragma once

#include <cstddef>
#include <string_view>

namespace kvindex {

struct NameHash {
  using is_transparent = void;
  size_t operator()(std::string_view name) const noexcept;
};

}  // namespace kvindex
