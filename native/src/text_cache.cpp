#include "text_cache.hpp"

#include <algorithm>

#include "xxh3.hpp"

namespace kvindex {

namespace {

constexpr size_t kVerifiedBytes = 64 * 1024;  // a comparison must not cost what a call may not

}  // namespace

// While it lives, others that need the same chunk wait for it.
class TextCache::Turn {
 public:
  Turn(TextCache& cache, Name name) : cache_(cache), name_(name) {}
  ~Turn() {
    {
      const std::lock_guard lock(cache_.lock_);
      cache_.at_work_.erase(name_);
    }
    cache_.finished_.notify_all();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  TextCache& cache_;
  const Name name_;
};

TextAnswer TextCache::ids(const TextRequest& request) { return answer(request, nullptr); }

TextAnswer TextCache::keys(const TextRequest& request, const KeyContext& context) { return answer(request, &context); }

TextAnswer TextCache::answer(const TextRequest& request, const KeyContext* context) {
  const bool native = request.encoder != nullptr && !request.encoder->refuted();
  try {
    TextAnswer given = walk(request, context);
    // Refuted meanwhile: what it gave for this text may be wrong too.
    if (native && request.encoder->refuted()) given = walk(request, context);
    return given;
  } catch (const TooLong&) {
    TextAnswer refused;
    refused.outcome = TextOutcome::kTooLong;
    return refused;
  }
}

TextCacheStats TextCache::stats() const {
  const std::lock_guard lock(lock_);
  return stats_;
}

// The answer as it grows, run of tokens by run.
class TextCache::Growth {
 public:
  Growth(TextAnswer& answer, const KeyContext* context) : answer_(answer), context_(context) {
    if (context == nullptr) return;
    extras_.lora_name = context->lora_name;
    extras_.cache_salt = context->cache_salt;
  }

  // Adds a run whose keys are not known; they are returned.
  std::shared_ptr<const Keys> add(const std::vector<uint32_t>& ids) {
    answer_.tokens += ids.size();
    if (context_ == nullptr) {
      answer_.ids.insert(answer_.ids.end(), ids.begin(), ids.end());
      return nullptr;
    }
    auto keys = std::make_shared<Keys>(Keys{*context_, {}});
    const size_t size = context_->block_size;
    keys->values.reserve((open_.size() + ids.size()) / size);
    open_.insert(open_.end(), ids.begin(), ids.end());
    size_t at = 0;
    for (; at + size <= open_.size(); at += size) {
      const size_t block = answer_.keys.size();
      if (!extras_.empty()) extras_.of_block(block, size, of_block_);
      const uint64_t parent = block == 0 ? 0 : answer_.keys.back();
      answer_.keys.push_back(
          block_key(open_.data() + at, size, of_block_, block == 0, parent, context_->seed, scratch_));
      keys->values.push_back(answer_.keys.back());
    }
    open_.erase(open_.begin(), open_.begin() + static_cast<std::ptrdiff_t>(at));
    return keys;
  }

  // Adds a run with the keys of the blocks that end in it.
  void add(const std::vector<uint32_t>& ids, const Keys& known) {
    answer_.tokens += ids.size();
    answer_.keys.insert(answer_.keys.end(), known.values.begin(), known.values.end());
    const size_t left = answer_.tokens - answer_.keys.size() * context_->block_size;
    if (left <= ids.size())
      open_.assign(ids.end() - static_cast<std::ptrdiff_t>(left), ids.end());
    else
      open_.insert(open_.end(), ids.begin(), ids.end());
  }

 private:
  TextAnswer& answer_;
  const KeyContext* context_;
  QueryExtras extras_;
  std::vector<uint32_t> open_;  // tokens behind the last full block
  std::string of_block_, scratch_;
};

TextAnswer TextCache::walk(const TextRequest& request, const KeyContext* context) {
  TextAnswer answer;
  Growth growth(answer, context);
  growth.add(request.prefix);
  std::vector<ChunkPtr> path;
  uint64_t parent = request.root;
  size_t referred = 0;
  const std::string_view text = request.text;
  // The reference may have something to say of an empty text too.
  const bool asks_of_empty = request.encoder == nullptr;
  for (size_t begin = 0; begin < text.size() || (asks_of_empty && path.empty());) {
    size_t end = text.size();
    if (request.cuts != nullptr && end - begin > chunk_bytes_)
      end = begin + request.cuts->next_cut(text.substr(begin), chunk_bytes_);
    const bool late = std::chrono::steady_clock::now() > request.deadline;
    const ChunkPtr chunk =
        late ? nullptr : obtain(request, parent, text.substr(begin, end - begin), end == text.size(), referred);
    if (!chunk) {
      answer.outcome = TextOutcome::kTooLate;
      return answer;
    }
    if (context == nullptr) {
      growth.add(chunk->ids);
    } else if (const auto known = keys_of(chunk, *context)) {
      growth.add(chunk->ids, *known);
    } else {
      keep_keys(chunk, growth.add(chunk->ids));
    }
    if (answer.tokens + request.suffix.size() > request.max_tokens) {
      answer.outcome = TextOutcome::kTooManyTokens;
      return answer;
    }
    path.push_back(chunk);
    parent = chunk->serial;
    begin = end;
  }
  growth.add(request.suffix);
  const std::lock_guard lock(lock_);
  // The root's side last, so that a chain loses its end first.
  for (auto each = path.rbegin(); each != path.rend(); ++each)
    if ((*each)->kept) order_.splice(order_.end(), order_, (*each)->place);
  return answer;
}

std::shared_ptr<const TextCache::Keys> TextCache::keys_of(const ChunkPtr& chunk, const KeyContext& context) const {
  const std::lock_guard lock(lock_);
  return chunk->keys && chunk->keys->context == context ? chunk->keys : nullptr;
}

TextCache::ChunkPtr TextCache::obtain(const TextRequest& request, uint64_t parent, std::string_view text, bool last,
                                      size_t& referred) {
  const uint64_t hash = xxh3_64(text.data(), text.size(), parent * 2 + (last ? 1 : 0));
  const Name name{parent, hash, text.size()};
  uint64_t generation = 0;
  {
    std::unique_lock lock(lock_);
    for (bool waited = false;; waited = true) {
      if (ChunkPtr found = find(parent, hash, text, last)) {
        ++stats_.chunk_hits;
        stats_.tokens_saved += found->ids.size();
        return found;
      }
      if (!at_work_.contains(name)) break;
      if (!waited) ++stats_.waits;
      if (request.deadline == std::chrono::steady_clock::time_point::max())
        finished_.wait(lock);
      else if (finished_.wait_until(lock, request.deadline) == std::cv_status::timeout)
        return nullptr;
    }
    ++stats_.chunk_misses;
    at_work_.insert(name);
    generation = generation_;
  }
  const Turn turn(*this, name);
  auto chunk = std::make_shared<Chunk>();
  chunk->parent = parent;
  chunk->hash = hash;
  chunk->last = last;
  chunk->ids = encode(request, text, referred);
  chunk->ids.shrink_to_fit();
  chunk->text = text;
  keep(chunk, generation);
  return chunk;
}

std::vector<uint32_t> TextCache::encode(const TextRequest& request, std::string_view text, size_t& referred) {
  const auto refer = [&] {
    const std::chrono::duration<double> left = request.deadline - std::chrono::steady_clock::now();
    return request.reference(text, left.count());
  };
  std::vector<uint32_t> ids;
  const bool native = request.encoder != nullptr && request.encoder->encode(text, ids);
  if (!native) referred += text.size();
  if (referred > request.max_reference_bytes) throw TooLong();
  bool verify = false;
  {
    const std::lock_guard lock(lock_);
    ++(native ? native_chunks_ : stats_.reference_chunks);
    verify = native && verify_every_ != 0 && text.size() <= kVerifiedBytes && native_chunks_ % verify_every_ == 0;
    if (verify) ++stats_.verified_chunks;
  }
  if (!native) return refer();
  if (!verify) return ids;
  std::vector<uint32_t> expected = refer();
  if (expected != ids) {
    // Whatever it encoded before may be wrong too.
    request.encoder->refute();
    const std::lock_guard lock(lock_);
    ++generation_;
    while (!order_.empty()) drop_oldest();
  }
  return expected;
}

TextCache::ChunkPtr TextCache::find(uint64_t parent, uint64_t hash, std::string_view text, bool last) const {
  const auto [begin, end] = chunks_.equal_range(hash);
  for (auto each = begin; each != end; ++each) {
    const Chunk& chunk = *each->second;
    if (chunk.parent == parent && chunk.last == last && chunk.text == text) return each->second;
  }
  return nullptr;
}

void TextCache::keep(const ChunkPtr& chunk, uint64_t generation) {
  const std::lock_guard lock(lock_);
  chunk->serial = next_serial_++;
  stats_.tokens_encoded += chunk->ids.size();
  if (generation != generation_ || bytes_of(*chunk) > max_bytes_) return;
  chunks_.emplace(chunk->hash, chunk);
  chunk->place = order_.insert(order_.end(), chunk);
  chunk->kept = true;
  stats_.bytes += bytes_of(*chunk);
  ++stats_.chunks;
  while (stats_.bytes > max_bytes_) drop_oldest();
}

void TextCache::keep_keys(const ChunkPtr& chunk, std::shared_ptr<const Keys> keys) {
  const std::lock_guard lock(lock_);
  if (!chunk->kept) return;
  stats_.bytes -= bytes_of(*chunk);
  chunk->keys = std::move(keys);
  stats_.bytes += bytes_of(*chunk);
  while (stats_.bytes > max_bytes_) drop_oldest();
}

void TextCache::drop_oldest() {
  const ChunkPtr chunk = order_.front();
  order_.pop_front();
  chunk->kept = false;
  const auto [begin, end] = chunks_.equal_range(chunk->hash);
  for (auto each = begin; each != end; ++each)
    if (each->second == chunk) {
      chunks_.erase(each);
      break;
    }
  stats_.bytes -= bytes_of(*chunk);
  --stats_.chunks;
  ++stats_.evictions;
}

size_t TextCache::bytes_of(const Chunk& chunk) {
  constexpr size_t kAround = sizeof(Chunk) + 160;  // nodes of the map and the list, control blocks
  size_t bytes = kAround + chunk.text.size() + chunk.ids.size() * 4;
  if (chunk.keys) bytes += sizeof(Keys) + chunk.keys->values.size() * 8;
  return bytes;
}

}  // namespace kvindex
