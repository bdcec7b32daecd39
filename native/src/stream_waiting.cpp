// Blocks that wait for their parent or for the block size, and claims that wait for their key.
#include <algorithm>
#include <memory>
#include <utility>

#include "stream.hpp"
#include "xxh3.hpp"

namespace kvindex {

namespace {

uint64_t digest_of(uint64_t parent, uint32_t size, const std::vector<uint64_t>& hashes) {
  return xxh3_64(hashes.data(), hashes.size() * sizeof(uint64_t), Stream::mixed(parent ^ Stream::mixed(size)));
}

}  // namespace

uint64_t Stream::Orphan::bytes() const {
  constexpr uint64_t kOwn = 512;  // itself, and its places in the books of all
  uint64_t all = kOwn + hashes.size() * sizeof(uint64_t) + tokens.size() * sizeof(uint32_t);
  for (const std::string& each : extras) all += sizeof(std::string) + each.size();
  return all;
}

// The first of a parent's of one block size is looked at itself, all others are known by their digest: mostly there is
// only the first.
bool Stream::is_waiting(const Event& event) const {
  const auto waiting = waiting_.find(event.parent);
  if (!event.has_parent || waiting == waiting_.end()) return false;
  const auto size = static_cast<uint32_t>(event.block_size);
  const auto of_size = waiting->second.find(size);
  if (of_size == waiting->second.end()) return false;
  const auto is_same = [&](const Orphan& other) {
    return other.parent == event.parent && other.block_size == size && other.hashes == event.hashes;
  };
  if (is_same(orphans_.at(of_size->second.first))) return true;
  const auto known = orphan_digests_.find(digest_of(event.parent, size, event.hashes));
  return known != orphan_digests_.end() && is_same(orphans_.at(known->second));
}

void Stream::add_orphan(const Event& event, Applied& applied) {
  const uint64_t blocks = event.hashes.size();
  if (is_waiting(event)) return;  // another copy of a range that waits already
  Orphan orphan{event.parent,     event.hashes, event.tokens, event.extras, static_cast<uint32_t>(event.block_size),
                !event.has_parent};
  const uint64_t bytes = orphan.bytes();
  if (blocks > kMaxOrphanBlocks || bytes > kMaxOrphanBytes || index_->is_full() ||
      (orphan.first && early_.size() >= kMaxEarly))
    return applied.count(Reason::kOrphanLimit, blocks);
  while (orphan_blocks_ + blocks > kMaxOrphanBlocks || orphan_bytes_ + bytes > kMaxOrphanBytes) {
    const auto oldest = orphans_.find(orphan_order_.front());
    orphan_order_.pop_front();
    if (oldest != orphans_.end()) applied.count(Reason::kOrphanLimit, take_orphan(oldest).hashes.size());
  }
  keep_orphan(std::move(orphan));
}

void Stream::keep_orphan(Orphan&& orphan) {
  const uint64_t id = next_orphan_++, bytes = orphan.bytes();
  if (orphan.first) {
    early_.push_back(id);
  } else if (const auto [waiting, is_new] = waiting_[orphan.parent].try_emplace(orphan.block_size, Waiting{id, id});
             !is_new) {
    waiting->second.last = orphans_.at(waiting->second.last).next = id;
    orphan.digest = digest_of(orphan.parent, orphan.block_size, orphan.hashes);
    orphan_digests_.emplace(*orphan.digest, id);
  }
  orphan_order_.push_back(id);
  orphan_blocks_ += orphan.hashes.size();
  orphan_bytes_ += bytes;
  index_->held().account(static_cast<int64_t>(bytes));
  orphans_.emplace(id, std::move(orphan));
}

// The oldest of its block size that waits for its parent, or for the block size: no other is ever taken.
Stream::Orphan Stream::take_orphan(Orphans::iterator found) {
  const uint64_t id = found->first;
  Orphan orphan = std::move(found->second);
  orphans_.erase(found);
  if (orphan.first) {
    early_.pop_front();
  } else {
    const auto waiting = waiting_.find(orphan.parent);
    const auto of_size = waiting->second.find(orphan.block_size);
    if (of_size->second.last == id) {
      waiting->second.erase(of_size);
      if (waiting->second.empty()) waiting_.erase(waiting);
    } else {
      of_size->second.first = orphan.next;
    }
  }
  if (orphan.digest) {
    const auto known = orphan_digests_.find(*orphan.digest);
    if (known != orphan_digests_.end() && known->second == id) orphan_digests_.erase(known);
  }
  const uint64_t bytes = orphan.bytes();
  orphan_blocks_ -= orphan.hashes.size();
  orphan_bytes_ -= bytes;
  index_->held().account(-static_cast<int64_t>(bytes));
  // Those that were adopted left their ids behind, perhaps after one that stays.
  if (orphan_order_.size() > 2 * orphans_.size() + 64)
    orphan_order_.erase(std::remove_if(orphan_order_.begin(), orphan_order_.end(),
                                       [&](uint64_t each) { return orphans_.count(each) == 0; }),
                        orphan_order_.end());
  return orphan;
}

void Stream::drop_orphans() {
  index_->held().account(-static_cast<int64_t>(orphan_bytes_));
  orphans_.clear();
  waiting_.clear();
  early_.clear();
  orphan_digests_.clear();
  orphan_order_.clear();
  orphan_blocks_ = orphan_bytes_ = 0;
}

Stream::Orphans::iterator Stream::next_waiting(const Known& known) {
  const auto waiting = waiting_.find(known.hash);
  if (waiting == waiting_.end()) return orphans_.end();
  const auto of_size = known.size == 0 ? waiting->second.begin() : waiting->second.find(known.size);
  return of_size == waiting->second.end() ? orphans_.end() : orphans_.find(of_size->second.first);
}

void Stream::adopt(uint64_t parent, uint64_t parent_key, uint32_t size) {
  // Placing a range may make further parents known; those are worked off from here, not from inside it.
  known_.push_back({parent, parent_key, parent_key != 0 ? 0 : size});
  if (adopting_) return;
  adopting_ = true;
  // Also when there is no memory half-way: what then still waits goes on waiting.
  const std::unique_ptr<Stream, void (*)(Stream*)> done(this, [](Stream* stream) {
    stream->adopting_ = false;
    stream->known_.clear();
  });
  while (!known_.empty()) {
    const Known known = known_.back();
    known_.pop_back();
    for (auto next = next_waiting(known); next != orphans_.end(); next = next_waiting(known)) {
      const Orphan orphan = take_orphan(next);
      place({orphan.hashes, orphan.tokens, orphan.extras, orphan.block_size, false, known.hash, known.key});
    }
  }
}

void Stream::place_early() {
  while (!early_.empty()) {
    const Orphan range = take_orphan(orphans_.find(early_.front()));
    place({range.hashes, range.tokens, range.extras, range.block_size, true, 0, 0});
  }
}

void Stream::doubt_keys(Applied& applied) {
  end_batch(applied);  // what it told so far is told and counted
  drop_orphans();
  std::vector<uint64_t> hashes;
  for (Book& book : books_) {
    hashes.clear();
    book.claims.each_hash([&](uint32_t /*ref*/, uint64_t hash) { hashes.push_back(hash); });
    removals_.open(groups_[book.group].index, book.tier, Left::kDoubted);
    for (const uint64_t hash : hashes) {
      uint32_t& ref = *book.claims.find(hash);
      if ((ref & kSpecial) != 0 && !specials_[ref & ~kSpecial].resolved) continue;
      if (unresolved_ >= kMaxUnresolved) {
        applied.count(Reason::kUnresolvedLimit);
        erase_claim(book, hash, ref);
        index_->unclaim(1);
        continue;
      }
      Special& claim = make_special(ref, hash);
      const Special before = claim;
      claim = {hash, 0, before.count, 0, before.size};
      ++unresolved_;
      release(before, book.group, book.tier);
    }
    removals_.close();
  }
  end_batch(applied);  // with their last claim, all spans and parts go, and the keys of what was removed
}

}  // namespace kvindex
