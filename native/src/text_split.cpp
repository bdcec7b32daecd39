#include "text_split.hpp"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

namespace kvindex {

namespace {

constexpr uint16_t kPlanMatch = 0x8000;
constexpr uint32_t kCut = 0x80000000;    // one piece ends before the character, the next starts with it
constexpr uint32_t kMatch = 0x40000000;  // a match may end before the character
constexpr uint32_t kRow = kMatch - 1;
constexpr uint32_t kFirst = 2;  // bits to the right, in a pair: cut and match of the first character
constexpr uint32_t kPairRow = (kMatch >> kFirst) - 1;
constexpr size_t kMostPairs = 1 << 20;

}  // namespace

CharClasses::CharClasses(const std::string& classes) {
  std::map<std::string, uint16_t> known;
  for (size_t page = 0; page < 0x1100; ++page) {
    const std::string content = classes.substr(page * 256, 256);
    const auto [found, is_new] = known.try_emplace(content, static_cast<uint16_t>(known.size()));
    if (is_new) pages_.insert(pages_.end(), content.begin(), content.end());
    page_of_.push_back(found->second);
  }
}

Splitter::Splitter(const std::vector<uint16_t>& table, const CharClasses& classes, size_t class_count)
    : end_column_(static_cast<uint32_t>(class_count)), columns_(static_cast<uint32_t>(class_count + 1)) {
  const uint32_t columns = columns_;
  if (table.size() < 2 * columns || table.size() % columns != 0)
    throw std::invalid_argument("malformed table of states");
  for (const uint16_t entry : table) {
    const uint32_t state = entry & static_cast<uint16_t>(~kPlanMatch);
    if (state >= table.size() / columns) throw std::invalid_argument("a state out of range");
    // The row of the next state, so that a step needs no multiplication.
    steps_.push_back(state * columns | ((entry & kPlanMatch) != 0 ? kMatch : 0));
  }
  start_ = columns;
  for (size_t of = 0; of < columns; ++of)
    if ((steps_[start_ + of] & kMatch) != 0) throw std::invalid_argument("a match of nothing");
  for (size_t byte = 0; byte < 256; ++byte) {
    size_t size = 0;
    const char ascii = static_cast<char>(byte);
    column_[byte] = static_cast<uint8_t>(byte < 128 ? classes.at(&ascii, size) : class_count);
    starts_[byte] = byte >= 128 || steps_[start_ + column_[byte]] != 0;
  }
  leaps_ = steps_;
  for (size_t row = 0; row < leaps_.size(); row += columns) {
    leaps_[row + class_count] = 0;
    for (size_t of = 0; of < class_count; ++of)
      if ((leaps_[row + of] & kRow) == 0) {
        const uint32_t next = steps_[start_ + of];
        leaps_[row + of] = (leaps_[row + of] & kMatch) != 0 && next != 0 ? next | kMatch | kCut : 0;
      }
  }
  for (size_t byte = 0; byte < 256; ++byte) pair_row_[byte] = column_[byte] * columns;
  if (leaps_.size() * columns > kMostPairs) return;
  for (size_t row = 0; row < leaps_.size(); row += columns)
    for (size_t first = 0; first < columns; ++first)
      for (size_t second = 0; second < columns; ++second) {
        uint32_t one = leaps_[row + first], two = one == 0 ? 0 : leaps_[(one & kRow) + second];
        // The match fails at the second character, and ended before the first: as in spaces before a word.
        if (two == 0 && (one & (kCut | kMatch)) == kMatch && second != class_count &&
            steps_[(one & kRow) + second] == 0 && steps_[start_ + first] != 0) {
          one = steps_[start_ + first] | kCut | kMatch;
          two = leaps_[(one & kRow) + second];
        }
        pairs_.push_back(two == 0 ? 0 : (one & ~kRow) >> kFirst | (two & ~kRow) | (two & kRow) * columns);
      }
}

size_t Splitter::match_at(const CharClasses& classes, std::string_view text, size_t at, size_t end) const {
  size_t matched = at, size = 0, row = start_;
  for (;;) {
    const uint32_t entry =
        at < end ? steps_[row + classes.at(text.data() + at, size)] : steps_[row + end_column_] & kMatch;
    if ((entry & kMatch) != 0) matched = at;
    row = entry & kRow;
    if (row == 0) return matched;
    at += size;
  }
}

size_t Splitter::split(const CharClasses& classes, std::string_view text, size_t& begin, size_t end, size_t* ends,
                       size_t room) const {
  const uint32_t* const leaps = leaps_.data();
  const uint32_t* const pairs = pairs_.data();
  const char* const data = text.data();
  size_t count = 0;
  size_t at = begin, matched = begin;
  uint32_t row = start_;
  while (begin < end) {
    // At most one end a step, and two behind the loop.
    if (room - count < 3) return count;
    const size_t stop = std::min(end, at + (room - count - 2));
    const size_t before = count;
    if (!pairs_.empty()) {
      uint32_t pair_row = row * columns_;
      for (; at + 1 < stop; at += 2) {
        const uint32_t pair =
            pairs[pair_row + pair_row_[static_cast<uint8_t>(data[at])] + column_[static_cast<uint8_t>(data[at + 1])]];
        if (pair == 0) break;
        ends[count] = at;
        count += (pair & (kCut >> kFirst)) != 0;
        ends[count] = at + 1;
        count += pair >> 31;
        matched = (pair & (kMatch >> kFirst)) != 0 ? at : matched;
        matched = (pair & kMatch) != 0 ? at + 1 : matched;
        pair_row = pair & kPairRow;
      }
      row = pair_row / columns_;
    }
    for (; at < stop; ++at) {
      const uint32_t leap = leaps[row + column_[static_cast<uint8_t>(data[at])]];
      if (leap == 0) break;
      ends[count] = at;
      count += leap >> 31;
      matched = (leap & kMatch) != 0 ? at : matched;
      row = leap & kRow;
    }
    if (count > before) begin = ends[count - 1];
    if (at == stop && stop < end) continue;  // no room, or one long piece
    size_t size = 0;
    const uint32_t step = at < end ? steps_[row + classes.at(data + at, size)] : steps_[row + end_column_] & kMatch;
    if ((step & kMatch) != 0) matched = at;
    row = step & kRow;
    if (row != 0) {
      at += size;
      continue;
    }
    if (matched == begin) {
      // No match here: up to the next one it is a piece of its own.
      (void)point_at(data + begin, size);
      for (at = begin + size; at < end; at += size) {
        size = 1;
        if (starts_[static_cast<uint8_t>(data[at])] == 0) continue;
        matched = match_at(classes, text, at, end);
        if (matched > at) break;
        (void)point_at(data + at, size);
      }
      ends[count++] = at;
      if (at == end) matched = end;
    }
    if (count == 0 || ends[count - 1] != matched) ends[count++] = matched;
    begin = at = matched;
    row = start_;
  }
  return count;
}

}  // namespace kvindex
