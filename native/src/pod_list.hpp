// The pods that a request names, as it names them.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "protobuf.hpp"

namespace kvindex {

class PodList {
 public:
  // The fields of one tag, a byte, at which `in` stands, up to the first of another one, where it stands afterwards.
  // Null when they are malformed, more than `most`, or one is empty or no UTF-8. A router asks about the same pods
  // again and again: the same bytes as those that this thread read last give the same list, without a look at any name.
  static std::shared_ptr<const PodList> read(protobuf::Reader& in, size_t most);

  explicit PodList(const std::vector<std::string>& names);
  PodList(const PodList&) = delete;
  PodList& operator=(const PodList&) = delete;

  const std::vector<std::string_view>& names() const { return names_; }

 private:
  PodList(std::string_view encoded, std::vector<std::string_view> names);

  const std::string bytes_;
  std::vector<std::string_view> names_;  // parts of them
};

}  // namespace kvindex
