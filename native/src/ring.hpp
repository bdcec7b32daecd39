// The last so many of something, in order: starts small and doubles up to its limit, both powers of two.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "memory.hpp"

namespace kvindex {

template <typename T>
class Ring {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Ring(std::atomic<int64_t>& bytes, uint64_t limit) : bytes_(bytes), limit_(limit) {}
  ~Ring() { reset(); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Positions count from the first one ever; [begin, end) are kept.
  uint64_t begin() const { return begin_; }
  uint64_t end() const { return end_; }
  uint64_t size() const { return end_ - begin_; }
  const T& at(uint64_t position) const { return slots_[position & (size_ - 1)]; }
  T& at(uint64_t position) { return slots_[position & (size_ - 1)]; }

  void prefetch(uint64_t position) const { __builtin_prefetch(&slots_[position & (size_ - 1)]); }

  bool full() const { return end_ - begin_ == size_; }
  // Makes room for more; false when it is as large as it may be, and something has to go first.
  bool grow() {
    const uint64_t larger = size_ == 0 ? (limit_ < kLeast ? limit_ : kLeast) : size_ * 2;
    if (larger > limit_ || larger == 0) return false;
    T* made = static_cast<T*>(take_memory(larger * sizeof(T), false));
    for (uint64_t at = begin_; at < end_; ++at) made[at & (larger - 1)] = slots_[at & (size_ - 1)];
    account(larger, size_);
    give_memory(slots_, size_ * sizeof(T));
    slots_ = made;
    size_ = larger;
    return true;
  }
  // There must be room. The memory ahead is asked for early: it was last written a whole round ago.
  void push(const T& value) {
    if ((end_ & (kPerLine - 1)) == 0) __builtin_prefetch(&slots_[(end_ + kAhead) & (size_ - 1)], 1);
    slots_[end_++ & (size_ - 1)] = value;
  }
  // Those before this position go.
  void drop_before(uint64_t position) { begin_ = position; }

  // Forgets all and gives its memory back.
  void reset() {
    account(0, size_);
    give_memory(slots_, size_ * sizeof(T));
    slots_ = nullptr;
    size_ = begin_ = end_ = 0;
  }

 private:
  static constexpr uint64_t kLeast = 64;
  static constexpr uint64_t kPerLine = sizeof(T) < 64 ? 64 / sizeof(T) : 1, kAhead = 4 * kPerLine;

  void account(uint64_t now, uint64_t before) {
    const auto taken = [](uint64_t slots) {
      return slots == 0 ? int64_t{0} : static_cast<int64_t>(footprint(slots * sizeof(T)));
    };
    bytes_.fetch_add(taken(now) - taken(before), std::memory_order_relaxed);
  }

  std::atomic<int64_t>& bytes_;
  const uint64_t limit_;
  T* slots_ = nullptr;
  uint64_t size_ = 0, begin_ = 0, end_ = 0;
};

}  // namespace kvindex
