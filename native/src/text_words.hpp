// Known words and their token ids: a bounded table of fixed size, written over when full.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "xxh3.hpp"
#include "zeroed.hpp"

namespace kvindex {

// Not synchronised. `want`, then `find`; `insert` may displace another word of
// the same set.
class Words {
 public:
  // `slots` short words, a power of two; a sixteenth as many long ones.
  explicit Words(size_t slots)
      : short_mask_(slots / kWays - 1), long_mask_(slots / 16 / kWays - 1), short_(slots), long_(slots / 16) {}

  // A word on its way to be looked up: where to look is known, and being fetched, before it is needed.
  struct Wanted {
    std::string_view word;
    uint64_t lo, hi;  // of a short word
    const void* set;
  };

  // `readable` bytes from `word` on may be read.
  [[gnu::always_inline]] void want(std::string_view word, size_t readable, Wanted& wanted) const {
    wanted.word = word;
    if (word.size() <= kShortText) {
      const Name name = name_of(word, readable);
      const Short* const set = short_.get() + short_set(name);
      __builtin_prefetch(set);
      __builtin_prefetch(set + kWays / 2);  // the other line
      wanted.lo = name.lo;
      wanted.hi = name.hi;
      wanted.set = set;
    } else if (word.size() <= kLongText) {
      wanted.set = long_.get() + long_set(word);
      __builtin_prefetch(wanted.set);
    }
  }

  // Writes the ids of a known word to `ids`, where there is place for kRoom, and returns how many; 0 = not known.
  size_t find(const Wanted& wanted, uint32_t* ids) const {
    const std::string_view word = wanted.word;
    if (word.size() <= kShortText) {
      const auto* set = static_cast<const Short*>(wanted.set);
      // Compared without a branch: which of the four it is cannot be guessed.
      uint32_t ways = 0;
      for (size_t way = 0; way < kWays; ++way)
        ways |= static_cast<uint32_t>(((set[way].name.lo ^ wanted.lo) | (set[way].name.hi ^ wanted.hi)) == 0) << way;
      if (ways != 0) {
        const Short& found = set[std::countr_zero(ways)];
        std::memcpy(ids, found.ids, sizeof found.ids);
        return found.count;
      }
    }
    if (word.size() > kLongText) return 0;
    // A short word of many tokens lies among the long ones.
    const Long* set = word.size() <= kShortText ? long_.get() + long_set(word) : static_cast<const Long*>(wanted.set);
    for (size_t way = 0; way < kWays; ++way)
      if (set[way].size == word.size() && std::memcmp(set[way].text, word.data(), word.size()) == 0) {
        std::memcpy(ids, set[way].ids, set[way].count * size_t{4});
        return set[way].count;
      }
    return 0;
  }

  void insert(std::string_view word, const uint32_t* ids, size_t count) {
    if (word.empty()) return;
    ++turn_;
    if (word.size() <= kShortText && count <= kShortIds) {
      const Name name = name_of(word, word.size());
      Short* set = short_.get() + short_set(name);
      Short& slot = *free_of(set, [&](const Short& each) {
        return each.count == 0 || (each.name.lo == name.lo && each.name.hi == name.hi);
      });
      slot.name = name;
      slot.count = static_cast<uint32_t>(count);
      std::memcpy(slot.ids, ids, count * 4);
    } else if (word.size() <= kLongText && count <= kLongIds) {
      Long* set = long_.get() + long_set(word);
      Long& slot = *free_of(set, [&](const Long& each) {
        return each.count == 0 || (each.size == word.size() && std::memcmp(each.text, word.data(), each.size) == 0);
      });
      slot.size = static_cast<uint8_t>(word.size());
      slot.count = static_cast<uint8_t>(count);
      std::memcpy(slot.text, word.data(), word.size());
      std::memcpy(slot.ids, ids, count * 4);
    }
  }

 private:
  static constexpr size_t kWays = 4, kShortText = 15, kShortIds = 3, kLongText = 118, kLongIds = 34;

 public:
  static constexpr size_t kRoom = kLongIds;

 private:
  // The word itself, zero padded, its length in the last byte.
  struct Name {
    uint64_t lo, hi;
  };
  struct Short {
    Name name;
    uint32_t ids[kShortIds];
    uint32_t count;
  };
  struct Long {
    uint8_t size, count;
    char text[kLongText];
    uint32_t ids[kLongIds];
  };
  // Bits of the first `size` bytes of sixteen; a table, as the branches would be guessed wrong.
  static constexpr auto kBits = [] {
    std::array<Name, kShortText + 1> bits{};
    for (size_t size = 0; size <= kShortText; ++size) {
      bits[size].lo = size >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * size)) - 1;
      bits[size].hi = size <= 8 ? 0 : (uint64_t{1} << (8 * (size - 8))) - 1;
    }
    return bits;
  }();

  [[gnu::always_inline]] static Name name_of(std::string_view word, size_t readable) {
    uint64_t part[2] = {0, 0};
    if (readable >= sizeof part)
      std::memcpy(part, word.data(), sizeof part);
    else
      std::memcpy(part, word.data(), word.size());
    const Name& bits = kBits[word.size()];
    return {part[0] & bits.lo, (part[1] & bits.hi) | static_cast<uint64_t>(word.size()) << 56};
  }
  size_t short_set(const Name& name) const {
    return (xxh3_detail::mul_fold(name.lo ^ 0x9E3779B97F4A7C15ULL, name.hi ^ 0xD6E8FEB86659FD93ULL) & short_mask_) *
           kWays;
  }
  size_t long_set(std::string_view word) const { return (xxh3_64(word.data(), word.size(), 0) & long_mask_) * kWays; }

  template <typename Slot, typename Fits>
  Slot* free_of(Slot* set, Fits fits) const {
    for (size_t way = 0; way < kWays; ++way)
      if (fits(set[way])) return set + way;
    return set + turn_ % kWays;
  }

  size_t short_mask_, long_mask_;
  uint64_t turn_ = 0;
  Zeroed<Short> short_;
  Zeroed<Long> long_;
};

}  // namespace kvindex
