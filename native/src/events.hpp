// KV events of one msgpack payload, in every encoding engines send (contract section 5), read in place.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "msgpack.hpp"

namespace kvindex {

// Why something was not applied, or was odd. The names are metric labels.
enum class Reason : uint8_t {
  kBadBatch,           // the payload is no batch of events
  kTruncated,          // the payload ends inside an event; what came before is applied
  kBadEvent,           // an event that is no array or map with a tag
  kUnknownEvent,       // a tag nobody knows
  kBadField,           // a field of the wrong type
  kTokenRange,         // a token id above 32 bits or negative
  kTokenIds,           // token ids that are no integers (pairs, strings)
  kTierLimit,          // more than 8 tiers in one model
  kGroupLimit,         // a group index above 31
  kClaimLimit,         // the configured number of claims is reached
  kUnresolvedLimit,    // too many claims whose key is unknown
  kOrphanLimit,        // an orphan pushed out of the full buffer
  kUnknownRemoval,     // a removal of something never seen
  kBlockSizeMismatch,  // an engine block that is not the model's block size
  kUnknownGroupKind,   // a KV-cache kind nobody knows: that group's stream fails closed
  kRankMismatch,       // the batch names another rank than the stream's
  kUnreadExtras,       // what makes equal tokens differ could not be read: the claim is kept without a key
  kMissingParent,      // blocks from the middle of a prompt that name none before them: likewise
  kCount
};
inline constexpr size_t kReasons = static_cast<size_t>(Reason::kCount);
const char* name_of(Reason reason);

// An engine's hash as one number: ints are u64 (two's complement), bytes and text get a hash of their own.
uint64_t hash_of_bytes(std::string_view bytes);

enum class Tag : uint8_t { kStored, kRemoved, kCleared };

// One event; the views point into the payload, the vectors are reused.
struct Event {
  Tag tag;
  bool has_parent, has_lora_id, has_window;
  bool again;                     // it removes one block, and differs from the event before in its hash only
  bool salted;                    // a salt sets its first block apart from equal tokens
  bool has_extra_keys;            // the engine says what makes its blocks differ, if only that nothing does
  std::optional<Reason> unkeyed;  // why no key may be computed of the tokens, though they are as many as the hashes
  uint64_t parent, block_size, lora_id, group, window;
  std::string_view medium;  // as sent; empty = absent
  std::string_view lora_name, cache_salt, kind;
  std::string_view
      adapter;  // of the blocks, wherever the engine has told its name; empty = none, or one without a name
  std::vector<uint64_t> hashes;
  const uint8_t* first_hash;  // where it stands
  std::vector<uint32_t> tokens;
  std::vector<std::string> extras;  // encoded: none at all, one for all blocks, or one per block

  void reset() {
    hashes.clear();
    tokens.clear();
    if (!extras.empty()) extras.clear();
    has_parent = has_lora_id = has_window = has_extra_keys = salted = again = false;
    parent = block_size = lora_id = group = window = 0;
    medium = lora_name = cache_salt = kind = adapter = {};
    unkeyed.reset();
  }
  // Gives back what one huge event has made the vectors take.
  void shed();
};

// Of block number `block`, wherever extras stand as an event has them.
inline std::string_view extras_of(const std::vector<std::string>& extras, size_t block) {
  if (extras.empty()) return {};
  return extras[extras.size() == 1 ? 0 : block];
}

inline constexpr size_t kShedAbove = 1U << 18;  // entries

template <typename T>
void shed(std::vector<T>& entries, size_t most = kShedAbove) {
  if (entries.capacity() > most) std::vector<T>().swap(entries);
}

class Batch {
 public:
  enum class Next { kEvent, kSkipped, kEnd };

  // False when the payload is no batch (kBadBatch).
  bool open(const uint8_t* data, size_t size);
  // The next event into `event`; kSkipped with `reason` when it cannot be applied.
  Next next(Event& event, Reason& reason);

  double timestamp() const { return timestamp_; }
  // Known once `next` has returned kEnd.
  bool has_rank() const { return has_rank_; }
  uint64_t rank() const { return rank_; }

 private:
  bool read_rank(Cursor& in);
  bool read_removed_again(Event& event);

  double timestamp_ = 0;
  bool rank_follows_ = false;
  bool has_rank_ = false;
  uint64_t rank_ = 0;
  uint32_t left_ = 0;
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
  // The bytes of the last event when it was the removal of one block, else none; and where in them its hash stands.
  std::string_view removal_;
  size_t hash_at_ = 0, hash_size_ = 0;
};

}  // namespace kvindex
