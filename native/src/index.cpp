#include "index.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <unordered_set>

#include "stream.hpp"

namespace kvindex {

// A member is lane << 8 | tier bits; members are sorted by lane.
struct Index::Members {
  uint32_t size;
  uint32_t capacity;
  uint32_t at[1];  // really `capacity` of them

  static size_t bytes(uint32_t capacity) { return sizeof(Members) + (capacity - 1) * sizeof(uint32_t); }
  static Members* make(uint32_t capacity) {
    auto* made = static_cast<Members*>(std::malloc(bytes(capacity)));
    if (made == nullptr) throw std::bad_alloc();
    made->size = 0;
    made->capacity = capacity;
    return made;
  }
};

// An open-addressing table (linear probing, no tombstones) behind one mutex, held for tens of nanoseconds.
struct alignas(64) Index::Shard {
  std::mutex mutex;
  std::vector<Slot> slots;
  size_t used = 0;

  size_t home(uint64_t key) const { return (key * 0x9E3779B97F4A7C15ULL >> 20) & (slots.size() - 1); }

  Slot* find(uint64_t key) {
    if (slots.empty()) return nullptr;
    for (size_t i = home(key);; i = (i + 1) & (slots.size() - 1)) {
      if (slots[i].ref == 0) return nullptr;
      if (slots[i].key == key) return &slots[i];
    }
  }

  // Bytes by which the table grew.
  int64_t reserve_one() {
    if (slots.size() * 3 >= (used + 1) * 4) return 0;
    return resize(slots.empty() ? 16 : slots.size() * 2);
  }

  int64_t shrink() {
    if (slots.size() <= 64 || used * 6 > slots.size()) return 0;
    return resize(slots.size() / 2);
  }

  int64_t resize(size_t size) {
    std::vector<Slot> old(size);
    old.swap(slots);
    for (const Slot& slot : old)
      if (slot.ref != 0) *place(slot.key) = slot;
    return (static_cast<int64_t>(size) - static_cast<int64_t>(old.size())) * static_cast<int64_t>(sizeof(Slot));
  }

  Slot* place(uint64_t key) {
    size_t i = home(key);
    while (slots[i].ref != 0) i = (i + 1) & (slots.size() - 1);
    return &slots[i];
  }

  void erase(Slot* slot) {
    const size_t mask = slots.size() - 1;
    size_t hole = static_cast<size_t>(slot - slots.data());
    for (size_t i = (hole + 1) & mask; slots[i].ref != 0; i = (i + 1) & mask) {
      if (((i - home(slots[i].key)) & mask) >= ((i - hole) & mask)) {
        slots[hole] = slots[i];
        hole = i;
      }
    }
    slots[hole] = Slot{};
    --used;
  }
};

namespace {

constexpr uint32_t lane_of(uint32_t member) { return member >> 8; }
constexpr uint64_t inline_ref(uint32_t member) { return (static_cast<uint64_t>(member) << 1) | 1; }
constexpr uint32_t inline_member(uint64_t ref) { return static_cast<uint32_t>(ref >> 1); }

}  // namespace

Index::Index(uint32_t block_size, uint64_t seed, uint64_t max_claims, uint64_t max_placements)
    : block_size_(block_size),
      seed_(seed),
      max_claims_(max_claims),
      placements_(max_placements),
      shards_(new Shard[kShards]) {
  auto first = std::make_shared<Topology>();
  first->lanes.emplace_back();
  topology_ = std::move(first);
}

Index::~Index() {
  for (size_t i = 0; i < kShards; ++i)
    for (const Slot& slot : shards_[i].slots)
      if (slot.ref != 0 && (slot.ref & 1) == 0) std::free(reinterpret_cast<void*>(slot.ref));
}

Index::Shard& Index::shard(uint64_t key) const { return shards_[key >> 56]; }

uint64_t Index::bytes() const {
  return sizeof(Index) + kShards * sizeof(Shard) + placements_.bytes() +
         static_cast<uint64_t>(std::max<int64_t>(0, bytes_.load(std::memory_order_relaxed)));
}

std::vector<std::string> Index::tiers() const {
  std::lock_guard lock(tiers_mutex_);
  return tiers_;
}

uint32_t Index::tier_of(std::string_view name) {
  std::lock_guard lock(tiers_mutex_);
  for (uint32_t i = 0; i < tiers_.size(); ++i)
    if (tiers_[i] == name) return i;
  if (tiers_.size() == kMaxTiers) return kMaxTiers;
  tiers_.emplace_back(name);
  return static_cast<uint32_t>(tiers_.size() - 1);
}

uint32_t Index::learn_block_size(uint32_t size) {
  uint32_t known = 0;
  if (block_size_.compare_exchange_strong(known, size)) return size;
  return known;
}

bool Index::claim() {
  const uint64_t before = claims_.fetch_add(1, std::memory_order_relaxed);
  if (max_claims_ == 0 || before < max_claims_) return true;
  unclaim(1);
  return false;
}

// --- topology ---

std::shared_ptr<const Topology> Index::topology() const {
  std::lock_guard lock(topology_mutex_);
  return topology_;
}

template <typename Change>
void Index::change_topology(Change change) {
  auto next = std::make_shared<Topology>(*topology_);
  change(*next);
  next->successor.reset();
  topology_->successor = next;
  topology_ = std::move(next);
}

std::shared_ptr<Stream> Index::add_stream(const std::string& pod, uint32_t rank) {
  std::lock_guard lock(topology_mutex_);
  uint32_t number = 0;
  uint32_t pod_number = 0;
  change_topology([&](Topology& next) {
    auto [found, is_new] = next.pod_of_name.try_emplace(pod, static_cast<uint32_t>(next.pods.size()));
    if (is_new) next.pods.push_back({pod, {}});
    if (free_streams_.empty()) {
      number = static_cast<uint32_t>(next.streams.size());
      next.streams.emplace_back();
      stream_objects_.emplace_back();
    } else {
      number = free_streams_.back();
      free_streams_.pop_back();
    }
    next.streams[number] = {found->second, rank, true, {}};
    next.pods[found->second].streams.push_back(number);
    pod_number = found->second;
  });
  auto made = std::make_shared<Stream>(shared_from_this(), pod_number, number);
  stream_objects_[number] = made;
  return made;
}

void Index::close_stream(uint32_t stream) {
  std::lock_guard lock(topology_mutex_);
  Placements::Place gone{};
  change_topology([&](Topology& next) {
    StreamPlace& place = next.streams[stream];
    auto& of_pod = next.pods[place.pod].streams;
    of_pod.erase(std::remove(of_pod.begin(), of_pod.end(), stream), of_pod.end());
    gone = {place.pod, stream};
    place = {};
  });
  // Before the number is given to another stream: a placement may have come since the stream's own drop.
  placements_.drop(gone);
  stream_objects_[stream].reset();
  free_streams_.push_back(stream);
}

uint32_t Index::open_lane(uint32_t stream, uint32_t group, GroupKind kind, uint32_t window) {
  std::lock_guard lock(topology_mutex_);
  uint32_t lane = 0;
  change_topology([&](Topology& next) {
    if (!resting_lanes_.empty() && resting_lanes_.front().second.expired()) {
      lane = resting_lanes_.front().first;
      resting_lanes_.pop_front();
    } else {
      lane = static_cast<uint32_t>(next.lanes.size());
      next.lanes.emplace_back();
    }
    next.lanes[lane] = {stream, group, window, kind, true};
    next.streams[stream].lanes.push_back(lane);
  });
  return lane;
}

void Index::change_lane(uint32_t lane, GroupKind kind, uint32_t window) {
  std::lock_guard lock(topology_mutex_);
  change_topology([&](Topology& next) {
    next.lanes[lane].kind = kind;
    next.lanes[lane].window = window;
  });
}

void Index::retire_lanes(const std::vector<uint32_t>& lanes) {
  if (lanes.empty()) return;
  std::lock_guard lock(topology_mutex_);
  change_topology([&](Topology& next) {
    for (const uint32_t lane : lanes) {
      next.lanes[lane].alive = false;
      auto& of_stream = next.streams[next.lanes[lane].stream].lanes;
      of_stream.erase(std::remove(of_stream.begin(), of_stream.end(), lane), of_stream.end());
    }
  });
}

void Index::free_lanes(const std::vector<uint32_t>& lanes) {
  if (lanes.empty()) return;
  std::lock_guard lock(topology_mutex_);
  // A topology keeps its successor alive, so this one expires only after every older one has.
  const std::weak_ptr<const Topology> seen = topology_;
  change_topology([](Topology&) {});
  for (const uint32_t lane : lanes) resting_lanes_.emplace_back(lane, seen);
}

std::vector<std::shared_ptr<Stream>> Index::live_streams() const {
  std::lock_guard lock(topology_mutex_);
  std::vector<std::shared_ptr<Stream>> live;
  for (const auto& each : stream_objects_)
    if (auto stream = each.lock()) live.push_back(std::move(stream));
  return live;
}

// --- claims ---

bool Index::hold(uint64_t key, uint32_t lane, uint32_t tier) {
  Shard& home = shard(key);
  const uint32_t bit = 1U << tier;
  std::lock_guard lock(home.mutex);
  Slot* slot = home.find(key);
  if (slot == nullptr) {
    account(home.reserve_one());
    slot = home.place(key);
    *slot = {key, inline_ref(lane << 8 | bit)};
    ++home.used;
    blocks_.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  if (slot->ref & 1) {
    const uint32_t member = inline_member(slot->ref);
    if (lane_of(member) == lane) {
      slot->ref = inline_ref(member | bit);
      return (member & bit) == 0;
    }
    Members* members = Members::make(2);
    const uint32_t added = lane << 8 | bit;
    members->size = 2;
    members->at[0] = std::min(member, added);
    members->at[1] = std::max(member, added);
    slot->ref = reinterpret_cast<uint64_t>(members);
    account(static_cast<int64_t>(Members::bytes(2)));
    return true;
  }
  auto* members = reinterpret_cast<Members*>(slot->ref);
  uint32_t* end = members->at + members->size;
  uint32_t* at = std::lower_bound(members->at, end, lane << 8);
  if (at != end && lane_of(*at) == lane) {
    const bool is_new = (*at & bit) == 0;
    *at |= bit;
    return is_new;
  }
  if (members->size == members->capacity) {
    const auto offset = at - members->at;
    const uint32_t capacity = members->capacity + members->capacity / 2 + 1;
    account(static_cast<int64_t>(Members::bytes(capacity)) - static_cast<int64_t>(Members::bytes(members->capacity)));
    auto* grown = static_cast<Members*>(std::realloc(members, Members::bytes(capacity)));
    if (grown == nullptr) throw std::bad_alloc();
    grown->capacity = capacity;
    slot->ref = reinterpret_cast<uint64_t>(grown);
    members = grown;
    at = members->at + offset;
    end = members->at + members->size;
  }
  std::memmove(at + 1, at, static_cast<size_t>(end - at) * sizeof(uint32_t));
  *at = lane << 8 | bit;
  ++members->size;
  return true;
}

void Index::release(uint64_t key, uint32_t lane, uint32_t tier) {
  Shard& home = shard(key);
  const uint32_t bit = 1U << tier;
  std::lock_guard lock(home.mutex);
  Slot* slot = home.find(key);
  if (slot == nullptr) return;
  if (slot->ref & 1) {
    const uint32_t member = inline_member(slot->ref);
    if (lane_of(member) != lane) return;
    if ((member & 0xFF & ~bit) != 0) {
      slot->ref = inline_ref(member & ~bit);
      return;
    }
  } else {
    auto* members = reinterpret_cast<Members*>(slot->ref);
    uint32_t* end = members->at + members->size;
    uint32_t* at = std::lower_bound(members->at, end, lane << 8);
    if (at == end || lane_of(*at) != lane) return;
    *at &= ~bit;
    if ((*at & 0xFF) != 0) return;
    std::memmove(at, at + 1, static_cast<size_t>(end - at - 1) * sizeof(uint32_t));
    if (--members->size > 1) return;
    const uint32_t last = members->size == 1 ? members->at[0] : 0;
    account(-static_cast<int64_t>(Members::bytes(members->capacity)));
    std::free(members);
    if (last != 0) {
      slot->ref = inline_ref(last);
      return;
    }
  }
  home.erase(slot);
  blocks_.fetch_sub(1, std::memory_order_relaxed);
  account(home.shrink());
}

template <typename Visit>
bool Index::visit(uint64_t key, Visit visit) const {
  Shard& home = shard(key);
  std::lock_guard lock(home.mutex);
  const Slot* slot = home.find(key);
  if (slot == nullptr) return false;
  if (slot->ref & 1) {
    const uint32_t member = inline_member(slot->ref);
    visit(lane_of(member), static_cast<uint8_t>(member));
  } else {
    const auto* members = reinterpret_cast<const Members*>(slot->ref);
    for (uint32_t i = 0; i < members->size; ++i) visit(lane_of(members->at[i]), static_cast<uint8_t>(members->at[i]));
  }
  return true;
}

uint8_t Index::held_by(const Topology& topology, uint32_t stream, uint64_t key) const {
  const auto& lanes = topology.streams[stream].lanes;
  const auto is_full = [&](uint32_t lane) { return topology.lanes[lane].kind == GroupKind::kFull; };
  const auto groups = std::count_if(lanes.begin(), lanes.end(), is_full);
  std::ptrdiff_t holding = 0;
  uint8_t held = 0;
  visit(key, [&](uint32_t lane, uint8_t tiers) {
    if (std::find(lanes.begin(), lanes.end(), lane) == lanes.end() || !is_full(lane)) return;
    ++holding;
    held |= tiers;
  });
  return holding == groups ? held : 0;
}

// --- placements ---

namespace {

// The streams of a pod; empty when it is not there.
const std::vector<uint32_t>& streams_of(const Topology& topology, const std::string& pod) {
  static const std::vector<uint32_t> none;
  const auto found = topology.pod_of_name.find(pod);
  return found == topology.pod_of_name.end() ? none : topology.pods[found->second].streams;
}

bool find_rank(const Topology& topology, const std::string& pod, int64_t rank, Placements::Place& place) {
  for (const uint32_t stream : streams_of(topology, pod)) {
    const StreamPlace& each = topology.streams[stream];
    if (each.rank == rank) return place = {each.pod, stream}, true;
  }
  return false;
}

}  // namespace

int64_t Index::likely_rank(const Topology& topology, const std::string& pod, const uint64_t* keys, size_t count) const {
  const auto matches = score(keys, count, {pod}, {1.0});
  if (!matches.empty()) return matches[0].rank;
  int64_t lowest = INT64_MAX;
  for (const uint32_t stream : streams_of(topology, pod))
    lowest = std::min<int64_t>(lowest, topology.streams[stream].rank);
  return lowest;
}

Placed Index::place(const std::string& pod, int64_t rank, const uint64_t* keys, size_t count, uint64_t ttl) {
  auto topology = this->topology();
  const size_t ranks = streams_of(*topology, pod).size();
  if (ranks == 0) return {Placed::Outcome::kNoPod, 0, 0};
  const bool guessed = rank < 0 && ranks > 1;
  if (rank < 0) rank = likely_rank(*topology, pod, keys, count);
  Placements::Place place{};
  if (!find_rank(*topology, pod, rank, place)) return {Placed::Outcome::kNoRank, 0, 0};
  const uint64_t life = placements_.life(place);
  // The stream may have been closed, and its number given away, before its life was asked.
  topology = this->topology();
  Placements::Place still{};
  if (!find_rank(*topology, pod, rank, still) || still != place) return {Placed::Outcome::kNoPod, 0, 0};

  std::vector<uint64_t> missing;
  for (size_t i = 0; i < count; ++i)
    if (held_by(*topology, place.stream, keys[i]) == 0) missing.push_back(keys[i]);
  const Placed placed{Placed::Outcome::kRecorded, static_cast<uint32_t>(rank), count - missing.size()};
  if (!placements_.record(place, life, missing, ttl, guessed)) return {Placed::Outcome::kNoRoom, placed.rank, 0};
  // An event that came between the question and the record had nothing to confirm.
  topology = this->topology();
  for (const uint64_t key : missing)
    if (held_by(*topology, place.stream, key) != 0) placements_.confirm(place, key);
  return placed;
}

// --- matching ---

namespace {

// Which streams have placements.
std::vector<bool> placed_streams(const Placements& placements, const Topology& topology) {
  std::vector<bool> of_stream(topology.streams.size());
  for (const auto& place : placements.places())
    if (place.stream < of_stream.size()) of_stream[place.stream] = true;
  return of_stream;
}

}  // namespace

// One prompt walked block by block for all candidates at once. A stream whose only group is a full-attention one
// is followed by counters; any other stream keeps the tiers of every block per group and is judged at the end.
class Index::Walk {
 public:
  Walk(const Index& index, const Pods& pods, const std::vector<double>& weights)
      : index_(index), topology_(index.topology()), runner_of_lane_(topology_->lanes.size(), kNone) {
    if (index.placements_.any()) is_placed_ = placed_streams(index.placements_, *topology_);
    if (pods.empty()) {
      for (const PodPlace& pod : topology_->pods) add(pod);
    } else {
      std::unordered_set<std::string_view> seen;
      for (const std::string& name : pods) {
        if (!seen.insert(name).second) continue;
        const auto found = topology_->pod_of_name.find(name);
        if (found != topology_->pod_of_name.end()) add(topology_->pods[found->second]);
      }
    }
    prepare(weights);
  }

  bool alive() const { return simple_alive_ > 0 || hybrids_alive_ > 0; }

  void step(uint64_t key) {
    const uint32_t block = walked_++;
    uint32_t simple = 0;
    for (Hybrid& hybrid : hybrids_)
      if (hybrid.alive)
        for (auto& lane : hybrid.lanes) lane.tiers.push_back(0);
    index_.visit(key, [&](uint32_t lane, uint8_t tiers) {
      if (lane >= runner_of_lane_.size()) return;  // opened after this query began
      const uint32_t place = runner_of_lane_[lane];
      if (place == kNone) return;
      if (place & kHybrid) {
        Hybrid& hybrid = hybrids_[(place & ~kHybrid) >> 5];
        if (hybrid.alive) hybrid.lanes[place & (kMaxGroups - 1)].tiers.back() = tiers;
        return;
      }
      Runner& runner = runners_[place];
      if (runner.blocks != block) return;
      ++runner.blocks;
      ++runner.tier_blocks[best_tier(tiers)];
      ++simple;
    });
    simple_alive_ = simple;
    for (Hybrid& hybrid : hybrids_) {
      if (!hybrid.alive || !hybrid.has_full) continue;
      for (const auto& lane : hybrid.lanes)
        if (lane.info.kind == GroupKind::kFull && lane.tiers.back() == 0) hybrid.alive = false;
      if (!hybrid.alive) --hybrids_alive_;
    }
  }

  std::vector<Match> finish(const uint64_t* keys, size_t count) {
    for (const Hybrid& hybrid : hybrids_) judge(hybrid);
    const uint64_t now = is_placed_.empty() ? 0 : index_.placements_.now();
    std::unordered_map<uint32_t, size_t> of_pod;
    std::vector<Match> matches;
    for (const Runner& runner : runners_) {
      const bool is_placed = !is_placed_.empty() && is_placed_[runner.stream];
      if (runner.blocks == 0 && !is_placed) continue;
      const StreamPlace& stream = topology_->streams[runner.stream];
      Match match;
      match.rank = stream.rank;
      match.blocks = runner.blocks;
      match.tier_blocks = runner.tier_blocks;
      for (uint32_t t = 0; t < kMaxTiers; ++t) match.score += weights_[t] * runner.tier_blocks[t];
      if (is_placed) lengthen(match, runner.stream, keys, count, now);
      if (match.blocks + match.speculative == 0) continue;
      const auto [found, is_new] = of_pod.try_emplace(stream.pod, matches.size());
      if (is_new) {
        match.pod = topology_->pods[stream.pod].name;
        matches.push_back(std::move(match));
        continue;
      }
      Match& best = matches[found->second];
      if (match.score > best.score || (match.score == best.score && match.rank < best.rank)) {
        match.pod = std::move(best.pod);
        best = std::move(match);
      }
    }
    return matches;
  }

 private:
  static constexpr uint32_t kNone = 0xFFFFFFFFU, kHybrid = 0x80000000U;

  struct Runner {
    uint32_t stream = 0;
    uint32_t blocks = 0;
    std::array<uint32_t, kMaxTiers> tier_blocks{};
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

  void add(const PodPlace& pod) {
    for (const uint32_t number : pod.streams) {
      const StreamPlace& stream = topology_->streams[number];
      if (!stream.alive) continue;
      if (stream.lanes.empty()) {  // nothing heard yet: only a placement can make a match
        if (!is_placed_.empty() && is_placed_[number]) runners_.push_back({number, 0, {}});
        continue;
      }
      const auto kind = [&](uint32_t lane) { return topology_->lanes[lane].kind; };
      if (std::any_of(stream.lanes.begin(), stream.lanes.end(),
                      [&](uint32_t lane) { return kind(lane) == GroupKind::kUnknown; }))
        continue;  // fails closed: nobody knows what such a group needs
      if (stream.lanes.size() == 1 && kind(stream.lanes[0]) == GroupKind::kFull) {
        runner_of_lane_[stream.lanes[0]] = static_cast<uint32_t>(runners_.size());
        runners_.push_back({number, 0, {}});
        ++simple_alive_;
        continue;
      }
      Hybrid hybrid;
      hybrid.stream = number;
      for (const uint32_t lane : stream.lanes) {
        runner_of_lane_[lane] =
            kHybrid | static_cast<uint32_t>(hybrids_.size()) << 5 | static_cast<uint32_t>(hybrid.lanes.size());
        hybrid.lanes.push_back({topology_->lanes[lane], {}});
        hybrid.has_full = hybrid.has_full || kind(lane) == GroupKind::kFull;
      }
      hybrids_.push_back(std::move(hybrid));
      ++hybrids_alive_;
    }
  }

  void prepare(const std::vector<double>& weights) {
    const double lowest = weights.empty() ? 0.0 : *std::min_element(weights.begin(), weights.end());
    for (uint32_t t = 0; t < kMaxTiers; ++t) weights_[t] = t < weights.size() ? weights[t] : lowest;
  }

  // The tier that weighs most of those in the bits, which are not all clear.
  uint32_t best_tier(uint8_t tiers) const {
    auto best = static_cast<uint32_t>(std::countr_zero(tiers));
    for (uint32_t rest = tiers & (tiers - 1U); rest != 0; rest &= rest - 1) {
      const auto tier = static_cast<uint32_t>(std::countr_zero(rest));
      if (weights_[tier] > weights_[best]) best = tier;
    }
    return best;
  }

  // The longest prefix that every group could reuse.
  void judge(const Hybrid& hybrid) {
    size_t length = walked_;
    for (const auto& lane : hybrid.lanes) length = std::min(length, lane.tiers.size());
    for (const auto& lane : hybrid.lanes) {
      if (lane.info.kind != GroupKind::kFull) continue;
      size_t held = 0;
      while (held < length && lane.tiers[held] != 0) ++held;
      length = held;
    }
    const uint32_t block_size = std::max(1U, index_.block_size());
    for (bool settled = false; !settled && length > 0;) {
      settled = true;
      for (const auto& lane : hybrid.lanes) {
        const size_t reached = longest(lane, length, block_size);
        if (reached == length) continue;
        length = reached;
        settled = false;
        if (length == 0) break;
      }
    }
    Runner runner{hybrid.stream, static_cast<uint32_t>(length), {}};
    for (size_t i = 0; i < length; ++i) {
      uint8_t tiers = 0;
      for (const auto& lane : hybrid.lanes) tiers |= lane.tiers[i];
      // Outside every window nothing is needed, so nothing is paid for: as good as on the GPU.
      ++runner.tier_blocks[tiers == 0 ? 0 : best_tier(tiers)];
    }
    runners_.push_back(runner);
  }

  // From the end of the match on, placed blocks count as held, by every full-attention group and every window: the
  // engine is about to compute them. Which states a mamba group will keep nobody can tell, so there nothing counts.
  void lengthen(Match& match, uint32_t number, const uint64_t* keys, size_t count, uint64_t now) const {
    const StreamPlace& stream = topology_->streams[number];
    bool windows = false;
    for (const uint32_t lane : stream.lanes) {
      const GroupKind kind = topology_->lanes[lane].kind;
      if (kind == GroupKind::kMamba) return;
      windows = windows || kind != GroupKind::kFull;
    }
    uint32_t blocks = 0;
    double score = match.score;
    // Most streams end at once, so the first questions are small ones.
    size_t size = 1;
    for (size_t at = match.blocks; at < count; at += size, size = std::min(Placements::kSlice, size * 4)) {
      size = std::min(size, count - at);
      const uint64_t placed = index_.placements_.placed({stream.pod, number}, keys + at, size, now);
      for (size_t i = 0; i < size; ++i) {
        const bool is_placed = (placed >> i & 1) != 0;
        const uint8_t held = is_placed ? uint8_t{1} : index_.held_by(*topology_, number, keys[at + i]);
        if (held == 0) return;
        ++blocks;
        score += weights_[best_tier(held)];
        // A match may not end where a window's blocks may be gone already.
        if (windows && !is_placed) continue;
        match.speculative = blocks;
        match.score = score;
      }
    }
  }

  // The longest prefix of at most `limit` blocks that this group alone could reuse.
  static size_t longest(const HybridLane& lane, size_t limit, uint32_t block_size) {
    switch (lane.info.kind) {
      case GroupKind::kFull: return limit;  // bounded before
      case GroupKind::kMamba:
        while (limit > 0 && lane.tiers[limit - 1] == 0) --limit;
        return limit;
      case GroupKind::kSliding: {
        const size_t window = (std::max(1U, lane.info.window) - 1 + block_size - 1) / block_size;
        if (window == 0) return limit;
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

  const Index& index_;
  std::shared_ptr<const Topology> topology_;
  std::vector<uint32_t> runner_of_lane_;
  std::vector<Runner> runners_;
  std::vector<Hybrid> hybrids_;
  std::vector<bool> is_placed_;  // by stream; empty when there are no placements
  std::array<double, kMaxTiers> weights_{};
  uint32_t simple_alive_ = 0;
  uint32_t hybrids_alive_ = 0;
  uint32_t walked_ = 0;
};

std::vector<Match> Index::score(const uint64_t* keys, size_t count, const Pods& pods,
                                const std::vector<double>& weights) const {
  Walk walk(*this, pods, weights);
  for (size_t i = 0; i < count && walk.alive(); ++i) walk.step(keys[i]);
  return walk.finish(keys, count);
}

std::vector<Match> Index::score_tokens(const uint32_t* tokens, size_t count, const Pods& pods,
                                       const std::vector<double>& weights, const QueryExtras& extras) const {
  constexpr size_t kChunk = 64;  // blocks hashed ahead of the walk
  const uint32_t size = block_size();
  const size_t blocks = size == 0 ? 0 : count / size;
  std::vector<uint64_t> keys;
  if (placements_.any()) {  // a placement may lengthen a match beyond where the walk would end
    if (blocks != 0) block_keys(tokens, 0, blocks, size, 0, seed_, extras, keys);
    return score(keys.data(), keys.size(), pods, weights);
  }
  Walk walk(*this, pods, weights);
  for (size_t begin = 0; begin < blocks && walk.alive(); begin += kChunk) {
    const uint64_t parent = keys.empty() ? 0 : keys.back();
    keys.clear();
    block_keys(tokens, begin, std::min(blocks, begin + kChunk), size, parent, seed_, extras, keys);
    for (size_t i = 0; i < keys.size() && walk.alive(); ++i) walk.step(keys[i]);
  }
  return walk.finish(nullptr, 0);
}

// --- holders ---

namespace {

void wanted(const Topology& topology, const Pods& pods, std::vector<bool>& of_pod) {
  of_pod.assign(topology.pods.size(), pods.empty());
  for (const std::string& name : pods) {
    const auto found = topology.pod_of_name.find(name);
    if (found != topology.pod_of_name.end()) of_pod[found->second] = true;
  }
}

void append_holders(const Topology& topology, uint32_t lane, uint8_t tiers, const std::vector<bool>& of_pod,
                    std::vector<Holder>& out) {
  if (lane >= topology.lanes.size() || !topology.lanes[lane].alive) return;
  const Lane& info = topology.lanes[lane];
  const StreamPlace& stream = topology.streams[info.stream];
  if (!stream.alive || !of_pod[stream.pod]) return;
  for (uint32_t t = 0; t < kMaxTiers; ++t)
    if (tiers >> t & 1) out.push_back({topology.pods[stream.pod].name, stream.rank, t, info.group});
}

void order(std::vector<Holder>& holders) {
  std::sort(holders.begin(), holders.end(), [](const Holder& a, const Holder& b) {
    return std::tie(a.pod, a.rank, a.group, a.tier, a.speculative) <
           std::tie(b.pod, b.rank, b.group, b.tier, b.speculative);
  });
}

}  // namespace

std::vector<std::vector<Holder>> Index::holders(const uint64_t* keys, size_t count, const Pods& pods) const {
  const auto topology = this->topology();
  std::vector<bool> of_pod;
  wanted(*topology, pods, of_pod);
  std::vector<std::vector<Holder>> result(count);
  std::vector<Holding> found;
  for (size_t i = 0; i < count; ++i) {
    found.clear();
    visit(keys[i], [&](uint32_t lane, uint8_t tiers) { found.push_back({lane, tiers}); });
    for (const Holding& each : found) append_holders(*topology, each.lane, each.tiers, of_pod, result[i]);
  }
  append_placed(*topology, keys, count, of_pod, result);
  for (auto& each : result) order(each);
  return result;
}

void Index::append_placed(const Topology& topology, const uint64_t* keys, size_t count, const std::vector<bool>& of_pod,
                          std::vector<std::vector<Holder>>& holders) const {
  const uint64_t now = placements_.any() ? placements_.now() : 0;
  for (const auto& place : placements_.places()) {
    if (place.stream >= topology.streams.size()) continue;
    const StreamPlace& stream = topology.streams[place.stream];
    if (!stream.alive || stream.pod != place.pod || !of_pod[stream.pod]) continue;
    for (size_t at = 0; at < count; at += Placements::kSlice) {
      uint64_t placed = placements_.placed(place, keys + at, std::min(Placements::kSlice, count - at), now);
      for (; placed != 0; placed &= placed - 1)
        holders[at + static_cast<size_t>(std::countr_zero(placed))].push_back(
            {topology.pods[stream.pod].name, stream.rank, 0, 0, true});
    }
  }
}

std::vector<std::pair<uint64_t, std::vector<Holder>>> Index::holders_of_hashes(const std::vector<uint64_t>& hashes,
                                                                               const Pods& pods) const {
  std::vector<std::pair<uint64_t, std::vector<Holder>>> result(hashes.size());
  std::vector<Holding> found;
  for (const auto& stream : live_streams()) {
    std::vector<std::vector<Holding>> of_hash(hashes.size());
    {
      const auto lock = stream->read_lock();
      for (size_t i = 0; i < hashes.size(); ++i) {
        const uint64_t key = stream->find(hashes[i], of_hash[i]);
        if (key != 0) result[i].first = key;
      }
    }
    const auto topology = this->topology();
    std::vector<bool> of_pod;
    wanted(*topology, pods, of_pod);
    for (size_t i = 0; i < hashes.size(); ++i)
      for (const Holding& each : of_hash[i]) append_holders(*topology, each.lane, each.tiers, of_pod, result[i].second);
  }
  for (auto& each : result) order(each.second);
  return result;
}

}  // namespace kvindex
