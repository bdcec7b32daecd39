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
// From this level on a table has exactly half the buckets of the one two levels above.
constexpr uint32_t kExact = 12;

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
  const uint32_t doublings = level < kExact ? 0 : (level - kExact) / 2;
  return static_cast<uint64_t>(std::exp2((level - 2 * doublings + phase) / 2)) << doublings;
}

inline uint64_t KeyTable::home(uint64_t buckets, uint64_t key) { return ((key >> 24 & 0xFFFFFFFFU) * buckets) >> 32; }

// Only the holder of the shard's lock writes, so no atomic addition is needed.
inline void KeyTable::pass(Bucket& bucket, uint64_t entries) {
  bucket.tags[1].store(bucket.tags[1].load(std::memory_order_relaxed) + entries, std::memory_order_release);
}

void KeyTable::prefetch(uint64_t key) const {
  const Shard& of = shard(key);
  const uint64_t at = home(of.buckets_hint.load(std::memory_order_relaxed), key);
  __builtin_prefetch(
      reinterpret_cast<const void*>(of.first_hint.load(std::memory_order_relaxed) + at * sizeof(Bucket)));
}

Node KeyTable::find(uint64_t key) const {
  const Table* table = shard(key).table.load();
  return table == nullptr ? 0 : find_in(*table, key);
}

inline Node KeyTable::find_in(const Table& table, uint64_t key) const {
  const uint64_t tag = tag_of(key);
  uint64_t at = home(table.size, key);
  const Bucket* bucket = &table.buckets[at];
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

inline void KeyTable::put(Table& table, uint64_t at, uint64_t tag, Node node) {
  Bucket* bucket = &table.buckets[at];
  for (;;) {
    for (uint32_t half = 0; half < 2; ++half) {
      const uint64_t tags = bucket->tags[half].load(std::memory_order_relaxed);
      uint64_t empty = equal(tags, 0);
      if (half == 1) empty &= kUpperTags;
      if (empty == 0) continue;
      const auto shift = static_cast<uint32_t>(std::countr_zero(empty)) / 8 * 8;
      bucket->nodes[half * 8 + shift / 8].store(node, std::memory_order_relaxed);
      bucket->tags[half].store(tags | tag << shift, std::memory_order_release);
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
  put(*table, home(table->size, key), tag_of(key), node);
  ++home_shard.used;
  return true;
}

void KeyTable::erase(uint64_t key, Node node) {
  Shard& home_shard = shard(key);
  Table& table = *home_shard.table.load(std::memory_order_relaxed);
  const uint64_t tag = tag_of(key);
  const uint64_t first = home(table.size, key);
  uint64_t at = first;
  Bucket* bucket = &table.buckets[at];
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
        if (home_shard.used >= home_shard.shrink_below) return;
        try {
          resize(home_shard, home_shard.level - kShrinkLevels);
        } catch (const std::bad_alloc&) {
          home_shard.shrink_below /= 2;  // it stays larger than it need be
        }
        return;
      }
    }
    if (++at == table.size) at = 0;
    bucket = &table.buckets[at];
  }
}

// All entries of a table to another one. Keys lie anywhere, so they are asked for early; and where half as many buckets
// are to take them and none was passed on, they are not needed.
void KeyTable::move(const Table& from, Table& to) const {
  constexpr uint64_t kAhead = 3;
  const bool halves = from.size == to.size * 2;
  const auto is_home = [&](uint64_t bucket) {
    const Bucket& before = from.buckets[bucket == 0 ? from.size - 1 : bucket - 1];
    return halves && before.tags[1].load(std::memory_order_relaxed) < kPassedOne;
  };
  const auto key = [&](Node node) -> std::atomic<uint64_t>& { return pool_.of(node)->keys[node % kSlots]; };
  const auto each = [&](uint64_t number, auto visit) {
    const Bucket& bucket = from.buckets[number];
    for (uint32_t i = 0; i < Bucket::kEntries; ++i)
      if (const uint64_t tag = bucket.tags[i / 8].load(std::memory_order_relaxed) >> i % 8 * 8 & 0xFF)
        visit(tag, bucket.nodes[i].load(std::memory_order_relaxed));
  };
  for (uint64_t i = 0; i < from.size; ++i) {
    if (i + kAhead < from.size && !is_home(i + kAhead))
      each(i + kAhead, [&](uint64_t, Node node) { __builtin_prefetch(&key(node)); });
    if (is_home(i)) {
      each(i, [&](uint64_t tag, Node node) { put(to, i / 2, tag, node); });
    } else {
      each(i, [&](uint64_t tag, Node node) {
        put(to, home(to.size, key(node).load(std::memory_order_relaxed)), tag, node);
      });
    }
  }
}

void KeyTable::resize(Shard& of, uint32_t level) {
  Table* old = of.table.load(std::memory_order_relaxed);
  const uint64_t size = buckets_at(of, level);
  void* memory = take_memory(bytes_of(size));
  auto* buckets = reinterpret_cast<Bucket*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  auto* made = new (take_memory(sizeof(Table))) Table{size, buckets, memory};
  int64_t grown = footprint_of(size);
  if (old != nullptr) {
    move(*old, *made);
    grown -= footprint_of(old->size);
  }
  of.level = level;
  of.grow_at = size * Bucket::kEntries * 9 / 10;
  const uint64_t smaller = level < kShrinkLevels ? size : buckets_at(of, level - kShrinkLevels);
  of.shrink_below = smaller == size ? 0 : smaller * Bucket::kEntries * 3 / 4;
  of.table.store(made);
  of.first_hint.store(reinterpret_cast<uintptr_t>(buckets), std::memory_order_relaxed);
  of.buckets_hint.store(size, std::memory_order_relaxed);
  if (old != nullptr)
    epoch_.retire([](void*, void* object, uint64_t) { give_table(static_cast<Table*>(object)); }, nullptr, old, 0);
  bytes_.fetch_add(grown, std::memory_order_relaxed);
}

}  // namespace kvindex
