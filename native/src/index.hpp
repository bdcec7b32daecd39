// The sharded block index of one model: which lane holds which key on which tiers.
//
// A lane is one KV-cache group of one stream in one life of its engine. Dropping a stream's claims gives it new
// lanes at once, so that nothing old is ever answered, and takes the old claims out afterwards.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "keys.hpp"
#include "placements.hpp"

namespace kvindex {

inline constexpr uint32_t kMaxTiers = 8;
inline constexpr uint32_t kMaxGroups = 32;

enum class GroupKind : uint8_t { kFull, kSliding, kMamba, kUnknown };

struct Lane {
  uint32_t stream = 0;  // index into Topology::streams
  uint32_t group = 0;
  uint32_t window = 0;  // tokens, for kSliding
  GroupKind kind = GroupKind::kFull;
  bool alive = false;
};

struct StreamPlace {
  uint32_t pod = 0;  // index into Topology::pods
  uint32_t rank = 0;
  bool alive = false;
  std::vector<uint32_t> lanes;
};

struct PodPlace {
  std::string name;
  std::vector<uint32_t> streams;
};

// Who is who, as one immutable value: a query works on the one it started with.
struct Topology {
  std::vector<PodPlace> pods;
  std::vector<StreamPlace> streams;
  std::vector<Lane> lanes;  // lane 0 is never used
  std::unordered_map<std::string, uint32_t> pod_of_name;
  mutable std::shared_ptr<const Topology> successor;  // written once, by the one who replaces this value
};

struct Match {
  std::string pod;
  uint32_t rank = 0;
  uint32_t blocks = 0;
  double score = 0;
  std::array<uint32_t, kMaxTiers> tier_blocks{};
  uint32_t speculative = 0;  // blocks by which placements lengthen the match; in `score`, not in the others
};

struct Holding {
  uint32_t lane;
  uint8_t tiers;  // bit per tier
};

struct Holder {
  std::string pod;
  uint32_t rank;
  uint32_t tier;
  uint32_t group;
  bool speculative = false;
  auto operator<=>(const Holder&) const = default;
};

// What became of a placement.
struct Placed {
  enum class Outcome : uint8_t { kRecorded, kNoPod, kNoRank, kNoRoom };
  Outcome outcome = Outcome::kRecorded;
  uint32_t rank = 0;  // the rank it was recorded at
  size_t held = 0;    // blocks that need none: the rank holds them
};

using Pods = std::vector<std::string>;

class Stream;

class Index : public std::enable_shared_from_this<Index> {
 public:
  Index(uint32_t block_size, uint64_t seed, uint64_t max_claims, uint64_t max_placements);
  ~Index();
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  uint32_t block_size() const { return block_size_.load(std::memory_order_relaxed); }
  uint64_t seed() const { return seed_; }
  uint64_t blocks() const { return blocks_.load(std::memory_order_relaxed); }
  uint64_t claims() const { return claims_.load(std::memory_order_relaxed); }
  uint64_t bytes() const;
  std::vector<std::string> tiers() const;

  std::shared_ptr<Stream> add_stream(const std::string& pod, uint32_t rank);

  // A router has sent a prompt to this pod: its blocks count as held for `ttl` nanoseconds, or until the engine's
  // events say so. `rank` < 0: the router does not know it; the rank that matches best is guessed.
  Placed place(const std::string& pod, int64_t rank, const uint64_t* keys, size_t count, uint64_t ttl);
  Placements& placements() { return placements_; }
  const Placements& placements() const { return placements_; }

  // Pods with a match > 0 or placed blocks, best rank of each; `pods` empty = all. `weights` by tier bit.
  std::vector<Match> score(const uint64_t* keys, size_t count, const Pods& pods,
                           const std::vector<double>& weights) const;
  // The same from tokens; hashing stops where the last match ends.
  std::vector<Match> score_tokens(const uint32_t* tokens, size_t count, const Pods& pods,
                                  const std::vector<double>& weights, const QueryExtras& extras) const;
  std::vector<std::vector<Holder>> holders(const uint64_t* keys, size_t count, const Pods& pods) const;
  // By engine hash: (key or 0, holders).
  std::vector<std::pair<uint64_t, std::vector<Holder>>> holders_of_hashes(const std::vector<uint64_t>& hashes,
                                                                          const Pods& pods) const;

  // --- for streams ---
  // The canonical block size: `size` becomes it when none is known. Returns the size in force.
  uint32_t learn_block_size(uint32_t size);
  // Bit of a tier by its lower-cased name; kMaxTiers when there is no bit left.
  uint32_t tier_of(std::string_view name);
  uint32_t open_lane(uint32_t stream, uint32_t group, GroupKind kind, uint32_t window);
  void change_lane(uint32_t lane, GroupKind kind, uint32_t window);
  // The lanes leave all answers at once; their claims are then taken out by the caller, who calls free_lanes.
  void retire_lanes(const std::vector<uint32_t>& lanes);
  void free_lanes(const std::vector<uint32_t>& lanes);
  void close_stream(uint32_t stream);
  // True when the lane did not hold the key on this tier before.
  bool hold(uint64_t key, uint32_t lane, uint32_t tier);
  void release(uint64_t key, uint32_t lane, uint32_t tier);
  // Room for one more claim; false at the limit.
  bool claim();
  void unclaim(uint64_t count) { claims_.fetch_sub(count, std::memory_order_relaxed); }
  void account(int64_t bytes) { bytes_.fetch_add(bytes, std::memory_order_relaxed); }

 private:
  struct Members;
  struct Slot {
    uint64_t key = 0;
    uint64_t ref = 0;  // 0 empty; odd: one member inline; even: Members*
  };
  struct Shard;
  class Walk;

  static constexpr size_t kShards = 256;

  Shard& shard(uint64_t key) const;
  std::shared_ptr<const Topology> topology() const;
  template <typename Change>
  void change_topology(Change change);
  template <typename Visit>
  bool visit(uint64_t key, Visit visit) const;
  // The tiers on which every full-attention group of the stream holds the key; 0 when one does not, or has none.
  uint8_t held_by(const Topology& topology, uint32_t stream, uint64_t key) const;
  std::vector<std::shared_ptr<Stream>> live_streams() const;
  // The rank of a pod that matches best; without any match its lowest.
  int64_t likely_rank(const Topology& topology, const std::string& pod, const uint64_t* keys, size_t count) const;
  void append_placed(const Topology& topology, const uint64_t* keys, size_t count, const std::vector<bool>& of_pod,
                     std::vector<std::vector<Holder>>& holders) const;

  std::atomic<uint32_t> block_size_;
  const uint64_t seed_;
  const uint64_t max_claims_;
  std::atomic<uint64_t> blocks_{0}, claims_{0};
  std::atomic<int64_t> bytes_{0};
  Placements placements_;
  std::unique_ptr<Shard[]> shards_;

  mutable std::mutex topology_mutex_;
  std::shared_ptr<const Topology> topology_;
  std::vector<std::weak_ptr<Stream>> stream_objects_;
  std::vector<uint32_t> free_streams_;
  // A lane's number is used again only when no query can still see the topology it was alive in.
  std::deque<std::pair<uint32_t, std::weak_ptr<const Topology>>> resting_lanes_;

  mutable std::mutex tiers_mutex_;
  std::vector<std::string> tiers_{"gpu", "cpu", "disk"};
};

}  // namespace kvindex
