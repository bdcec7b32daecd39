#include "dialect.hpp"

#include <algorithm>
#include <iterator>
#include <optional>

namespace kvindex {

const char* name_of(Trait trait) {
  static constexpr const char* kNames[kTraits] = {
      "array_batch", "map_batch", "array_events", "map_events",  "envelope",   "unsigned_hashes", "signed_hashes",
      "bytes_16",    "bytes_32",  "other_bytes",  "text_hashes", "odd_hashes", "token_pairs",     "token_text",
      "odd_tokens",  "locality",  "ownership",    "session_id",  "lookahead",  "cache_salt",      "spec_kind"};
  return kNames[static_cast<size_t>(trait)];
}

namespace {

// Nil, or nothing but nils: vLLM lists extra keys per block though there are none.
bool is_nils(Cursor value) {
  uint32_t count;
  if (value.nil()) return true;
  if (!value.array(count)) return false;
  while (count > 0 && value.nil()) --count;
  return count == 0;
}

}  // namespace

// Where the fields of the event at hand stand.
struct Dialect::Fields {
  std::string_view tag;
  std::optional<Cursor> hashes, tokens;
  bool has_parent = false;
  bool has_context = false;  // an adapter, a salt or anything else that a hash covers beside the tokens
  uint64_t block_size = 0;
};

void Dialect::look(const uint8_t* data, size_t size) {
  ++looked_;
  Cursor in(data, size);
  uint32_t count;
  if (in.array(count)) {
    saw(Trait::kArrayBatch);
    if (count >= 2 && in.skip()) look_events(in);
  } else if (in.map(count)) {
    saw(Trait::kMapBatch);
    for (uint32_t i = 0; i < count; ++i) {
      std::string_view name;
      if (!in.str(name) && !in.skip()) return;
      if (name == "events") look_events(in);
      if (!in.skip()) return;
    }
  }
}

void Dialect::take_context(std::string_view adapter, bool beginning, bool salted) {
  if (beginning) ++beginnings_, salted_ += salted ? 1 : 0;
  if (adapter.empty() || adapter.size() > kMaxName || adapters_.size() == kMaxAdapters) return;
  if (std::find(adapters_.begin(), adapters_.end(), adapter) == adapters_.end()) adapters_.emplace_back(adapter);
}

void Dialect::look_events(Cursor in) {
  uint32_t count;
  if (!in.array(count)) return;
  for (uint32_t i = 0; i < std::min(count, kMaxEvents); ++i) {
    look_event(in);
    if (!in.skip()) return;
  }
}

void Dialect::look_event(Cursor in) {
  static constexpr std::string_view kStoredAt[] = {
      "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys"};
  Fields fields;
  uint32_t count;
  if (in.array(count)) {
    saw(Trait::kArrayEvents);
    if (count == 0 || !in.str(fields.tag)) return;
    const bool stored = fields.tag == "BlockStored";
    if (stored) {
      shortest_ = shortest_ == 0 ? count : std::min(shortest_, count);
      longest_ = std::max(longest_, count);
    }
    for (uint32_t i = 0; i + 1 < count; ++i) {
      if (i == 0 || (stored && i < std::size(kStoredAt))) look_field(kStoredAt[i], in, fields);
      if (!in.skip()) return;
    }
  } else if (in.map(count)) {
    saw(Trait::kMapEvents);
    for (uint32_t i = 0; i < count; ++i) {
      std::string_view name;
      if (!in.str(name) && !in.skip()) return;
      look_field(name, in, fields);
      if (!in.skip()) return;
    }
  } else {
    return;
  }
  static constexpr std::string_view kEnvelope[] = {"stored", "removed", "cleared"};
  static constexpr std::string_view kKnown[] = {"BlockStored", "BlockRemoved", "AllBlocksCleared"};
  const auto is_one_of = [&](const auto& tags) {
    return std::find(std::begin(tags), std::end(tags), fields.tag) != std::end(tags);
  };
  if (is_one_of(kEnvelope)) {
    saw(Trait::kEnvelope);
  } else if (!is_one_of(kKnown)) {
    // It will be shown to people, so it must be a short plain name.
    if (odd_tag_.empty())
      for (const char each : fields.tag.substr(0, kMaxTag)) odd_tag_ += each > ' ' && each < 0x7f ? each : '?';
    return;
  }
  if (fields.hashes) look_hashes(*fields.hashes);
  if (fields.tokens) look_tokens(*fields.tokens);
  if (fields.tag == "BlockStored" || fields.tag == "stored") take_root(fields);
}

void Dialect::look_field(std::string_view name, Cursor value, Fields& fields) {
  const bool is_nil = value.peek() == Type::kNil;
  bool negative;
  if (name == "type" || name == "event_type") {
    value.str(fields.tag);
  } else if (name == "block_hashes" || (name == "seq_hashes" && !fields.hashes)) {
    fields.hashes = value;
  } else if (name == "parent_block_hash" || name == "parent_hash") {
    fields.has_parent = fields.has_parent || !is_nil;
  } else if (name == "base_block_idx") {
    uint64_t first = 0;
    fields.has_parent = fields.has_parent || (value.integer(first, negative) && first > 0);
  } else if (name == "token_ids") {
    fields.tokens = value;
  } else if (name == "block_size") {
    if (value.peek() == Type::kInt) value.integer(fields.block_size, negative);
  } else if (name == "extra_keys") {
    fields.has_context = fields.has_context || !is_nils(value);
  } else if (name == "lora_id" || name == "lora_name" || name == "additional_salt" || name == "mm_keys") {
    fields.has_context = fields.has_context || !is_nil;
  } else if (name == "cache_salt") {
    saw(Trait::kCacheSalt);
    fields.has_context = fields.has_context || !is_nil;
  } else if (name == "lookahead_token_ids") {
    saw(Trait::kLookahead);
    fields.has_context = fields.has_context || !is_nil;
  } else if (name == "locality") {
    saw(Trait::kLocality);
  } else if (name == "ownership") {
    saw(Trait::kOwnership);
  } else if (name == "session_id") {
    saw(Trait::kSessionId);
  } else if (name == "kv_cache_spec_kind") {
    saw(Trait::kSpecKind);
  }
}

void Dialect::look_hashes(Cursor in) {
  uint32_t count;
  if (!in.array(count)) return saw(Trait::kOddHashes);
  for (uint32_t i = 0; i < count; ++i) {
    uint64_t number;
    bool negative;
    std::string_view bytes;
    switch (in.peek()) {
      case Type::kInt:
        if (!in.integer(number, negative)) return;
        saw(negative ? Trait::kSignedHashes : Trait::kUnsignedHashes);
        continue;
      case Type::kBin:
        if (!in.bin(bytes)) return;
        saw(bytes.size() == 16 ? Trait::kBytes16 : bytes.size() == 32 ? Trait::kBytes32 : Trait::kOtherBytes);
        continue;
      case Type::kStr: saw(Trait::kTextHashes); break;
      default: saw(Trait::kOddHashes);
    }
    if (!in.skip()) return;
  }
}

void Dialect::look_tokens(Cursor in) {
  uint32_t count;
  if (in.nil()) return;
  if (!in.array(count)) return saw(Trait::kOddTokens);
  if (count == 0) return;
  switch (in.peek()) {
    case Type::kInt: return;
    case Type::kArray: return saw(Trait::kTokenPairs);
    case Type::kStr:
    case Type::kBin: return saw(Trait::kTokenText);
    default: return saw(Trait::kOddTokens);
  }
}

void Dialect::take_root(const Fields& fields) {
  if (!root_.tokens.empty() || fields.has_parent || fields.has_context || !fields.hashes || !fields.tokens) return;
  if (fields.block_size == 0 || fields.block_size > kMaxRoot) return;
  Cursor hashes = *fields.hashes, tokens = *fields.tokens;
  uint32_t count;
  Root root;
  bool negative;
  std::string_view bytes;
  if (!hashes.array(count) || count == 0) return;
  if (hashes.peek() == Type::kInt) {
    root.is_int = hashes.integer(root.number, negative);
  } else if (hashes.bin(bytes) && bytes.size() <= 64) {
    root.bytes = bytes;
  } else {
    return;
  }
  uint32_t of_all;
  // As many tokens as the hashes stand for, or nobody knows which block they are of.
  if (!tokens.array(of_all) || of_all != fields.block_size * count) return;
  for (uint64_t i = 0; i < fields.block_size; ++i) {
    uint64_t value;
    if (tokens.peek() != Type::kInt || !tokens.integer(value, negative) || negative || value > UINT32_MAX) return;
    root.tokens.push_back(static_cast<uint32_t>(value));
  }
  root_ = std::move(root);
}

}  // namespace kvindex
