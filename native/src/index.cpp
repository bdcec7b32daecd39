#include "index.hpp"

#include <algorithm>
#include <bit>
#include <mutex>
#include <tuple>

#include "lengthening.hpp"
#include "stream.hpp"

namespace kvindex {

Index::Index(uint32_t block_size, uint64_t seed, uint64_t max_claims, uint64_t max_placements, uint64_t max_bytes,
             uint64_t max_removals, uint64_t max_claims_per_stream)
    : block_size_(block_size),
      is_size_given_(block_size != 0),
      seed_(seed),
      max_claims_(max_claims),
      max_bytes_(max_bytes),
      max_removals_(max_removals),
      max_claims_per_stream_(max_claims_per_stream),
      placements_(max_placements) {
  auto* first = new Topology;
  first->lanes.emplace_back();
  topology_ = first;
}

Index::~Index() { delete topology_.load(); }

uint64_t Index::bytes() const {
  return sizeof(Index) + placements_.bytes() + static_cast<uint64_t>(std::max<int64_t>(0, blocks_.bytes()));
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

uint32_t Index::set_block_size(uint32_t size) {
  while (!is_size_given_) {
    uint64_t added;
    {
      std::lock_guard lock(topology_mutex_);
      added = streams_added_;
    }
    // Streams take the topology's mutex under their own, so theirs come first.
    const auto streams = live_streams();
    std::vector<std::unique_lock<std::mutex>> locks;
    locks.reserve(streams.size());
    for (const auto& stream : streams) locks.push_back(stream->read_lock());
    std::lock_guard lock(topology_mutex_);
    if (streams_added_ != added) continue;
    if (claims() == 0) block_size_.store(size);
    break;
  }
  return learn_block_size(size);
}

bool Index::is_full() const { return max_bytes_ != 0 && bytes() >= max_bytes_; }

uint64_t Index::claim(uint64_t count) {
  if (is_full()) return 0;
  const uint64_t before = claims_.fetch_add(count, std::memory_order_relaxed) + wide_.load(std::memory_order_relaxed);
  if (max_claims_ == 0 || before + count <= max_claims_) return count;
  const uint64_t granted = before < max_claims_ ? max_claims_ - before : 0;
  unclaim(count - granted);
  return granted;
}

bool Index::widen(uint64_t count) {
  if (is_full()) return false;
  const uint64_t before = wide_.fetch_add(count, std::memory_order_relaxed) + claims();
  if (max_claims_ == 0 || before + count <= max_claims_) return true;
  unwiden(count);
  return false;
}

// --- topology ---

// Under the mutex. Readers that pinned before still use the old value.
template <typename Change>
void Index::change_topology(Change change) {
  const Topology* old = topology_.load();
  auto* next = new Topology(*old);
  change(*next);
  next->settle();
  topology_.store(next);
  blocks_.epoch().retire([](void*, void* object, uint64_t) { delete static_cast<Topology*>(object); }, nullptr,
                         const_cast<Topology*>(old), 0);
}

std::shared_ptr<Stream> Index::add_stream(const std::string& pod, uint32_t rank) {
  std::shared_ptr<Stream> made;
  {
    std::lock_guard lock(topology_mutex_);
    ++streams_added_;
    uint32_t number = 0, pod_number = 0;
    change_topology([&](Topology& next) {
      pod_number = names_->add(pod);
      while (next.pods.size() <= pod_number)
        next.pods.push_back({names_->name(static_cast<uint32_t>(next.pods.size())), {}});
      if (free_streams_.empty()) {
        number = static_cast<uint32_t>(next.streams.size());
        next.streams.emplace_back();
        stream_objects_.emplace_back();
      } else {
        number = free_streams_.back();
        free_streams_.pop_back();
      }
      next.streams[number] = {pod_number, rank, true, {}, {}};
      next.pods[pod_number].streams.push_back(number);
    });
    made = std::make_shared<Stream>(shared_from_this(), pod_number, number);
    stream_objects_[number] = made;
  }
  blocks_.epoch().collect();
  return made;
}

void Index::close_stream(uint32_t stream) {
  {
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
  blocks_.epoch().collect();
}

uint32_t Index::open_lane(uint32_t stream, uint32_t group, GroupKind kind, uint32_t window) {
  std::lock_guard lock(topology_mutex_);
  uint32_t lane = 0;
  change_topology([&](Topology& next) {
    {
      std::lock_guard free_lock(free_lanes_mutex_);
      if (!free_lanes_.empty()) {
        lane = free_lanes_.back();
        free_lanes_.pop_back();
      }
    }
    if (lane == 0) {
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

// A lane's number is used again only when no query can still see the topology it was alive in.
void Index::free_lanes(const std::vector<uint32_t>& lanes) {
  for (const uint32_t lane : lanes)
    blocks_.epoch().retire(
        [](void* owner, void*, uint64_t number) {
          auto* index = static_cast<Index*>(owner);
          std::lock_guard lock(index->free_lanes_mutex_);
          index->free_lanes_.push_back(static_cast<uint32_t>(number));
        },
        this, nullptr, lane);
}

std::vector<std::shared_ptr<Stream>> Index::live_streams() const {
  std::lock_guard lock(topology_mutex_);
  std::vector<std::shared_ptr<Stream>> live;
  for (const auto& each : stream_objects_)
    if (auto stream = each.lock()) live.push_back(std::move(stream));
  return live;
}

// --- queries ---

std::vector<Match> Index::score(const uint64_t* keys, size_t count, const Pods& pods,
                                const std::vector<double>& weights) const {
  const std::vector<uint32_t> numbers = names_->numbers(pods);
  return score(keys, count, pods.empty() ? Wanted::all() : Wanted::only(numbers), weights);
}

std::vector<Match> Index::score(const uint64_t* keys, size_t count, Wanted pods,
                                const std::vector<double>& weights) const {
  PromptKeys known(keys, count);
  return match(known, count, pods, weights);
}

// Hashing runs ahead of the walk by `ahead` blocks at first.
std::vector<Match> Index::match(PromptKeys& keys, size_t ahead, Wanted pods, const std::vector<double>& weights) const {
  constexpr size_t kMost = 256;
  const auto pin = blocks_.epoch().pin();
  const Topology& topology = *topology_.load();
  Walk walk(blocks_, topology, pods, weights);
  for (size_t at = 0; at < keys.count() && walk.alive();) {
    const size_t end = std::min(keys.count(), at + ahead);
    walk.advance(keys.upto(end) + at, end - at);
    at = end;
    ahead = std::min(ahead * 2, kMost);
  }
  if (!placements_.any()) return walk.finish(block_size(), nullptr);
  const Lengthening lengthening(placements_, blocks_, topology, keys);
  return walk.finish(block_size(), &lengthening);
}

std::vector<Match> Index::score_tokens(const uint32_t* tokens, size_t count, const Pods& pods,
                                       const std::vector<double>& weights, const QueryExtras& extras) const {
  const std::vector<uint32_t> numbers = names_->numbers(pods);
  return score_tokens(tokens, count, pods.empty() ? Wanted::all() : Wanted::only(numbers), weights, extras);
}

std::vector<Match> Index::score_tokens(const uint32_t* tokens, size_t count, Wanted pods,
                                       const std::vector<double>& weights, const QueryExtras& extras) const {
  constexpr size_t kFirst = 4;  // few, for those who miss early
  thread_local std::vector<uint64_t> room;
  const uint32_t size = block_size();
  PromptKeys keys(tokens, size == 0 ? 0 : count / size, size, seed_, extras, room);
  auto matches = match(keys, kFirst, pods, weights);
  constexpr size_t kKeep = 1U << 16;
  if (room.capacity() > kKeep) std::vector<uint64_t>().swap(room);  // one very large prompt does not keep its memory
  return matches;
}

namespace {

void wanted(const Topology& topology, const PodNames& names, const Pods& pods, std::vector<bool>& of_pod) {
  of_pod.assign(topology.pods.size(), pods.empty());
  for (const std::string& name : pods)
    if (const uint32_t number = names.find(name); number < of_pod.size()) of_pod[number] = true;
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
  const auto pin = blocks_.epoch().pin();
  const Topology& topology = *topology_.load();
  std::vector<bool> of_pod;
  wanted(topology, *names_, pods, of_pod);
  std::vector<std::vector<Holder>> result(count);
  std::vector<Holding> found;
  for (size_t i = 0; i < count; ++i) {
    holdings_of(blocks_, keys[i], found);
    for (const Holding& each : found) append_holders(topology, each.lane, each.tiers, of_pod, result[i]);
  }
  if (placements_.any()) append_placed(topology, keys, count, of_pod, result);
  for (auto& each : result) order(each);
  return result;
}

void Index::append_placed(const Topology& topology, const uint64_t* keys, size_t count, const std::vector<bool>& of_pod,
                          std::vector<std::vector<Holder>>& holders) const {
  const uint64_t now = placements_.now();
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

// --- placements ---

namespace {

struct Rank {
  Placements::Place place;
  uint32_t rank;
};

// The streams of a pod; none when it is not there.
std::vector<Rank> ranks_of(const Topology& topology, uint32_t pod) {
  std::vector<Rank> ranks;
  if (pod >= topology.pods.size()) return ranks;
  for (const uint32_t stream : topology.pods[pod].streams)
    ranks.push_back({{pod, stream}, topology.streams[stream].rank});
  return ranks;
}

const Rank* find_rank(const std::vector<Rank>& ranks, int64_t rank) {
  for (const Rank& each : ranks)
    if (each.rank == rank) return &each;
  return nullptr;
}

}  // namespace

Placed Index::place(const std::string& pod, int64_t rank, const uint64_t* keys, size_t count, uint64_t ttl) {
  const uint32_t number = names_->find(pod);
  const auto ranks = [&] {
    const auto pin = blocks_.epoch().pin();
    return ranks_of(*topology_.load(), number);
  };
  const auto is_held = [&](uint32_t stream, uint64_t key) {
    const auto pin = blocks_.epoch().pin();
    const Topology& topology = *topology_.load();
    return stream < topology.streams.size() && held_by(blocks_, topology, stream, key) != 0;
  };
  const std::vector<Rank> before = ranks();
  if (before.empty()) return {Placed::Outcome::kNoPod, 0, 0};
  const bool guessed = rank < 0 && before.size() > 1;
  if (rank < 0) {
    // The one that matches best; without any match the lowest.
    const auto matches = score(keys, count, Pods{pod}, {1.0});
    const auto lowest =
        std::min_element(before.begin(), before.end(), [](const Rank& a, const Rank& b) { return a.rank < b.rank; });
    rank = matches.empty() ? lowest->rank : matches[0].rank;
  }
  const Rank* found = find_rank(before, rank);
  if (found == nullptr) return {Placed::Outcome::kNoRank, 0, 0};
  const Placements::Place place = found->place;
  const uint64_t life = placements_.life(place);
  // The stream may have been closed, and its number given away, before its life was asked.
  const std::vector<Rank> after = ranks();
  const Rank* still = find_rank(after, rank);
  if (still == nullptr || still->place != place) return {Placed::Outcome::kNoPod, 0, 0};

  std::vector<uint64_t> missing;
  for (size_t i = 0; i < count; ++i)
    if (!is_held(place.stream, keys[i])) missing.push_back(keys[i]);
  const Placed placed{Placed::Outcome::kRecorded, static_cast<uint32_t>(rank), count - missing.size()};
  if (!placements_.record(place, life, missing, ttl, guessed)) return {Placed::Outcome::kNoRoom, placed.rank, 0};
  // An event that came between the question and the record had nothing to confirm.
  for (const uint64_t key : missing)
    if (is_held(place.stream, key)) placements_.confirm(place, key);
  return placed;
}

std::vector<HashHolders> Index::holders_of_hashes(const std::vector<uint64_t>& hashes, const Pods& pods) const {
  const std::vector<uint32_t> numbers = names_->numbers(pods);
  std::vector<HashHolders> result(hashes.size());
  for (const auto& stream : live_streams()) {
    if (!pods.empty() && std::find(numbers.begin(), numbers.end(), stream->pod()) == numbers.end()) continue;
    std::vector<std::vector<Holding>> of_hash(hashes.size());
    auto lock = stream->read_lock();
    const auto pin = blocks_.epoch().pin();  // lanes found keep their meaning while it lasts
    for (size_t i = 0; i < hashes.size(); ++i) {
      const uint64_t key = stream->find(hashes[i], of_hash[i]);
      if (key == 0) continue;
      result[i].disputed = result[i].disputed || (result[i].key != 0 && result[i].key != key);
      result[i].key = key;
    }
    lock.unlock();
    const Topology& topology = *topology_.load();
    std::vector<bool> of_pod;
    wanted(topology, *names_, pods, of_pod);
    for (size_t i = 0; i < hashes.size(); ++i)
      for (const Holding& each : of_hash[i]) append_holders(topology, each.lane, each.tiers, of_pod, result[i].holders);
  }
  for (auto& each : result) {
    if (each.disputed) each.key = 0;
    order(each.holders);
  }
  return result;
}

std::vector<Remembered> Index::removals(const std::string& pod, const uint64_t* keys, size_t count) const {
  std::vector<std::pair<uint32_t, std::shared_ptr<Stream>>> streams;
  {
    std::lock_guard lock(topology_mutex_);
    const Topology& topology = *topology_.load();
    for (const Rank& each : ranks_of(topology, names_->find(pod)))
      if (auto stream = stream_objects_[each.place.stream].lock()) streams.emplace_back(each.rank, std::move(stream));
  }
  std::vector<Remembered> all;
  for (const auto& [rank, stream] : streams) {
    const auto lock = stream->read_lock();
    Remembered& of = all.emplace_back(Remembered{rank, stream->removals().memory(), {}});
    of.found.resize(count);
    for (size_t i = 0; i < count; ++i) stream->removals().find(keys[i], of.found[i]);
  }
  return all;
}

}  // namespace kvindex
