#include "key_table.hpp"

#include <cmath>

#include "memory.hpp"

namespace kvindex {
namespace {

constexpr uint64_t kLow = 0x0101010101010101ULL, kHigh = kLow << 7;

// 0 means an empty entry.
constexpr uint64_t tag_of(uint64_t key) { return (key & 0xFF) == 0 ? 1 : key & 0xFF; }

// The high bit of every byte that equals the tag; bytes above an equal one may be reported too, which costs a look.
constexpr uint64_t equal(uint64_t tags, uint64_t tag) {
  const uint64_t differing = tags ^ (tag * kLow);
  return (differing - kLow) & ~differing & kHigh;
}

// A table is halved at once: by one level at a time, each entry that goes would have two others moved.
constexpr uint32_t kShrinkLevels = 2;

constexpr uint64_t kUpperTags = 0x80808080ULL;  // the high bits of tags 8 to 11
constexpr uint64_t kPassedOne = uint64_t{1} << 32;

}  // namespace

KeyTable::KeyTable(const ChunkPool& pool, Epoch& epoch, std::atomic<int64_t>& bytes)
    : pool_(pool), epoch_(epoch), bytes_(bytes) {}

KeyTable::~KeyTable() {
  for (Shard& each : shards_) {
    Table* table = each.table.load();
    if (table != nullptr) give_table(table);
  }
}

size_t KeyTable::bytes_of(uint64_t buckets) { return 64 + buckets * sizeof(Bucket); }

int64_t KeyTable::footprint_of(uint64_t buckets) {
  return static_cast<int64_t>(footprint(bytes_of(buckets)) + footprint(sizeof(Table)));
}

void KeyTable::give_table(Table* table) {
  give_memory(table->memory, bytes_of(table->size));
  give_memory(table, sizeof(Table));
}

// Sizes grow by the square root of two, each shard at another time, so that the table as a whole is always as full.
uint64_t KeyTable::buckets_at(const Shard& shard, uint32_t level) const {
  const double phase = static_cast<double>(&shard - shards_.data()) / kShards;
  return static_cast<uint64_t>(std::exp2((level + phase) / 2));
}

inline KeyTable::Bucket& KeyTable::home(const Table& table, uint64_t key, uint64_t& at) {
  at = ((key >> 24 & 0xFFFFFFFFU) * table.size) >> 32;
  return table.buckets[at];
}

// Only the holder of the shard's lock writes, so no atomic addition is needed.
inline void KeyTable::pass(Bucket& bucket, uint64_t entries) {
  bucket.tags[1].store(bucket.tags[1].load(std::memory_order_relaxed) + entries, std::memory_order_release);
}

void KeyTable::prefetch(uint64_t key) const {
  const Table* table = shard(key).table.load();  // as in `find`: what it points to is read
  if (table == nullptr) return;
  uint64_t at;
  __builtin_prefetch(&home(*table, key, at));
}

Node KeyTable::find(uint64_t key) const {
  const Table* table = shard(key).table.load();
  return table == nullptr ? 0 : find_in(*table, key);
}

inline Node KeyTable::find_in(const Table& table, uint64_t key) const {
  const uint64_t tag = tag_of(key);
  uint64_t at;
  const Bucket* bucket = &home(table, key, at);
  for (uint64_t looked = 0; looked < table.size; ++looked) {
    const uint64_t lower = bucket->tags[0].load(std::memory_order_acquire);
    const uint64_t upper = bucket->tags[1].load(std::memory_order_acquire);
    const auto check = [&](uint64_t hits, uint32_t first) -> Node {
      for (; hits != 0; hits &= hits - 1) {
        const uint32_t entry = first + static_cast<uint32_t>(std::countr_zero(hits)) / 8;
        const Node node = bucket->nodes[entry].load(std::memory_order_relaxed);
        const Chunk* chunk = pool_.of(node);
        if (chunk != nullptr && chunk->has(node % kSlots, key)) return node;
      }
      return 0;
    };
    if (const Node node = check(equal(lower, tag), 0)) return node;
    if (const Node node = check(equal(upper, tag) & kUpperTags, 8)) return node;
    if (upper < kPassedOne) return 0;
    if (++at == table.size) at = 0;
    bucket = &table.buckets[at];
  }
  return 0;
}

inline void KeyTable::put(Table& table, uint64_t key, Node node) {
  uint64_t at;
  Bucket* bucket = &home(table, key, at);
  for (;;) {
    for (uint32_t half = 0; half < 2; ++half) {
      const uint64_t tags = bucket->tags[half].load(std::memory_order_relaxed);
      uint64_t empty = equal(tags, 0);
      if (half == 1) empty &= kUpperTags;
      if (empty == 0) continue;
      const auto shift = static_cast<uint32_t>(std::countr_zero(empty)) / 8 * 8;
      bucket->nodes[half * 8 + shift / 8].store(node, std::memory_order_relaxed);
      bucket->tags[half].store(tags | tag_of(key) << shift, std::memory_order_release);
      return;
    }
    pass(*bucket, kPassedOne);
    if (++at == table.size) at = 0;
    bucket = &table.buckets[at];
  }
}

bool KeyTable::insert(uint64_t key, Node node) {
  Shard& home_shard = shard(key);
  Table* table = home_shard.table.load(std::memory_order_relaxed);
  if (table != nullptr && find_in(*table, key) != 0) return false;
  if (table == nullptr || home_shard.used == home_shard.grow_at) {
    uint32_t level = home_shard.level;
    while (table != nullptr && buckets_at(home_shard, level) <= table->size) ++level;
    resize(home_shard, level);
    table = home_shard.table.load(std::memory_order_relaxed);
  }
  put(*table, key, node);
  ++home_shard.used;
  return true;
}

void KeyTable::erase(uint64_t key, Node node) {
  Shard& home_shard = shard(key);
  Table& table = *home_shard.table.load(std::memory_order_relaxed);
  const uint64_t tag = tag_of(key);
  uint64_t at;
  Bucket* bucket = &home(table, key, at);
  const uint64_t first = at;
  for (;;) {
    for (uint32_t half = 0; half < 2; ++half) {
      const uint64_t tags = bucket->tags[half].load(std::memory_order_relaxed);
      for (uint64_t hits = equal(tags, tag) & (half == 1 ? kUpperTags : kHigh); hits != 0; hits &= hits - 1) {
        const auto shift = static_cast<uint32_t>(std::countr_zero(hits)) / 8 * 8;
        if ((tags >> shift & 0xFF) != tag ||
            bucket->nodes[half * 8 + shift / 8].load(std::memory_order_relaxed) != node)
          continue;
        bucket->tags[half].store(tags & ~(uint64_t{0xFF} << shift), std::memory_order_release);
        for (uint64_t passed = first; passed != at; passed = passed + 1 == table.size ? 0 : passed + 1)
          pass(table.buckets[passed], -kPassedOne);
        --home_shard.used;
        if (home_shard.used < home_shard.shrink_below) resize(home_shard, home_shard.level - kShrinkLevels);
        return;
      }
    }
    if (++at == table.size) at = 0;
    bucket = &table.buckets[at];
  }
}

void KeyTable::resize(Shard& of, uint32_t level) {
  Table* old = of.table.load(std::memory_order_relaxed);
  const uint64_t size = buckets_at(of, level);
  void* memory = take_memory(bytes_of(size));
  auto* buckets = reinterpret_cast<Bucket*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  auto* made = new (take_memory(sizeof(Table))) Table{size, buckets, memory};
  int64_t grown = footprint_of(size);
  const auto each_node = [&](uint64_t bucket, auto visit) {
    const Bucket& from = old->buckets[bucket];
    for (uint32_t i = 0; i < Bucket::kEntries; ++i)
      if ((from.tags[i / 8].load(std::memory_order_relaxed) >> i % 8 * 8 & 0xFF) != 0)
        visit(from.nodes[i].load(std::memory_order_relaxed));
  };
  const auto key = [&](Node node) -> std::atomic<uint64_t>& { return pool_.of(node)->keys[node % kSlots]; };
  if (old != nullptr) {
    constexpr uint64_t kAhead = 3;  // keys lie anywhere: ask for them early
    for (uint64_t i = 0; i < old->size; ++i) {
      if (i + kAhead < old->size) each_node(i + kAhead, [&](Node node) { __builtin_prefetch(&key(node)); });
      each_node(i, [&](Node node) { put(*made, key(node).load(std::memory_order_relaxed), node); });
    }
    grown -= footprint_of(old->size);
  }
  of.level = level;
  of.grow_at = size * Bucket::kEntries * 9 / 10;
  const uint64_t smaller = level < kShrinkLevels ? size : buckets_at(of, level - kShrinkLevels);
  of.shrink_below = smaller == size ? 0 : smaller * Bucket::kEntries * 3 / 4;
  of.table.store(made);
  if (old != nullptr)
    epoch_.retire([](void*, void* object, uint64_t) { give_table(static_cast<Table*>(object)); }, nullptr, old, 0);
  bytes_.fetch_add(grown, std::memory_order_relaxed);
}

}  // namespace kvindex
