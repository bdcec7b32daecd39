#include "events.hpp"

#include <algorithm>
#include <cstring>

#include "keys.hpp"
#include "msgpack.hpp"
#include "xxh3.hpp"

namespace kvindex {

const char* name_of(Reason reason) {
  static constexpr const char* kNames[kReasons] = {
      "bad_batch",        "truncated",     "bad_event",       "unknown_event",       "bad_field",
      "token_range",      "token_ids",     "tier_limit",      "group_limit",         "claim_limit",
      "unresolved_limit", "orphan_limit",  "unknown_removal", "block_size_mismatch", "unknown_group_kind",
      "rank_mismatch",    "unread_extras", "missing_parent"};
  return kNames[static_cast<size_t>(reason)];
}

uint64_t hash_of_bytes(std::string_view bytes) {
  constexpr uint64_t kSeed = 0x6B76696E64657862ULL;  // apart from every other use of the hash
  return xxh3_64(bytes.data(), bytes.size(), kSeed);
}

void Event::shed() {
  kvindex::shed(hashes);
  kvindex::shed(tokens);
  kvindex::shed(extras);
}

namespace {

enum class Field : uint8_t {
  kHashes,
  kParent,
  kTokens,
  kBlockSize,
  kLoraId,
  kMedium,
  kLoraName,
  kExtraKeys,
  kGroup,
  kKind,
  kWindow,
  kSalt,
  kHashAliases,
  kFirstBlock,
  kUnreadExtras,
  kOther
};

// Of a name, a salt or an item that blocks differ by; clients may say as much (1,024 characters).
constexpr size_t kMaxText = 4096;
// Of one event's extras together: no real event comes near.
constexpr size_t kMaxExtras = 16U << 20;

// Positions of the array form, the tag at 0.
constexpr Field kStoredAt[] = {Field::kHashes, Field::kParent, Field::kTokens,   Field::kBlockSize,
                               Field::kLoraId, Field::kMedium, Field::kLoraName, Field::kExtraKeys,
                               Field::kGroup,  Field::kKind,   Field::kWindow};
constexpr Field kRemovedAt[] = {Field::kHashes, Field::kMedium, Field::kGroup};

Field field_of(std::string_view name) {
  switch (name.size()) {
    case 6: return name == "medium" ? Field::kMedium : Field::kOther;
    case 7:
      if (name == "mm_keys") return Field::kUnreadExtras;
      return name == "lora_id" ? Field::kLoraId : Field::kOther;
    case 9:
      if (name == "token_ids") return Field::kTokens;
      if (name == "group_idx") return Field::kGroup;
      return name == "lora_name" ? Field::kLoraName : Field::kOther;
    case 10:
      if (name == "block_size") return Field::kBlockSize;
      if (name == "extra_keys") return Field::kExtraKeys;
      if (name == "cache_salt") return Field::kSalt;
      return name == "seq_hashes" ? Field::kHashAliases : Field::kOther;
    case 11: return name == "parent_hash" ? Field::kParent : Field::kOther;
    case 12: return name == "block_hashes" ? Field::kHashes : Field::kOther;
    case 14: return name == "base_block_idx" ? Field::kFirstBlock : Field::kOther;
    case 15: return name == "additional_salt" ? Field::kUnreadExtras : Field::kOther;
    case 17: return name == "parent_block_hash" ? Field::kParent : Field::kOther;
    case 18: return name == "kv_cache_spec_kind" ? Field::kKind : Field::kOther;
    case 28: return name == "kv_cache_spec_sliding_window" ? Field::kWindow : Field::kOther;
    default: return Field::kOther;
  }
}

bool tag_of(std::string_view name, Tag& tag) {
  if (name == "BlockStored") return tag = Tag::kStored, true;
  if (name == "BlockRemoved") return tag = Tag::kRemoved, true;
  if (name == "AllBlocksCleared") return tag = Tag::kCleared, true;
  // The names of the Mooncake master's envelope (RFC #1527).
  if (name == "stored") return tag = Tag::kStored, true;
  if (name == "removed") return tag = Tag::kRemoved, true;
  if (name == "cleared") return tag = Tag::kCleared, true;
  return false;
}

bool read_hash(Cursor& in, uint64_t& hash) {
  bool negative;
  if (in.integer(hash, negative)) return true;
  std::string_view bytes;
  if (!in.bin(bytes) && !in.str(bytes)) return false;
  hash = hash_of_bytes(bytes);
  return true;
}

bool read_optional_uint(Cursor& in, bool& present, uint64_t& value) {
  present = false;
  if (in.nil()) return true;
  bool negative;
  if (!in.integer(value, negative) || negative) return false;
  present = true;
  return true;
}

bool read_optional_str(Cursor& in, std::string_view& value) { return in.nil() || in.str(value); }

bool read_tokens(Cursor& in, std::vector<uint32_t>& tokens, Reason& reason) {
  uint32_t count;
  if (in.nil()) return true;
  if (!in.array(count)) return reason = Reason::kBadField, false;
  for (uint32_t i = 0; i < count; ++i) {
    i += in.small_integers(count - i, tokens);
    if (i == count) break;
    uint64_t value;
    bool negative;
    if (!in.integer(value, negative)) return reason = Reason::kTokenIds, false;
    if (negative || value > 0xFFFFFFFFULL) return reason = Reason::kTokenRange, false;
    tokens.push_back(static_cast<uint32_t>(value));
  }
  return true;
}

// One item of a block's extra_keys: untagged, or a tuple that names its kind (wire facts, section 6).
struct ExtraItem {
  enum class Kind { kText, kMultimodal, kEmbeds, kLora, kSalt } kind;
  std::string_view bytes;
};

bool read_extra_item(Cursor& in, ExtraItem& item) {
  std::string_view bytes;
  switch (in.peek()) {
    case Type::kStr:
      if (!in.str(bytes) || bytes.size() > kMaxText) return false;
      item = {ExtraItem::Kind::kText, bytes};
      return true;
    case Type::kBin:
      if (!in.bin(bytes) || bytes.size() > kMaxText) return false;
      item = {ExtraItem::Kind::kEmbeds, bytes};
      return true;
    case Type::kArray: {
      const Cursor start = in;
      uint32_t count;
      if (!in.array(count) || count < 2) return false;
      std::string_view first;
      if (!in.str(first) && !in.bin(first)) return false;
      const Type second = in.peek();
      if (first == "mm" || first == "lora" || first == "cache_salt" || first == "prompt_embeds") {
        if (second == Type::kStr || second == Type::kBin) {
          if ((!in.str(bytes) && !in.bin(bytes)) || bytes.size() > kMaxText) return false;
          const auto kind = first == "mm"           ? ExtraItem::Kind::kMultimodal
                            : first == "lora"       ? ExtraItem::Kind::kLora
                            : first == "cache_salt" ? ExtraItem::Kind::kSalt
                                                    : ExtraItem::Kind::kEmbeds;
          item = {kind, bytes};
          in = start;
          return in.skip();
        }
      }
      if (second != Type::kInt || first.size() > kMaxText) return false;
      item = {ExtraItem::Kind::kMultimodal, first};
      in = start;
      return in.skip();
    }
    default: return false;
  }
}

// The items of one block, which `in` stands at; false when one of them is nothing that is known.
template <typename Visit>
bool each_item(Cursor& in, Visit visit) {
  if (in.nil()) return true;
  uint32_t count;
  if (!in.array(count)) return false;
  for (; count > 0; --count) {
    ExtraItem item;
    if (!read_extra_item(in, item)) return false;
    visit(item);
  }
  return true;
}

// Whether one of the next `blocks` blocks has this text as an item.
bool has_text(Cursor in, uint32_t blocks, std::string_view text) {
  bool found = false;
  for (; blocks > 0 && !found; --blocks)
    each_item(in, [&](const ExtraItem& item) {
      found = found || (item.kind == ExtraItem::Kind::kText && item.bytes == text);
    });
  return found;
}

// Untagged strings: the adapter's name, else the salt (only in the request's first block, last of its strings), else
// a multimodal id of an engine that sends it bare. A string that stands in several blocks is no salt.
// False when there is something that nobody knows here: then equal tokens may stand for different blocks.
bool encode_extras(Event& event, const std::optional<Cursor>& extra_keys) {
  if (event.lora_name.size() > kMaxText || event.cache_salt.size() > kMaxText) return false;
  std::string_view lora = event.lora_name, first_text, tagged;
  bool any = false;
  uint32_t count = 0;
  Cursor entries;
  if (extra_keys) {
    entries = *extra_keys;
    if (!entries.array(count) || count != event.hashes.size()) return false;
    Cursor in = entries;
    for (uint32_t i = 0; i < count; ++i) {
      const bool read = each_item(in, [&](const ExtraItem& item) {
        if (!any && i == 0 && item.kind == ExtraItem::Kind::kText) first_text = item.bytes;
        if (tagged.empty() && item.kind == ExtraItem::Kind::kLora) tagged = item.bytes;
        any = true;
      });
      if (!read) return false;
    }
  }
  if (lora.empty() && event.has_lora_id) lora = first_text;
  if (lora.empty()) lora = tagged;
  event.adapter = lora;
  std::string adapter;
  if (!lora.empty()) {
    append_extra(adapter, ExtraKind::kLora, lora);
  } else if (event.has_lora_id) {
    append_extra(adapter, ExtraKind::kLoraId, std::to_string(event.lora_id));
  }
  const std::string_view salt_of_first = event.has_parent ? std::string_view{} : event.cache_salt;
  if (!any && salt_of_first.empty()) {
    if (!adapter.empty()) event.extras.push_back(std::move(adapter));
    return true;
  }

  size_t size = 0;
  bool differ = false;
  std::vector<ExtraItem> items;
  std::vector<std::string_view> multimodal, embeds;
  for (size_t i = 0; i < event.hashes.size(); ++i) {
    std::string& out = event.extras.emplace_back(adapter);
    std::string_view salt = i == 0 ? salt_of_first : std::string_view{};
    items.clear();
    multimodal.clear();
    embeds.clear();
    if (count > 0) each_item(entries, [&](const ExtraItem& item) { items.push_back(item); });
    size_t last_text = items.size();
    for (size_t j = 0; j < items.size(); ++j)
      if (items[j].kind == ExtraItem::Kind::kText && items[j].bytes != lora) last_text = j;
    for (size_t j = 0; j < items.size(); ++j) {
      const ExtraItem& item = items[j];
      switch (item.kind) {
        case ExtraItem::Kind::kMultimodal: multimodal.push_back(item.bytes); break;
        case ExtraItem::Kind::kEmbeds: embeds.push_back(item.bytes); break;
        case ExtraItem::Kind::kSalt: salt = item.bytes; break;
        case ExtraItem::Kind::kLora: break;
        case ExtraItem::Kind::kText:
          if (item.bytes == lora) break;
          // Looked for in the other blocks at most once per event.
          if (i == 0 && !event.has_parent && j == last_text && !has_text(entries, count - 1, item.bytes)) {
            salt = item.bytes;
          } else {
            multimodal.push_back(item.bytes);
          }
      }
    }
    for (const auto each : multimodal) append_extra(out, ExtraKind::kMultimodal, each);
    if (!salt.empty()) append_extra(out, ExtraKind::kCacheSalt, salt), event.salted = true;
    for (const auto each : embeds) append_extra(out, ExtraKind::kPromptEmbeds, each);
    size += out.size();
    if (size > kMaxExtras) return false;
    differ = differ || out != event.extras.front();
  }
  if (!differ) event.extras.resize(1);
  return true;
}

// Where the fields stand that can be read only when all others are known.
struct Later {
  std::optional<Cursor> extra_keys;
  bool odd_extras = false;  // something else makes these blocks differ from others of equal tokens
  bool has_first_block = false;
  uint64_t first_block = 0;
};

bool read_hashes(Cursor& in, Event& event) {
  uint32_t count;
  if (!in.array(count)) return false;
  event.hashes.clear();  // seq_hashes may have named them already
  event.first_hash = in.position();
  for (uint32_t i = 0; i < count; ++i) {
    i += in.wide_integers(count - i, event.hashes);
    if (i < count && !read_hash(in, event.hashes.emplace_back())) return false;
  }
  return true;
}

// Under the master's name, which stands beside block_hashes or instead of it.
bool read_aliases(Cursor& in, Event& event) { return event.hashes.empty() ? read_hashes(in, event) : in.skip(); }

bool read_group(Cursor& in, Event& event) {
  bool present;
  uint64_t group;
  if (!read_optional_uint(in, present, group)) return false;
  event.group = present ? group : 0;
  return true;
}

// Fields of no concern to a removal are passed over, whatever stands in them.
bool read_removed_field(Field field, Cursor& in, Event& event) {
  switch (field) {
    case Field::kHashes: return read_hashes(in, event);
    case Field::kHashAliases: return read_aliases(in, event);
    case Field::kMedium: return read_optional_str(in, event.medium);
    case Field::kGroup: return read_group(in, event);
    default: return in.skip();
  }
}

bool read_stored_field(Field field, Cursor& in, Event& event, Later& later, Reason& reason) {
  bool present;
  switch (field) {
    case Field::kHashes: return read_hashes(in, event);
    case Field::kHashAliases: return read_aliases(in, event);
    case Field::kParent:
      if (in.nil()) return true;
      event.has_parent = true;
      return read_hash(in, event.parent);
    case Field::kTokens: return read_tokens(in, event.tokens, reason);
    case Field::kBlockSize: return read_optional_uint(in, present, event.block_size);
    case Field::kLoraId:
      if (in.peek() == Type::kStr) return event.lora_name.empty() ? in.str(event.lora_name) : in.skip();
      return read_optional_uint(in, event.has_lora_id, event.lora_id);
    case Field::kMedium: return read_optional_str(in, event.medium);
    case Field::kLoraName: return in.nil() || in.str(event.lora_name);
    case Field::kExtraKeys:
      if (in.nil()) return true;
      event.has_extra_keys = in.peek() == Type::kArray;
      later.extra_keys = in;
      return in.skip();
    case Field::kGroup: return read_group(in, event);
    case Field::kKind: return read_optional_str(in, event.kind);
    case Field::kWindow: return read_optional_uint(in, event.has_window, event.window);
    case Field::kSalt: return read_optional_str(in, event.cache_salt);
    case Field::kFirstBlock: return read_optional_uint(in, later.has_first_block, later.first_block);
    case Field::kUnreadExtras: {  // TensorRT-LLM's images, the envelope's further salt: nothing, or nobody knows what
      Cursor value = in;
      std::string_view text;
      uint32_t count = 1;
      later.odd_extras =
          later.odd_extras || !(value.nil() || (value.str(text) && text.empty()) || (value.array(count) && count == 0));
      return in.skip();
    }
    case Field::kOther: return in.skip();
  }
  return false;
}

// A clear has no field at all.
bool read_field(Field field, Cursor& in, Event& event, Later& later, Reason& reason) {
  reason = Reason::kBadField;
  switch (event.tag) {
    case Tag::kStored: return read_stored_field(field, in, event, later, reason);
    case Tag::kRemoved: return read_removed_field(field, in, event);
    case Tag::kCleared: break;
  }
  return in.skip();
}

// The tag of an event with `count` members from `at` on: `type`, or `event_type` where that is a tag, anywhere.
bool find_tag(Cursor at, uint32_t count, Tag& tag, Reason& reason) {
  reason = Reason::kBadEvent;
  for (uint32_t i = 0; i < count; ++i) {
    std::string_view name, value;
    if (!at.str(name)) {
      if (!at.skip() || !at.skip()) return reason = Reason::kBadEvent, false;
    } else if (name == "type" || name == "event_type") {
      const bool is_text = at.str(value);
      if (is_text && tag_of(value, tag)) return true;
      reason = is_text ? Reason::kUnknownEvent : Reason::kBadEvent;
      if (name == "type" || (!is_text && !at.skip())) return false;
    } else if (!at.skip()) {
      return reason = Reason::kBadEvent, false;
    }
  }
  return false;
}

// What remains when all fields are known. Where tokens cannot be told apart by block, no key is computed of them; their
// extras are but a guess then, and need not be there.
void finish_stored(Event& event, const Later& later) {
  const size_t blocks = event.hashes.size();
  if (blocks == 0 || event.block_size == 0 || event.tokens.empty()) return;
  const bool read = !later.odd_extras && encode_extras(event, later.extra_keys);
  if (!read) event.extras.clear();
  if (event.tokens.size() / event.block_size != blocks || event.tokens.size() % event.block_size != 0) return;
  if (!event.has_parent && later.first_block > 0) event.unkeyed = Reason::kMissingParent;
  if (!read) event.unkeyed = Reason::kUnreadExtras;
}

// A whole event. When it could be read, `in` stands behind it.
bool read_event(Cursor& in, Event& event, Reason& reason) {
  event.reset();
  Later later;
  bool has_hashes = false;
  uint32_t count;
  reason = Reason::kBadEvent;
  if (in.array(count)) {
    std::string_view tag;
    if (count == 0 || !in.str(tag)) return false;
    if (!tag_of(tag, event.tag)) return reason = Reason::kUnknownEvent, false;
    for (uint32_t i = 1; i < count; ++i) {
      Field field = Field::kOther;
      if (event.tag == Tag::kStored && i - 1 < std::size(kStoredAt)) field = kStoredAt[i - 1];
      if (event.tag == Tag::kRemoved && i - 1 < std::size(kRemovedAt)) field = kRemovedAt[i - 1];
      if (!read_field(field, in, event, later, reason)) return false;
      has_hashes = has_hashes || field == Field::kHashes || field == Field::kHashAliases;
    }
  } else if (in.map(count)) {
    const uint8_t* const first = in.position();
    std::string_view type, tag;
    if (count > 0 && in.str(type) && type == "type" && in.str(tag) && tag_of(tag, event.tag)) {
      --count;  // where engines have it
    } else {
      in.back_to(first);
      if (!find_tag(in, count, event.tag, reason)) return false;
    }
    for (uint32_t i = 0; i < count; ++i) {
      std::string_view name;
      if (!in.str(name)) {
        if (!in.skip() || !in.skip()) return reason = Reason::kBadEvent, false;
        continue;
      }
      const Field field = field_of(name);
      if (!read_field(field, in, event, later, reason)) return false;
      has_hashes = has_hashes || field == Field::kHashes || field == Field::kHashAliases;
    }
  } else {
    return false;
  }
  if (event.tag != Tag::kCleared && !has_hashes) return reason = Reason::kBadField, false;
  if (event.tag == Tag::kStored) finish_stored(event, later);
  return true;
}

// Seconds, whatever unit the sender counts in (the Mooncake master's is milliseconds): no engine speaks from a day on
// which the seconds are so many, nor from one on which the milliseconds are so few.
double seconds_of(double timestamp) {
  if (timestamp > 1e14) return timestamp / 1e6;
  return timestamp > 1e11 ? timestamp / 1e3 : timestamp;
}

}  // namespace

bool Batch::open(const uint8_t* data, size_t size) {
  Cursor in(data, size);
  *this = Batch{};
  end_ = data + size;
  uint32_t count;
  bool has_events = false;
  if (in.array(count)) {
    if (count < 2 || (!in.number(timestamp_) && !in.nil())) return false;
    timestamp_ = seconds_of(timestamp_);
    if (!in.array(left_)) return false;
    at_ = in.position();
    rank_follows_ = count > 2;
    return true;
  }
  if (!in.map(count)) return false;
  for (uint32_t i = 0; i < count; ++i) {
    std::string_view name;
    if (!in.str(name)) {
      if (!in.skip() || !in.skip()) return has_events;
      continue;
    }
    if (name == "ts" || name == "timestamp") {
      if (!in.number(timestamp_) && !in.skip()) return has_events;
      timestamp_ = seconds_of(timestamp_);
    } else if (name == "events") {
      if (!in.array(left_)) return false;
      at_ = in.position();
      has_events = true;
      for (uint32_t k = 0; k < left_; ++k)
        if (!in.skip()) return true;
    } else if (name == "data_parallel_rank" || name == "attn_dp_rank" || name == "dp_rank") {
      if (!read_rank(in)) return has_events;
    } else if (!in.skip()) {
      return has_events;
    }
  }
  return has_events;
}

bool Batch::read_rank(Cursor& in) {
  return in.peek() == Type::kInt || in.peek() == Type::kNil ? read_optional_uint(in, has_rank_, rank_) : in.skip();
}

// Removals come in rows, each the same bytes but for its hash: then `event` needs another hash and nothing else.
bool Batch::read_removed_again(Event& event) {
  if (static_cast<size_t>(end_ - at_) < removal_.size()) return false;
  const uint8_t* const hash = at_ + hash_at_;
  const size_t behind = hash_at_ + hash_size_;
  if (std::memcmp(at_, removal_.data(), hash_at_) != 0 ||
      std::memcmp(at_ + behind, removal_.data() + behind, removal_.size() - behind) != 0)
    return false;
  Cursor in(hash, hash_size_);
  event.again = read_hash(in, event.hashes.front()) && in.at_end();
  return event.again;
}

Batch::Next Batch::next(Event& event, Reason& reason) {
  Cursor in(at_, static_cast<size_t>(end_ - at_));
  if (left_ == 0) {
    // The rank stands behind the events; a payload cut inside them has none, and its first events still count.
    if (rank_follows_) read_rank(in);
    rank_follows_ = false;
    return Next::kEnd;
  }
  if (!removal_.empty() && read_removed_again(event)) {
    --left_;
    at_ += removal_.size();
    return Next::kEvent;
  }
  const Cursor start = in;
  const bool read = read_event(in, event, reason);
  removal_ = {};
  if (read && event.tag == Tag::kRemoved && event.hashes.size() == 1) {
    removal_ = {reinterpret_cast<const char*>(at_), static_cast<size_t>(in.position() - at_)};
    hash_at_ = static_cast<size_t>(event.first_hash - at_);
    Cursor hash(event.first_hash, removal_.size() - hash_at_);
    hash.skip();
    hash_size_ = static_cast<size_t>(hash.position() - event.first_hash);
  } else if (!read) {
    in = start;
    if (!in.skip()) {
      left_ = 0;
      rank_follows_ = false;
      reason = Reason::kTruncated;
      return Next::kSkipped;
    }
  }
  --left_;
  at_ = in.position();
  return read ? Next::kEvent : Next::kSkipped;
}

}  // namespace kvindex
