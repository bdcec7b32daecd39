// What was tokenized before: a chain of chunks of text, each with its token ids and the block keys that end in it.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "keys.hpp"
#include "text_cuts.hpp"
#include "text_encoder.hpp"

namespace kvindex {

// Encodes a chunk by the reference tokenizer, within this many seconds; it may throw.
using ReferenceEncoder = std::function<std::vector<uint32_t>(std::string_view, double)>;

struct TextRequest {
  std::string_view text;                 // valid UTF-8
  const TextEncoder* encoder = nullptr;  // none: encoded by the reference
  const TextCuts* cuts = nullptr;        // none: one chunk
  uint64_t root = 0;                     // texts of different roots share nothing
  std::vector<uint32_t> prefix, suffix;  // what the tokenizer adds before and behind
  ReferenceEncoder reference;
  size_t max_tokens = SIZE_MAX;
  size_t max_reference_bytes = SIZE_MAX;  // of this text
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
};

// What block keys depend on beside the tokens.
struct KeyContext {
  uint32_t block_size = 0;
  uint64_t seed = 0;
  std::string lora_name, cache_salt;
  bool operator==(const KeyContext&) const = default;
};

enum class TextOutcome { kDone, kTooManyTokens, kTooLate, kTooLong };

struct TextAnswer {
  TextOutcome outcome = TextOutcome::kDone;
  uint64_t tokens = 0;
  std::vector<uint32_t> ids;   // when asked for
  std::vector<uint64_t> keys;  // when asked for
};

struct TextCacheStats {
  uint64_t chunk_hits = 0, chunk_misses = 0, waits = 0, evictions = 0;
  uint64_t tokens_saved = 0, tokens_encoded = 0;
  uint64_t reference_chunks = 0;  // encoded by the reference
  uint64_t verified_chunks = 0;   // encoded by both, and compared
  uint64_t bytes = 0, chunks = 0;
};

class TextCache {
 public:
  // Of the chunks encoded natively, every `verify_every`-th is compared with the reference; 0 = none.
  // A chunk is cut at the first safe place at or after `chunk_bytes`.
  explicit TextCache(size_t max_bytes, uint64_t verify_every = 0, size_t chunk_bytes = 4096)
      : max_bytes_(max_bytes), verify_every_(verify_every), chunk_bytes_(std::max<size_t>(chunk_bytes, 1)) {}

  // The ids of the text, or its tokens' count and block keys under `context`; safe from many threads.
  TextAnswer ids(const TextRequest& request);
  TextAnswer keys(const TextRequest& request, const KeyContext& context);
  TextCacheStats stats() const;

 private:
  struct Keys {
    KeyContext context;
    std::vector<uint64_t> values;
  };
  struct Chunk {
    uint64_t serial, parent, hash;
    bool last;  // the text ends with it
    std::string text;
    std::vector<uint32_t> ids;
    std::shared_ptr<const Keys> keys;  // under the cache's lock
    std::list<std::shared_ptr<Chunk>>::iterator place;
    bool kept = false;
  };
  using ChunkPtr = std::shared_ptr<Chunk>;
  struct Name {
    uint64_t parent, hash, size;
    auto operator<=>(const Name&) const = default;
  };
  class Turn;
  class Growth;
  struct TooLong : std::exception {};

  TextAnswer answer(const TextRequest& request, const KeyContext* context);
  TextAnswer walk(const TextRequest& request, const KeyContext* context);
  // None when the deadline passes while another call encodes the chunk. `referred` counts the reference's bytes.
  ChunkPtr obtain(const TextRequest& request, uint64_t parent, std::string_view text, bool last, size_t& referred);
  ChunkPtr find(uint64_t parent, uint64_t hash, std::string_view text, bool last) const;  // under the lock
  std::shared_ptr<const Keys> keys_of(const ChunkPtr& chunk, const KeyContext& context) const;
  std::vector<uint32_t> encode(const TextRequest& request, std::string_view text, size_t& referred);
  void keep(const ChunkPtr& chunk, uint64_t generation);
  void keep_keys(const ChunkPtr& chunk, std::shared_ptr<const Keys> keys);
  void drop_oldest();  // under the lock
  static size_t bytes_of(const Chunk& chunk);

  const size_t max_bytes_;
  const uint64_t verify_every_;
  const size_t chunk_bytes_;
  mutable std::mutex lock_;
  std::condition_variable finished_;
  std::unordered_multimap<uint64_t, ChunkPtr> chunks_;  // by hash
  std::list<ChunkPtr> order_;                           // least recently used first
  std::set<Name> at_work_;
  uint64_t next_serial_ = uint64_t{1} << 32;  // above every root
  uint64_t generation_ = 0;                   // of everything kept: one more when an encoder was found wrong
  uint64_t native_chunks_ = 0;
  TextCacheStats stats_;
};

}  // namespace kvindex
