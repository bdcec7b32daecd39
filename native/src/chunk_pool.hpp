// Where chunks live: slabs of a huge page, each given back when all of it is free.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "chunk.hpp"
#include "epoch.hpp"
#include "memory.hpp"

namespace kvindex {

// Numbers of chunks, with the lowest found at once: low numbers first keeps high slabs empty.
class ChunkSet {
 public:
  bool add(uint32_t number);     // false when it was there
  bool remove(uint32_t number);  // false when it was not
  bool lowest(uint32_t& number) const;

 private:
  std::vector<uint64_t> words_, summary_;
};

class ChunkPool {
 public:
  ChunkPool(Epoch& epoch, std::atomic<int64_t>& bytes);
  ~ChunkPool();
  ChunkPool(const ChunkPool&) = delete;
  ChunkPool& operator=(const ChunkPool&) = delete;

  // Null when its slab is gone; stays valid while the caller's pin lasts.
  Chunk* at(uint32_t number) const {
    char* slab = slabs_[number / kPerSlab].load();
    return slab == nullptr ? nullptr : reinterpret_cast<Chunk*>(slab) + number % kPerSlab;
  }
  Chunk* of(Node node) const { return at(node / kSlots); }

  // A chunk for one writer to name slots in (kOpen): one with gaps when `blocks`, those alive, leave too many, else a
  // fresh one. The writer gives it back with `close`.
  uint32_t open(uint64_t blocks);
  // Both under the chunk's lock.
  void close(uint32_t number, Chunk& chunk);
  void slots_freed(uint32_t number, Chunk& chunk);

 private:
  static constexpr size_t kSlabBytes = kHugePage;
  static constexpr uint32_t kPerSlab = kSlabBytes / sizeof(Chunk), kMaxSlabs = (1U << 31) / kSlots / kPerSlab;
  static constexpr uint32_t kGaps = 16;  // free slots that make a chunk worth being filled again

  void settle(uint32_t number, Chunk& chunk);
  void add_slab();
  void release_slab(uint32_t slab);

  Epoch& epoch_;
  std::atomic<int64_t>& bytes_;
  std::unique_ptr<std::atomic<char*>[], void (*)(std::atomic<char*>*)> slabs_;
  std::mutex mutex_;
  ChunkSet free_, partial_;
  std::vector<uint16_t> free_in_slab_;
  uint32_t in_use_ = 0, empty_slabs_ = 0;
};

}  // namespace kvindex
