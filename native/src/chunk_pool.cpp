#include "chunk_pool.hpp"

namespace kvindex {

bool ChunkSet::add(uint32_t number) {
  const size_t word = number / 64;
  if (word >= words_.size()) {
    words_.resize(word + 1);
    summary_.resize(word / 64 + 1);
  }
  const uint64_t bit = uint64_t{1} << number % 64;
  if (words_[word] & bit) return false;
  words_[word] |= bit;
  summary_[word / 64] |= uint64_t{1} << word % 64;
  return true;
}

bool ChunkSet::remove(uint32_t number) {
  const size_t word = number / 64;
  const uint64_t bit = uint64_t{1} << number % 64;
  if (word >= words_.size() || (words_[word] & bit) == 0) return false;
  words_[word] &= ~bit;
  if (words_[word] == 0) summary_[word / 64] &= ~(uint64_t{1} << word % 64);
  return true;
}

bool ChunkSet::lowest(uint32_t& number) const {
  for (size_t i = 0; i < summary_.size(); ++i) {
    if (summary_[i] == 0) continue;
    const size_t word = i * 64 + static_cast<size_t>(std::countr_zero(summary_[i]));
    number = static_cast<uint32_t>(word * 64 + static_cast<size_t>(std::countr_zero(words_[word])));
    return true;
  }
  return false;
}

namespace {

constexpr size_t directory_bytes(uint32_t slabs) { return slabs * sizeof(std::atomic<char*>); }

}  // namespace

ChunkPool::ChunkPool(Epoch& epoch, std::atomic<int64_t>& bytes)
    : epoch_(epoch),
      bytes_(bytes),
      slabs_(static_cast<std::atomic<char*>*>(take_memory(directory_bytes(kMaxSlabs), false)),
             [](std::atomic<char*>* all) { give_memory(all, directory_bytes(kMaxSlabs)); }) {}

ChunkPool::~ChunkPool() {
  for (size_t slab = 0; slab < free_in_slab_.size(); ++slab) {
    char* memory = slabs_[slab].load();
    if (memory == nullptr) continue;
    for (uint32_t i = 0; i < kPerSlab; ++i) {
      const uint64_t holders = reinterpret_cast<Chunk*>(memory)[i].holders.load();
      if (holders == 0 || (holders & 1) != 0) continue;
      auto* many = reinterpret_cast<Holders*>(holders);
      give_memory(many, Holders::bytes(many->capacity()));
    }
    give_memory(memory, kSlabBytes);
  }
}

uint32_t ChunkPool::open(uint64_t blocks) {
  std::lock_guard lock(mutex_);
  uint32_t number = 0;
  const uint64_t slots = uint64_t{in_use_} * kSlots;
  // A tenth of all slots may be gaps for chains to grow into.
  if (blocks + slots / 10 < slots && partial_.lowest(number)) {
    partial_.remove(number);
  } else {
    if (!free_.lowest(number)) {
      add_slab();
      free_.lowest(number);
    }
    free_.remove(number);
    if (free_in_slab_[number / kPerSlab]-- == kPerSlab) --empty_slabs_;
    ++in_use_;
  }
  at(number)->state.store(Chunk::State::kOpen, std::memory_order_relaxed);
  return number;
}

void ChunkPool::close(uint32_t number, Chunk& chunk) {
  std::lock_guard lock(mutex_);
  settle(number, chunk);
}

void ChunkPool::slots_freed(uint32_t number, Chunk& chunk) {
  const auto state = chunk.state.load(std::memory_order_relaxed);
  if (state == Chunk::State::kOpen) {
    if (chunk.taken != 0) return;
  } else if (chunk.taken != 0 &&
             (state == Chunk::State::kPartial || static_cast<uint32_t>(std::popcount(~chunk.taken)) < kGaps)) {
    return;
  }
  std::lock_guard lock(mutex_);
  // An open chunk is its writer's, who settles it.
  if (chunk.state.load(std::memory_order_relaxed) != Chunk::State::kOpen) settle(number, chunk);
}

void ChunkPool::settle(uint32_t number, Chunk& chunk) {
  using State = Chunk::State;
  State state = State::kFull;
  if (chunk.taken == 0) {
    state = State::kFree;
  } else if (static_cast<uint32_t>(std::popcount(~chunk.taken)) >= kGaps) {
    state = State::kPartial;
  }
  chunk.state.store(state, std::memory_order_relaxed);
  if (state == State::kPartial) {
    partial_.add(number);
  } else {
    partial_.remove(number);
  }
  if (state != State::kFree) return;
  chunk.next.store(0, std::memory_order_relaxed);
  free_.add(number);
  --in_use_;
  const uint32_t slab = number / kPerSlab;
  if (++free_in_slab_[slab] < kPerSlab) return;
  // One empty slab stays, so that a chunk that comes and goes does not map and unmap.
  if (++empty_slabs_ > 1) release_slab(slab);
}

void ChunkPool::add_slab() {
  uint32_t slab = 0;
  while (slab < free_in_slab_.size() && slabs_[slab].load() != nullptr) ++slab;
  if (slab == kMaxSlabs) throw std::bad_alloc();
  auto* memory = static_cast<char*>(take_huge_page());
  if (slab == free_in_slab_.size()) free_in_slab_.push_back(0);
  slabs_[slab].store(memory);
  bytes_.fetch_add(static_cast<int64_t>(footprint(kSlabBytes)), std::memory_order_relaxed);
  free_in_slab_[slab] = kPerSlab;
  ++empty_slabs_;
  for (uint32_t i = 0; i < kPerSlab; ++i)
    if (slab + i > 0) free_.add(slab * kPerSlab + i);  // chunk 0 is never used: node 0 means none
  if (slab == 0) {
    --free_in_slab_[0];
    --empty_slabs_;
  }
}

void ChunkPool::release_slab(uint32_t slab) {
  for (uint32_t i = 0; i < kPerSlab; ++i) free_.remove(slab * kPerSlab + i);
  --empty_slabs_;
  char* memory = slabs_[slab].load();
  slabs_[slab].store(nullptr);
  bytes_.fetch_sub(static_cast<int64_t>(footprint(kSlabBytes)), std::memory_order_relaxed);
  epoch_.retire([](void*, void* object, uint64_t size) { give_memory(object, size); }, nullptr, memory, kSlabBytes);
}

}  // namespace kvindex
