#include "stream.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>

#include "keys.hpp"
#include "xxh3.hpp"

namespace kvindex {
namespace {

// A window of no tokens would need nothing at all, and match every prompt: nobody knows what is meant.
bool kind_of(std::string_view name, bool has_window, GroupKind& kind) {
  if (name.empty() || name == "full_attention" || name == "mla_attention" || name == "sink_full_attention")
    return kind = GroupKind::kFull, true;
  if (name == "sliding_window" || name == "sliding_window_mla")
    return kind = has_window ? GroupKind::kSliding : GroupKind::kUnknown, has_window;
  if (name == "mamba" || name == "linear_attention") return kind = GroupKind::kMamba, true;
  return kind = GroupKind::kUnknown, false;
}

constexpr double kLatest = 253402300800;      // the year 10000
constexpr uint32_t kMaxTopologyChanges = 64;  // under one pin: each leaves a whole topology behind
constexpr size_t kMaxMedium = 64;

}  // namespace

Stream::Stream(std::shared_ptr<Index> index, uint32_t pod, uint32_t number)
    : index_(std::move(index)),
      pod_(pod),
      number_(number),
      removals_(index_->held().accounted(), index_->max_removals()) {}

Stream::~Stream() { close(); }

void Stream::apply(const uint8_t* data, size_t size, uint32_t rank, Applied& applied, uint64_t sequence) {
  std::lock_guard lock(mutex_);
  Batch batch;
  if (!batch.open(data, size)) return applied.count(Reason::kBadBatch);
  ++applied.messages;
  if (batch.timestamp() > 0) applied.timestamp = batch.timestamp();
  if (closed_) return;
  // An engine's time may be anything; one that no calendar has is as good as none.
  const bool is_time = batch.timestamp() > 0 && batch.timestamp() < kLatest;
  removals_.message(sequence, is_time ? batch.timestamp() : 0);
  bool looked = dialect_.due();
  if (looked) dialect_.look(data, size);
  // What a pin keeps from being freed is whatever was replaced meanwhile: a long message is applied under several.
  for (bool more = true; more;) {
    {
      const auto pin = index_->held().epoch().pin();
      more = apply_some(batch, rank, applied, {data, size}, looked);
    }
    index_->held().epoch().collect();
  }
  end_batch(applied);
  event_.shed();
  shed(keys_);
  shed(nodes_);
  shed(removed_);
  if (is_new_size_ > kShedAbove) is_new_.reset(), is_new_size_ = 0;
}

bool Stream::apply_some(Batch& batch, uint32_t rank, Applied& applied, Message whole, bool& looked) {
  topology_changes_ = 0;
  for (;;) {
    Reason reason;
    const auto next = batch.next(event_, reason);
    if (next != Batch::Next::kEvent || event_.tag != Tag::kRemoved) remove_gathered(applied);
    switch (next) {
      case Batch::Next::kEnd:
        if (batch.has_rank() && batch.rank() != rank) applied.count(Reason::kRankMismatch);
        return false;
      case Batch::Next::kSkipped:
        applied.count(reason);
        if (!looked && dialect_.odd_due()) dialect_.look(whole.data, whole.size);
        looked = true;
        continue;
      case Batch::Next::kEvent: break;
    }
    ++applied.events;
    switch (event_.tag) {
      case Tag::kStored:
        dialect_.take_context(event_.adapter, !event_.has_parent && !event_.tokens.empty(), event_.salted);
        store(event_, applied);
        break;
      case Tag::kRemoved: remove(event_, applied); break;
      case Tag::kCleared:
        ++applied.clears;
        drop_all(Left::kCleared);
        break;
    }
    if (topology_changes_ >= kMaxTopologyChanges) return remove_gathered(applied), true;
  }
}

// It becomes a metric label and part of answers, so it is made a short plain name if it is none.
uint32_t Stream::tier_of(std::string_view medium) {
  if (medium.empty()) return 0;
  for (const auto& [name, tier] : tier_names_)
    if (name == medium) return tier;
  std::string plain(medium.substr(0, kMaxMedium));
  for (char& c : plain) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    if (c <= ' ' || c >= 0x7f) c = '_';
  }
  const uint32_t tier = index_->tier_of(plain);
  if (tier < kMaxTiers && tier_names_.size() < 64 && medium.size() <= kMaxMedium)
    tier_names_.emplace_back(std::string(medium), tier);
  return tier;
}

bool Stream::group_of(const Event& event, uint8_t& group, Applied& applied) {
  GroupKind kind;
  const bool known = kind_of(event.kind, event.has_window && event.window > 0, kind);
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
      ++topology_changes_;
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
  ++topology_changes_;
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

  // Connectors leave the list out of their events, whatever the block's extras are; another event tells its key. Keys
  // told before the first list are all of such events, or of an engine that has no lists.
  if (event.has_extra_keys && !tells_extra_keys_) {
    tells_extra_keys_ = true;
    doubt_keys(applied);
  }
  const bool sure = !event.unkeyed && (event.has_extra_keys || !tells_extra_keys_);
  // Which tokens belong to which hash is only sure when every block of the range has its hash.
  const bool mapped = sure && count > 0 && event.block_size > 0 && event.block_size <= UINT32_MAX &&
                      event.tokens.size() / event.block_size == count && event.tokens.size() % event.block_size == 0;
  const GroupKind kind = groups_[group].kind;
  // A mamba group's block is its state at one point, whatever tokens it covers.
  const uint32_t size =
      kind == GroupKind::kMamba ? 0 : static_cast<uint32_t>(std::min<uint64_t>(event.block_size, UINT32_MAX));
  uint32_t canonical = 0;
  bool early = false;
  if (size > 0) {
    uint32_t& own = book_of(group, tier_bit).block_size;
    own = std::max(own, size);
    // A group of unknown kind follows the size that others have taught.
    if (mapped) canonical = kind == GroupKind::kUnknown ? index_->block_size() : learn_size(event, size);
    early = mapped && canonical == 0 && kind != GroupKind::kUnknown;
    // A smaller block than the group's own is a partial one: held, but not yet part of any prefix.
    if (size < own && size != canonical) canonical = 0;
    if (canonical != 0 && size % canonical != 0 && canonical % size != 0) {
      if (kind != GroupKind::kUnknown) applied.count(Reason::kBlockSizeMismatch, count);
      canonical = 0;
    }
  }
  const uint32_t in_force = index_->block_size();
  if (!early_.empty() && in_force != 0) place_early();
  const bool direct = canonical != 0 && canonical == size;
  uint64_t parent = 0;
  Node before = 0;
  const bool parent_known = !event.has_parent || knows(event.parent, size, parent, before);
  if (!direct || !parent_known) {
    // Where placing follows, it is that which resolves them: only then is it known what they stand for.
    const bool placed = canonical != 0 && parent_known;
    if (!mapped && in_force != 0 && size > in_force && parent_known) tell_spans(event, in_force, parent);
    // A copy told without its tokens, or with some that do not tell all, may be of a block that this batch removed.
    const bool told = sure && !event.tokens.empty();
    for (const uint64_t hash : event.hashes) {
      uint64_t key = 0;
      Node node = 0;
      if (!placed && !key_of(hash, key, node) && !told) key = removed_key(hash);
      if (event.unkeyed && key == 0 && !knows(hash, size, key, node)) applied.count(*event.unkeyed);
      add_claim(hash, group, tier_bit, size, key, applied);
      if (!placed && unresolved_ != 0) resolve(hash, key);
    }
    if (placed) return place({event.hashes, event.tokens, event.extras, size, !event.has_parent, event.parent, parent});
    if (early || canonical != 0) add_orphan(event, applied);
    return;
  }
  std::string scratch;
  keys_.resize(count);
  const Claims& claims = book_of(group, tier_bit).claims;
  for (size_t i = 0; i < count; ++i) {
    claims.prefetch(event.hashes[i]);
    parent = block_key(event.tokens.data() + i * canonical, canonical, extras_of(event.extras, i),
                       i == 0 && !event.has_parent, parent, index_->seed(), scratch);
    keys_[i] = parent;
    index_->held().prefetch_key(parent);
  }
  if (unresolved_ == 0 && orphans_.empty() && parts_.empty() && spans_.empty())
    return add_claims(event.hashes.data(), count, before, group, tier_bit, applied);
  const std::vector<uint64_t> keys = keys_;
  for (size_t i = 0; i < count; ++i) add_claim(event.hashes[i], group, tier_bit, size, keys[i], applied);
  for (size_t i = 0; i < count && (unresolved_ != 0 || !orphans_.empty()); ++i) learn(event.hashes[i], keys[i]);
}

// The model's block size, learned from this event if it is not known yet and the event can tell it; 0 when it cannot.
uint32_t Stream::learn_size(const Event& event, uint32_t size) {
  if (const uint32_t known = index_->block_size()) return known;
  // A block that comes alone may be a partial one, whose size says nothing, unless engines have such blocks ...
  if (event.hashes.size() > 1 || std::has_single_bit(size)) return index_->learn_block_size(size);
  // ... or another one builds on it.
  if (!event.has_parent) return 0;
  for (const Book& book : books_) {
    const uint32_t* ref = book.claims.find(event.parent);
    if (ref == nullptr || (*ref & kSpecial) == 0 || groups_[book.group].kind == GroupKind::kUnknown) continue;
    if (const uint32_t told = specials_[*ref & ~kSpecial].size) return index_->learn_block_size(told);
  }
  return 0;
}

// Removals in a row are gathered and done together: one after the other they would wait for memory at every step.
void Stream::remove(const Event& event, Applied& applied) {
  if (!event.again || removed_from_ == nullptr) {
    Book* const book = removed_book(event, applied);
    if (book != removed_from_) remove_gathered(applied);
    removed_from_ = book;
    if (book == nullptr) return;
  }
  for (const uint64_t hash : event.hashes) {
    removed_from_->claims.prefetch(hash);
    removed_.push_back(hash);
  }
}

// What a removal is of; nullptr, and counted, when nothing of it can be held.
Stream::Book* Stream::removed_book(const Event& event, Applied& applied) {
  const uint32_t tier = tier_of(event.medium);
  if (tier == kMaxTiers) return applied.count(Reason::kTierLimit), nullptr;
  size_t group = 0;
  while (group < groups_.size() && groups_[group].index != event.group) ++group;
  Book* book = nullptr;
  if (group < groups_.size()) book = find_book(static_cast<uint8_t>(group), static_cast<uint8_t>(tier));
  if (book == nullptr) applied.count(Reason::kUnknownRemoval, event.hashes.size());
  return book;
}

void Stream::remove_gathered(Applied& applied) {
  if (removed_.empty()) return;
  Book& book = *removed_from_;
  Blocks& blocks = index_->held();
  uint64_t gone = 0;
  nodes_.clear();
  removals_.open(groups_[book.group].index, book.tier, Left::kRemoved);
  for (const uint64_t hash : removed_) {
    uint32_t* ref = book.claims.find(hash);
    if (ref == nullptr) {
      applied.count(Reason::kUnknownRemoval);
      continue;
    }
    ++applied.blocks_removed;
    if ((*ref & kSpecial) == 0) {
      removed_[nodes_.size()] = hash;
      nodes_.push_back(*ref);
      blocks.prefetch(*ref);
      book.claims.erase(hash, ref);
    } else if (specials_[*ref & ~kSpecial].count > 1) {
      --specials_[*ref & ~kSpecial].count;
      settle(*ref);
    } else {
      erase_claim(book, hash, *ref);
      ++gone;
    }
  }
  gone += nodes_.size();
  for (const Node node : nodes_) blocks.prefetch_key(blocks.key_of(node));
  size_t held = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const uint64_t key = blocks.key_of(nodes_[i]);
    note_gone(removed_[i], key);
    if (!shared_.empty() && unshare(key, book.group, book.tier)) continue;
    note_released(key, book.group, book.tier);
    removals_.note(key);
    nodes_[held++] = nodes_[i];
  }
  nodes_.resize(held);
  blocks.release(nodes_, holder_of(book.group, book.tier));
  removals_.close();
  index_->unclaim(gone);
  removed_.clear();
  removed_from_ = nullptr;
}

// --- claims ---

Stream::Book* Stream::find_book(uint8_t group, uint8_t tier) {
  for (Book& each : books_)
    if (each.group == group && each.tier == tier) return &each;
  return nullptr;
}

Stream::Book& Stream::book_of(uint8_t group, uint8_t tier) {
  if (Book* found = find_book(group, tier)) return *found;
  return books_.emplace_back(Book{group, tier, Claims(index_->held().accounted())});
}

uint32_t Stream::add_special(const Special& special) {
  if (free_specials_.empty()) grow_specials();
  const uint32_t place = free_specials_.back();
  free_specials_.pop_back();
  specials_[place] = special;
  return kSpecial | place;
}

// Room for more, half as many again; `free_specials_` has room for all of them, so that freeing never allocates.
void Stream::grow_specials() {
  const size_t before = specials_.size(), after = before + before / 2 + 16;
  specials_.reserve(after);
  free_specials_.reserve(after);
  specials_.resize(after);
  for (size_t i = after; i > before; --i) free_specials_.push_back(static_cast<uint32_t>(i - 1));
  index_->held().account(static_cast<int64_t>((after - before) * (sizeof(Special) + sizeof(uint32_t))));
}

void Stream::free_special(uint32_t ref) {
  specials_[ref & ~kSpecial] = {};
  free_specials_.push_back(ref & ~kSpecial);
}

Stream::Special& Stream::make_special(uint32_t& ref, uint64_t hash) {
  if ((ref & kSpecial) == 0) {
    Special made{hash, index_->held().key_of(ref), 1, ref, index_->block_size(), true};
    ref = add_special(made);
  }
  return specials_[ref & ~kSpecial];
}

void Stream::settle(uint32_t& ref) {
  const Special& special = specials_[ref & ~kSpecial];
  if (!special.plain()) return;
  const Node node = special.node;
  free_special(ref);
  ref = node;
}

bool Stream::key_of(uint64_t hash, uint64_t& key, Node& node) const {
  for (const Book& book : books_) {
    const uint32_t* ref = book.claims.find(hash);
    if (ref == nullptr) continue;
    if ((*ref & kSpecial) == 0) return node = *ref, key = index_->held().key_of(*ref), true;
    const Special& special = specials_[*ref & ~kSpecial];
    // A part that ends inside a canonical block has no key.
    if (special.resolved && special.key != 0) return node = special.node, key = special.key, true;
  }
  return false;
}

uint64_t Stream::find(uint64_t hash, std::vector<Holding>& out) const {
  uint64_t key = 0;
  for (const Book& book : books_) {
    const uint32_t* ref = book.claims.find(hash);
    if (ref == nullptr) continue;
    out.push_back({groups_[book.group].lane, static_cast<uint8_t>(1U << book.tier)});
    if ((*ref & kSpecial) == 0) {
      key = index_->held().key_of(*ref);
    } else if (specials_[*ref & ~kSpecial].resolved) {
      key = specials_[*ref & ~kSpecial].key;
    }
  }
  return key;
}

void Stream::add_claim(uint64_t hash, uint8_t group, uint8_t tier, uint32_t size, uint64_t key, Applied& applied) {
  Book& book = book_of(group, tier);
  if (uint32_t* ref = book.claims.find(hash)) {
    Special& claim = make_special(*ref, hash);
    if (claim.count != UINT32_MAX) ++claim.count;
    if (size != 0 && claim.size != size) narrow(claim, group, tier, size);
    if (!claim.resolved && hold(claim, group, tier, key)) --unresolved_;
    return;
  }
  if (claim(1) == 0) return applied.count(Reason::kClaimLimit);
  Special claim{hash, 0, 1, 0, size};
  if (!hold(claim, group, tier, key)) {
    if (unresolved_ >= kMaxUnresolved) return index_->unclaim(1), applied.count(Reason::kUnresolvedLimit);
    ++unresolved_;
  }
  bool is_new;
  book.claims.insert(hash, claim.plain() ? claim.node : add_special(claim), is_new);
}

void Stream::narrow(Special& claim, uint8_t group, uint8_t tier, uint32_t size) {
  if (claim.size == 0) return claim.size = size, void();
  ++misfits_;
  if (claim.size < size) return;
  if (claim.resolved) {
    release(claim, group, tier);
    claim.resolved = claim.wide = claim.part = false;
    claim.node = 0;
    ++unresolved_;
  }
  claim.size = size;
}

uint32_t Stream::size_of(uint64_t hash, uint8_t group) const {
  const uint32_t canonical = index_->block_size();
  if (groups_[group].kind == GroupKind::kMamba) return canonical;
  uint32_t claimed = UINT32_MAX, own = UINT32_MAX;
  for (const Book& book : books_) {
    if (book.group != group) continue;
    if (book.block_size != 0) own = std::min(own, book.block_size);
    const uint32_t* ref = book.claims.find(hash);
    if (ref == nullptr) continue;
    const uint32_t size = (*ref & kSpecial) == 0 ? canonical : specials_[*ref & ~kSpecial].size;
    if (size != 0) claimed = std::min(claimed, size);
  }
  if (claimed != UINT32_MAX) return claimed;
  return own != UINT32_MAX ? own : canonical;
}

void Stream::add_claims(const uint64_t* hashes, size_t count, Node before, uint8_t group, uint8_t tier,
                        Applied& applied) {
  Blocks& blocks = index_->held();
  Book& book = book_of(group, tier);
  nodes_.resize(std::max(nodes_.size(), count));
  if (is_new_size_ < count) is_new_ = std::make_unique<bool[]>(is_new_size_ = count);
  // Normally there is room, and all of them are held before it shows which were claimed already. Without room for
  // all, those are looked for first, so that the room goes to the others.
  const HolderId holder = holder_of(group, tier);
  uint64_t granted = claim(count);
  if (granted == count) {
    blocks.hold(keys_.data(), count, before, holder, pen_, nodes_.data(), is_new_.get());
  } else {
    index_->unclaim(granted);
    std::fill_n(nodes_.begin(), count, 0);
    granted = 0;
    for (size_t i = 0; i < count; ++i) {
      const uint32_t* ref = book.claims.find(hashes[i]);
      if (ref != nullptr) {
        before = (*ref & kSpecial) != 0 ? specials_[*ref & ~kSpecial].node : *ref;
      } else if (claim(1, granted) == 1) {
        ++granted;
        blocks.hold(&keys_[i], 1, before, holder, pen_, &nodes_[i], &is_new_[i]);
        before = nodes_[i];
      } else {
        before = 0;
      }
    }
  }
  uint64_t used = 0;
  for (size_t i = 0; i < count; ++i) {
    if (nodes_[i] == 0 || !is_new_[i]) continue;
    book.held += mixed(keys_[i]);
    if (changes_ != nullptr) changes_->held(keys_[i], group, tier);
  }
  const bool placed = index_->placements().any();
  for (size_t i = 0; i < count; ++i) {
    if (nodes_[i] == 0 && book.claims.find(hashes[i]) == nullptr) {
      applied.count(Reason::kClaimLimit);
      continue;
    }
    bool is_new;
    uint32_t* ref = book.claims.insert(hashes[i], nodes_[i], is_new);
    if (is_new) {
      ++used;
      if (!is_new_[i]) {
        share(keys_[i], group, tier);
      } else if (placed) {
        index_->placements().confirm({pod_, number_}, keys_[i]);
      }
      continue;
    }
    // Another copy. It holds the block already, unless the engine gave one hash to two blocks: the first one counts.
    Special& claim = make_special(*ref, hashes[i]);
    if (claim.count != UINT32_MAX) ++claim.count;
    if (nodes_[i] != 0 && nodes_[i] != claim.node && is_new_[i]) {
      note_released(keys_[i], group, tier);
      blocks.release(nodes_[i], holder);
    }
  }
  index_->unclaim(granted - used);
}

void Stream::erase_claim(Book& book, uint64_t hash, uint32_t ref) {
  if ((ref & kSpecial) == 0) {
    note_gone(hash, index_->held().key_of(ref));
    release_node(ref, book.group, book.tier);
  } else {
    const Special claim = specials_[ref & ~kSpecial];
    free_special(ref);
    if (claim.resolved) {
      if (claim.key != 0) note_gone(hash, claim.key);
      release(claim, book.group, book.tier);
    } else {
      --unresolved_;
      removals_.unnamed();
    }
  }
  book.claims.erase(hash);
}

// The index is told once per (key, group, tier), however many hashes stand for it.
void Stream::share(uint64_t key, uint8_t group, uint8_t tier) {
  uint32_t& holders = shared_[key][static_cast<uint16_t>(group << 8 | tier)];
  holders = std::max(holders, 1U) + 1;
}

bool Stream::unshare(uint64_t key, uint8_t group, uint8_t tier) {
  const auto found = shared_.find(key);
  if (found == shared_.end()) return false;
  const auto holders = found->second.find(static_cast<uint16_t>(group << 8 | tier));
  if (holders == found->second.end()) return false;
  if (--holders->second == 1) found->second.erase(holders);
  if (found->second.empty()) shared_.erase(found);
  return true;
}

Node Stream::hold_key(uint64_t key, uint8_t group, uint8_t tier, Node before) {
  Node node;
  bool is_new;
  index_->held().hold(&key, 1, before, holder_of(group, tier), pen_, &node, &is_new);
  if (!is_new) {
    share(key, group, tier);
  } else {
    note_held(key, group, tier);
    if (index_->placements().any()) index_->placements().confirm({pod_, number_}, key);
  }
  return node;
}

void Stream::note_held(uint64_t key, uint8_t group, uint8_t tier) {
  if (Book* book = find_book(group, tier)) book->held += mixed(key);
  if (changes_ != nullptr) changes_->held(key, group, tier);
}

void Stream::note_released(uint64_t key, uint8_t group, uint8_t tier) {
  if (Book* book = find_book(group, tier)) book->held -= mixed(key);
  if (changes_ != nullptr) changes_->released(key, group, tier);
}

void Stream::release_key(uint64_t key, uint8_t group, uint8_t tier) {
  if (!shared_.empty() && unshare(key, group, tier)) return;
  note_released(key, group, tier);
  removals_.note(key);
  if (const Node node = index_->held().find(key)) index_->held().release(node, holder_of(group, tier));
}

void Stream::release_node(Node node, uint8_t group, uint8_t tier) {
  const uint64_t key = index_->held().key_of(node);
  if (!shared_.empty() && unshare(key, group, tier)) return;
  note_released(key, group, tier);
  removals_.note(key);
  index_->held().release(node, holder_of(group, tier));
}

bool Stream::hold(Special& claim, uint8_t group, uint8_t tier, uint64_t key) {
  const uint32_t canonical = index_->block_size();
  const uint32_t size = claim.size != 0 ? claim.size : size_of(claim.hash, group);
  if (size < canonical) {
    const auto part = parts_.find({claim.hash, size});
    if (part == parts_.end()) {
      return key != 0 ? note_short(claim, Reason::kBlockSizeMismatch) : false;
    }
    claim.key = part->second.key;
    claim.part = true;
    ++part->second.claims;
    hold_part(part->first, static_cast<uint16_t>(group << 8 | tier), true);
  } else {
    if (key == 0) return false;
    if (size % canonical != 0) return note_short(claim, Reason::kBlockSizeMismatch);
    Node before = 0;
    if (size > canonical) {
      const size_t width = size / canonical - 1;
      const auto span = spans_.find(key);
      if (span == spans_.end() || span->second.keys.size() < width)
        return note_short(claim, Reason::kBlockSizeMismatch);
      const bool is_new = find_book(group, tier)->claims.find(claim.hash) == nullptr;
      if (!widen(width, is_new ? 1 : 0)) return note_short(claim, Reason::kClaimLimit);
      ++span->second.claims;
      claim.wide = true;
      for (auto each = span->second.keys.end() - static_cast<std::ptrdiff_t>(width); each != span->second.keys.end();
           ++each)
        before = hold_key(*each, group, tier, before);
    }
    claim.key = key;
    claim.node = hold_key(key, group, tier, before);
  }
  claim.size = size;
  claim.resolved = true;
  return true;
}

// Once per claim, however often a batch tries it.
bool Stream::note_short(Special& claim, Reason reason) {
  if (!claim.is_short) short_.emplace_back(claim.hash, reason);
  claim.is_short = true;
  return false;
}

void Stream::release(const Special& claim, uint8_t group, uint8_t tier) {
  if (claim.part) {
    const PartId id{claim.hash, claim.size};
    hold_part(id, static_cast<uint16_t>(group << 8 | tier), false);
    --parts_.at(id).claims;
    loose_parts_.push_back(id);
    return;
  }
  if (claim.wide) {
    const auto [from, to] = span_of(claim);
    for (const uint64_t* key = from; key != to; ++key) release_key(*key, group, tier);
    unwiden(static_cast<uint64_t>(to - from));
    if (--spans_.at(claim.key).claims == 0) told_spans_.push_back(claim.key);
  }
  release_node(claim.node, group, tier);
}

std::pair<const uint64_t*, const uint64_t*> Stream::span_of(const Special& claim) const {
  const std::vector<uint64_t>& keys = spans_.at(claim.key).keys;
  const uint64_t* end = keys.data() + keys.size();
  return {end - (claim.size / index_->block_size() - 1), end};
}

// A longer span ends with the shorter one, for a key names all that comes before it.
void Stream::tell_span(uint64_t key, const uint64_t* from, size_t count) {
  Span& span = spans_[key];
  if (span.keys.size() < count) {
    index_->held().account(static_cast<int64_t>((count - span.keys.size()) * sizeof(uint64_t)));
    span.keys.assign(from, from + count);
  }
  if (span.claims == 0) told_spans_.push_back(key);
}

void Stream::end_batch(Applied& applied) {
  for (const uint64_t key : told_spans_) {
    const auto span = spans_.find(key);
    if (span == spans_.end() || span->second.claims != 0) continue;
    index_->held().account(-static_cast<int64_t>(span->second.keys.size() * sizeof(uint64_t)));
    spans_.erase(span);
  }
  told_spans_.clear();
  forget_loose();
  std::sort(short_.begin(), short_.end());
  short_.erase(std::unique(short_.begin(), short_.end()), short_.end());
  for (const auto& [hash, reason] : short_)
    for (const Book& book : books_) {
      const uint32_t* ref = book.claims.find(hash);
      if (ref == nullptr || (*ref & kSpecial) == 0) continue;
      Special& claim = specials_[*ref & ~kSpecial];
      claim.is_short = false;
      if (!claim.resolved) applied.count(reason);
    }
  short_.clear();
  forget_gone();
  if (misfits_ != 0) applied.count(Reason::kBlockSizeMismatch, misfits_);
  misfits_ = 0;
}

void Stream::forget_loose() {
  for (const PartId& id : loose_parts_) forget_part(id);
  loose_parts_.clear();
}

void Stream::forget_gone() {
  gone_.clear();
  shed(gone_, 4096);
  if (gone_keyed_ == 0) return;  // clearing an empty map costs what it once grew to, and this is done for every batch
  decltype(gone_keys_)().swap(gone_keys_);
  gone_keyed_ = 0;
}

// The key of a block that this batch removed: a copy on another tier may be told after that, without its tokens.
uint64_t Stream::removed_key(uint64_t hash) {
  for (; gone_keyed_ < gone_.size(); ++gone_keyed_) gone_keys_[gone_[gone_keyed_].first] = gone_[gone_keyed_].second;
  const auto found = gone_keys_.find(hash);
  return found == gone_keys_.end() ? 0 : found->second;
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

bool Stream::knows(uint64_t hash, uint32_t size, uint64_t& key, Node& node) const {
  if (size < index_->block_size() && !parts_.empty()) {
    const auto part = parts_.find({hash, size});
    if (part != parts_.end()) return key = part->second.key, true;
  }
  return key_of(hash, key, node);
}

bool Stream::resolve(uint64_t hash, uint64_t key) {
  bool any = false;
  for (Book& book : books_) {
    uint32_t* ref = book.claims.find(hash);
    if (ref == nullptr) continue;
    any = true;
    if ((*ref & kSpecial) == 0) continue;
    Special& claim = specials_[*ref & ~kSpecial];
    if (claim.resolved || !hold(claim, book.group, book.tier, key)) continue;
    --unresolved_;
    settle(*ref);
  }
  return any;
}

void Stream::place(const Range& range) {
  const uint32_t canonical = index_->block_size();
  // A range that waited for the block size may turn out to be a partial block, or of a size that cannot be.
  if (range.block_size % canonical != 0 && canonical % range.block_size != 0) {
    if (range.block_size > canonical) misfits_ += range.hashes.size();
    return;
  }
  const uint32_t parts = parts_of(range.block_size);
  if (parts > 1) return place_parts(range, parts);
  const uint32_t times = range.block_size / canonical;
  std::string scratch, extras;
  uint64_t chain = range.parent_key;
  bool first = range.first;
  const uint32_t* tokens = range.tokens.data();
  std::vector<uint64_t> keys(times);
  for (size_t i = 0; i < range.hashes.size(); ++i) {
    const std::string_view own = extras_of(range.extras, i);
    for (uint32_t n = 0; n < times; ++n, tokens += canonical) {
      if (times == 1) {
        extras = own;
      } else if (!extras_of_nth(own, n, extras)) {
        misfits_ += range.hashes.size() - i;
        return;  // the claims stay unresolved: never a wrong key
      }
      chain = block_key(tokens, canonical, extras, first, chain, index_->seed(), scratch);
      first = false;
      keys[n] = chain;
    }
    if (times > 1 && told_spans_.size() < kMaxOfBatch) tell_span(chain, keys.data(), times - 1);
    // Only a block that is held tells others its key: a removed one may never come back as the same.
    if (resolve(range.hashes[i], chain) && !orphans_.empty()) adopt(range.hashes[i], chain, range.block_size);
  }
}

void Stream::tell_spans(const Event& event, uint32_t canonical, uint64_t parent) {
  if (event.hashes.empty() || event.block_size > event.tokens.size() || event.block_size % canonical != 0) return;
  const size_t times = event.block_size / canonical;
  std::string scratch, extras;
  // A wrong guess of the extras makes keys that nobody asks for.
  const std::string_view own = extras_of(event.extras, 0);
  if (!extras_of_nth(own, event.has_parent ? 1 : 0, extras)) return;
  std::string later;
  extras_of_nth(own, 1, later);
  bool first = !event.has_parent;
  std::vector<uint64_t> keys(times);
  for (size_t at = 0; at + event.block_size <= event.tokens.size() && told_spans_.size() < kMaxOfBatch;
       at += event.block_size) {
    for (size_t n = 0; n < times; ++n) {
      const uint32_t* tokens = event.tokens.data() + at + n * canonical;
      parent = block_key(tokens, canonical, first ? extras : later, first, parent, index_->seed(), scratch);
      first = false;
      keys[n] = parent;
    }
    tell_span(parent, keys.data(), times - 1);
  }
}

bool Stream::whole_key(const Part& last, uint64_t& key) const {
  std::vector<const Part*> chain{&last};
  while (chain.back()->place > 0) {
    const auto before = parts_.find({chain.back()->parent, static_cast<uint32_t>(last.tokens.size())});
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
    const PartId id{range.hashes[i], range.block_size};
    if (parts_.find(id) == parts_.end()) {
      Part part;
      part.first = true;
      if (has_before) {
        const auto parent = parts_.find({before, range.block_size});
        if (parent != parts_.end()) {
          const bool starts_block = parent->second.place + 1 == parts;
          part.parent = before;
          part.place = starts_block ? 0 : parent->second.place + 1;
          part.base = starts_block ? parent->second.key : parent->second.base;
          part.first = !starts_block && parent->second.first;
        } else if (i == 0 && range.parent_key != 0) {  // a block of another size that ends where a canonical one does
          part.base = range.parent_key;
          part.first = false;
        } else {
          misfits_ += range.hashes.size() - i;
          break;
        }
      }
      const auto* tokens = range.tokens.data() + i * range.block_size;
      part.tokens.assign(tokens, tokens + range.block_size);
      part.extras = extras_of(range.extras, i);
      if (part.place + 1 == parts && !whole_key(part, part.key)) return;
      if (part.place > 0) parts_.at({before, range.block_size}).children.push_back(id.hash);
      // What its earlier parts hold already.
      if (part.place + 1 == parts) {
        uint64_t at = part.parent;
        for (uint32_t left = part.place; left > 0; --left) {
          for (const Book& book : books_) {
            const uint32_t* ref = book.claims.find(at);
            if (ref == nullptr || (*ref & kSpecial) == 0) continue;
            const Special& claim = specials_[*ref & ~kSpecial];
            if (claim.part && claim.size == range.block_size)
              ++part.held[static_cast<uint16_t>(book.group << 8 | book.tier)];
          }
          at = parts_.at({at, range.block_size}).parent;
        }
      }
      index_->held().account(static_cast<int64_t>(bytes_of(part)));
      parts_.emplace(id, std::move(part));
    }
    const uint64_t key = parts_.at(id).key;
    const bool held = resolve(id.hash, key);
    // A part that nothing claims stays only while one that builds on it does, and no longer than the batch.
    loose_parts_.push_back(id);
    if (loose_parts_.size() >= kMaxOfBatch) forget_loose();
    before = id.hash;
    has_before = true;
    if (held && !orphans_.empty()) adopt(id.hash, key, id.size);
  }
}

// A (group, tier) came to hold a part, or no longer does: every whole block above it is told.
void Stream::hold_part(const PartId& id, uint16_t holder, bool added) {
  const uint32_t canonical = index_->block_size();
  const uint32_t parts = canonical / id.size;
  std::vector<uint64_t> open{id.hash};
  while (!open.empty()) {
    Part& part = parts_.at({open.back(), id.size});
    open.pop_back();
    open.insert(open.end(), part.children.begin(), part.children.end());
    if (part.place + 1 != parts) continue;
    uint32_t& held = part.held[holder];
    const auto group = static_cast<uint8_t>(holder >> 8), tier = static_cast<uint8_t>(holder);
    if (added) {
      if (++held == parts) hold_key(part.key, group, tier, 0);
    } else {
      if (held-- == parts) release_key(part.key, group, tier);
      if (held == 0) part.held.erase(holder);
    }
  }
}

// Takes a part out when nothing claims it and nothing builds on it, and then perhaps the one before it.
void Stream::forget_part(PartId id) {
  for (;;) {
    const auto found = parts_.find(id);
    if (found == parts_.end() || found->second.claims > 0 || !found->second.children.empty()) return;
    const bool has_before = found->second.place > 0;
    const PartId before{found->second.parent, id.size};
    index_->held().account(-static_cast<int64_t>(bytes_of(found->second)));
    parts_.erase(found);
    if (!has_before) return;
    const auto parent = parts_.find(before);
    if (parent == parts_.end()) return;
    auto& children = parent->second.children;
    children.erase(std::remove(children.begin(), children.end(), id.hash), children.end());
    id = before;
  }
}

// --- keys that become known later ---

void Stream::learn(uint64_t hash, uint64_t key) {
  if (unresolved_ != 0) resolve(hash, key);
  if (!orphans_.empty()) adopt(hash, key, index_->block_size());
}

// --- leaving ---

uint64_t Stream::drop_all(std::optional<Left> left) {
  if (changes_ != nullptr) changes_->dropped();
  std::vector<uint32_t> lanes;
  lanes.reserve(groups_.size());
  for (const Group& group : groups_) lanes.push_back(group.lane);
  index_->retire_lanes(lanes);
  ++topology_changes_;
  index_->placements().drop({pod_, number_});
  const uint64_t dropped = size();
  Blocks& blocks = index_->held();
  // What cannot be remembered anyway is not looked at: a fence costs what its blocks cost.
  const uint64_t capacity = left ? removals_.capacity() : 0;
  uint64_t noted = 0;
  bool more = false;
  const auto note = [&](uint64_t key) {
    if (noted == capacity) {
      more = true;
    } else {
      ++noted;
      removals_.note(key);
    }
  };
  const auto open = [&](uint8_t group, uint8_t tier) {
    if (left) removals_.open(groups_[group].index, tier, *left);
  };
  const auto release_of_key = [&](uint64_t key, HolderId holder) {
    if (const Node node = blocks.find(key)) blocks.release(node, holder);
  };
  for (const auto& [id, part] : parts_)
    for (const auto& [holder, held] : part.held) {
      const auto group = static_cast<uint8_t>(holder >> 8), tier = static_cast<uint8_t>(holder);
      if (held == parts_of(id.size)) {
        open(group, tier);
        note(part.key);
        removals_.close();
      }
      release_of_key(part.key, holder_of(group, tier));
    }
  for (const Book& book : books_) {
    const HolderId holder = holder_of(book.group, book.tier);
    open(book.group, book.tier);
    std::vector<Node> nodes;
    nodes.reserve(book.claims.size());
    book.claims.each([&](uint32_t ref) {
      if ((ref & kSpecial) == 0) return nodes.push_back(ref);
      const Special& claim = specials_[ref & ~kSpecial];
      if (claim.node != 0) nodes.push_back(claim.node);
      if (!claim.wide) return;
      const auto [from, to] = span_of(claim);
      for (const uint64_t* key = from; key != to; ++key) {
        note(*key);
        release_of_key(*key, holder);
      }
      unwiden(static_cast<uint64_t>(to - from));
    });
    // Chunk by chunk, which is far cheaper than block by block.
    std::sort(nodes.begin(), nodes.end());
    const size_t noting = std::min<uint64_t>(nodes.size(), capacity - noted);
    for (size_t i = 0; i < noting; ++i) removals_.note(blocks.key_of(nodes[i]));
    noted += noting;
    more = more || noting < nodes.size();
    removals_.close();
    blocks.release(nodes, holder);
  }
  if (left && more) removals_.lose();
  if (left == Left::kCleared) removals_.cleared();
  blocks.lay_down(pen_);
  index_->free_lanes(lanes);
  index_->unclaim(dropped);
  books_.clear();
  blocks.account(-static_cast<int64_t>(specials_.size() * (sizeof(Special) + sizeof(uint32_t))));
  std::vector<Special>().swap(specials_);
  std::vector<uint32_t>().swap(free_specials_);
  unresolved_ = 0;
  groups_.clear();
  shared_.clear();
  int64_t bytes = 0;
  for (const auto& [key, span] : spans_) bytes += static_cast<int64_t>(span.keys.size() * sizeof(uint64_t));
  for (const auto& [id, part] : parts_) bytes += static_cast<int64_t>(bytes_of(part));
  blocks.account(-bytes);
  spans_.clear();
  parts_.clear();
  told_spans_.clear();
  loose_parts_.clear();
  short_.clear();
  forget_gone();
  drop_orphans();
  return dropped;
}

uint64_t Stream::clear(Left left) {
  uint64_t dropped;
  {
    std::lock_guard lock(mutex_);
    const auto pin = index_->held().epoch().pin();
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    removals_.drop(std::chrono::duration<double>(now).count());
    dropped = drop_all(left);
    if (left != Left::kDoubted) {
      removals_.restart();
      dialect_.reset();
      tells_extra_keys_ = false;
    }
  }
  index_->held().epoch().collect();
  return dropped;
}

uint64_t Stream::close() {
  uint64_t dropped;
  {
    std::lock_guard lock(mutex_);
    if (closed_) return 0;
    closed_ = true;
    const auto pin = index_->held().epoch().pin();
    dropped = drop_all(std::nullopt);
    removals_.reset();
  }
  index_->close_stream(number_);
  return dropped;
}

uint64_t Stream::size() const {
  uint64_t all = 0;
  for (const Book& book : books_) all += book.claims.size();
  return all;
}

uint64_t Stream::claim(uint64_t count, uint64_t taken) const {
  if (const uint64_t most = index_->max_claims_per_stream(); most != 0) {
    const uint64_t have = size() + wide_ + taken;
    count = std::min(count, have < most ? most - have : 0);
  }
  return index_->claim(count);
}

bool Stream::widen(uint64_t count, uint64_t taken) {
  const uint64_t most = index_->max_claims_per_stream();
  if (most != 0 && size() + wide_ + taken + count > most) return false;
  if (!index_->widen(count)) return false;
  wide_ += count;
  return true;
}

void Stream::unwiden(uint64_t count) {
  index_->unwiden(count);
  wide_ -= count;
}

uint64_t Stream::claims() const {
  std::lock_guard lock(mutex_);
  return size();
}

uint64_t Stream::digest() const {
  std::lock_guard lock(mutex_);
  const std::vector<std::string> tiers = index_->tiers();
  uint64_t all = 0;
  for (const Book& book : books_) {
    if (book.held == 0) continue;
    const uint64_t tier = xxh3_64(tiers[book.tier].data(), tiers[book.tier].size());
    all += mixed(book.held ^ mixed(tier + groups_[book.group].index));
  }
  return all;
}

std::array<uint64_t, kMaxTiers> Stream::claims_by_tier() const {
  std::lock_guard lock(mutex_);
  std::array<uint64_t, kMaxTiers> all{};
  for (const Book& book : books_) all[book.tier] += book.claims.size();
  return all;
}

uint64_t Stream::orphans() const {
  std::lock_guard lock(mutex_);
  return orphan_blocks_;
}

uint64_t Stream::unresolved() const {
  std::lock_guard lock(mutex_);
  return unresolved_;
}

Dialect Stream::dialect() const {
  std::lock_guard lock(mutex_);
  return dialect_;
}

bool Stream::closed() const {
  std::lock_guard lock(mutex_);
  return closed_;
}

}  // namespace kvindex
