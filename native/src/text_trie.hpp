// Strings to be found in a text, byte by byte.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace kvindex {

class TextTrie {
 public:
  bool empty() const { return nodes_.empty(); }

  // `content` is not empty; `value` is not negative.
  void add(std::string_view content, int32_t value) {
    const auto first = static_cast<uint8_t>(content[0]);
    only_ = empty() || only_ == first ? first : -1;
    int32_t* link = &roots_[first];
    int32_t at = -1;
    for (const char each : content) {
      const auto byte = static_cast<uint8_t>(each);
      while (*link >= 0 && nodes_[*link].byte != byte) link = &nodes_[*link].sibling;
      at = *link;
      if (at < 0) {
        *link = at = static_cast<int32_t>(nodes_.size());
        nodes_.push_back({-1, -1, -1, byte});  // moves what `link` points to
      }
      link = &nodes_[at].child;
    }
    nodes_[at].value = value;
  }

  // The value of the longest string that starts at `at`; -1 when none does.
  int32_t longest(std::string_view text, size_t at) const {
    int32_t node = roots_[static_cast<uint8_t>(text[at])], found = -1;
    while (node >= 0) {
      if (nodes_[node].value >= 0) found = nodes_[node].value;
      if (++at == text.size()) break;
      const auto byte = static_cast<uint8_t>(text[at]);
      node = nodes_[node].child;
      while (node >= 0 && nodes_[node].byte != byte) node = nodes_[node].sibling;
    }
    return found;
  }

  // The first place at or after `at` where a string may start; the text's size when there is none.
  size_t candidate(std::string_view text, size_t at) const {
    if (empty()) return text.size();
    if (only_ >= 0) {
      const void* const found = at < text.size() ? std::memchr(text.data() + at, only_, text.size() - at) : nullptr;
      return found == nullptr ? text.size() : static_cast<size_t>(static_cast<const char*>(found) - text.data());
    }
    while (at < text.size() && roots_[static_cast<uint8_t>(text[at])] < 0) ++at;
    return at;
  }

 private:
  struct Node {
    int32_t child, sibling, value;
    uint8_t byte;
  };
  std::vector<Node> nodes_;
  std::vector<int32_t> roots_ = std::vector<int32_t>(256, -1);
  int only_ = -1;  // the first byte of every string, when it is one
};

}  // namespace kvindex
