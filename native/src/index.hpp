// The index of one model: its blocks, who is who, the limits, and what can be asked.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "blocks.hpp"
#include "keys.hpp"
#include "placements.hpp"
#include "pod_names.hpp"
#include "removals.hpp"
#include "topology.hpp"
#include "walk.hpp"

namespace kvindex {

struct Holder {
  std::string_view pod;  // lives as long as the index
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

// What is known of one engine hash.
struct HashHolders {
  uint64_t key = 0;       // 0 = not known, or disputed
  bool disputed = false;  // streams know it by different keys: to them it names different blocks
  std::vector<Holder> holders;
};

// What one rank remembers of blocks that left it.
struct Remembered {
  uint32_t rank;
  Removals::Memory memory;
  std::vector<std::vector<Removals::Found>> found;  // per key asked for
};

class PromptKeys;
class Stream;

class Index : public std::enable_shared_from_this<Index> {
 public:
  static constexpr uint64_t kRemovals = 8192;

  // Limits of 0 mean none, but for `max_removals`: so many removals are remembered of each stream.
  Index(uint32_t block_size, uint64_t seed, uint64_t max_claims, uint64_t max_placements, uint64_t max_bytes = 0,
        uint64_t max_removals = kRemovals, uint64_t max_claims_per_stream = 0);
  ~Index();
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  uint32_t block_size() const { return block_size_.load(std::memory_order_relaxed); }
  uint64_t seed() const { return seed_; }
  uint64_t blocks() const { return blocks_.size(); }
  uint64_t claims() const { return claims_.load(std::memory_order_relaxed); }
  uint64_t bytes() const;
  std::vector<std::string> tiers() const;
  const std::shared_ptr<PodNames>& names() const { return names_; }

  std::shared_ptr<Stream> add_stream(const std::string& pod, uint32_t rank);

  // A router has sent a prompt to this pod: its blocks count as held for `ttl` nanoseconds, or until the engine's
  // events say so. `rank` < 0: the router does not know it; the rank that matches best is guessed.
  Placed place(const std::string& pod, int64_t rank, const uint64_t* keys, size_t count, uint64_t ttl);
  Placements& placements() { return placements_; }
  const Placements& placements() const { return placements_; }

  // Pods with a match > 0 or placed blocks, best rank of each; `pods` empty = all. `weights` by tier bit.
  std::vector<Match> score(const uint64_t* keys, size_t count, const Pods& pods,
                           const std::vector<double>& weights) const;
  std::vector<Match> score(const uint64_t* keys, size_t count, Wanted pods, const std::vector<double>& weights) const;
  // The same from tokens; hashing stops where the last match ends.
  std::vector<Match> score_tokens(const uint32_t* tokens, size_t count, const Pods& pods,
                                  const std::vector<double>& weights, const QueryExtras& extras) const;
  std::vector<Match> score_tokens(const uint32_t* tokens, size_t count, Wanted pods, const std::vector<double>& weights,
                                  const QueryExtras& extras) const;
  std::vector<std::vector<Holder>> holders(const uint64_t* keys, size_t count, const Pods& pods) const;
  // By engine hash, of the streams of these pods alone.
  std::vector<HashHolders> holders_of_hashes(const std::vector<uint64_t>& hashes, const Pods& pods) const;
  // How each of these keys left each rank of a pod.
  std::vector<Remembered> removals(const std::string& pod, const uint64_t* keys, size_t count) const;

  // --- for streams ---
  uint64_t max_removals() const { return max_removals_; }
  Blocks& held() { return blocks_; }
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
  // It takes as much memory as it may.
  bool is_full() const;
  // The size in force: `size` if none was known. While nothing is claimed, a size that was learned gives way to this
  // one; streams wait meanwhile.
  uint32_t set_block_size(uint32_t size);
  bool is_block_size_open() const { return !is_size_given_ && claims() == 0; }
  // Room for that many more claims; returns how many there is room for. What is not used is given back by `unclaim`.
  uint64_t claim(uint64_t count);
  uint64_t max_claims_per_stream() const { return max_claims_per_stream_; }
  void unclaim(uint64_t count) { claims_.fetch_sub(count, std::memory_order_relaxed); }
  // Room for so many blocks beyond the first that one claim stands for; they count against the same limit.
  bool widen(uint64_t count);
  void unwiden(uint64_t count) { wide_.fetch_sub(count, std::memory_order_relaxed); }

 private:
  template <typename Change>
  void change_topology(Change change);
  std::vector<std::shared_ptr<Stream>> live_streams() const;
  std::vector<Match> match(PromptKeys& keys, size_t ahead, Wanted pods, const std::vector<double>& weights) const;
  void append_placed(const Topology& topology, const uint64_t* keys, size_t count, const std::vector<bool>& of_pod,
                     std::vector<std::vector<Holder>>& holders) const;

  std::atomic<uint32_t> block_size_;
  const bool is_size_given_;  // from the start, and then for good
  const uint64_t seed_;
  const uint64_t max_claims_, max_bytes_, max_removals_, max_claims_per_stream_;
  std::atomic<uint64_t> claims_{0};
  std::atomic<uint64_t> wide_{0};  // blocks of claims beyond the first of each
  Placements placements_;

  mutable std::mutex topology_mutex_;  // for those who change it; readers pin and load
  uint64_t streams_added_ = 0;         // ever
  std::atomic<const Topology*> topology_;
  const std::shared_ptr<PodNames> names_ = std::make_shared<PodNames>();
  std::vector<std::weak_ptr<Stream>> stream_objects_;
  std::vector<uint32_t> free_streams_;
  std::mutex free_lanes_mutex_;
  std::vector<uint32_t> free_lanes_;

  mutable std::mutex tiers_mutex_;
  std::vector<std::string> tiers_{"gpu", "cpu", "disk"};

  Blocks blocks_;  // last: what it still has to free refers to the members above
};

}  // namespace kvindex
