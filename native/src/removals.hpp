// What a stream held and holds no longer: the last so many keys, how they left and by which message.
//
// Keys stand in a ring in the order in which they left, 8 bytes each; what many have in common, the message and the
// (group, tier), stands once per run of them. To leave a trace costs a store or two; to find one reads the whole ring,
// which is for people.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <vector>

#include "ring.hpp"

namespace kvindex {

enum class Left : uint8_t {
  kRemoved,    // by a BlockRemoved of the engine
  kCleared,    // by an AllBlocksCleared of the engine
  kRestarted,  // dropped here: the engine was found to be another one
  kRequested,  // dropped here: someone asked for it
  kRebuilt,    // dropped here, to be built anew from a replay or a sibling
  kDoubted,    // dropped here after a hole, or its key was told without extra keys; the engine may hold it still
};

class Removals {
 public:
  static constexpr uint64_t kNoSequence = UINT64_MAX;
  // Seconds since 1970: of the engine's clock where a message is meant, of this host's where claims were dropped here;
  // 0 = not told.
  struct Moment {
    uint64_t sequence = kNoSequence;
    double time = 0;
  };
  struct Found {
    uint32_t group;  // as the engine numbers it
    uint8_t tier;
    Left left;
    bool earlier;  // in a life of the stream before its last restart
    Moment at;
  };
  // From where on every block that left is remembered.
  enum class Reach : uint8_t {
    kOff,       // none is
    kNothing,   // no message has been applied yet
    kStart,     // from the first message of this life, which is `from`
    kRestored,  // from the first message after a saved state was restored
    kFull,      // older ones had to give way: from behind `from`
  };
  struct Memory {
    Reach reach = Reach::kNothing;
    Moment from;
    bool cleared = false;  // the engine has cleared everything in this life, last at `cleared_at`
    Moment cleared_at;
    uint64_t unnamed = 0;  // blocks of this life that left without anyone having told their tokens
  };

  // `capacity` keys at most, rounded up to a power of two; 0 = off.
  Removals(std::atomic<int64_t>& bytes, uint64_t capacity)
      : capacity_(capacity == 0 ? 0 : std::bit_ceil(capacity)),
        keys_(bytes, capacity_),
        runs_(bytes, std::max<uint64_t>(capacity_ / 8, std::min<uint64_t>(capacity_, 1))) {}

  uint64_t capacity() const { return capacity_; }

  // A message is about to be applied.
  void message(uint64_t sequence, double time) {
    now_ = {sequence, time};
    if (begins_) begin(now_);
  }
  // Claims are about to be dropped here, at this time of the host's clock.
  void drop(double time) { now_.time = time; }

  // What follows leaves from here; `close` when that is all.
  void open(uint32_t group, uint8_t tier, Left left) {
    open_ = {now_.sequence, now_.time, keys_.end(), static_cast<uint16_t>(group), tier, left, false};
  }
  void note(uint64_t key) {
    if (keys_.full() && !make_room()) return;
    keys_.push(key);
  }
  void close() {
    if (keys_.end() != open_.first) keep_open();
  }
  // A block left whose key nobody knows.
  void unnamed() { ++memory_.unnamed; }
  void cleared() {
    memory_.cleared = true;
    memory_.cleared_at = now_;
  }
  // Not all of what leaves now is noted.
  void lose() { forgot(now_, false); }

  // Another life begins with the next message.
  void restart();
  // A saved state was restored: what left before is not known.
  void restored();
  // All of it goes, with its memory.
  void reset();

  Memory memory() const {
    Memory told = memory_;
    if (capacity_ == 0) told.reach = Reach::kOff;
    return told;
  }
  // The last time the key left each (group, tier), latest first.
  void find(uint64_t key, std::vector<Found>& out) const;

 private:
  struct Run {
    uint64_t sequence;
    double time;
    uint64_t first;  // position of its first key
    uint16_t group;
    uint8_t tier;
    Left left;
    bool earlier;
  };

  bool make_room();
  void keep_open();
  void drop_oldest_run();
  void begin(const Moment& at);
  void forgot(const Moment& last, bool earlier);

  const uint64_t capacity_;
  Ring<uint64_t> keys_;
  Ring<Run> runs_;
  Run open_{};
  Moment now_;
  Memory memory_;
  bool begins_ = true;
  Reach begins_as_ = Reach::kStart;
};

}  // namespace kvindex
