// The order of one event stream: what a message's sequence number means after those applied before it.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

namespace kvindex {

enum class Outcome : uint8_t { kFirst, kNext, kDuplicate, kGap, kRestart };

// Judges sequence numbers. The caller applies what it is told to and reports it with `applied`.
class Order {
 public:
  // Digests kept of the last applied messages, to tell a duplicate from a restarted engine.
  static constexpr uint64_t kRemembered = 8192;

  // To be read from any thread; everything else belongs to one.
  std::optional<uint64_t> last() const {
    const uint64_t last = last_.load(std::memory_order_acquire);
    return last == kNone ? std::nullopt : std::optional(last);
  }

  // Of the last applied message; 0 before any.
  uint64_t last_digest() const { return begun() ? ring_[last_ % ring_.size()].digest : 0; }

  // `digest` is a hash of the payload, which carries the engine's time.
  Outcome judge(uint64_t sequence, uint64_t digest) const {
    if (!begun()) return Outcome::kFirst;
    if (sequence == last_ + 1) return Outcome::kNext;
    if (sequence > last_) return Outcome::kGap;
    // An engine counts from 0 again when it restarts, and says nothing else about it. A number already passed is
    // a duplicate only if it is the very message seen under it; when that is not remembered any more, a restart
    // is assumed: dropping true claims costs a replay, keeping dead ones is wrong.
    return remembers(sequence) && ring_[sequence % ring_.size()].digest == digest ? Outcome::kDuplicate
                                                                                  : Outcome::kRestart;
  }

  bool is_next(uint64_t sequence) const { return begun() && sequence == last_ + 1; }

  bool remembers(uint64_t sequence) const {
    return !ring_.empty() && ring_[sequence % ring_.size()].sequence == sequence;
  }

  // The message has been applied; it is the last one now.
  void applied(uint64_t sequence, uint64_t digest) {
    if (ring_.empty()) ring_.resize(kFirst);
    while (ring_.size() < kRemembered && is_taken(sequence)) grow();
    ring_[sequence % ring_.size()] = {sequence, digest};
    last_.store(sequence, std::memory_order_release);
  }

  // Forget the old life.
  void restarted() {
    last_.store(kNone, std::memory_order_release);
    ring_ = {};
  }

 private:
  struct Seen {
    uint64_t sequence = UINT64_MAX;
    uint64_t digest = 0;
  };

  // All of it would be 128 KiB, which a stream of few messages need not have.
  static constexpr uint64_t kFirst = 64;

  bool is_taken(uint64_t sequence) const {
    const uint64_t other = ring_[sequence % ring_.size()].sequence;
    return other != UINT64_MAX && other != sequence;
  }
  // Two that stand apart now do so in a ring twice as large too: nothing is forgotten.
  void grow() {
    std::vector<Seen> larger(ring_.size() * 2);
    for (const Seen& each : ring_)
      if (each.sequence != UINT64_MAX) larger[each.sequence % larger.size()] = each;
    ring_.swap(larger);
  }

  static constexpr uint64_t kNone = UINT64_MAX;  // marks the end of a replay, so no message has it
  bool begun() const { return last_ != kNone; }

  std::atomic<uint64_t> last_{kNone};
  std::vector<Seen> ring_;
};

}  // namespace kvindex
