// One prompt walked chunk by chunk for all candidates at once.
//
// A simple stream holds what it matches from block 0 on, so its runner is made there and followed by bit masks; a
// hybrid stream keeps the tiers of every block per group and is judged at the end.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "blocks.hpp"
#include "pod_names.hpp"
#include "topology.hpp"

namespace kvindex {

struct Match {
  std::string_view pod;  // lives as long as the index
  uint32_t number = 0;   // of the pod
  uint32_t rank = 0;
  uint32_t blocks = 0;
  double score = 0;
  std::array<uint32_t, kMaxTiers> tier_blocks{};
  uint32_t speculative = 0;  // blocks by which placements lengthen the match; in `score`, not in the others
};

class Lengthening;

// For one thread and one query at a time; the caller holds a pin of the blocks' epoch.
class Walk {
 public:
  // `weights` by tier bit.
  Walk(const Blocks& blocks, const Topology& topology, Wanted pods, const std::vector<double>& weights);
  ~Walk();
  Walk(const Walk&) = delete;
  Walk& operator=(const Walk&) = delete;

  // False when further keys cannot change the result.
  bool alive() const { return walked_ == 0 || !alive_.empty() || hybrids_alive_ > 0; }
  void advance(const uint64_t* keys, size_t count);
  // `lengthening` may be null.
  std::vector<Match> finish(uint32_t block_size, const Lengthening* lengthening);

 private:
  // What every step touches of a stream that is followed; `Tiers` is for those with blocks on several of them.
  struct Runner {
    uint64_t all = 0;  // blocks of this step that it holds on any tier
    uint32_t stream = 0;
    uint32_t blocks = 0;
    uint32_t on_tier = 0;  // how many of them, the last ones, are on `tier` and not in Tiers::blocks yet
    uint8_t tier = 0;
    uint8_t tiers = 0;  // on which it holds any block of this step
  };
  struct Tiers {
    std::array<uint64_t, kMaxTiers> bits{};  // of this step, when `tiers` has several
    std::array<uint32_t, kMaxTiers> blocks{};
  };
  struct HybridLane {
    Lane info;
    std::vector<uint8_t> tiers;  // per block
  };
  struct Hybrid {
    uint32_t stream = 0;
    bool alive = true;
    bool has_full = false;
    std::vector<HybridLane> lanes;
  };
  struct Found {
    HolderId holder;
    uint64_t bits;  // from the first block of the step
  };
  struct Scratch;

  static constexpr uint32_t kHybrid = 0x80000000U;

  bool wanted(uint32_t pod);
  void keep_best(const Match& match, uint32_t pod, std::vector<Match>& matches);
  void add_hybrid(uint32_t stream);
  uint32_t step(const uint64_t* keys, size_t count);
  void apply(uint32_t length);
  bool in_step(uint32_t length) const;
  void catch_up();
  void start(const Found& found);
  void collect(const Found& found);
  void move(uint32_t number, uint32_t length);
  void to_tier(uint32_t number, uint8_t tier);
  void apply_to_hybrids(uint32_t length);
  uint32_t& place_of(uint32_t lane);
  bool has_place(uint32_t lane) const;
  uint32_t best_tier(uint8_t tiers) const;
  void judge(const Hybrid& hybrid, uint32_t block_size);
  static size_t longest(const HybridLane& lane, size_t limit, uint32_t block_size);

  const Blocks& blocks_;
  const Topology& topology_;
  const Wanted pods_;
  Scratch& scratch_;
  std::vector<Found>& found_;
  std::vector<Found>& previous_;  // of the step before
  std::vector<Runner>& runners_;
  std::vector<Tiers>& tiers_;     // by runner
  std::vector<uint32_t>& alive_;  // simple streams that held every block so far
  std::vector<bool> wanted_;      // by pod, filled when first asked
  std::vector<Hybrid> hybrids_;
  std::array<double, kMaxTiers> weights_{};
  std::array<uint8_t, kMaxTiers> by_weight_{};  // tiers, heaviest first
  // While the holders of the step before hold all of this one too, on the same tiers, nothing is done per runner: these
  // blocks are added to all that are alive later.
  bool steady_ = false;
  uint32_t behind_ = 0;
  uint32_t hybrids_alive_ = 0;
  uint32_t walked_ = 0;
  Node last_ = 0;  // of the block before, when it is known
};

}  // namespace kvindex
