#include "lengthening.hpp"

#include <algorithm>

namespace kvindex {

const uint64_t* PromptKeys::upto(size_t end) {
  end = std::min(end, count_);
  if (end > known_) {
    const uint64_t parent = known_ == 0 ? 0 : (*room_)[known_ - 1];
    room_->resize(std::max(room_->size(), end));
    block_keys(tokens_, known_, end, block_size_, parent, seed_, *extras_, room_->data() + known_);
    known_ = end;
    keys_ = room_->data();
  }
  return keys_;
}

uint8_t held_by(const Blocks& blocks, const Topology& topology, uint32_t stream, uint64_t key) {
  const auto& lanes = topology.streams[stream].lanes;
  uint8_t of_any = 0;
  bool has_full = false;
  std::vector<Holding> holdings;
  holdings_of(blocks, key, holdings);
  for (const uint32_t lane : lanes) {
    if (topology.lanes[lane].kind != GroupKind::kFull) continue;
    has_full = true;
    uint8_t held = 0;
    for (const Holding& each : holdings)
      if (each.lane == lane) held |= each.tiers;
    if (held == 0) return 0;
    of_any |= held;
  }
  return has_full ? of_any : uint8_t{0};
}

Lengthening::Lengthening(const Placements& placements, const Blocks& blocks, const Topology& topology, PromptKeys& keys)
    : placements_(placements),
      blocks_(blocks),
      topology_(topology),
      keys_(keys),
      now_(placements.now()),
      is_placed_(topology.streams.size()) {
  for (const auto& place : placements.places()) {
    if (place.stream >= topology.streams.size()) continue;
    const StreamPlace& stream = topology.streams[place.stream];
    if (!stream.alive || stream.pod != place.pod) continue;
    places_.push_back(place);
    is_placed_[place.stream] = true;
  }
}

// Placed blocks count for every full-attention group and every window: the engine is about to compute them. Which
// states a mamba group will keep nobody can tell, and what an unknown one needs neither, so there nothing counts.
void Lengthening::lengthen(Match& match, uint32_t number, const std::array<double, kMaxTiers>& weights) const {
  const StreamPlace& stream = topology_.streams[number];
  bool windows = false;
  for (const uint32_t lane : stream.lanes) {
    const GroupKind kind = topology_.lanes[lane].kind;
    if (kind == GroupKind::kMamba || kind == GroupKind::kUnknown) return;
    windows = windows || kind != GroupKind::kFull;
  }
  const auto best = [&](uint8_t tiers) {
    double most = 0;
    bool any = false;
    for (uint32_t t = 0; t < kMaxTiers; ++t)
      if ((tiers >> t & 1) != 0 && (!any || weights[t] > most)) any = true, most = weights[t];
    return most;
  };
  uint32_t blocks = 0;
  double score = match.score;
  // Most streams end at once, so the first questions are small ones.
  size_t size = 1;
  for (size_t at = match.blocks; at < keys_.count(); at += size, size = std::min(Placements::kSlice, size * 4)) {
    size = std::min(size, keys_.count() - at);
    const uint64_t* keys = keys_.upto(at + size) + at;
    const uint64_t placed = placements_.placed({stream.pod, number}, keys, size, now_);
    for (size_t i = 0; i < size; ++i) {
      const bool is_placed = (placed >> i & 1) != 0;
      const uint8_t held = is_placed ? uint8_t{1} : held_by(blocks_, topology_, number, keys[i]);
      if (held == 0) return;
      ++blocks;
      score += best(held);
      // A match may not end where a window's blocks may be gone already.
      if (windows && !is_placed) continue;
      match.speculative = blocks;
      match.score = score;
    }
  }
}

}  // namespace kvindex
