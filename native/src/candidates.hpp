// The pods that one query is about.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "pod_list.hpp"
#include "pod_names.hpp"

namespace kvindex {

// Distinct, in the order they were named.
struct Candidates {
  std::vector<std::string_view> names;  // parts of `list`
  std::vector<uint32_t> numbers;        // of each; PodNames::kNobody for a pod that never had a stream
  std::shared_ptr<const PodList> list;
};

// The first of equal names is kept. The only place where an answer looks at names: one hash for each, and none when
// this thread was asked for the same list last and no pod was new to `known`, which numbers them, meanwhile.
std::shared_ptr<const Candidates> distinct(const std::shared_ptr<const PodList>& list,
                                           const std::shared_ptr<const PodNames>& known);

}  // namespace kvindex
