#include "chunk.hpp"

#include <new>

#include "memory.hpp"

namespace kvindex {

size_t Holders::bytes(uint32_t capacity) {
  return sizeof(Holders) + capacity * (sizeof(std::atomic<uint64_t>) + sizeof(HolderId));
}

Holders* Holders::make(uint32_t capacity) { return new (take_memory(bytes(capacity))) Holders(capacity); }

void Holders::add(HolderId holder, uint64_t mask) {
  const uint32_t at = size_.load(std::memory_order_relaxed);
  holders()[at] = holder;
  masks()[at].store(mask, std::memory_order_relaxed);
  size_.store(at + 1, std::memory_order_release);
}

uint32_t Holders::place(HolderId holder) const {
  const uint32_t size = size_.load(std::memory_order_relaxed);
  const HolderId* all = holders();
  uint32_t i = 0;
  while (i < size && all[i] != holder) ++i;
  return i;
}

void Chunk::replace(Holders* old, Holders* made, Epoch& epoch, std::atomic<int64_t>& bytes) {
  holders.store(reinterpret_cast<uint64_t>(made));
  int64_t grown = made == nullptr ? 0 : static_cast<int64_t>(footprint(Holders::bytes(made->capacity())));
  if (old != nullptr) {
    grown -= static_cast<int64_t>(footprint(Holders::bytes(old->capacity())));
    epoch.retire([](void*, void* object, uint64_t size) { give_memory(object, size); }, nullptr, old,
                 Holders::bytes(old->capacity()));
  }
  bytes.fetch_add(grown, std::memory_order_relaxed);
}

uint64_t Chunk::add(HolderId holder, uint64_t bits, Epoch& epoch, std::atomic<int64_t>& bytes) {
  const uint64_t found = holders.load(std::memory_order_relaxed);
  if (found == 0) {
    change();
    mask.store(bits, std::memory_order_release);
    holders.store(uint64_t{holder} << 1 | 1);
    return bits;
  }
  if (found & 1) {
    const auto only = static_cast<HolderId>(found >> 1);
    const uint64_t old = mask.load(std::memory_order_relaxed);
    if (only == holder) {
      mask.store(old | bits, std::memory_order_release);
      return bits & ~old;
    }
    Holders* made = Holders::make(2);
    made->add(only, old);
    made->add(holder, bits);
    replace(nullptr, made, epoch, bytes);
    return bits;
  }
  auto* many = reinterpret_cast<Holders*>(found);
  const uint32_t place = many->place(holder), size = many->size();
  if (place < size) {
    const uint64_t old = many->mask(place).load(std::memory_order_relaxed);
    many->mask(place).store(old | bits, std::memory_order_release);
    return bits & ~old;
  }
  if (size < many->capacity()) {
    many->add(holder, bits);
    return bits;
  }
  uint32_t used = 0;
  for (uint32_t i = 0; i < size; ++i) used += many->mask(i).load(std::memory_order_relaxed) != 0 ? 1 : 0;
  Holders* made = Holders::make(used + 1 + used / 4);
  for (uint32_t i = 0; i < size; ++i) {
    const uint64_t each = many->mask(i).load(std::memory_order_relaxed);
    if (each != 0) made->add(many->holder(i), each);
  }
  made->add(holder, bits);
  replace(many, made, epoch, bytes);
  return bits;
}

uint64_t Chunk::remove(HolderId holder, uint64_t bits, Epoch& epoch, std::atomic<int64_t>& bytes) {
  const uint64_t found = holders.load(std::memory_order_relaxed);
  if (found == 0) return 0;
  if (found & 1) {
    if (static_cast<HolderId>(found >> 1) != holder) return 0;
    const uint64_t old = mask.load(std::memory_order_relaxed);
    change();
    mask.store(old & ~bits, std::memory_order_release);
    if ((old & ~bits) == 0) holders.store(0);
    return old & bits;
  }
  auto* many = reinterpret_cast<Holders*>(found);
  const uint32_t place = many->place(holder), size = many->size();
  if (place == size) return 0;
  const uint64_t old = many->mask(place).load(std::memory_order_relaxed);
  change();
  many->mask(place).store(old & ~bits, std::memory_order_release);
  if ((old & ~bits) != 0) return old & bits;
  uint32_t used = 0;
  for (uint32_t i = 0; i < size; ++i) used += many->mask(i).load(std::memory_order_relaxed) != 0 ? 1 : 0;
  if (used == 0) {
    replace(many, nullptr, epoch, bytes);
  } else if (many->capacity() > 4 && used * 3 < many->capacity()) {
    Holders* made = Holders::make(used + 1);
    for (uint32_t i = 0; i < size; ++i) {
      const uint64_t each = many->mask(i).load(std::memory_order_relaxed);
      if (each != 0) made->add(many->holder(i), each);
    }
    replace(many, made, epoch, bytes);
  }
  return old & bits;
}

void Chunk::name(uint32_t slot, const uint64_t* wanted, uint32_t count) {
  change();
  taken |= bits_from(slot, count);
  for (uint32_t i = 0; i < count; ++i) keys[slot + i].store(wanted[i], std::memory_order_release);
}

// Counted when it is done: from then on such a block may be placed elsewhere, and whoever holds it there may come to
// hold its neighbours here. Nobody may see those together with what was here before.
void Chunk::bury(uint64_t bits) {
  live.fetch_and(~bits, std::memory_order_release);
  change();
}

void Chunk::unname(uint64_t bits) {
  change();
  taken &= ~bits;
  for (; bits != 0; bits &= bits - 1) keys[std::countr_zero(bits)].store(0, std::memory_order_release);
}

}  // namespace kvindex
