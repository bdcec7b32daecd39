// Key -> node, in 256 shards of 64-byte buckets. An entry is a tag and a node: the key itself stands in the chunk.
//
// Entries never move inside a table, so a reader without a lock finds every entry that stays. A full bucket passes an
// entry on and counts it, and a search goes on only where something was passed on. A table that grows is copied and
// replaced; readers of the old one see it as it was.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>

#include "chunk_pool.hpp"
#include "epoch.hpp"
#include "spin_lock.hpp"

namespace kvindex {

class KeyTable {
 public:
  KeyTable(const ChunkPool& pool, Epoch& epoch, std::atomic<int64_t>& bytes);
  ~KeyTable();
  KeyTable(const KeyTable&) = delete;
  KeyTable& operator=(const KeyTable&) = delete;

  void prefetch(uint64_t key) const;
  // The live node of a key, 0 when there is none; needs a pin, no lock.
  Node find(uint64_t key) const;

  // For the following two: the lock of the key's shard.
  [[nodiscard]] std::unique_lock<SpinLock> lock(uint64_t key) { return std::unique_lock(shard(key).lock); }
  // False when the key is there already.
  bool insert(uint64_t key, Node node);
  void erase(uint64_t key, Node node);

 private:
  struct Bucket {
    static constexpr uint32_t kEntries = 12;
    // Tags 0 to 7; tags 8 to 11 below and, in the upper half, how many entries were passed on.
    std::array<std::atomic<uint64_t>, 2> tags;
    std::array<std::atomic<uint32_t>, kEntries> nodes;
  };
  static_assert(sizeof(Bucket) == 64);
  // Apart from its buckets: all shards' tables lie together and stay near.
  struct Table {
    uint64_t size;  // buckets
    Bucket* buckets;
    void* memory;
  };
  struct alignas(64) Shard {
    SpinLock lock;
    uint32_t level = 0;
    uint64_t used = 0, grow_at = 0, shrink_below = 0;  // entries
    std::atomic<Table*> table{nullptr};
    // For prefetches, which may be of the wrong place while a table is replaced.
    std::atomic<uintptr_t> first_hint{0};
    std::atomic<uint64_t> buckets_hint{0};
  };
  static constexpr uint32_t kShards = 256;

  Shard& shard(uint64_t key) { return shards_[key >> 56]; }
  const Shard& shard(uint64_t key) const { return shards_[key >> 56]; }
  static uint64_t home(uint64_t buckets, uint64_t key);
  Node find_in(const Table& table, uint64_t key) const;
  static void pass(Bucket& bucket, uint64_t entries);
  static void put(Table& table, uint64_t at, uint64_t tag, Node node);
  void move(const Table& from, Table& to) const;
  void resize(Shard& shard, uint32_t level);
  uint64_t buckets_at(const Shard& shard, uint32_t level) const;
  static size_t bytes_of(uint64_t buckets);
  static int64_t footprint_of(uint64_t buckets);
  static void give_table(Table* table);

  const ChunkPool& pool_;
  Epoch& epoch_;
  std::atomic<int64_t>& bytes_;
  std::array<Shard, kShards> shards_;
};

}  // namespace kvindex
