// How placements lengthen matches: from the end of what a stream really holds on, blocks placed there count as held.
#pragma once

#include <cstdint>
#include <vector>

#include "blocks.hpp"
#include "keys.hpp"
#include "placements.hpp"
#include "topology.hpp"
#include "walk.hpp"

namespace kvindex {

// The keys of one prompt, hashed as far as somebody asks.
class PromptKeys {
 public:
  // Keys that are known.
  PromptKeys(const uint64_t* keys, size_t count) : keys_(keys), count_(count), known_(count) {}
  // Keys of tokens; `room` is where they go.
  PromptKeys(const uint32_t* tokens, size_t blocks, uint32_t block_size, uint64_t seed, const QueryExtras& extras,
             std::vector<uint64_t>& room)
      : count_(blocks), tokens_(tokens), block_size_(block_size), seed_(seed), extras_(&extras), room_(&room) {}

  size_t count() const { return count_; }
  // At least the first `end` keys are there afterwards.
  const uint64_t* upto(size_t end);

 private:
  const uint64_t* keys_ = nullptr;
  size_t count_ = 0, known_ = 0;
  const uint32_t* tokens_ = nullptr;
  uint32_t block_size_ = 0;
  uint64_t seed_ = 0;
  const QueryExtras* extras_ = nullptr;
  std::vector<uint64_t>* room_ = nullptr;
};

// The tiers on which every full-attention group of a stream holds the key; 0 when one does not, or there is none.
uint8_t held_by(const Blocks& blocks, const Topology& topology, uint32_t stream, uint64_t key);

// For one query; the caller holds a pin of the blocks' epoch.
class Lengthening {
 public:
  Lengthening(const Placements& placements, const Blocks& blocks, const Topology& topology, PromptKeys& keys);

  // The streams that have placements, each once.
  const std::vector<Placements::Place>& places() const { return places_; }
  bool has(uint32_t stream) const { return stream < is_placed_.size() && is_placed_[stream]; }
  // Adds to `speculative` and `score` what lies behind the match.
  void lengthen(Match& match, uint32_t stream, const std::array<double, kMaxTiers>& weights) const;

 private:
  const Placements& placements_;
  const Blocks& blocks_;
  const Topology& topology_;
  PromptKeys& keys_;
  const uint64_t now_;
  std::vector<Placements::Place> places_;
  std::vector<bool> is_placed_;  // by stream
};

}  // namespace kvindex
