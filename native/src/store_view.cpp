#include "store_view.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>

#include "changes.hpp"
#include "lengthening.hpp"
#include "placements.hpp"

namespace kvindex {
namespace {

constexpr size_t kGroupBytes = 9, kHolderBytes = 8;
// The store has left out those whose time is over; here they need to last for one query.
constexpr uint64_t kOneQuery = uint64_t{3600} * 1'000'000'000;

}  // namespace

StoreView::StoreView(const std::vector<StoredStream>& streams) {
  topology_.lanes.emplace_back();
  for (const StoredStream& stream : streams) {
    const uint32_t pod = names_.add(stream.pod);
    if (pod == topology_.pods.size()) topology_.pods.push_back({names_.name(pod), {}});
    const auto number = static_cast<uint32_t>(topology_.streams.size());
    topology_.pods[pod].streams.push_back(number);
    Place place{number, {}, stream.tiers};
    for (size_t at = 0; at + kGroupBytes <= stream.groups.size() && place.lanes.size() < kMaxGroups;
         at += kGroupBytes) {
      const char* group = stream.groups.data() + at;
      Lane lane;
      lane.stream = number;
      lane.alive = true;
      std::memcpy(&lane.group, group, 4);
      const auto kind = static_cast<uint8_t>(group[4]);
      lane.kind = kind < static_cast<uint8_t>(GroupKind::kUnknown) ? static_cast<GroupKind>(kind) : GroupKind::kUnknown;
      std::memcpy(&lane.window, group + 5, 4);
      place.lanes.push_back(static_cast<uint32_t>(topology_.lanes.size()));
      topology_.lanes.push_back(lane);
    }
    topology_.streams.push_back({pod, stream.rank, true, {}, place.lanes});
    of_life_[stream.life] = std::move(place);
  }
  topology_.settle();
}

template <typename Visit, typename VisitPlaced>
bool StoreView::each(const uint64_t* keys, size_t count, const std::vector<Reading>& readings, Visit visit,
                     VisitPlaced visit_placed) const {
  const auto partitions = static_cast<uint32_t>(readings.size());
  std::vector<Reading> left(readings);
  std::vector<bool> ended(partitions);
  // Neighbouring keys have mostly the same holders.
  uint64_t last_life = 0;
  const Place* place = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t partition = partition_of(keys[i], partitions);
    Reading& reading = left[partition];
    if (ended[partition] || reading.empty()) {
      ended[partition] = true;
      continue;
    }
    if (reading.size() < 2) return false;
    const size_t holders = static_cast<uint8_t>(reading[0]) | static_cast<size_t>(static_cast<uint8_t>(reading[1]))
                                                                  << 8;
    reading.remove_prefix(2);
    if (reading.size() < holders * kHolderBytes) return false;
    for (size_t n = 0; n < holders; ++n, reading.remove_prefix(kHolderBytes)) {
      uint64_t life = 0;
      std::memcpy(&life, reading.data(), 6);
      if (life != last_life) {
        const auto found = of_life_.find(life);
        place = found == of_life_.end() ? nullptr : &found->second;
        last_life = life;
      }
      if (place == nullptr || keys[i] == 0) continue;
      const auto group = static_cast<uint8_t>(reading[6]);
      if (reading[7] == 0) {
        visit_placed(i, place->stream);
        continue;
      }
      if (group >= place->lanes.size()) continue;
      uint8_t tiers = 0;
      for (uint32_t t = 0; t < kMaxTiers; ++t)
        if ((static_cast<uint8_t>(reading[7]) >> t & 1) != 0 && place->tiers[t] < kMaxTiers)
          tiers |= static_cast<uint8_t>(1U << place->tiers[t]);
      if (tiers != 0) visit(i, place->lanes[group], tiers);
    }
  }
  return std::all_of(left.begin(), left.end(), [](Reading reading) { return reading.empty(); });
}

std::unique_ptr<Blocks> StoreView::borrow() {
  std::lock_guard lock(mutex_);
  if (free_.empty()) return std::make_unique<Blocks>();
  auto blocks = std::move(free_.back());
  free_.pop_back();
  return blocks;
}

std::vector<Match> StoreView::lengthened(Walk& walk, std::vector<std::pair<uint32_t, uint64_t>>& placed,
                                         const Blocks& blocks, const uint64_t* keys, size_t count,
                                         uint32_t block_size) const {
  Placements placements(std::numeric_limits<uint64_t>::max());
  std::stable_sort(placed.begin(), placed.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<uint64_t> of_stream;
  for (size_t i = 0; i < placed.size(); ++i) {
    of_stream.push_back(placed[i].second);
    if (i + 1 < placed.size() && placed[i + 1].first == placed[i].first) continue;
    const uint32_t stream = placed[i].first;
    placements.record({topology_.streams[stream].pod, stream}, 0, of_stream, kOneQuery, false);
    of_stream.clear();
  }
  PromptKeys prompt(keys, count);
  const Lengthening lengthening(placements, blocks, topology_, prompt);
  return walk.finish(block_size, &lengthening);
}

bool StoreView::score(const uint64_t* keys, size_t count, const std::vector<Reading>& readings, uint32_t block_size,
                      const Pods& pods, const std::vector<double>& weights, std::vector<Match>& matches) {
  struct Run {
    size_t begin = 0, end = 0;  // end 0: none yet
  };
  auto borrowed = borrow();
  Blocks& blocks = *borrowed;
  Blocks::Pen pen;
  std::vector<Run> runs(topology_.lanes.size() * kMaxTiers);  // by holder
  std::vector<std::pair<uint32_t, uint64_t>> placed;          // stream, key
  std::vector<HolderId> seen;
  std::vector<Filled> filled;
  std::vector<Node> nodes(count);
  const auto is_new = std::make_unique<bool[]>(count);
  bool well_formed;
  {
    const auto pin = blocks.epoch().pin();
    const auto lay = [&](HolderId holder, Run run) {
      const size_t length = run.end - run.begin;
      blocks.hold(keys + run.begin, length, 0, holder, pen, nodes.data(), is_new.get());
      for (size_t i = 0; i < length; ++i) {
        if (!is_new[i]) continue;
        const uint32_t chunk = nodes[i] / kSlots;
        if (filled.empty() || filled.back().chunk != chunk || filled.back().holder != holder)
          filled.push_back({chunk, holder, 0});
        filled.back().bits |= bits_from(nodes[i] % kSlots, 1);
      }
    };
    const auto visit = [&](size_t i, uint32_t lane, uint8_t tiers) {
      for (uint32_t t = 0; t < kMaxTiers; ++t) {
        if ((tiers >> t & 1) == 0) continue;
        const HolderId holder = holder_id(lane, t);
        Run& run = runs[holder];
        if (run.end == 0) {
          seen.push_back(holder);
          run.begin = i;
        } else if (run.end != i) {
          lay(holder, run);
          run.begin = i;
        }
        run.end = i + 1;
      }
    };
    well_formed =
        each(keys, count, readings, visit, [&](size_t i, uint32_t stream) { placed.emplace_back(stream, keys[i]); });
    for (const HolderId holder : seen) lay(holder, runs[holder]);
    if (well_formed) {
      const std::vector<uint32_t> numbers = names_.numbers(pods);
      Walk walk(blocks, topology_, pods.empty() ? Wanted::all() : Wanted::only(numbers), weights);
      walk.advance(keys, count);
      matches =
          placed.empty() ? walk.finish(block_size, nullptr) : lengthened(walk, placed, blocks, keys, count, block_size);
    }
    for (const auto& [chunk, holder, bits] : filled) blocks.release(chunk, bits, holder);
    blocks.lay_down(pen);
  }
  blocks.epoch().collect();
  std::lock_guard lock(mutex_);
  free_.push_back(std::move(borrowed));
  return well_formed;
}

bool StoreView::holders(const uint64_t* keys, size_t count, const std::vector<Reading>& readings, const Pods& pods,
                        std::vector<std::vector<Holder>>& found) const {
  std::vector<bool> of_pod(topology_.pods.size(), pods.empty());
  for (const std::string& name : pods)
    if (const uint32_t number = names_.find(name); number < of_pod.size()) of_pod[number] = true;
  found.assign(count, {});
  const auto visit = [&](size_t i, uint32_t lane, uint8_t tiers) {
    const Lane& info = topology_.lanes[lane];
    const StreamPlace& stream = topology_.streams[info.stream];
    if (!of_pod[stream.pod]) return;
    for (uint32_t t = 0; t < kMaxTiers; ++t)
      if ((tiers >> t & 1) != 0) found[i].push_back({topology_.pods[stream.pod].name, stream.rank, t, info.group});
  };
  const bool well_formed = each(keys, count, readings, visit, [&](size_t i, uint32_t number) {
    const StreamPlace& stream = topology_.streams[number];
    if (of_pod[stream.pod]) found[i].push_back({topology_.pods[stream.pod].name, stream.rank, 0, 0, true});
  });
  for (auto& of_key : found)
    std::sort(of_key.begin(), of_key.end(), [](const Holder& a, const Holder& b) {
      return std::tie(a.pod, a.rank, a.group, a.tier, a.speculative) <
             std::tie(b.pod, b.rank, b.group, b.tier, b.speculative);
    });
  return well_formed;
}

std::vector<std::string> split_keys(const uint64_t* keys, size_t count, uint32_t partitions) {
  std::vector<std::string> split(partitions);
  for (size_t i = 0; i < count; ++i)
    split[partition_of(keys[i], partitions)].append(reinterpret_cast<const char*>(&keys[i]), sizeof keys[i]);
  return split;
}

}  // namespace kvindex
