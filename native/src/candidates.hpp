// The pods that one query is about.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "pod_names.hpp"

namespace kvindex {

// Distinct, in the order they were named.
struct Candidates {
  std::vector<std::string_view> names;
  std::vector<uint32_t> numbers;  // of each; PodNames::kNobody for a pod that never had a stream
};

// The first of equal names is kept. The only place where an answer looks at names: one hash for each. `known` numbers
// them.
Candidates distinct(const std::vector<std::string_view>& named, const PodNames& known);

}  // namespace kvindex
