// A stream's whole state as bytes, and back: whatever `apply` can do afterwards is the same.
//
// Little-endian, no padding: version u32; canonical block size u32; hash seed u64; whether the engine lists extra keys
// u8; tier names; groups; spans; parts; orphans; then a book per (group, tier) with its plain claims as (hash u64, key
// u64), 16 bytes each, in the order in which their blocks lie in memory, and its other claims. What follows from these
// (who shares a key, which whole block is held by its parts) is not written but found again.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "stream.hpp"

namespace kvindex {
namespace {

constexpr uint32_t kVersion = 2;

class Writer {
 public:
  explicit Writer(std::string& out) : out_(out) {}

  template <typename T>
  void number(T value) {
    static_assert(std::is_integral_v<T>);
    out_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void text(std::string_view value) {
    number(static_cast<uint32_t>(value.size()));
    out_.append(value);
  }
  template <typename T>
  void numbers(const std::vector<T>& values) {
    number(static_cast<uint32_t>(values.size()));
    out_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }

 private:
  std::string& out_;
};

}  // namespace

// Reads what Writer wrote; `ok` turns false at the first thing that does not fit, and everything after is 0.
class Stream::Reader {
 public:
  explicit Reader(std::string_view in) : at_(in.data()), left_(in.size()) {}

  bool ok() const { return ok_; }
  bool at_end() const { return ok_ && left_ == 0; }
  void fail() { ok_ = false, left_ = 0; }

  template <typename T>
  T number() {
    T value{};
    if (const char* from = take(sizeof value)) std::memcpy(&value, from, sizeof value);
    return value;
  }
  std::string text() {
    const auto size = number<uint32_t>();
    const char* from = take(size);
    return from == nullptr ? std::string() : std::string(from, size);
  }
  template <typename T>
  std::vector<T> numbers() {
    const uint64_t size = number<uint32_t>();
    const char* from = take(size * sizeof(T));
    if (from == nullptr || size == 0) return {};
    std::vector<T> values(size);
    std::memcpy(values.data(), from, size * sizeof(T));
    return values;
  }
  // How many things of at least `least` bytes follow.
  uint64_t count(size_t least) {
    const auto size = number<uint64_t>();
    if (size > left_ / least) return fail(), 0;
    return size;
  }

 private:
  const char* take(uint64_t size) {
    if (size > left_) return fail(), nullptr;
    const char* from = at_;
    at_ += size;
    left_ -= size;
    return from;
  }

  const char* at_;
  uint64_t left_;
  bool ok_ = true;
};

void Stream::snapshot(std::string& out) const {
  std::lock_guard lock(mutex_);
  const auto pin = index_->held().epoch().pin();
  Writer write(out);
  out.reserve(out.size() + 256 + size() * 16);
  write.number(kVersion);
  write.number(index_->block_size());
  write.number(index_->seed());
  write.number(static_cast<uint8_t>(tells_extra_keys_));
  const std::vector<std::string> tiers = index_->tiers();
  write.number(static_cast<uint64_t>(tiers.size()));
  for (const std::string& each : tiers) write.text(each);

  write.number(static_cast<uint64_t>(groups_.size()));
  for (const Group& each : groups_) {
    write.number(each.index);
    write.number(static_cast<uint8_t>(each.kind));
    write.number(each.window);
  }
  write.number(static_cast<uint64_t>(spans_.size()));
  for (const auto& [key, span] : spans_) {
    write.number(key);
    write.numbers(span.keys);
  }
  write.number(static_cast<uint64_t>(parts_.size()));
  for (const auto& [id, part] : parts_) {
    write.number(id.hash);
    write.number(part.parent);
    write.number(part.base);
    write.number(static_cast<uint8_t>(part.first));
    write.number(part.place);
    write.numbers(part.tokens);
    write.text(part.extras);
    write.number(part.key);
  }
  std::vector<const Orphan*> orphans;
  for (const uint64_t id : orphan_order_)
    if (const auto found = orphans_.find(id); found != orphans_.end()) orphans.push_back(&found->second);
  write.number(static_cast<uint64_t>(orphans.size()));
  for (const Orphan* each : orphans) {
    write.number(each->parent);
    write.number(each->block_size);
    write.number(static_cast<uint8_t>(each->first));
    write.numbers(each->hashes);
    write.numbers(each->tokens);
    write.number(static_cast<uint64_t>(each->extras.size()));
    for (const std::string& extras : each->extras) write.text(extras);
  }

  write.number(static_cast<uint64_t>(books_.size()));
  for (const Book& book : books_) {
    std::vector<std::pair<Node, uint64_t>> plain;
    std::vector<const Special*> specials;
    plain.reserve(book.claims.size());
    book.claims.each_hash([&](uint32_t ref, uint64_t hash) {
      if ((ref & kSpecial) == 0) return plain.emplace_back(ref, hash), void();
      specials.push_back(&specials_[ref & ~kSpecial]);
    });
    std::sort(plain.begin(), plain.end());
    write.number(book.group);
    write.number(book.tier);
    write.number(book.block_size);
    write.number(static_cast<uint64_t>(plain.size()));
    for (const auto& [node, hash] : plain) {
      write.number(hash);
      write.number(index_->held().key_of(node));
    }
    write.number(static_cast<uint64_t>(specials.size()));
    for (const Special* each : specials) {
      write.number(each->hash);
      write.number(each->key);
      write.number(each->count);
      write.number(each->size);
      write.number(static_cast<uint8_t>(each->resolved));
    }
  }
}

bool Stream::restore(std::string_view bytes) {
  std::lock_guard lock(mutex_);
  if (closed_ || size() != 0 || !groups_.empty() || !orphans_.empty()) return false;
  bool restored;
  {
    const auto pin = index_->held().epoch().pin();
    restored = read(bytes);
    if (!restored) drop_all(std::nullopt), tells_extra_keys_ = false;
    removals_.restored();
  }
  index_->held().epoch().collect();
  return restored;
}

bool Stream::read(std::string_view bytes) {
  Reader in(bytes);
  const auto version = in.number<uint32_t>();
  const auto block_size = in.number<uint32_t>();
  const auto seed = in.number<uint64_t>();
  const bool tells = in.number<uint8_t>() != 0;
  if (!in.ok() || version != kVersion || seed != index_->seed()) return false;
  if (block_size != 0 && index_->learn_block_size(block_size) != block_size) return false;
  tells_extra_keys_ = tells;
  std::vector<uint32_t> tiers;  // by the snapshot's number
  for (uint64_t left = in.count(4); left > 0; --left) tiers.push_back(index_->tier_of(in.text()));

  const uint64_t groups = in.count(9);
  if (groups > kMaxGroups) return false;
  for (uint64_t i = 0; i < groups; ++i) {
    const auto index = in.number<uint32_t>();
    const auto kind = in.number<uint8_t>();
    const auto window = in.number<uint32_t>();
    if (!in.ok() || kind > static_cast<uint8_t>(GroupKind::kUnknown) || index > 0xFFFF) return false;
    const auto as = static_cast<GroupKind>(kind);
    groups_.push_back({index, index_->open_lane(number_, index, as, window), as, window});
  }
  for (uint64_t left = in.count(12); left > 0; --left) {
    const auto key = in.number<uint64_t>();
    const auto keys = in.numbers<uint64_t>();
    tell_span(key, keys.data(), keys.size());
  }
  std::vector<std::pair<uint64_t, PartId>> children;  // parent, child
  for (uint64_t left = in.count(38); left > 0; --left) {
    const auto hash = in.number<uint64_t>();
    Part part;
    part.parent = in.number<uint64_t>();
    part.base = in.number<uint64_t>();
    part.first = in.number<uint8_t>() != 0;
    part.place = in.number<uint32_t>();
    part.tokens = in.numbers<uint32_t>();
    part.extras = in.text();
    part.key = in.number<uint64_t>();
    if (!in.ok() || part.tokens.empty() || block_size % part.tokens.size() != 0 ||
        part.place >= block_size / part.tokens.size())
      return false;
    const PartId id{hash, static_cast<uint32_t>(part.tokens.size())};
    if (parts_.find(id) != parts_.end()) return false;
    if (part.place > 0) children.emplace_back(part.parent, id);
    index_->held().account(static_cast<int64_t>(bytes_of(part)));
    loose_parts_.push_back(id);
    parts_.emplace(id, std::move(part));
  }
  for (const auto& [parent, child] : children) {
    const auto found = parts_.find({parent, child.size});
    if (found == parts_.end() || found->second.place + 1 != parts_.at(child).place) return false;
    found->second.children.push_back(child.hash);
  }
  if (!read_orphans(in)) return false;
  for (uint64_t left = in.count(22); left > 0; --left) {
    const auto group = in.number<uint8_t>();
    const auto tier = in.number<uint8_t>();
    const auto own_size = in.number<uint32_t>();
    if (!in.ok() || group >= groups_.size() || tier >= tiers.size() || tiers[tier] >= kMaxTiers) return false;
    const auto as = static_cast<uint8_t>(tiers[tier]);
    if (find_book(group, as) != nullptr) return false;
    book_of(group, as).block_size = own_size;
    if (!read_book(in, book_of(group, as))) return false;
  }
  return in.at_end();
}

bool Stream::read_orphans(Reader& in) {
  for (uint64_t left = in.count(25); left > 0; --left) {
    Orphan orphan;
    orphan.parent = in.number<uint64_t>();
    orphan.block_size = in.number<uint32_t>();
    orphan.first = in.number<uint8_t>() != 0;
    orphan.hashes = in.numbers<uint64_t>();
    orphan.tokens = in.numbers<uint32_t>();
    for (uint64_t extras = in.count(4); extras > 0; --extras) orphan.extras.push_back(in.text());
    const size_t blocks = orphan.hashes.size();
    if (!in.ok() || orphan.block_size == 0 || (orphan.first && early_.size() >= kMaxEarly) ||
        orphan.tokens.size() != blocks * orphan.block_size || orphan_blocks_ + blocks > kMaxOrphanBlocks ||
        (orphan.extras.size() > 1 && orphan.extras.size() != blocks))
      return false;
    keep_orphan(std::move(orphan));
  }
  return in.ok();
}

bool Stream::read_book(Reader& in, Book& book) {
  const uint8_t group = book.group, tier = book.tier;
  Claims& claims = book.claims;
  Blocks& blocks = index_->held();
  const HolderId holder = holder_of(group, tier);
  uint64_t hashes[kSlots], keys[kSlots];
  Node nodes[kSlots], before = 0;
  bool is_new[kSlots];
  for (uint64_t left = in.count(16); left > 0;) {
    if (index_->block_size() == 0) return false;  // keys of blocks of no size
    const size_t count = std::min<uint64_t>(left, kSlots);
    for (size_t i = 0; i < count; ++i) {
      hashes[i] = in.number<uint64_t>();
      keys[i] = in.number<uint64_t>();
      claims.prefetch(hashes[i]);
      blocks.prefetch_key(keys[i]);
    }
    const uint64_t granted = claim(count);
    if (granted < count) return index_->unclaim(granted), false;
    blocks.hold(keys, count, before, holder, pen_, nodes, is_new);
    before = nodes[count - 1];
    for (size_t i = 0; i < count; ++i) {
      bool inserted;
      claims.insert(hashes[i], nodes[i], inserted);
      if (!inserted) {  // a hash that is there twice
        for (size_t rest = i; rest < count; ++rest)
          if (is_new[rest]) blocks.release(nodes[rest], holder);
        return index_->unclaim(count - i), false;
      }
      if (is_new[i]) {
        book.held += mixed(keys[i]);
      } else {
        share(keys[i], group, tier);
      }
    }
    left -= count;
  }
  for (uint64_t left = in.count(25); left > 0; --left) {
    Special claim;
    claim.hash = in.number<uint64_t>();
    claim.key = in.number<uint64_t>();
    claim.count = in.number<uint32_t>();
    claim.size = in.number<uint32_t>();
    const bool resolved = in.number<uint8_t>() != 0;
    if (!in.ok() || claim.count == 0 || claims.find(claim.hash) != nullptr) return false;
    if (!resolved && unresolved_ >= kMaxUnresolved) return false;
    if (Stream::claim(1) == 0) return false;
    if (resolved) {
      if (index_->block_size() == 0 || !hold(claim, group, tier, claim.key)) return index_->unclaim(1), false;
    } else {
      ++unresolved_;
    }
    bool inserted;
    claims.insert(claim.hash, claim.plain() ? claim.node : add_special(claim), inserted);
  }
  return in.ok();
}

}  // namespace kvindex
