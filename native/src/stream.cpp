#include "stream.hpp"

#include <algorithm>

#include "keys.hpp"

namespace kvindex {
namespace {

bool kind_of(std::string_view name, bool has_window, GroupKind& kind) {
  if (name.empty() || name == "full_attention" || name == "mla_attention" || name == "sink_full_attention")
    return kind = GroupKind::kFull, true;
  if (name == "sliding_window" || name == "sliding_window_mla")
    return kind = has_window ? GroupKind::kSliding : GroupKind::kUnknown, has_window;
  if (name == "mamba" || name == "linear_attention") return kind = GroupKind::kMamba, true;
  return kind = GroupKind::kUnknown, false;
}

}  // namespace

Stream::Stream(std::shared_ptr<Index> index, uint32_t number) : index_(std::move(index)), number_(number) {}

Stream::~Stream() { close(); }

void Stream::apply(const uint8_t* data, size_t size, uint32_t rank, Applied& applied) {
  std::lock_guard lock(mutex_);
  Batch batch;
  if (!batch.open(data, size)) {
    applied.count(Reason::kBadBatch);
    return;
  }
  ++applied.messages;
  if (batch.timestamp() > 0) applied.timestamp = batch.timestamp();
  if (batch.has_rank() && batch.rank() != rank) applied.count(Reason::kRankMismatch);
  if (closed_) return;
  for (;;) {
    Reason reason;
    switch (batch.next(event_, reason)) {
      case Batch::Next::kEnd: return;
      case Batch::Next::kSkipped: applied.count(reason); continue;
      case Batch::Next::kEvent: break;
    }
    ++applied.events;
    switch (event_.tag) {
      case Tag::kStored: store(event_, applied); break;
      case Tag::kRemoved: remove(event_, applied); break;
      case Tag::kCleared:
        ++applied.clears;
        drop_all();
        break;
    }
  }
}

uint32_t Stream::tier_of(std::string_view medium) {
  if (medium.empty()) return 0;
  for (const auto& [name, tier] : tier_names_)
    if (name == medium) return tier;
  std::string lower(medium);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  const uint32_t tier = index_->tier_of(lower);
  if (tier < kMaxTiers && tier_names_.size() < 64) tier_names_.emplace_back(std::string(medium), tier);
  return tier;
}

bool Stream::group_of(const Event& event, uint8_t& group, Applied& applied) {
  GroupKind kind;
  const bool known = kind_of(event.kind, event.has_window, kind);
  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& each = groups_[i];
    if (each.index != event.group) continue;
    group = static_cast<uint8_t>(i);
    const auto window = static_cast<uint32_t>(std::min<uint64_t>(event.window, UINT32_MAX));
    // Removals and placeholders name no kind; only an event that does can change what is known.
    if (!event.kind.empty() && (each.kind != kind || each.window != window)) {
      each.kind = kind;
      each.window = window;
      index_->change_lane(each.lane, kind, window);
      if (!known) applied.count(Reason::kUnknownGroupKind);
    }
    return true;
  }
  if (groups_.size() == kMaxGroups || event.group > 0xFFFF) {
    applied.count(Reason::kGroupLimit);
    return false;
  }
  if (!known) applied.count(Reason::kUnknownGroupKind);
  const auto window = static_cast<uint32_t>(std::min<uint64_t>(event.window, UINT32_MAX));
  const auto index = static_cast<uint32_t>(event.group);
  groups_.push_back({index, index_->open_lane(number_, index, kind, window), kind, window});
  group = static_cast<uint8_t>(groups_.size() - 1);
  return true;
}

void Stream::store(const Event& event, Applied& applied) {
  const uint32_t tier = tier_of(event.medium);
  if (tier == kMaxTiers) return applied.count(Reason::kTierLimit);
  uint8_t group;
  if (!group_of(event, group, applied)) return;
  const auto tier_bit = static_cast<uint8_t>(tier);
  const size_t count = event.hashes.size();
  applied.blocks_stored += count;

  // Which tokens belong to which hash is only sure when every block of the range has its hash.
  const bool mapped = count > 0 && event.block_size > 0 && event.block_size <= UINT32_MAX &&
                      event.tokens.size() / event.block_size == count && event.tokens.size() % event.block_size == 0;
  bool canonical = false;
  const GroupKind kind = groups_[group].kind;
  if (mapped && kind != GroupKind::kMamba) {
    const auto size = static_cast<uint32_t>(event.block_size);
    // A group of unknown kind follows the size that others have taught.
    canonical = (kind == GroupKind::kUnknown ? index_->block_size() : index_->learn_block_size(size)) == size;
    if (!canonical && kind == GroupKind::kFull) applied.count(Reason::kBlockSizeMismatch, count);
  }
  if (!canonical) {
    for (const uint64_t hash : event.hashes) {
      uint64_t key = 0;
      const bool known = key_of(hash, key);
      add_claim(hash, group, tier_bit, known, key, applied);
    }
    return;
  }

  uint64_t parent = 0;
  if (event.has_parent && !key_of(event.parent, parent)) {
    for (const uint64_t hash : event.hashes) {
      uint64_t key = 0;
      const bool known = key_of(hash, key);
      add_claim(hash, group, tier_bit, known, key, applied);
    }
    add_orphan(event, applied);
    return;
  }
  std::string scratch;
  bool first = !event.has_parent;
  for (size_t i = 0; i < count; ++i) {
    const std::string_view extras = event.extras.empty() ? std::string_view{} : std::string_view(event.extras[i]);
    parent = block_key(event.tokens.data() + i * event.block_size, event.block_size, extras, first, parent,
                       index_->seed(), scratch);
    first = false;
    add_claim(event.hashes[i], group, tier_bit, true, parent, applied);
    if (unresolved_ != 0 || !orphans_.empty()) learn(event.hashes[i], parent);
  }
}

void Stream::remove(const Event& event, Applied& applied) {
  const uint32_t tier = tier_of(event.medium);
  if (tier == kMaxTiers) return applied.count(Reason::kTierLimit);
  size_t group = 0;
  while (group < groups_.size() && groups_[group].index != event.group) ++group;
  if (group == groups_.size()) return applied.count(Reason::kUnknownRemoval, event.hashes.size());
  for (const uint64_t hash : event.hashes) {
    Claim* claim = find_claim(hash, static_cast<uint8_t>(group), static_cast<uint8_t>(tier));
    if (claim == nullptr) {
      applied.count(Reason::kUnknownRemoval);
      continue;
    }
    ++applied.blocks_removed;
    if (--claim->count == 0) erase_claim(claim);
  }
}

// --- the claim table ---

Stream::Claim* Stream::find_claim(uint64_t hash, uint8_t group, uint8_t tier) {
  if (table_.empty()) return nullptr;
  for (size_t i = home(hash); table_[i].count != 0; i = (i + 1) & (table_.size() - 1)) {
    Claim& claim = table_[i];
    if (claim.hash == hash && claim.group == group && claim.tier == tier) return &claim;
  }
  return nullptr;
}

bool Stream::key_of(uint64_t hash, uint64_t& key) const {
  if (table_.empty()) return false;
  for (size_t i = home(hash); table_[i].count != 0; i = (i + 1) & (table_.size() - 1)) {
    if (table_[i].hash == hash && table_[i].resolved) return key = table_[i].key, true;
  }
  return false;
}

uint64_t Stream::find(uint64_t hash, std::vector<Holding>& out) const {
  uint64_t key = 0;
  if (table_.empty()) return key;
  for (size_t i = home(hash); table_[i].count != 0; i = (i + 1) & (table_.size() - 1)) {
    const Claim& claim = table_[i];
    if (claim.hash != hash) continue;
    out.push_back({groups_[claim.group].lane, static_cast<uint8_t>(1U << claim.tier)});
    if (claim.resolved) key = claim.key;
  }
  return key;
}

void Stream::add_claim(uint64_t hash, uint8_t group, uint8_t tier, bool known, uint64_t key, Applied& applied) {
  if (Claim* claim = find_claim(hash, group, tier)) {
    if (claim->count != UINT32_MAX) ++claim->count;
    if (known && !claim->resolved) {
      claim->resolved = true;
      claim->key = key;
      --unresolved_;
      hold(*claim);
    }
    return;
  }
  if (!known && unresolved_ >= kMaxUnresolved) return applied.count(Reason::kUnresolvedLimit);
  if (!index_->claim()) return applied.count(Reason::kClaimLimit);
  if ((used_ + 1) * 4 > table_.size() * 3) resize(table_.empty() ? 64 : table_.size() * 2);
  size_t i = home(hash);
  while (table_[i].count != 0) i = (i + 1) & (table_.size() - 1);
  table_[i] = {hash, key, 1, tier, group, known};
  ++used_;
  ++by_tier_[tier];
  if (known) {
    hold(table_[i]);
  } else {
    ++unresolved_;
  }
}

void Stream::erase_claim(Claim* claim) {
  if (claim->resolved) {
    release(*claim);
  } else {
    --unresolved_;
  }
  --by_tier_[claim->tier];
  --used_;
  index_->unclaim(1);
  const size_t mask = table_.size() - 1;
  size_t hole = static_cast<size_t>(claim - table_.data());
  for (size_t i = (hole + 1) & mask; table_[i].count != 0; i = (i + 1) & mask) {
    if (((i - home(table_[i].hash)) & mask) >= ((i - hole) & mask)) {
      table_[hole] = table_[i];
      hole = i;
    }
  }
  table_[hole] = Claim{};
  if (table_.size() > 64 && used_ * 6 < table_.size()) resize(table_.size() / 2);
}

void Stream::resize(size_t size) {
  std::vector<Claim> old(size);
  old.swap(table_);
  index_->account((static_cast<int64_t>(size) - static_cast<int64_t>(old.size())) *
                  static_cast<int64_t>(sizeof(Claim)));
  for (const Claim& claim : old) {
    if (claim.count == 0) continue;
    size_t i = home(claim.hash);
    while (table_[i].count != 0) i = (i + 1) & (size - 1);
    table_[i] = claim;
  }
}

void Stream::hold(const Claim& claim) {
  if (index_->hold(claim.key, groups_[claim.group].lane, claim.tier)) return;
  const auto place = static_cast<uint16_t>(claim.group << 8 | claim.tier);
  uint32_t& holders = shared_[claim.key][place];
  holders = std::max(holders, 1U) + 1;
}

void Stream::release(const Claim& claim) {
  if (!shared_.empty()) {
    const auto found = shared_.find(claim.key);
    if (found != shared_.end()) {
      const auto place = static_cast<uint16_t>(claim.group << 8 | claim.tier);
      const auto holders = found->second.find(place);
      if (holders != found->second.end()) {
        if (--holders->second == 1) found->second.erase(holders);
        if (found->second.empty()) shared_.erase(found);
        return;
      }
    }
  }
  index_->release(claim.key, groups_[claim.group].lane, claim.tier);
}

// --- keys that become known later ---

void Stream::learn(uint64_t hash, uint64_t key) {
  if (unresolved_ != 0) {
    for (size_t i = home(hash); table_[i].count != 0; i = (i + 1) & (table_.size() - 1)) {
      Claim& claim = table_[i];
      if (claim.hash != hash || claim.resolved) continue;
      claim.resolved = true;
      claim.key = key;
      --unresolved_;
      hold(claim);
    }
  }
  if (!orphans_.empty()) adopt(hash, key);
}

void Stream::add_orphan(const Event& event, Applied& applied) {
  const uint64_t blocks = event.hashes.size();
  const auto [from, to] = waiting_.equal_range(event.parent);
  for (auto it = from; it != to; ++it)
    if (orphans_.at(it->second).hashes == event.hashes) return;  // another copy of a range that waits already
  if (blocks > kMaxOrphanBlocks) return applied.count(Reason::kOrphanLimit, blocks);
  while (orphan_blocks_ + blocks > kMaxOrphanBlocks) {
    const uint64_t oldest = orphan_order_.front();
    orphan_order_.pop_front();
    const auto found = orphans_.find(oldest);
    if (found == orphans_.end()) continue;
    applied.count(Reason::kOrphanLimit, found->second.hashes.size());
    drop_orphan(oldest);
  }
  const uint64_t id = next_orphan_++;
  orphans_.emplace(
      id, Orphan{event.parent, event.hashes, event.tokens, event.extras, static_cast<uint32_t>(event.block_size)});
  waiting_.emplace(event.parent, id);
  orphan_order_.push_back(id);
  orphan_blocks_ += blocks;
}

void Stream::drop_orphan(uint64_t id) {
  const auto found = orphans_.find(id);
  const auto [from, to] = waiting_.equal_range(found->second.parent);
  for (auto it = from; it != to; ++it) {
    if (it->second != id) continue;
    waiting_.erase(it);
    break;
  }
  orphan_blocks_ -= found->second.hashes.size();
  orphans_.erase(found);
  // Adopted ones leave their number behind; keep the queue from growing with them.
  while (!orphan_order_.empty() && orphans_.find(orphan_order_.front()) == orphans_.end()) orphan_order_.pop_front();
}

void Stream::adopt(uint64_t parent, uint64_t parent_key) {
  std::vector<std::pair<uint64_t, uint64_t>> known{{parent, parent_key}};
  std::string scratch;
  while (!known.empty()) {
    const auto [hash, key] = known.back();
    known.pop_back();
    for (auto it = waiting_.find(hash); it != waiting_.end(); it = waiting_.find(hash)) {
      const uint64_t id = it->second;
      const Orphan orphan = std::move(orphans_.at(id));
      orphans_.at(id).parent = orphan.parent;
      orphans_.at(id).hashes = orphan.hashes;
      drop_orphan(id);
      uint64_t chain = key;
      for (size_t i = 0; i < orphan.hashes.size(); ++i) {
        const std::string_view extras = orphan.extras.empty() ? std::string_view{} : std::string_view(orphan.extras[i]);
        chain = block_key(orphan.tokens.data() + i * orphan.block_size, orphan.block_size, extras, false, chain,
                          index_->seed(), scratch);
        bool held = false;
        for (size_t at = home(orphan.hashes[i]); !table_.empty() && table_[at].count != 0;
             at = (at + 1) & (table_.size() - 1)) {
          Claim& claim = table_[at];
          if (claim.hash != orphan.hashes[i]) continue;
          held = true;
          if (claim.resolved) continue;
          claim.resolved = true;
          claim.key = chain;
          --unresolved_;
          hold(claim);
        }
        // Only a block that is held tells others its key: a removed one may never come back as the same.
        if (held) known.emplace_back(orphan.hashes[i], chain);
      }
    }
  }
}

// --- leaving ---

uint64_t Stream::drop_all() {
  std::vector<uint32_t> lanes;
  for (const Group& group : groups_) lanes.push_back(group.lane);
  index_->retire_lanes(lanes);
  const uint64_t dropped = used_;
  for (const Claim& claim : table_)
    if (claim.count != 0 && claim.resolved) index_->release(claim.key, groups_[claim.group].lane, claim.tier);
  index_->free_lanes(lanes);
  index_->unclaim(used_);
  index_->account(-static_cast<int64_t>(table_.size() * sizeof(Claim)));
  std::vector<Claim>().swap(table_);
  used_ = 0;
  unresolved_ = 0;
  by_tier_ = {};
  groups_.clear();
  shared_.clear();
  orphans_.clear();
  waiting_.clear();
  orphan_order_.clear();
  orphan_blocks_ = 0;
  return dropped;
}

uint64_t Stream::clear() {
  std::lock_guard lock(mutex_);
  return drop_all();
}

uint64_t Stream::close() {
  std::lock_guard lock(mutex_);
  if (closed_) return 0;
  closed_ = true;
  const uint64_t dropped = drop_all();
  index_->close_stream(number_);
  return dropped;
}

uint64_t Stream::claims() const {
  std::lock_guard lock(mutex_);
  return used_;
}

std::array<uint64_t, kMaxTiers> Stream::claims_by_tier() const {
  std::lock_guard lock(mutex_);
  return by_tier_;
}

uint64_t Stream::orphans() const {
  std::lock_guard lock(mutex_);
  return orphan_blocks_;
}

uint64_t Stream::unresolved() const {
  std::lock_guard lock(mutex_);
  return unresolved_;
}

bool Stream::closed() const {
  std::lock_guard lock(mutex_);
  return closed_;
}

}  // namespace kvindex
