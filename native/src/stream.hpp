// What one engine rank claims to hold: counted claims by engine hash, and the blocks still waiting for a parent.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "blocks.hpp"
#include "changes.hpp"
#include "claims.hpp"
#include "dialect.hpp"
#include "events.hpp"
#include "index.hpp"
#include "removals.hpp"

namespace kvindex {

struct Applied {
  uint64_t messages = 0, events = 0, blocks_stored = 0, blocks_removed = 0, clears = 0;
  double timestamp = 0;
  std::array<uint64_t, kReasons> reasons{};

  void count(Reason reason, uint64_t times = 1) { reasons[static_cast<size_t>(reason)] += times; }
  // Nothing happened that may change how far the stream can be trusted.
  bool is_plain() const {
    uint64_t dropped = 0;
    for (const uint64_t times : reasons) dropped += times;
    return clears == 0 && dropped == reasons[static_cast<size_t>(Reason::kUnknownRemoval)];
  }
};

class Stream {
 public:
  Stream(std::shared_ptr<Index> index, uint32_t pod, uint32_t number);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // `sequence`: the message's number in its stream, when known; only what is told of removals depends on it.
  void apply(const uint8_t* data, size_t size, uint32_t rank, Applied& applied,
             uint64_t sequence = Removals::kNoSequence);
  // Drops every claim. All but kDoubted begin another life: its sequences are counted anew.
  uint64_t clear(Left left = Left::kRequested);
  uint64_t close();

  // Appends the whole state; see stream_snapshot.cpp. Holds back this stream's writer, and nobody else.
  void snapshot(std::string& out) const;
  // Takes a snapshot into a stream that knows nothing yet. False, and still nothing known, when it does not fit.
  bool restore(std::string_view bytes);

  // For an index kept elsewhere, see changes.cpp. From now on changes are noted, beginning with all that is held.
  void follow_changes(size_t limit);
  // What was noted since, and the groups by their number: index u32, kind u8, window u32.
  Changes::Taken take_changes(uint32_t partitions, std::string& groups);

  uint64_t claims() const;
  // Makes keys independent of each other, so that a sum of them tells sets apart. (The steps of SplitMix64.)
  static uint64_t mixed(uint64_t value) {
    value += 0x9E3779B97F4A7C15;
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9;
    value = (value ^ value >> 27) * 0x94D049BB133111EB;
    return value ^ value >> 31;
  }
  // Of what is held, whatever order it came in: the same for everyone who holds the same keys in the same (group as the
  // engine numbers it, tier by its name).
  uint64_t digest() const;
  std::array<uint64_t, kMaxTiers> claims_by_tier() const;
  uint64_t orphans() const;
  uint64_t unresolved() const;
  bool closed() const;
  uint32_t pod() const { return pod_; }

  std::unique_lock<std::mutex> read_lock() const { return std::unique_lock(mutex_); }
  // Under read_lock: the lanes that hold this engine hash; returns its key, 0 when unknown.
  uint64_t find(uint64_t hash, std::vector<Holding>& out) const;
  // Under read_lock.
  const Removals& removals() const { return removals_; }
  Dialect dialect() const;

 private:
  // A claim that is more than "held once, under this node": it stands here, and its reference says so.
  struct Special {
    uint64_t hash = 0;
    uint64_t key = 0;
    uint32_t count = 0;
    Node node = 0;              // of `key`; 0 while unresolved and for parts
    uint32_t size = 0;          // tokens of the block that is claimed: groups and tiers share hashes, not sizes
    bool resolved : 1 = false;  // what it stands for is known, because some event of the stream has told it, and held
    bool wide : 1 = false;      // stands for several canonical blocks, see spans_
    bool part : 1 = false;      // a part of a canonical block, see parts_
    bool is_short : 1 = false;  // stands in short_
    bool plain() const { return resolved && !wide && !part && count == 1; }
  };
  // Claims of one (group, tier) by engine hash. A reference is the block's node, or kSpecial and a place in specials_.
  struct Book {
    uint8_t group;  // index into groups_
    uint8_t tier;
    Claims claims;
    uint64_t held = 0;        // the sum of mixed(key) over the keys held
    uint32_t block_size = 0;  // of its full blocks, the largest seen; 0 = none seen
  };
  struct Group {
    uint32_t index;  // the engine's group_idx
    uint32_t lane;
    GroupKind kind;
    uint32_t window;
  };
  // The keys before the one that is the map's key, in their order. Blocks of several sizes may end there: each claim
  // stands for as many of the last ones as its own size makes.
  struct Span {
    std::vector<uint64_t> keys;
    uint32_t claims = 0;
  };
  // Blocks of several sizes may have one hash, so a part is known by both.
  struct PartId {
    uint64_t hash;
    uint32_t size;
    bool operator==(const PartId&) const = default;
  };
  struct PartIdHash {
    size_t operator()(const PartId& id) const { return id.hash ^ uint64_t{id.size} * 0x9E3779B97F4A7C15; }
  };
  // An engine block smaller than the canonical one: tokens number `place` of `parts` that make it whole.
  struct Part {
    uint64_t parent = 0;  // engine hash of the part before, of the same size, when place > 0
    uint64_t base = 0;    // key of the canonical block before
    bool first = false;   // the canonical block starts at token 0
    uint32_t place = 0;
    std::vector<uint32_t> tokens;
    std::string extras;
    std::vector<uint64_t> children;
    uint32_t claims = 0;
    // Of the last part only: the whole block's key, and how many of its parts each (group, tier) holds.
    uint64_t key = 0;
    std::unordered_map<uint16_t, uint32_t> held;
  };
  static size_t bytes_of(const Part& part) {
    return sizeof part + part.tokens.size() * sizeof(uint32_t) + part.extras.size();
  }
  // A stored range whose parent is unknown, or one from token 0 on that waits until the block size is known.
  struct Orphan {
    uint64_t parent;
    std::vector<uint64_t> hashes;
    std::vector<uint32_t> tokens;
    std::vector<std::string> extras;
    uint32_t block_size;
    bool first;
    std::optional<uint64_t> digest = {};  // of all but the tokens: the same for another copy of the range
    uint64_t next = 0;                    // id of the next one of the same parent and block size

    uint64_t bytes() const;
  };
  using Orphans = std::unordered_map<uint64_t, Orphan>;  // by id; a higher one came later
  // Ids of those of one block size that wait for one parent, the oldest and the latest.
  struct Waiting {
    uint64_t first, last;
  };

  // A parent whose orphans are to be placed: of blocks of `size` tokens, or of any (0).
  struct Known {
    uint64_t hash, key;
    uint32_t size;
  };

  static constexpr uint64_t kMaxOrphanBlocks = 65536;
  static constexpr size_t kMaxEarly = 1024;
  static constexpr size_t kMaxOfBatch = 1U << 18;  // of each list that is kept for the length of a batch
  static constexpr uint64_t kMaxOrphanBytes = 64U << 20;
  static constexpr uint64_t kMaxUnresolved = 1U << 20;

  class Reader;
  bool read(std::string_view bytes);
  bool read_orphans(Reader& in);
  bool read_book(Reader& in, Book& book);

  // Applies some of a message's events; false when that was the last.
  struct Message {
    const uint8_t* data;
    size_t size;
  };
  bool apply_some(Batch& batch, uint32_t rank, Applied& applied, Message whole, bool& looked);
  void store(const Event& event, Applied& applied);
  uint32_t learn_size(const Event& event, uint32_t size);
  // What was kept for the length of a batch goes, and what could not be told is counted.
  void end_batch(Applied& applied);
  void remove(const Event& event, Applied& applied);
  Book* removed_book(const Event& event, Applied& applied);
  void remove_gathered(Applied& applied);
  // All claims go; how they leave is remembered, unless it is of no use to anyone.
  uint64_t drop_all(std::optional<Left> left);
  uint64_t size() const;
  // As Index::claim, within the stream's own limit; `taken` are claims granted already that no book has yet.
  uint64_t claim(uint64_t count, uint64_t taken = 0) const;
  // As Index::widen, likewise.
  bool widen(uint64_t count, uint64_t taken);
  void unwiden(uint64_t count);
  bool group_of(const Event& event, uint8_t& group, Applied& applied);
  uint32_t tier_of(std::string_view medium);

  static constexpr uint32_t kSpecial = 0x80000000U;

  Book* find_book(uint8_t group, uint8_t tier);
  Book& book_of(uint8_t group, uint8_t tier);
  HolderId holder_of(uint8_t group, uint8_t tier) const { return holder_id(groups_[group].lane, tier); }
  uint32_t add_special(const Special& special);
  // The claim behind a reference as a special one, which it becomes if it was none.
  Special& make_special(uint32_t& ref, uint64_t hash);
  // Back to a plain reference when nothing is special any more.
  void settle(uint32_t& ref);
  void free_special(uint32_t ref);
  void grow_specials();
  bool key_of(uint64_t hash, uint64_t& key, Node& node) const;
  // One claim of a block of `size` tokens, 0 when the event does not say it. `key` is the hash's, 0 while unknown.
  void add_claim(uint64_t hash, uint8_t group, uint8_t tier, uint32_t size, uint64_t key, Applied& applied);
  // Another copy says another size: what both of them hold is sure, and no more.
  void narrow(Special& claim, uint8_t group, uint8_t tier, uint32_t size);
  // The size of a block that nobody has told, by what is known of its group.
  uint32_t size_of(uint64_t hash, uint8_t group) const;
  // Claims of consecutive blocks with known keys, while the stream has neither parts nor spans nor anything unresolved.
  void add_claims(const uint64_t* hashes, size_t count, Node before, uint8_t group, uint8_t tier, Applied& applied);
  void erase_claim(Book& book, uint64_t hash, uint32_t ref);
  // Resolves a claim whose hash has this key (0: unknown, or none): false when what it stands for is not known yet.
  bool hold(Special& claim, uint8_t group, uint8_t tier, uint64_t key);
  // The keys before its last one that a wide claim stands for.
  std::pair<const uint64_t*, const uint64_t*> span_of(const Special& claim) const;
  void tell_span(uint64_t key, const uint64_t* from, size_t count);
  // The spans of all blocks of the group's size in a range that does not say where its hashes stand.
  void tell_spans(const Event& event, uint32_t canonical, uint64_t parent);
  uint64_t removed_key(uint64_t hash);
  void note_gone(uint64_t hash, uint64_t key) {
    if (gone_.size() < kMaxOfBatch) gone_.emplace_back(hash, key);
  }
  void forget_gone();
  bool note_short(Special& claim, Reason reason);
  void forget_loose();
  void release(const Special& claim, uint8_t group, uint8_t tier);
  Node hold_key(uint64_t key, uint8_t group, uint8_t tier, Node before);
  void release_key(uint64_t key, uint8_t group, uint8_t tier);
  void release_node(Node node, uint8_t group, uint8_t tier);
  // The stream has come to hold a key, or no longer does: for `digest`, and for whoever follows changes.
  void note_held(uint64_t key, uint8_t group, uint8_t tier);
  void note_released(uint64_t key, uint8_t group, uint8_t tier);
  // Whether another hash of the same (group, tier) still stands for the key.
  bool unshare(uint64_t key, uint8_t group, uint8_t tier);
  void share(uint64_t key, uint8_t group, uint8_t tier);
  // Makes the key of every block of a range known, one hash after the other; `told` sees each hash and its key.
  struct Range {
    const std::vector<uint64_t>& hashes;
    const std::vector<uint32_t>& tokens;
    const std::vector<std::string>& extras;
    uint32_t block_size;
    bool first;
    uint64_t parent_hash;
    uint64_t parent_key;
  };
  void place(const Range& range);
  void place_parts(const Range& range, uint32_t parts);
  void place_early();
  void hold_part(const PartId& id, uint16_t holder, bool added);
  void forget_part(PartId id);
  bool whole_key(const Part& last, uint64_t& key) const;
  // Tries every unresolved claim of a hash; true when there is any claim of it.
  bool resolve(uint64_t hash, uint64_t key);
  // Whether a block of `size` tokens can follow this one; its key is 0 when it ends inside a canonical block.
  bool knows(uint64_t hash, uint32_t size, uint64_t& key, Node& node) const;
  uint32_t parts_of(uint32_t block_size) const;
  // `key` is the key of `hash`: unresolved claims of it get it, and orphans waiting for it are adopted.
  void learn(uint64_t hash, uint64_t key);
  void add_orphan(const Event& event, Applied& applied);
  bool is_waiting(const Event& event) const;
  void keep_orphan(Orphan&& orphan);
  Orphan take_orphan(Orphans::iterator found);
  void drop_orphans();
  // `parent` has become known. Without a key it is a part of `size` tokens, which only such parts can follow.
  void adopt(uint64_t parent, uint64_t parent_key, uint32_t size);
  Orphans::iterator next_waiting(const Known& known);
  // No key told so far is believed any more: every claim waits for another event to tell it.
  void doubt_keys(Applied& applied);

  const std::shared_ptr<Index> index_;
  const uint32_t pod_;  // as the index numbers it
  const uint32_t number_;
  mutable std::mutex mutex_;
  bool closed_ = false;
  std::unique_ptr<Changes> changes_;  // when they are followed
  Removals removals_;
  Dialect dialect_;
  std::vector<Book> books_;
  std::vector<Special> specials_;
  std::vector<uint32_t> free_specials_;
  uint64_t unresolved_ = 0;
  uint64_t wide_ = 0;  // blocks of claims beyond the first of each
  std::vector<Group> groups_;
  Blocks::Pen pen_;
  // Of the event at hand, per block.
  std::vector<uint64_t> keys_;
  std::vector<Node> nodes_;
  std::unique_ptr<bool[]> is_new_;
  size_t is_new_size_ = 0;
  // Removals that the events at hand ask for and that are still to be done, all of one book.
  std::vector<uint64_t> removed_;
  Book* removed_from_ = nullptr;  // and of the last removal
  // Keys that several engine hashes of one (group, tier) stand for, with how many do.
  std::unordered_map<uint64_t, std::unordered_map<uint16_t, uint32_t>> shared_;
  std::unordered_map<uint64_t, Span> spans_;
  std::unordered_map<PartId, Part, PartIdHash> parts_;
  Orphans orphans_;
  std::unordered_map<uint64_t, std::map<uint32_t, Waiting>> waiting_;  // by parent hash and block size
  std::deque<uint64_t> early_;                                         // ids of those that wait for the block size
  std::unordered_map<uint64_t, uint64_t> orphan_digests_;              // -> id
  std::deque<uint64_t> orphan_order_;                                  // ids, oldest first, also of some that are gone
  uint64_t next_orphan_ = 0;
  uint64_t orphan_blocks_ = 0;
  uint64_t orphan_bytes_ = 0;
  std::vector<Known> known_;  // parents whose orphans are to be placed
  bool adopting_ = false;
  // Of the batch at hand: spans and parts that nobody may need after it, hashes with a key whose claims could
  // not be resolved, keys of what was removed, and what is to be counted.
  std::vector<uint64_t> told_spans_;
  std::vector<PartId> loose_parts_;
  std::vector<std::pair<uint64_t, Reason>> short_;
  std::vector<std::pair<uint64_t, uint64_t>> gone_;
  std::unordered_map<uint64_t, uint64_t> gone_keys_;  // of the first `gone_keyed_` of them, once one was asked for
  size_t gone_keyed_ = 0;
  uint64_t misfits_ = 0;
  // Media names as sent -> tier bit, so that lower-casing happens once.
  std::vector<std::pair<std::string, uint32_t>> tier_names_;
  // The engine lists what makes its blocks differ. An event that does not then leaves it open, it does not say
  // "nothing".
  bool tells_extra_keys_ = false;
  uint32_t topology_changes_ = 0;
  Event event_;
};

}  // namespace kvindex
