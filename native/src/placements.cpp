#include "placements.hpp"

#include <algorithm>
#include <chrono>

namespace kvindex {

uint64_t Placements::now() const {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(since).count()) +
         ahead_.load(std::memory_order_relaxed);
}

uint64_t Placements::life(Place place) const {
  const Shard& home = shard(place);
  std::lock_guard lock(home.mutex);
  const auto found = home.lives.find(place.stream);
  return found == home.lives.end() ? 0 : found->second;
}

bool Placements::record(Place place, uint64_t life, const std::vector<uint64_t>& keys, uint64_t ttl, bool guessed) {
  if (keys.empty()) return true;
  // Room for all of them is taken first; those that are there already need none, and give it back.
  const uint64_t needed = blocks_.fetch_add(keys.size(), std::memory_order_relaxed) + keys.size();
  if (needed > max_blocks_ && needed - present(place, keys) > max_blocks_) {
    leave(keys.size());
    refused_.fetch_add(keys.size(), std::memory_order_relaxed);
    return false;
  }
  const uint64_t from = now();
  const Entry entry{from + ttl, guessed};
  Shard& home = shard(place);
  for (size_t at = 0; at < keys.size(); at += kBatch) {
    const size_t end = std::min(keys.size(), at + kBatch);
    std::lock_guard lock(home.mutex);
    const auto living = home.lives.find(place.stream);
    if ((living == home.lives.end() ? 0 : living->second) != life) {
      recorded_.fetch_add(keys.size() - at, std::memory_order_relaxed);
      fenced_.fetch_add(keys.size() - at, std::memory_order_relaxed);
      leave(keys.size() - at);
      return true;
    }
    Table& table = home.tables[place];
    if (sweep_some(table.blocks, table.hand, from, 2 * kBatch)) table.hand = 0;
    for (size_t i = at; i < end; ++i) add(table, keys[i], entry, from);
  }
  return true;
}

uint64_t Placements::present(Place place, const std::vector<uint64_t>& keys) const {
  const Shard& home = shard(place);
  uint64_t count = 0;
  for (size_t at = 0; at < keys.size(); at += kBatch) {
    std::lock_guard lock(home.mutex);
    const auto table = home.tables.find(place);
    if (table == home.tables.end()) break;
    for (size_t i = at; i < std::min(keys.size(), at + kBatch); ++i) count += table->second.blocks.count(keys[i]);
  }
  return count;
}

void Placements::add(Table& table, uint64_t key, Entry entry, uint64_t now) {
  const auto [found, is_new] = table.blocks.try_emplace(key, entry);
  Entry& known = found->second;
  if (is_new) {
    recorded_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  leave(1);
  if (known.ends <= now) {
    expired_.fetch_add(1, std::memory_order_relaxed);
    recorded_.fetch_add(1, std::memory_order_relaxed);
    known = entry;
    return;
  }
  renewed_.fetch_add(1, std::memory_order_relaxed);
  known.ends = std::max<uint64_t>(known.ends, entry.ends);
  known.guessed = known.guessed & entry.guessed;
}

void Placements::confirm(Place place, uint64_t key) {
  Shard& home = shard(place);
  std::lock_guard lock(home.mutex);
  for (auto at = home.tables.lower_bound({place.pod, 0}); at != home.tables.end() && at->first.pod == place.pod;) {
    const auto each = at++;
    Blocks& blocks = each->second.blocks;
    const auto found = blocks.find(key);
    if (found == blocks.end() || (each->first.stream != place.stream && !found->second.guessed)) continue;
    (found->second.ends <= now() ? expired_ : confirmed_).fetch_add(1, std::memory_order_relaxed);
    blocks.erase(found);
    leave(1);
    if (blocks.empty()) home.tables.erase(each);
  }
}

void Placements::drop(Place place) {
  Shard& home = shard(place);
  std::lock_guard lock(home.mutex);
  ++home.lives[place.stream];
  const auto found = home.tables.find(place);
  if (found == home.tables.end()) return;
  const uint64_t time = now();
  for (const auto& [key, entry] : found->second.blocks)
    (entry.ends <= time ? expired_ : fenced_).fetch_add(1, std::memory_order_relaxed);
  leave(found->second.blocks.size());
  home.tables.erase(found);
}

uint64_t Placements::placed(Place place, const uint64_t* keys, size_t count, uint64_t now) const {
  const Shard& home = shard(place);
  std::lock_guard lock(home.mutex);
  const auto table = home.tables.find(place);
  if (table == home.tables.end()) return 0;
  uint64_t bits = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto found = table->second.blocks.find(keys[i]);
    if (found != table->second.blocks.end() && now < found->second.ends) bits |= uint64_t{1} << i;
  }
  return bits;
}

std::vector<Placements::Place> Placements::places() const {
  std::vector<Place> all;
  if (!any()) return all;
  for (const Shard& each : shards_) {
    std::lock_guard lock(each.mutex);
    for (const auto& [place, table] : each.tables) all.push_back(place);
  }
  return all;
}

void Placements::sweep(uint64_t now) {
  if (!any()) return;
  for (Shard& each : shards_) {
    Place next{0, 0};
    size_t hand = 0;
    for (;;) {
      std::lock_guard lock(each.mutex);
      const auto at = each.tables.lower_bound(next);
      if (at == each.tables.end()) break;
      if (at->first != next) hand = 0;
      next = at->first;
      const bool done = sweep_some(at->second.blocks, hand, now, 2 * kBatch);
      const bool empty = at->second.blocks.empty();
      if (empty) each.tables.erase(at);
      if (!done && !empty) continue;
      ++next.stream;
      hand = 0;
    }
  }
}

bool Placements::sweep_some(Blocks& blocks, size_t& hand, uint64_t now, size_t buckets) {
  const size_t end = std::min(blocks.bucket_count(), hand + buckets);
  std::vector<uint64_t> over;
  for (; hand < end; ++hand)
    for (auto at = blocks.cbegin(hand); at != blocks.cend(hand); ++at)
      if (at->second.ends <= now) over.push_back(at->first);
  for (const uint64_t key : over) blocks.erase(key);
  expired_.fetch_add(over.size(), std::memory_order_relaxed);
  leave(over.size());
  return hand >= blocks.bucket_count();
}

Placements::Counts Placements::counts() const {
  const auto read = [](const std::atomic<uint64_t>& value) { return value.load(std::memory_order_relaxed); };
  return {read(blocks_),  read(recorded_), read(renewed_), read(confirmed_),
          read(expired_), read(fenced_),   read(refused_)};
}

}  // namespace kvindex
