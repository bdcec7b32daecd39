// Blocks that wait for their parent, and claims that wait for their key.
#include <algorithm>
#include <utility>

#include "stream.hpp"
#include "xxh3.hpp"

namespace kvindex {

uint64_t Stream::Orphan::bytes() const {
  constexpr uint64_t kOwn = 512;  // itself, and its places in the books of all
  uint64_t all = kOwn + hashes.size() * sizeof(uint64_t) + tokens.size() * sizeof(uint32_t);
  for (const std::string& each : extras) all += sizeof each + each.size();
  return all;
}

uint64_t Stream::Orphan::digest() const {
  return xxh3_64(hashes.data(), hashes.size() * sizeof(uint64_t), mixed(parent));
}

void Stream::add_orphan(const Event& event, Applied& applied) {
  const uint64_t blocks = event.hashes.size();
  Orphan orphan{event.parent, event.hashes, event.tokens, event.extras, static_cast<uint32_t>(event.block_size)};
  const auto same = orphan_digests_.find(orphan.digest());
  if (same != orphan_digests_.end()) {
    const Orphan& other = orphans_.at(same->second);
    if (other.parent == orphan.parent && other.hashes == orphan.hashes) return;  // another copy of what waits already
  }
  const uint64_t bytes = orphan.bytes();
  if (blocks > kMaxOrphanBlocks || bytes > kMaxOrphanBytes || index_->is_full())
    return applied.count(Reason::kOrphanLimit, blocks);
  while (orphan_blocks_ + blocks > kMaxOrphanBlocks || orphan_bytes_ + bytes > kMaxOrphanBytes) {
    const uint64_t oldest = orphan_order_.front();
    orphan_order_.pop_front();
    if (orphans_.count(oldest) != 0) applied.count(Reason::kOrphanLimit, take_orphan(oldest).hashes.size());
  }
  keep_orphan(std::move(orphan));
}

void Stream::keep_orphan(Orphan&& orphan) {
  const uint64_t id = next_orphan_++, bytes = orphan.bytes();
  waiting_[orphan.parent].push_back(id);
  orphan_digests_.emplace(orphan.digest(), id);
  orphan_order_.push_back(id);
  orphan_blocks_ += orphan.hashes.size();
  orphan_bytes_ += bytes;
  index_->held().account(static_cast<int64_t>(bytes));
  orphans_.emplace(id, std::move(orphan));
}

// The oldest that waits for its parent: no other is ever asked for.
Stream::Orphan Stream::take_orphan(uint64_t id) {
  const auto found = orphans_.find(id);
  Orphan orphan = std::move(found->second);
  orphans_.erase(found);
  const auto waiting = waiting_.find(orphan.parent);
  waiting->second.pop_front();
  if (waiting->second.empty()) waiting_.erase(waiting);
  const auto digest = orphan_digests_.find(orphan.digest());
  if (digest != orphan_digests_.end() && digest->second == id) orphan_digests_.erase(digest);
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
  orphan_digests_.clear();
  orphan_order_.clear();
  orphan_blocks_ = orphan_bytes_ = 0;
}

void Stream::adopt(uint64_t parent, uint64_t parent_key) {
  // Placing a range may make further parents known; those are worked off from here, not from inside it.
  known_.emplace_back(parent, parent_key);
  if (adopting_) return;
  adopting_ = true;
  while (!known_.empty()) {
    const auto [hash, key] = known_.back();
    known_.pop_back();
    for (auto waiting = waiting_.find(hash); waiting != waiting_.end(); waiting = waiting_.find(hash)) {
      const Orphan orphan = take_orphan(waiting->second.front());
      place({orphan.hashes, orphan.tokens, orphan.extras, orphan.block_size, false, hash, key});
    }
  }
  adopting_ = false;
}

void Stream::doubt_keys(Applied& applied) {
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
      claim = {hash, 0, before.count, 0, false, false, false};
      ++unresolved_;
      release(before, book.group, book.tier);
    }
    removals_.close();
  }
}

}  // namespace kvindex
