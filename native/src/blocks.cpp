#include "blocks.hpp"

#include <algorithm>

namespace kvindex {
namespace {

// Where the chain behind a node normally goes on.
Node guess_after(Node node, const Chunk& chunk) {
  return node % kSlots + 1 < kSlots ? node + 1 : chunk.next.load(std::memory_order_relaxed) * kSlots;
}

}  // namespace

void Blocks::hold(const uint64_t* keys, size_t count, Node before, HolderId holder, Pen& pen, Node* nodes,
                  bool* is_new) {
  for (size_t i = 0; i < count;) {
    size_t done = 0;
    if (before != 0) {
      const Node guess = guess_after(before, *pool_.of(before));
      if (guess != 0) done = hold_known(guess, keys + i, count - i, holder, nodes + i, is_new + i);
    }
    if (done == 0) {
      const Node found = table_.find(keys[i]);
      if (found != 0) {
        // 0 when it was forgotten since: look again.
        done = hold_known(found, keys + i, count - i, holder, nodes + i, is_new + i);
        if (done > 0 && before != 0 && found % kSlots == 0)
          pool_.of(before)->next.store(found / kSlots, std::memory_order_relaxed);
      } else {
        // What follows an absent block is absent too, but for holes; `hold_absent` sees to those.
        done = hold_absent(keys + i, count - i, before, holder, pen, nodes + i, is_new + i);
      }
    }
    i += done;
    if (done > 0) before = nodes[i - 1];
  }
}

size_t Blocks::hold_known(Node node, const uint64_t* keys, size_t count, HolderId holder, Node* nodes, bool* is_new) {
  Chunk* chunk = pool_.of(node);
  const uint32_t slot = node % kSlots;
  if (chunk == nullptr || !chunk->has(slot, keys[0])) return 0;
  std::lock_guard lock(chunk->lock);
  const uint32_t run = chunk->run(slot, keys, count);
  if (run == 0) return 0;
  const uint64_t added = chunk->add(holder, bits_from(slot, run), epoch_, bytes_);
  for (uint32_t i = 0; i < run; ++i) {
    nodes[i] = node + i;
    is_new[i] = (added >> (slot + i) & 1) != 0;
  }
  return run;
}

size_t Blocks::hold_absent(const uint64_t* keys, size_t count, Node before, HolderId holder, Pen& pen, Node* nodes,
                           bool* is_new) {
  const Place at = place(before, count, pen);
  const Node first = at.number * kSlots + at.slot;
  {
    // `place` has locked it; adding may find no memory.
    const std::lock_guard lock(at.chunk->lock, std::adopt_lock);
    at.chunk->name(at.slot, keys, at.count);
    at.chunk->add(holder, bits_from(at.slot, at.count), epoch_, bytes_);
  }
  if (before != 0 && at.slot == 0) pool_.of(before)->next.store(at.number, std::memory_order_relaxed);

  // Some keys may be there already: there is one node per key, so ours gives way.
  uint64_t lost = 0;
  for (uint32_t i = 0; i < at.count; ++i) {
    nodes[i] = first + i;
    is_new[i] = true;
    const auto lock = table_.lock(keys[i]);
    if (table_.insert(keys[i], first + i)) {
      at.chunk->live.fetch_or(bits_from(at.slot + i, 1), std::memory_order_release);
    } else {
      lost |= bits_from(at.slot + i, 1);
    }
  }
  size_.fetch_add(at.count - static_cast<uint32_t>(std::popcount(lost)), std::memory_order_relaxed);
  if (lost == 0) return at.count;
  {
    std::lock_guard lock(at.chunk->lock);
    at.chunk->remove(holder, lost, epoch_, bytes_);
    at.chunk->unname(lost);
    pool_.slots_freed(at.number, *at.chunk);
  }
  // What stands before the first lost one is done; the caller goes on with that one. The later ones are given back.
  const auto kept = static_cast<uint32_t>(std::countr_zero(lost)) - at.slot;
  const uint64_t later = bits_from(at.slot + kept, at.count - kept) & ~lost;
  if (later != 0) release(at.number, later, holder);
  return kept;
}

Blocks::Place Blocks::place(Node before, size_t count, Pen& pen) {
  if (before != 0 && before % kSlots + 1 < kSlots) {
    Chunk* chunk = pool_.of(before);
    const uint32_t slot = before % kSlots + 1;
    chunk->lock.lock();
    const auto room = static_cast<uint32_t>(std::countr_zero(chunk->taken >> slot | uint64_t{1} << (kSlots - slot)));
    if (room > 0) return {before / kSlots, chunk, slot, std::min(room, static_cast<uint32_t>(count))};
    chunk->lock.unlock();
  }
  for (;;) {
    if (pen.chunk == 0) {
      pen.chunk = pool_.open(size());
      Chunk* opened = pool_.at(pen.chunk);
      std::lock_guard lock(opened->lock);
      pen.scattered = opened->taken != 0;
    }
    Chunk* chunk = pool_.at(pen.chunk);
    chunk->lock.lock();
    // A chain starts on an empty eighth and so has room to grow, one block after the other.
    uint32_t slot = 0;
    while (slot < kSlots && (chunk->taken >> slot & 0xFF) != 0) slot += 8;
    if (slot == kSlots && pen.scattered && ~chunk->taken != 0)
      slot = static_cast<uint32_t>(std::countr_zero(~chunk->taken));
    if (slot < kSlots) {
      const uint64_t rest = chunk->taken >> slot;
      const uint32_t room = rest == 0 ? kSlots - slot : static_cast<uint32_t>(std::countr_zero(rest));
      return {pen.chunk, chunk, slot, std::min(room, static_cast<uint32_t>(count))};
    }
    pool_.close(pen.chunk, *chunk);
    chunk->lock.unlock();
    pen = {};
  }
}

void Blocks::lay_down(Pen& pen) {
  if (pen.chunk == 0) return;
  Chunk* chunk = pool_.at(pen.chunk);
  std::lock_guard lock(chunk->lock);
  pool_.close(pen.chunk, *chunk);
  pen = {};
}

void Blocks::release(uint32_t number, uint64_t bits, HolderId holder) {
  Chunk& chunk = *pool_.at(number);
  uint64_t keys[kSlots];
  uint64_t orphaned;
  {
    const std::lock_guard lock(chunk.lock);
    orphaned = chunk.remove(holder, bits, epoch_, bytes_) & ~chunk.held();
    if (orphaned == 0) return;
    // From here on nobody finds them, and nobody comes to hold them: who stores such a block makes another node.
    chunk.bury(orphaned);
    for (uint64_t rest = orphaned; rest != 0; rest &= rest - 1) {
      const auto slot = static_cast<uint32_t>(std::countr_zero(rest));
      keys[slot] = chunk.keys[slot].load(std::memory_order_relaxed);
      table_.prefetch(keys[slot]);
    }
  }
  for (uint64_t rest = orphaned; rest != 0; rest &= rest - 1) {
    const auto slot = static_cast<uint32_t>(std::countr_zero(rest));
    const auto lock = table_.lock(keys[slot]);
    table_.erase(keys[slot], number * kSlots + slot);
  }
  size_.fetch_sub(static_cast<uint32_t>(std::popcount(orphaned)), std::memory_order_relaxed);
  const std::lock_guard lock(chunk.lock);
  chunk.unname(orphaned);
  pool_.slots_freed(number, chunk);
}

void Blocks::release(const std::vector<Node>& nodes, HolderId holder) {
  for (size_t i = 0; i < nodes.size();) {
    const uint32_t chunk = nodes[i] / kSlots;
    uint64_t bits = 0;
    for (; i < nodes.size() && nodes[i] / kSlots == chunk; ++i) bits |= bits_from(nodes[i] % kSlots, 1);
    release(chunk, bits, holder);
  }
}

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

}  // namespace kvindex
