// Where a text may be cut so that the ids of its parts, one after the other, are the ids of the whole.
#pragma once

#include <cstddef>
#include <string_view>

namespace kvindex {

class TextCuts {
 public:
  virtual ~TextCuts() = default;
  // The first safe cut at or after `from`, which is inside the text; the text's size when there is none.
  virtual size_t next_cut(std::string_view text, size_t from) const = 0;
};

}  // namespace kvindex
