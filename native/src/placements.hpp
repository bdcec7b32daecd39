// Speculative claims of one model: blocks a router has just sent somewhere. Each is believed until the engine's own
// event confirms it or its time is over, whichever is first. Every question is asked with the time, so a placement
// ends on time even when nobody has taken it out yet.
#pragma once

#include <array>
#include <atomic>
#include <compare>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace kvindex {

class Placements {
 public:
  static constexpr size_t kSlice = 64;  // keys asked about at once: a bit each

  // A stream as the index numbers it. `pod` groups the ranks of one pod.
  struct Place {
    uint32_t pod;
    uint32_t stream;
    auto operator<=>(const Place&) const = default;
  };

  // In blocks. recorded = confirmed + expired + fenced + blocks, at any quiet moment.
  struct Counts {
    uint64_t blocks = 0;
    uint64_t recorded = 0;   // new ones
    uint64_t renewed = 0;    // those that were there already: the later end holds
    uint64_t confirmed = 0;  // the engine's event came in time
    uint64_t expired = 0;    // it did not
    uint64_t fenced = 0;     // the stream was cleared or closed
    uint64_t refused = 0;    // no room
  };

  explicit Placements(uint64_t max_blocks) : max_blocks_(max_blocks) {}

  // Whether there may be any: all that a caller pays while routers place nothing.
  bool any() const { return blocks_.load(std::memory_order_relaxed) != 0; }
  // Nanoseconds of a clock that never goes back.
  uint64_t now() const;
  // Puts this clock forward, for tests of expiry.
  void advance(uint64_t nanoseconds) { ahead_.fetch_add(nanoseconds, std::memory_order_relaxed); }

  // The stream's life; ask it before making sure that the stream is alive, and give it to `record`.
  uint64_t life(Place place) const;
  // False, and nothing recorded, when there is no room for all keys. A `guessed` placement is one whose rank the
  // router did not name. When the stream's life has ended meanwhile the rest counts as fenced.
  bool record(Place place, uint64_t life, const std::vector<uint64_t>& keys, uint64_t ttl, bool guessed);
  // The engine stores this key: its placement is confirmed, and so are guesses at other ranks of the pod.
  void confirm(Place place, uint64_t key);
  // The stream's life ends, and its placements with it.
  void drop(Place place);

  // Which of at most kSlice keys are placed on this stream: bit i for keys[i].
  uint64_t placed(Place place, const uint64_t* keys, size_t count, uint64_t now) const;
  // The streams that have placements, expired ones too.
  std::vector<Place> places() const;

  // Takes out what has expired; no lock is held for longer than a few hundred blocks' work.
  void sweep(uint64_t now);

  Counts counts() const;
  uint64_t bytes() const { return blocks_.load(std::memory_order_relaxed) * kBlockBytes; }

 private:
  struct Entry {
    uint64_t ends : 63;
    uint64_t guessed : 1;
  };
  using Blocks = std::unordered_map<uint64_t, Entry>;
  struct Table {
    Blocks blocks;
    size_t hand = 0;  // the bucket that a record sweeps next
  };
  struct alignas(64) Shard {
    mutable std::mutex mutex;
    std::map<Place, Table> tables;                 // none is empty
    std::unordered_map<uint32_t, uint64_t> lives;  // by stream; absent = 0
  };

  static constexpr size_t kShards = 16;
  static constexpr size_t kBatch = 256;        // blocks recorded under one lock
  static constexpr uint64_t kBlockBytes = 48;  // a map's node and its bucket

  Shard& shard(Place place) { return shards_[place.pod % kShards]; }
  const Shard& shard(Place place) const { return shards_[place.pod % kShards]; }
  // How many of the keys are in the table, expired ones too.
  uint64_t present(Place place, const std::vector<uint64_t>& keys) const;
  void add(Table& table, uint64_t key, Entry entry, uint64_t now);
  // Sweeps so many buckets from `hand` on; true when it has come to the end of the table.
  bool sweep_some(Blocks& blocks, size_t& hand, uint64_t now, size_t buckets);
  void leave(uint64_t count) { blocks_.fetch_sub(count, std::memory_order_relaxed); }

  const uint64_t max_blocks_;
  std::atomic<uint64_t> blocks_{0}, ahead_{0};
  std::atomic<uint64_t> recorded_{0}, renewed_{0}, confirmed_{0}, expired_{0}, fenced_{0}, refused_{0};
  std::array<Shard, kShards> shards_;
};

}  // namespace kvindex
