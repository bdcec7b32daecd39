// What one engine rank claims to hold: counted claims by engine hash, and the blocks still waiting for a parent.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "events.hpp"
#include "index.hpp"

namespace kvindex {

struct Applied {
  uint64_t messages = 0, events = 0, blocks_stored = 0, blocks_removed = 0, clears = 0;
  double timestamp = 0;
  std::array<uint64_t, kReasons> reasons{};

  void count(Reason reason, uint64_t times = 1) { reasons[static_cast<size_t>(reason)] += times; }
};

class Stream {
 public:
  Stream(std::shared_ptr<Index> index, uint32_t pod, uint32_t number);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void apply(const uint8_t* data, size_t size, uint32_t rank, Applied& applied);
  uint64_t clear();
  uint64_t close();

  uint64_t claims() const;
  std::array<uint64_t, kMaxTiers> claims_by_tier() const;
  uint64_t orphans() const;
  uint64_t unresolved() const;
  bool closed() const;

  std::unique_lock<std::mutex> read_lock() const { return std::unique_lock(mutex_); }
  // Under read_lock: the lanes that hold this engine hash; returns its key, 0 when unknown.
  uint64_t find(uint64_t hash, std::vector<Holding>& out) const;

 private:
  // Claims of one (engine hash, group, tier). The key is known once some event of the stream has told it.
  struct Claim {
    uint64_t hash = 0;
    uint64_t key = 0;
    uint32_t count = 0;  // 0 = empty place
    uint8_t tier = 0;
    uint8_t group = 0;  // index into groups_
    bool resolved : 1 = false;
    bool wide : 1 = false;  // stands for several canonical blocks, see spans_
    bool part : 1 = false;  // a part of a canonical block, see parts_
  };
  struct Group {
    uint32_t index;  // the engine's group_idx
    uint32_t lane;
    GroupKind kind;
    uint32_t window;
    uint32_t block_size;  // of its first full blocks; 0 = none seen
  };
  // The keys of an engine block of several canonical blocks, but the last, which is the map's key.
  struct Span {
    std::vector<uint64_t> keys;
    uint32_t claims = 0;
  };
  // An engine block smaller than the canonical one: tokens number `place` of `parts` that make it whole.
  struct Part {
    uint64_t parent = 0;  // engine hash of the part before, when place > 0
    uint64_t base = 0;    // key of the canonical block before
    bool first = false;   // the canonical block starts at token 0
    uint32_t place = 0;
    std::vector<uint32_t> tokens;
    std::string extras;
    std::vector<uint64_t> children;
    uint32_t claims = 0;
    // Of the last part only: the whole block's key, and how many of its parts each (group, tier) holds.
    uint64_t key = 0;
    std::unordered_map<uint16_t, uint32_t> held;
  };
  // A stored range whose parent is unknown.
  struct Orphan {
    uint64_t parent;
    std::vector<uint64_t> hashes;
    std::vector<uint32_t> tokens;
    std::vector<std::string> extras;
    uint32_t block_size;
  };

  static constexpr uint64_t kMaxOrphanBlocks = 65536;
  static constexpr uint64_t kMaxUnresolved = 1U << 20;

  void store(const Event& event, Applied& applied);
  void remove(const Event& event, Applied& applied);
  uint64_t drop_all();
  bool group_of(const Event& event, uint8_t& group, Applied& applied);
  uint32_t tier_of(std::string_view medium);

  size_t home(uint64_t hash) const { return (hash * 0x9E3779B97F4A7C15ULL >> 24) & (table_.size() - 1); }
  Claim* find_claim(uint64_t hash, uint8_t group, uint8_t tier);
  bool key_of(uint64_t hash, uint64_t& key) const;
  void add_claim(uint64_t hash, uint8_t group, uint8_t tier, bool known, uint64_t key, Applied& applied);
  void erase_claim(Claim* claim);
  void resize(size_t size);
  void hold(Claim& claim);
  void release(const Claim& claim);
  void hold_key(uint64_t key, uint8_t group, uint8_t tier);
  void release_key(uint64_t key, uint8_t group, uint8_t tier);
  // Makes the key of every block of a range known, one hash after the other; `told` sees each hash and its key.
  struct Range {
    const std::vector<uint64_t>& hashes;
    const std::vector<uint32_t>& tokens;
    const std::vector<std::string>& extras;
    uint32_t block_size;
    bool first;
    uint64_t parent_hash;
    uint64_t parent_key;
  };
  void place(const Range& range);
  void place_parts(const Range& range, uint32_t parts);
  void hold_part(uint64_t hash, uint16_t holder, bool added);
  void forget_part(uint64_t hash);
  bool whole_key(const Part& last, uint64_t& key) const;
  // Gives its key to every unresolved claim of a hash; true when there is any claim of it.
  bool resolve(uint64_t hash, uint64_t key, bool part);
  bool knows(uint64_t hash, uint64_t& key) const;
  uint32_t parts_of(uint32_t block_size) const;
  // `key` is the key of `hash`: unresolved claims of it get it, and orphans waiting for it are adopted.
  void learn(uint64_t hash, uint64_t key);
  void add_orphan(const Event& event, Applied& applied);
  void adopt(uint64_t parent, uint64_t parent_key);
  void drop_orphan(uint64_t id);

  const std::shared_ptr<Index> index_;
  const uint32_t pod_;  // as the index numbers it
  const uint32_t number_;
  mutable std::mutex mutex_;
  bool closed_ = false;
  std::vector<Claim> table_;
  size_t used_ = 0;
  uint64_t unresolved_ = 0;
  std::array<uint64_t, kMaxTiers> by_tier_{};
  std::vector<Group> groups_;
  // Keys that several engine hashes of one (group, tier) stand for, with how many do.
  std::unordered_map<uint64_t, std::unordered_map<uint16_t, uint32_t>> shared_;
  std::unordered_map<uint64_t, Span> spans_;
  std::unordered_map<uint64_t, Part> parts_;             // by engine hash
  std::unordered_map<uint64_t, Orphan> orphans_;         // by id
  std::unordered_multimap<uint64_t, uint64_t> waiting_;  // parent hash -> id
  std::deque<uint64_t> orphan_order_;
  uint64_t next_orphan_ = 0;
  uint64_t orphan_blocks_ = 0;
  std::vector<std::pair<uint64_t, uint64_t>> known_;  // parents whose orphans are to be placed
  bool adopting_ = false;
  // Media names as sent -> tier bit, so that lower-casing happens once.
  std::vector<std::pair<std::string, uint32_t>> tier_names_;
  Event event_;
};

}  // namespace kvindex
