#include "stream.hpp"

#include <algorithm>
#include <cstring>

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

Stream::Stream(std::shared_ptr<Index> index, uint32_t pod, uint32_t number)
    : index_(std::move(index)), pod_(pod), number_(number) {}

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
  groups_.push_back({index, index_->open_lane(number_, index, kind, window), kind, window, 0});
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
  const GroupKind kind = groups_[group].kind;
  uint32_t canonical = 0;
  if (event.block_size > 0 && event.block_size <= UINT32_MAX && kind != GroupKind::kMamba) {
    const auto size = static_cast<uint32_t>(event.block_size);
    uint32_t& own = groups_[group].block_size;
    own = std::max(own, size);
    // A group of unknown kind follows the size that others have taught.
    if (mapped) canonical = kind == GroupKind::kUnknown ? index_->block_size() : index_->learn_block_size(size);
    // A smaller block than the group's own is a partial one: held, but not yet part of any prefix.
    if (size < own && size != canonical) canonical = 0;
    if (canonical != 0 && size % canonical != 0 && canonical % size != 0) {
      if (kind == GroupKind::kFull) applied.count(Reason::kBlockSizeMismatch, count);
      canonical = 0;
    }
  }
  const bool direct = canonical != 0 && canonical == event.block_size;
  uint64_t parent = 0;
  const bool parent_known = !event.has_parent || knows(event.parent, parent);
  if (!direct || !parent_known) {
    for (const uint64_t hash : event.hashes) {
      uint64_t key = 0;
      const bool known = knows(hash, key);
      add_claim(hash, group, tier_bit, known, key, applied);
    }
    if (canonical == 0) return;
    if (!parent_known) return add_orphan(event, applied);
    return place({event.hashes, event.tokens, event.extras, static_cast<uint32_t>(event.block_size), !event.has_parent,
                  event.parent, parent});
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
  table_[i] = {hash, key, 1, tier, group, known, false, false};
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

// The index is told once per (key, group, tier), however many hashes stand for it.
void Stream::hold_key(uint64_t key, uint8_t group, uint8_t tier) {
  if (index_->hold(key, groups_[group].lane, tier)) {
    if (index_->placements().any()) index_->placements().confirm({pod_, number_}, key);
    return;
  }
  uint32_t& holders = shared_[key][static_cast<uint16_t>(group << 8 | tier)];
  holders = std::max(holders, 1U) + 1;
}

void Stream::release_key(uint64_t key, uint8_t group, uint8_t tier) {
  if (!shared_.empty()) {
    const auto found = shared_.find(key);
    if (found != shared_.end()) {
      const auto holders = found->second.find(static_cast<uint16_t>(group << 8 | tier));
      if (holders != found->second.end()) {
        if (--holders->second == 1) found->second.erase(holders);
        if (found->second.empty()) shared_.erase(found);
        return;
      }
    }
  }
  index_->release(key, groups_[group].lane, tier);
}

void Stream::hold(Claim& claim) {
  if (!parts_.empty()) {
    const auto part = parts_.find(claim.hash);
    if (part != parts_.end()) {
      claim.part = true;
      ++part->second.claims;
      return hold_part(claim.hash, static_cast<uint16_t>(claim.group << 8 | claim.tier), true);
    }
  }
  if (!spans_.empty() && groups_[claim.group].block_size > index_->block_size()) {
    const auto span = spans_.find(claim.key);
    if (span != spans_.end()) {
      claim.wide = true;
      ++span->second.claims;
      for (const uint64_t key : span->second.keys) hold_key(key, claim.group, claim.tier);
    }
  }
  hold_key(claim.key, claim.group, claim.tier);
}

void Stream::release(const Claim& claim) {
  if (claim.part) {
    hold_part(claim.hash, static_cast<uint16_t>(claim.group << 8 | claim.tier), false);
    --parts_.at(claim.hash).claims;
    return forget_part(claim.hash);
  }
  if (claim.wide) {
    const auto span = spans_.find(claim.key);
    for (const uint64_t key : span->second.keys) release_key(key, claim.group, claim.tier);
    if (--span->second.claims == 0) spans_.erase(span);
  }
  release_key(claim.key, claim.group, claim.tier);
}

// --- engine blocks of another size than the canonical one ---

namespace {

// Visits the items of encoded extras: (kind, bytes).
template <typename Visit>
void each_extra(std::string_view extras, Visit visit) {
  while (extras.size() >= 5) {
    uint32_t length;
    std::memcpy(&length, extras.data() + 1, 4);
    visit(static_cast<ExtraKind>(extras[0]), extras.substr(5, length));
    extras.remove_prefix(5 + size_t{length});
  }
}

// Extras of the canonical block number `n` of an engine block; false when nobody can tell which of its blocks a
// multimodal item touches.
bool extras_of_nth(std::string_view extras, size_t n, std::string& out) {
  bool clear = true;
  out.clear();
  each_extra(extras, [&](ExtraKind kind, std::string_view bytes) {
    if (kind == ExtraKind::kMultimodal || kind == ExtraKind::kPromptEmbeds) clear = false;
    if (kind == ExtraKind::kCacheSalt && n > 0) return;
    append_extra(out, kind, bytes);
  });
  return clear;
}

}  // namespace

uint32_t Stream::parts_of(uint32_t block_size) const {
  const uint32_t canonical = index_->block_size();
  return block_size < canonical ? canonical / block_size : 1;
}

bool Stream::knows(uint64_t hash, uint64_t& key) const {
  if (!parts_.empty()) {
    const auto part = parts_.find(hash);
    if (part != parts_.end()) return key = part->second.key, true;
  }
  return key_of(hash, key);
}

bool Stream::resolve(uint64_t hash, uint64_t key, bool part) {
  bool any = false;
  if (table_.empty()) return any;
  for (size_t i = home(hash); table_[i].count != 0; i = (i + 1) & (table_.size() - 1)) {
    Claim& claim = table_[i];
    if (claim.hash != hash) continue;
    any = true;
    if (claim.resolved) {
      if (part && claim.part) claim.key = key;
      continue;
    }
    claim.resolved = true;
    claim.key = key;
    --unresolved_;
    hold(claim);
  }
  return any;
}

void Stream::place(const Range& range) {
  const uint32_t canonical = index_->block_size();
  const uint32_t parts = parts_of(range.block_size);
  if (parts > 1) return place_parts(range, parts);
  const uint32_t times = range.block_size / canonical;
  std::string scratch, extras;
  uint64_t chain = range.parent_key;
  bool first = range.first;
  const uint32_t* tokens = range.tokens.data();
  for (size_t i = 0; i < range.hashes.size(); ++i) {
    const std::string_view own = range.extras.empty() ? std::string_view{} : std::string_view(range.extras[i]);
    std::vector<uint64_t> keys;
    for (uint32_t n = 0; n < times; ++n, tokens += canonical) {
      if (times == 1) {
        extras = own;
      } else if (!extras_of_nth(own, n, extras)) {
        return;  // the claims stay unresolved: never a wrong key
      }
      chain = block_key(tokens, canonical, extras, first, chain, index_->seed(), scratch);
      first = false;
      if (n + 1 < times) keys.push_back(chain);
    }
    if (!keys.empty()) spans_.try_emplace(chain, Span{std::move(keys), 0});
    const bool held = resolve(range.hashes[i], chain, false);
    const auto span = spans_.find(chain);
    if (span != spans_.end() && span->second.claims == 0) spans_.erase(span);
    // Only a block that is held tells others its key: a removed one may never come back as the same.
    if (held && !orphans_.empty()) adopt(range.hashes[i], chain);
  }
}

bool Stream::whole_key(const Part& last, uint64_t& key) const {
  std::vector<const Part*> chain{&last};
  while (chain.back()->place > 0) {
    const auto before = parts_.find(chain.back()->parent);
    if (before == parts_.end()) return false;
    chain.push_back(&before->second);
  }
  std::vector<uint32_t> tokens;
  std::vector<std::pair<ExtraKind, std::string>> items;
  for (auto it = chain.rbegin(); it != chain.rend(); ++it) {
    tokens.insert(tokens.end(), (*it)->tokens.begin(), (*it)->tokens.end());
    each_extra((*it)->extras, [&](ExtraKind kind, std::string_view bytes) {
      const std::pair<ExtraKind, std::string> item{kind, std::string(bytes)};
      if (std::find(items.begin(), items.end(), item) == items.end()) items.push_back(item);
    });
  }
  std::string extras, scratch;
  for (const ExtraKind kind :
       {ExtraKind::kLora, ExtraKind::kLoraId, ExtraKind::kMultimodal, ExtraKind::kCacheSalt, ExtraKind::kPromptEmbeds})
    for (const auto& item : items)
      if (item.first == kind) append_extra(extras, kind, item.second);
  key = block_key(tokens.data(), tokens.size(), extras, last.first, last.base, index_->seed(), scratch);
  return true;
}

void Stream::place_parts(const Range& range, uint32_t parts) {
  bool has_before = !range.first;
  uint64_t before = range.parent_hash;
  for (size_t i = 0; i < range.hashes.size(); ++i) {
    const uint64_t hash = range.hashes[i];
    if (parts_.find(hash) == parts_.end()) {
      Part part;
      part.first = true;
      if (has_before) {
        const auto parent = parts_.find(before);
        if (parent == parts_.end()) return;  // its claims are gone already
        const bool starts_block = parent->second.place + 1 == parts;
        part.parent = before;
        part.place = starts_block ? 0 : parent->second.place + 1;
        part.base = starts_block ? parent->second.key : parent->second.base;
        part.first = !starts_block && parent->second.first;
      }
      const auto* tokens = range.tokens.data() + i * range.block_size;
      part.tokens.assign(tokens, tokens + range.block_size);
      if (!range.extras.empty()) part.extras = range.extras[i];
      if (part.place + 1 == parts && !whole_key(part, part.key)) return;
      if (part.place > 0) parts_.at(before).children.push_back(hash);
      // What its earlier parts hold already.
      if (part.place + 1 == parts) {
        uint64_t at = part.parent;
        for (uint32_t left = part.place; left > 0; --left) {
          const Part& each = parts_.at(at);
          for (size_t place = home(at); !table_.empty() && table_[place].count != 0;
               place = (place + 1) & (table_.size() - 1))
            if (table_[place].hash == at && table_[place].part)
              ++part.held[static_cast<uint16_t>(table_[place].group << 8 | table_[place].tier)];
          at = each.parent;
        }
      }
      parts_.emplace(hash, std::move(part));
    }
    const uint64_t key = parts_.at(hash).key;
    const bool held = resolve(hash, key, true);
    before = hash;
    has_before = true;
    if (held && !orphans_.empty()) adopt(hash, key);
  }
  // A part that nothing claims stays only while one that builds on it does.
  for (auto hash = range.hashes.rbegin(); hash != range.hashes.rend(); ++hash) forget_part(*hash);
}

// A (group, tier) came to hold a part, or no longer does: every whole block above it is told.
void Stream::hold_part(uint64_t hash, uint16_t holder, bool added) {
  const uint32_t canonical = index_->block_size();
  std::vector<uint64_t> open{hash};
  while (!open.empty()) {
    Part& part = parts_.at(open.back());
    open.pop_back();
    open.insert(open.end(), part.children.begin(), part.children.end());
    const auto parts = static_cast<uint32_t>(canonical / part.tokens.size());
    if (part.place + 1 != parts) continue;
    uint32_t& held = part.held[holder];
    const auto group = static_cast<uint8_t>(holder >> 8), tier = static_cast<uint8_t>(holder);
    if (added) {
      if (++held == parts) hold_key(part.key, group, tier);
    } else {
      if (held-- == parts) release_key(part.key, group, tier);
      if (held == 0) part.held.erase(holder);
    }
  }
}

// Takes a part out when nothing claims it and nothing builds on it, and then perhaps the one before it.
void Stream::forget_part(uint64_t hash) {
  for (;;) {
    const auto found = parts_.find(hash);
    if (found == parts_.end() || found->second.claims > 0 || !found->second.children.empty()) return;
    const bool has_before = found->second.place > 0;
    const uint64_t before = found->second.parent;
    parts_.erase(found);
    if (!has_before) return;
    const auto parent = parts_.find(before);
    if (parent == parts_.end()) return;
    auto& children = parent->second.children;
    children.erase(std::remove(children.begin(), children.end(), hash), children.end());
    hash = before;
  }
}

// --- keys that become known later ---

void Stream::learn(uint64_t hash, uint64_t key) {
  if (unresolved_ != 0) resolve(hash, key, false);
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
  // Placing a range may make further parents known; those are worked off from here, not from inside it.
  known_.emplace_back(parent, parent_key);
  if (adopting_) return;
  adopting_ = true;
  while (!known_.empty()) {
    const auto [hash, key] = known_.back();
    known_.pop_back();
    for (auto it = waiting_.find(hash); it != waiting_.end(); it = waiting_.find(hash)) {
      const uint64_t id = it->second;
      const Orphan orphan = orphans_.at(id);
      drop_orphan(id);
      place({orphan.hashes, orphan.tokens, orphan.extras, orphan.block_size, false, hash, key});
    }
  }
  adopting_ = false;
}

// --- leaving ---

uint64_t Stream::drop_all() {
  std::vector<uint32_t> lanes;
  lanes.reserve(groups_.size());
  for (const Group& group : groups_) lanes.push_back(group.lane);
  index_->retire_lanes(lanes);
  index_->placements().drop({pod_, number_});
  const uint64_t dropped = used_;
  for (const Claim& claim : table_) {
    if (claim.count == 0 || !claim.resolved || claim.part) continue;
    index_->release(claim.key, groups_[claim.group].lane, claim.tier);
    if (claim.wide)
      for (const uint64_t key : spans_.at(claim.key).keys) index_->release(key, groups_[claim.group].lane, claim.tier);
  }
  for (const auto& [hash, part] : parts_)
    for (const auto& [holder, held] : part.held) index_->release(part.key, groups_[holder >> 8].lane, holder & 0xFF);
  index_->free_lanes(lanes);
  index_->unclaim(used_);
  index_->account(-static_cast<int64_t>(table_.size() * sizeof(Claim)));
  std::vector<Claim>().swap(table_);
  used_ = 0;
  unresolved_ = 0;
  by_tier_ = {};
  groups_.clear();
  shared_.clear();
  spans_.clear();
  parts_.clear();
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
