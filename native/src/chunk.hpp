// 64 blocks side by side, normally of one chain, with one bit mask per holder.
//
// What each party may do:
// - Writers change a chunk under its lock, but for a slot's `live` bit, which is set under the lock of its key's shard.
// - Readers take no lock: they read `version`, then keys and masks, then `version` again. It counts everything that
//   takes away or renames, before that is visible (and what is no longer live, once more behind it), so an unchanged
//   version means that all they saw was true at once. Before a slot or an inline holder gets another name it is
//   emptied, so an old name never meets new bits.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>

#include "epoch.hpp"
#include "spin_lock.hpp"

namespace kvindex {

using Node = uint32_t;  // chunk number * 64 + slot; 0 = none

inline constexpr uint32_t kSlots = 64;
inline constexpr uint64_t bits_from(uint32_t slot, uint32_t count) {
  return (count >= kSlots ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << slot;
}

// Whose bits: a lane on one tier.
using HolderId = uint32_t;
inline constexpr HolderId holder_id(uint32_t lane, uint32_t tier) { return lane << 3 | tier; }
inline constexpr uint32_t lane_of(HolderId holder) { return holder >> 3; }
inline constexpr uint32_t tier_of(HolderId holder) { return holder & 7; }

// Two or more holders of a chunk. Places are only ever added; a holder without bits keeps its place until the array is
// written anew.
class Holders {
 public:
  static Holders* make(uint32_t capacity);
  static size_t bytes(uint32_t capacity);

  uint32_t size() const { return size_.load(std::memory_order_acquire); }
  uint32_t capacity() const { return capacity_; }
  HolderId holder(uint32_t i) const { return holders()[i]; }
  std::atomic<uint64_t>& mask(uint32_t i) const { return masks()[i]; }
  void add(HolderId holder, uint64_t mask);
  // Place of a holder, size() when it has none.
  uint32_t place(HolderId holder) const;

 private:
  explicit Holders(uint32_t capacity) : capacity_(capacity) {}
  std::atomic<uint64_t>* masks() const {
    return reinterpret_cast<std::atomic<uint64_t>*>(const_cast<Holders*>(this) + 1);
  }
  HolderId* holders() const { return reinterpret_cast<HolderId*>(masks() + capacity_); }

  const uint32_t capacity_;
  std::atomic<uint32_t> size_{0};
};

struct Chunk {
  enum class State : uint8_t { kFree, kOpen, kFull, kPartial };  // see ChunkPool

  SpinLock lock;
  std::atomic<uint32_t> version;
  std::atomic<uint64_t> live;     // slots whose block is in the key table
  uint64_t taken;                 // slots in use, live or about to be
  std::atomic<uint64_t> holders;  // 0 none; odd: one holder, its bits in `mask`; even: Holders*
  std::atomic<uint64_t> mask;
  std::atomic<uint32_t> next;  // the chunk where the chain went on: a hint, to be checked by key
  std::atomic<State> state;
  std::atomic<uint64_t> keys[kSlots];  // 0 = free

  bool has(uint32_t slot, uint64_t key) const {
    return keys[slot].load(std::memory_order_relaxed) == key && (live.load(std::memory_order_acquire) >> slot & 1) != 0;
  }
  // How many slots from `slot` on are live and have these keys.
  uint32_t run(uint32_t slot, const uint64_t* wanted, size_t count) const {
    const uint32_t most = static_cast<uint32_t>(count < kSlots - slot ? count : kSlots - slot);
    const auto alive = static_cast<uint32_t>(std::countr_one(live.load(std::memory_order_acquire) >> slot));
    const uint32_t end = most < alive ? most : alive;
    uint32_t length = 0;
    while (length < end && keys[slot + length].load(std::memory_order_relaxed) == wanted[length]) ++length;
    return length;
  }
  // Calls visit(holder, mask) for every holder; masks may be 0.
  template <typename Visit>
  void each_holder(Visit visit) const {
    const uint64_t found = holders.load();
    if (found == 0) return;
    if (found & 1) {
      visit(static_cast<HolderId>(found >> 1), mask.load(std::memory_order_acquire));
      return;
    }
    const auto* many = reinterpret_cast<const Holders*>(found);
    const uint32_t size = many->size();
    for (uint32_t i = 0; i < size; ++i) visit(many->holder(i), many->mask(i).load(std::memory_order_acquire));
  }

  // --- under the lock ---
  // Returns the bits that are new. `bytes` counts what holder arrays take.
  uint64_t add(HolderId holder, uint64_t bits, Epoch& epoch, std::atomic<int64_t>& bytes);
  // Returns the bits that were there.
  uint64_t remove(HolderId holder, uint64_t bits, Epoch& epoch, std::atomic<int64_t>& bytes);
  uint64_t held() const {
    uint64_t all = 0;
    each_holder([&](HolderId, uint64_t each) { all |= each; });
    return all;
  }
  void name(uint32_t slot, const uint64_t* wanted, uint32_t count);
  // Takes blocks that nobody holds out of sight; their slots stay in use.
  void bury(uint64_t bits);
  void unname(uint64_t bits);

 private:
  // What is taken away or renamed afterwards is stored with release, so whoever sees that sees this too.
  void change() { version.store(version.load(std::memory_order_relaxed) + 1, std::memory_order_release); }
  void replace(Holders* old, Holders* made, Epoch& epoch, std::atomic<int64_t>& bytes);
};

}  // namespace kvindex
