#include "walk.hpp"

#include <algorithm>
#include <numeric>

#include "lengthening.hpp"

namespace kvindex {

// Kept per thread, so that a query allocates only for its answer. A lane's place counts when its turn is this query's.
struct Walk::Scratch {
  struct Place {
    uint64_t turn = 0;
    uint32_t at = 0;  // number of a runner, or kHybrid with hybrid and lane
  };
  std::vector<Found> found, previous;
  std::vector<Runner> runners;
  std::vector<Tiers> tiers;
  std::vector<uint32_t> alive;
  std::vector<Place> of_lane;
  std::vector<Place> of_pod;
  uint64_t turn = 0;

  static Scratch& mine() {
    thread_local Scratch scratch;
    return scratch;
  }
};

Walk::Walk(const Blocks& blocks, const Topology& topology, Wanted pods, const std::vector<double>& weights)
    : blocks_(blocks),
      topology_(topology),
      pods_(pods),
      scratch_(Scratch::mine()),
      found_(scratch_.found),
      previous_(scratch_.previous),
      runners_(scratch_.runners),
      tiers_(scratch_.tiers),
      alive_(scratch_.alive) {
  ++scratch_.turn;
  if (scratch_.of_lane.size() < topology.lanes.size()) scratch_.of_lane.resize(topology.lanes.size());
  if (scratch_.of_pod.size() < topology.pods.size()) scratch_.of_pod.resize(topology.pods.size());
  runners_.clear();
  tiers_.clear();
  alive_.clear();
  const double lowest = weights.empty() ? 0.0 : *std::min_element(weights.begin(), weights.end());
  for (uint32_t t = 0; t < kMaxTiers; ++t) weights_[t] = t < weights.size() ? weights[t] : lowest;
  std::iota(by_weight_.begin(), by_weight_.end(), uint8_t{0});
  for (uint32_t i = 1; i < kMaxTiers; ++i)
    for (uint32_t k = i; k > 0 && weights_[by_weight_[k]] > weights_[by_weight_[k - 1]]; --k)
      std::swap(by_weight_[k], by_weight_[k - 1]);
  for (const uint32_t stream : topology.hybrids)
    if (wanted(topology.streams[stream].pod)) add_hybrid(stream);
}

// A thread that answered one very large query does not keep its memory.
Walk::~Walk() {
  constexpr size_t kKeep = 4096;
  if (runners_.capacity() <= kKeep) return;
  std::vector<Runner>().swap(runners_);
  std::vector<Tiers>().swap(tiers_);
}

bool Walk::wanted(uint32_t pod) {
  if (pods_.pods() == nullptr) return true;
  if (wanted_.empty()) {
    wanted_.resize(topology_.pods.size());
    for (const uint32_t each : *pods_.pods())
      if (each < wanted_.size()) wanted_[each] = true;
  }
  return wanted_[pod];
}

bool Walk::has_place(uint32_t lane) const {
  return lane < topology_.lanes.size() && scratch_.of_lane[lane].turn == scratch_.turn;
}

uint32_t& Walk::place_of(uint32_t lane) {
  scratch_.of_lane[lane].turn = scratch_.turn;
  return scratch_.of_lane[lane].at;
}

void Walk::add_hybrid(uint32_t stream) {
  Hybrid hybrid;
  hybrid.stream = stream;
  for (const uint32_t lane : topology_.streams[stream].lanes) {
    const Lane& info = topology_.lanes[lane];
    place_of(lane) = kHybrid | static_cast<uint32_t>(hybrids_.size()) << 5 | static_cast<uint32_t>(hybrid.lanes.size());
    hybrid.lanes.push_back({info, {}});
    hybrid.has_full = hybrid.has_full || info.kind == GroupKind::kFull;
  }
  hybrids_.push_back(std::move(hybrid));
  ++hybrids_alive_;
}

void Walk::advance(const uint64_t* keys, size_t count) {
  if (walked_ == 0 && count > 1) blocks_.prefetch_key(keys[1]);  // needed at once by those who diverge there
  while (count > 0 && alive()) {
    const uint32_t length = step(keys, count);
    apply(length);
    walked_ += length;
    keys += length;
    count -= length;
  }
}

// Finds the chunk of the next block and what everyone holds of the blocks that stand in it one after the other, as all
// of it was at one moment. Returns for how many blocks that is; nobody is found when the first one is not there.
uint32_t Walk::step(const uint64_t* keys, size_t count) {
  for (;;) {
    Node node = 0;
    if (last_ != 0) {
      const Chunk* chunk = blocks_.chunk_of(last_);
      if (chunk != nullptr)
        node = last_ % kSlots + 1 < kSlots ? last_ + 1 : chunk->next.load(std::memory_order_relaxed) * kSlots;
      if (node != 0) {
        const Chunk* guessed = blocks_.chunk_of(node);
        if (guessed == nullptr || !guessed->has(node % kSlots, keys[0])) node = 0;
      }
    }
    if (node == 0) node = blocks_.find(keys[0]);
    found_.clear();
    last_ = 0;
    if (node == 0) return 1;
    const Chunk* here = blocks_.chunk_of(node);
    if (here == nullptr) continue;  // its slab went just now
    const Chunk& chunk = *here;
    const uint32_t slot = node % kSlots;
    const uint32_t version = chunk.version.load(std::memory_order_acquire);
    // Where the second block stands here too, the walk will probably leave this chunk at its end.
    const bool goes_on = count > kSlots - slot && (slot + 1 == kSlots || chunk.has(slot + 1, keys[1]));
    if (const uint32_t next = chunk.next.load(std::memory_order_relaxed); next != 0 && goes_on) {
      const auto* ahead = reinterpret_cast<const char*>(blocks_.chunk_of(next * kSlots));
      if (ahead != nullptr)
        for (size_t offset = 0; offset < sizeof(Chunk); offset += 64) __builtin_prefetch(ahead + offset);
    }
    const uint32_t length = chunk.run(slot, keys, count);
    if (length == 0) continue;  // it was forgotten just now
    const uint64_t among = bits_from(0, length);
    chunk.each_holder([&](HolderId holder, uint64_t mask) {
      const uint64_t bits = mask >> slot & among;
      if (bits != 0) found_.push_back({holder, bits});
    });
    if (chunk.version.load(std::memory_order_acquire) != version) continue;
    last_ = node + length - 1;
    return length;
  }
}

void Walk::apply(uint32_t length) {
  if (steady_ && in_step(length)) {
    behind_ += length;
    return;
  }
  catch_up();
  if (walked_ == 0) {
    runners_.reserve(found_.size());
    tiers_.reserve(found_.size());
    for (const Found& each : found_)
      if (each.bits & 1) start(each);
  }
  if (!alive_.empty()) {
    steady_ = hybrids_alive_ == 0;
    for (const Found& each : found_) {
      steady_ = steady_ && each.bits == bits_from(0, length);
      collect(each);
    }
    size_t kept = 0;
    for (const uint32_t number : alive_) {
      const uint32_t before = runners_[number].blocks;
      move(number, length);
      if (runners_[number].blocks - before == length) alive_[kept++] = number;
    }
    alive_.resize(kept);
  }
  if (hybrids_alive_ > 0) apply_to_hybrids(length);
  found_.swap(previous_);
}

bool Walk::in_step(uint32_t length) const {
  if (found_.size() != previous_.size()) return false;
  const uint64_t all = bits_from(0, length);
  for (size_t i = 0; i < found_.size(); ++i)
    if (found_[i].holder != previous_[i].holder || found_[i].bits != all) return false;
  return true;
}

void Walk::catch_up() {
  if (behind_ == 0) return;
  for (const uint32_t number : alive_) {
    runners_[number].blocks += behind_;
    runners_[number].on_tier += behind_;
  }
  behind_ = 0;
}

// A lane that holds block 0: whose it is, and whether it is asked for.
void Walk::start(const Found& found) {
  const uint32_t lane = lane_of(found.holder);
  if (lane >= topology_.lanes.size() || has_place(lane)) return;  // opened after this query began, or known already
  const Lane& info = topology_.lanes[lane];
  if (!info.alive || topology_.streams[info.stream].shape != StreamPlace::Shape::kSimple) return;
  if (!wanted(topology_.streams[info.stream].pod)) return;
  place_of(lane) = static_cast<uint32_t>(runners_.size());
  alive_.push_back(place_of(lane));
  Runner& made = runners_.emplace_back();
  made.stream = info.stream;
  tiers_.emplace_back();
}

void Walk::collect(const Found& found) {
  const uint32_t lane = lane_of(found.holder), tier = kvindex::tier_of(found.holder);
  if (!has_place(lane) || (place_of(lane) & kHybrid) != 0) return;
  Runner& runner = runners_[place_of(lane)];
  if (runner.tiers == 0) {
    runner.all = found.bits;
  } else {
    Tiers& several = tiers_[place_of(lane)];
    if ((runner.tiers & (runner.tiers - 1U)) == 0) several.bits[std::countr_zero(runner.tiers)] = runner.all;
    several.bits[tier] = found.bits;
    runner.all |= found.bits;
    steady_ = false;
  }
  runner.tiers |= static_cast<uint8_t>(1U << tier);
}

void Walk::move(uint32_t number, uint32_t length) {
  Runner& runner = runners_[number];
  if (runner.tiers == 0) return;
  const auto held = std::min(length, static_cast<uint32_t>(std::countr_one(runner.all)));
  runner.blocks += held;
  if ((runner.tiers & (runner.tiers - 1U)) == 0) {
    to_tier(number, static_cast<uint8_t>(std::countr_zero(runner.tiers)));
    runner.on_tier += held;
  } else {
    Tiers& several = tiers_[number];
    uint64_t open = bits_from(0, held);
    for (const uint8_t tier : by_weight_) {
      if ((runner.tiers >> tier & 1) == 0) continue;
      several.blocks[tier] += static_cast<uint32_t>(std::popcount(several.bits[tier] & open));
      open &= ~several.bits[tier];
    }
  }
  runner.tiers = 0;
}

void Walk::to_tier(uint32_t number, uint8_t tier) {
  Runner& runner = runners_[number];
  if (runner.tier == tier) return;
  tiers_[number].blocks[runner.tier] += runner.on_tier;
  runner.on_tier = 0;
  runner.tier = tier;
}

void Walk::apply_to_hybrids(uint32_t length) {
  for (Hybrid& hybrid : hybrids_)
    if (hybrid.alive)
      for (auto& lane : hybrid.lanes) lane.tiers.resize(lane.tiers.size() + length);
  for (const Found& each : found_) {
    const uint32_t lane = lane_of(each.holder);
    if (!has_place(lane) || (place_of(lane) & kHybrid) == 0) continue;
    Hybrid& hybrid = hybrids_[(place_of(lane) & ~kHybrid) >> 5];
    if (!hybrid.alive) continue;
    auto& tiers = hybrid.lanes[place_of(lane) & (kMaxGroups - 1)].tiers;
    for (uint64_t bits = each.bits; bits != 0; bits &= bits - 1)
      tiers[tiers.size() - length + static_cast<size_t>(std::countr_zero(bits))] |=
          static_cast<uint8_t>(1U << kvindex::tier_of(each.holder));
  }
  for (Hybrid& hybrid : hybrids_) {
    if (!hybrid.alive || !hybrid.has_full) continue;
    for (const auto& lane : hybrid.lanes)
      if (lane.info.kind == GroupKind::kFull &&
          std::find(lane.tiers.end() - length, lane.tiers.end(), 0) != lane.tiers.end())
        hybrid.alive = false;
    if (!hybrid.alive) --hybrids_alive_;
  }
}

void Walk::keep_best(const Match& match, uint32_t pod, std::vector<Match>& matches) {
  auto& place = scratch_.of_pod[pod];
  if (place.turn != scratch_.turn) {
    place = {scratch_.turn, static_cast<uint32_t>(matches.size())};
    matches.push_back(match);
    return;
  }
  Match& best = matches[place.at];
  if (match.score > best.score || (match.score == best.score && match.rank < best.rank)) best = match;
}

std::vector<Match> Walk::finish(uint32_t block_size, const Lengthening* lengthening) {
  catch_up();
  for (const Hybrid& hybrid : hybrids_) judge(hybrid, block_size);
  std::vector<Match> matches;
  matches.reserve(runners_.size());
  for (uint32_t number = 0; number < runners_.size(); ++number) {
    const Runner& runner = runners_[number];
    if (runner.blocks == 0) continue;  // if blocks are placed there, below
    const StreamPlace& stream = topology_.streams[runner.stream];
    Match match;
    match.pod = topology_.pods[stream.pod].name;
    match.number = stream.pod;
    match.rank = stream.rank;
    match.blocks = runner.blocks;
    match.tier_blocks = tiers_[number].blocks;
    match.tier_blocks[runner.tier] += runner.on_tier;
    for (uint32_t t = 0; t < kMaxTiers; ++t) match.score += weights_[t] * match.tier_blocks[t];
    if (lengthening != nullptr && lengthening->has(runner.stream))
      lengthening->lengthen(match, runner.stream, weights_);
    keep_best(match, stream.pod, matches);
  }
  if (lengthening != nullptr) {
    for (const auto& [pod, number] : lengthening->places()) {
      const auto same = [number = number](const Runner& runner) {
        return runner.stream == number && runner.blocks > 0;
      };
      if (!wanted(pod) || std::any_of(runners_.begin(), runners_.end(), same)) continue;
      Match match;
      match.pod = topology_.pods[pod].name;
      match.number = pod;
      match.rank = topology_.streams[number].rank;
      lengthening->lengthen(match, number, weights_);
      if (match.speculative > 0) keep_best(match, pod, matches);
    }
  }
  return matches;
}

// The tier that weighs most of those in the bits, which are not all clear.
uint32_t Walk::best_tier(uint8_t tiers) const {
  for (const uint8_t tier : by_weight_)
    if (tiers >> tier & 1) return tier;
  return 0;
}

// The longest prefix that every group could reuse.
void Walk::judge(const Hybrid& hybrid, uint32_t block_size) {
  size_t length = walked_;
  for (const auto& lane : hybrid.lanes) length = std::min(length, lane.tiers.size());
  for (const auto& lane : hybrid.lanes) {
    if (lane.info.kind != GroupKind::kFull) continue;
    size_t held = 0;
    while (held < length && lane.tiers[held] != 0) ++held;
    length = held;
  }
  for (bool settled = false; !settled && length > 0;) {
    settled = true;
    for (const auto& lane : hybrid.lanes) {
      const size_t reached = longest(lane, length, std::max(1U, block_size));
      if (reached == length) continue;
      length = reached;
      settled = false;
      if (length == 0) break;
    }
  }
  Runner runner;
  runner.stream = hybrid.stream;
  runner.blocks = static_cast<uint32_t>(length);
  Tiers& several = tiers_.emplace_back();
  for (size_t i = 0; i < length; ++i) {
    uint8_t tiers = 0;
    for (const auto& lane : hybrid.lanes) tiers |= lane.tiers[i];
    // Outside every window nothing is needed, so nothing is paid for: as good as on the GPU.
    ++several.blocks[tiers == 0 ? 0 : best_tier(tiers)];
  }
  runners_.push_back(runner);
}

// The longest prefix of at most `limit` blocks that this group alone could reuse.
size_t Walk::longest(const HybridLane& lane, size_t limit, uint32_t block_size) {
  switch (lane.info.kind) {
    case GroupKind::kFull: return limit;  // bounded before
    case GroupKind::kMamba:
      while (limit > 0 && lane.tiers[limit - 1] == 0) --limit;
      return limit;
    case GroupKind::kSliding: {
      // A window of one token needs no other, but engines ask for a block at the end all the same.
      const size_t window = std::max<size_t>(1, (size_t{lane.info.window} + block_size - 2) / block_size);
      size_t run = 0;  // held blocks directly before `end`
      for (size_t i = limit; i-- > 0;) {
        if (lane.tiers[i] == 0) {
          run = 0;
          limit = i;
        } else if (++run >= window) {
          return limit;
        }
      }
      return limit;  // all of them are held from the start, fewer than a window
    }
    case GroupKind::kUnknown: break;
  }
  return 0;
}

}  // namespace kvindex
