// Known words and their token ids: a bounded table of fixed size, written over when full.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "xxh3.hpp"

namespace kvindex {

// Not synchronised. `find` appends the ids of a known word; `insert` may displace another word of the same set.
class Words {
 public:
  // `slots` short words, a power of two; an eighth as many long ones.
  explicit Words(size_t slots)
      : short_mask_(slots / kWays - 1),
        long_mask_(slots / 8 / kWays - 1),
        short_(static_cast<Short*>(std::calloc(slots, sizeof(Short)))),
        long_(static_cast<Long*>(std::calloc(slots / 8, sizeof(Long)))) {
    if (!short_ || !long_) throw std::bad_alloc();
  }

  static size_t bytes(size_t slots) { return slots * sizeof(Short) + slots / 8 * sizeof(Long); }

  // `readable` bytes from `word` on may be read.
  bool find(std::string_view word, size_t readable, std::vector<uint32_t>& ids) const {
    if (word.size() <= kShortText) {
      const Name name = name_of(word, readable);
      const Short* set = short_.get() + short_set(name);
      for (size_t way = 0; way < kWays; ++way)
        if (set[way].name.lo == name.lo && set[way].name.hi == name.hi) {
          if (set[way].count == 1)
            ids.push_back(set[way].ids[0]);
          else
            ids.insert(ids.end(), set[way].ids, set[way].ids + set[way].count);
          return true;
        }
      return false;
    }
    if (word.size() > kLongText) return false;
    const Long* set = long_.get() + long_set(word);
    for (size_t way = 0; way < kWays; ++way)
      if (set[way].size == word.size() && std::memcmp(set[way].text, word.data(), word.size()) == 0) {
        ids.insert(ids.end(), set[way].ids, set[way].ids + set[way].count);
        return true;
      }
    return false;
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
    } else if (word.size() > kShortText && word.size() <= kLongText && count <= kLongIds) {
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
  static constexpr size_t kWays = 4, kShortText = 15, kShortIds = 3, kLongText = 62, kLongIds = 16;

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
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  static Name name_of(std::string_view word, size_t readable) {
    uint64_t part[2] = {0, 0};
    const size_t size = word.size();
    if (readable >= 16) {
      std::memcpy(part, word.data(), 16);
      if (size < 8) {
        part[0] &= ~uint64_t{0} >> (64 - 8 * size);
        part[1] = 0;
      } else {
        part[1] = size == 8 ? 0 : part[1] & (~uint64_t{0} >> (128 - 8 * size));
      }
    } else {
      std::memcpy(part, word.data(), size);
    }
    return {part[0], part[1] | static_cast<uint64_t>(size) << 56};
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
  std::unique_ptr<Short, Free> short_;  // pages are taken as they are written
  std::unique_ptr<Long, Free> long_;
};

}  // namespace kvindex
