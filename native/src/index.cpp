#include "index.hpp"

#include <algorithm>
#include <tuple>

#include "stream.hpp"

namespace kvindex {

Index::Index(uint32_t block_size, uint64_t seed, uint64_t max_claims, uint64_t max_bytes)
    : block_size_(block_size), seed_(seed), max_claims_(max_claims), max_bytes_(max_bytes) {
  auto* first = new Topology;
  first->lanes.emplace_back();
  topology_ = first;
}

Index::~Index() { delete topology_.load(); }

uint64_t Index::bytes() const { return sizeof(Index) + static_cast<uint64_t>(std::max<int64_t>(0, blocks_.bytes())); }

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

uint64_t Index::claim(uint64_t count) {
  if (max_bytes_ != 0 && bytes() >= max_bytes_) return 0;
  const uint64_t before = claims_.fetch_add(count, std::memory_order_relaxed);
  if (max_claims_ == 0 || before + count <= max_claims_) return count;
  const uint64_t granted = before < max_claims_ ? max_claims_ - before : 0;
  unclaim(count - granted);
  return granted;
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
    uint32_t number = 0;
    change_topology([&](Topology& next) {
      auto found = next.pod_of_name.find(pod);
      if (found == next.pod_of_name.end()) {
        const std::string_view name = names_.emplace_back(pod);
        found = next.pod_of_name.emplace(name, static_cast<uint32_t>(next.pods.size())).first;
        next.pods.push_back({name, {}});
      }
      if (free_streams_.empty()) {
        number = static_cast<uint32_t>(next.streams.size());
        next.streams.emplace_back();
        stream_objects_.emplace_back();
      } else {
        number = free_streams_.back();
        free_streams_.pop_back();
      }
      next.streams[number] = {found->second, rank, true, {}, {}};
      next.pods[found->second].streams.push_back(number);
    });
    made = std::make_shared<Stream>(shared_from_this(), number);
    stream_objects_[number] = made;
  }
  blocks_.epoch().collect();
  return made;
}

void Index::close_stream(uint32_t stream) {
  {
    std::lock_guard lock(topology_mutex_);
    change_topology([&](Topology& next) {
      StreamPlace& place = next.streams[stream];
      auto& of_pod = next.pods[place.pod].streams;
      of_pod.erase(std::remove(of_pod.begin(), of_pod.end(), stream), of_pod.end());
      place = {};
    });
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
  const auto pin = blocks_.epoch().pin();
  Walk walk(blocks_, *topology_.load(), pods, weights);
  walk.advance(keys, count);
  return walk.finish(block_size());
}

std::vector<Match> Index::score_tokens(const uint32_t* tokens, size_t count, const Pods& pods,
                                       const std::vector<double>& weights, const QueryExtras& extras) const {
  constexpr size_t kFirst = 4, kMost = 256;  // blocks hashed ahead of the walk: few at first, for those who miss early
  const auto pin = blocks_.epoch().pin();
  Walk walk(blocks_, *topology_.load(), pods, weights);
  const uint32_t size = block_size();
  const size_t blocks = size == 0 ? 0 : count / size;
  uint64_t keys[kMost];
  uint64_t parent = 0;
  size_t ahead = kFirst;
  for (size_t begin = 0; begin < blocks && walk.alive(); begin += ahead) {
    if (begin > 0) ahead = std::min(ahead * 2, kMost);
    const size_t end = std::min(blocks, begin + ahead);
    block_keys(tokens, begin, end, size, parent, seed_, extras, keys);
    parent = keys[end - begin - 1];
    walk.advance(keys, end - begin);
  }
  return walk.finish(size);
}

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
    return std::tie(a.pod, a.rank, a.group, a.tier) < std::tie(b.pod, b.rank, b.group, b.tier);
  });
}

// What a key's holders are at one moment.
void holdings_of(const Blocks& blocks, uint64_t key, std::vector<Holding>& out) {
  for (;;) {
    out.clear();
    const Node node = blocks.find(key);
    if (node == 0) return;
    const Chunk* chunk = blocks.chunk_of(node);
    if (chunk == nullptr) continue;  // its slab went just now
    const uint32_t version = chunk->version.load(std::memory_order_acquire);
    if (!chunk->has(node % kSlots, key)) continue;
    chunk->each_holder([&](HolderId holder, uint64_t mask) {
      if (mask >> node % kSlots & 1) out.push_back({lane_of(holder), static_cast<uint8_t>(1U << tier_of(holder))});
    });
    if (chunk->version.load(std::memory_order_acquire) == version) return;
  }
}

}  // namespace

std::vector<std::vector<Holder>> Index::holders(const uint64_t* keys, size_t count, const Pods& pods) const {
  const auto pin = blocks_.epoch().pin();
  const Topology& topology = *topology_.load();
  std::vector<bool> of_pod;
  wanted(topology, pods, of_pod);
  std::vector<std::vector<Holder>> result(count);
  std::vector<Holding> found;
  for (size_t i = 0; i < count; ++i) {
    holdings_of(blocks_, keys[i], found);
    for (const Holding& each : found) append_holders(topology, each.lane, each.tiers, of_pod, result[i]);
    order(result[i]);
  }
  return result;
}

std::vector<std::pair<uint64_t, std::vector<Holder>>> Index::holders_of_hashes(const std::vector<uint64_t>& hashes,
                                                                               const Pods& pods) const {
  std::vector<std::pair<uint64_t, std::vector<Holder>>> result(hashes.size());
  for (const auto& stream : live_streams()) {
    std::vector<std::vector<Holding>> of_hash(hashes.size());
    auto lock = stream->read_lock();
    const auto pin = blocks_.epoch().pin();  // lanes found keep their meaning while it lasts
    for (size_t i = 0; i < hashes.size(); ++i) {
      const uint64_t key = stream->find(hashes[i], of_hash[i]);
      if (key != 0) result[i].first = key;
    }
    lock.unlock();
    const Topology& topology = *topology_.load();
    std::vector<bool> of_pod;
    wanted(topology, pods, of_pod);
    for (size_t i = 0; i < hashes.size(); ++i)
      for (const Holding& each : of_hash[i]) append_holders(topology, each.lane, each.tiers, of_pod, result[i].second);
  }
  for (auto& each : result) order(each.second);
  return result;
}

}  // namespace kvindex
