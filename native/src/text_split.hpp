// One pass of a pre-tokenizer: a text falls apart into the matches of a pattern and what lies between them.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "text_classes.hpp"

namespace kvindex {

// The pattern is a table of states over classes of characters, made by kvindex_server/tokenize/pattern.py. Walking
// it match by match costs several wrongly guessed branches a word. So there is a second table of the same states, for
// ASCII, in which the end of one match and the first character of the next are one step: the walk does not branch
// where words end, only where a match has to be taken back, or where the character is not ASCII. A third table does two
// such steps at once, as each waits for the one before.
class Splitter {
 public:
  // `table`: rows of states, a column per class and one for the end of the text. invalid_argument when malformed.
  Splitter(const std::vector<uint16_t>& table, const CharClasses& classes, size_t class_count);

  // The ends of the pieces of text[begin, end), in order, as many as fit into `room` (at least kLeastRoom). `begin`
  // moves to the last of them. Before `end` is reached there is at least one.
  size_t split(const CharClasses& classes, std::string_view text, size_t& begin, size_t end, size_t* ends,
               size_t room) const;

  static constexpr size_t kLeastRoom = 8;

 private:
  // The end of the match that starts at `at`; `at` when there is none.
  size_t match_at(const CharClasses& classes, std::string_view text, size_t at, size_t end) const;

  std::vector<uint32_t> steps_;  // the next state's row, and whether the match may end before the character
  std::vector<uint32_t> leaps_;  // the same for ASCII, on into the next match; 0 where that is not so simple
  std::vector<uint32_t> pairs_;  // two leaps at once; 0 where one of them is 0, none when the table would be large
  uint8_t column_[256];          // of a byte, in `leaps_`; of what is not ASCII the last, which is all 0
  uint32_t pair_row_[256];       // the same of the first byte of two, times the number of columns
  uint8_t starts_[256];          // a match may start with this byte
  uint32_t start_ = 0, end_column_ = 0, columns_ = 0;
};

}  // namespace kvindex
