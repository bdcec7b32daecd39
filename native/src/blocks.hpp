// The blocks of one model: key -> which lanes hold it on which tiers. Any number of writers and readers at once.
//
// A block's node stands in a chunk and, under its key, in the key table. It stays while anyone holds it. Its key may
// stand in the table twice for a moment: once more with the node of a block that was just given up and is no longer
// `live`. No writer has the lock of a shard and of a chunk at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "chunk_pool.hpp"
#include "epoch.hpp"
#include "key_table.hpp"

namespace kvindex {

class Blocks {
 public:
  // One writer's chunk for new blocks; every writer has its own.
  struct Pen {
    uint32_t chunk = 0;      // 0 = none
    bool scattered = false;  // it had blocks before: any gap will do
  };

  Blocks() : pool_(epoch_, bytes_), table_(pool_, epoch_, bytes_) {}

  Epoch& epoch() const { return epoch_; }
  uint64_t size() const { return size_.load(std::memory_order_relaxed); }
  int64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
  std::atomic<int64_t>& accounted() { return bytes_; }
  void account(int64_t bytes) { bytes_.fetch_add(bytes, std::memory_order_relaxed); }

  // --- everything below needs a pin ---
  // The holder holds `count` blocks that follow each other behind `before` (0 = nothing known). Writes every block's
  // node, and whether the holder did not hold it before.
  void hold(const uint64_t* keys, size_t count, Node before, HolderId holder, Pen& pen, Node* nodes, bool* is_new);
  void prefetch_key(uint64_t key) const { table_.prefetch(key); }
  // Blocks of one chunk, whose node no other thread gives back for this holder.
  void release(uint32_t chunk, uint64_t bits, HolderId holder);
  void release(Node node, HolderId holder) { release(node / kSlots, bits_from(node % kSlots, 1), holder); }
  // Those of one chunk that follow each other cost little more than one.
  void release(const std::vector<Node>& nodes, HolderId holder);
  void lay_down(Pen& pen);
  // For a release soon: the chunk first, then what its key leads to.
  void prefetch(Node node) const {
    const Chunk* chunk = pool_.of(node);
    __builtin_prefetch(chunk);
    __builtin_prefetch(&chunk->keys[node % kSlots]);
  }

  // For blocks that the caller holds.
  uint64_t key_of(Node node) const { return pool_.of(node)->keys[node % kSlots].load(std::memory_order_relaxed); }

  Node find(uint64_t key) const { return table_.find(key); }
  const Chunk* chunk_of(Node node) const { return pool_.of(node); }

 private:
  size_t hold_known(Node node, const uint64_t* keys, size_t count, HolderId holder, Node* nodes, bool* is_new);
  size_t hold_absent(const uint64_t* keys, size_t count, Node before, HolderId holder, Pen& pen, Node* nodes,
                     bool* is_new);
  // Slots for up to `count` blocks in a row, locked.
  struct Place {
    uint32_t number;
    Chunk* chunk;
    uint32_t slot, count;
  };
  Place place(Node before, size_t count, Pen& pen);

  mutable Epoch epoch_;
  std::atomic<int64_t> bytes_{0};
  std::atomic<uint64_t> size_{0};
  ChunkPool pool_;
  KeyTable table_;
};

struct Holding {
  uint32_t lane;
  uint8_t tiers;  // bit per tier
};

// Who holds a key, as it was at one moment; needs a pin.
void holdings_of(const Blocks& blocks, uint64_t key, std::vector<Holding>& out);

}  // namespace kvindex
