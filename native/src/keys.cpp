#include "keys.hpp"

#include <algorithm>
#include <cstring>

#include "xxh3.hpp"

namespace kvindex {

void append_extra(std::string& extras, ExtraKind kind, std::string_view bytes) {
  extras.push_back(static_cast<char>(kind));
  const auto length = static_cast<uint32_t>(bytes.size());
  char encoded[4];
  std::memcpy(encoded, &length, 4);
  extras.append(encoded, 4);
  extras.append(bytes);
}

void QueryExtras::of_block(size_t block, size_t block_size, std::string& out) const {
  out.clear();
  if (!lora_name.empty()) append_extra(out, ExtraKind::kLora, lora_name);
  const uint64_t begin = static_cast<uint64_t>(block) * block_size, end = begin + block_size;
  for (const MmFeature& feature : mm_features)
    if (feature.offset < end && feature.offset + feature.length > begin)
      append_extra(out, ExtraKind::kMultimodal, feature.hash);
  if (block == 0 && !cache_salt.empty()) append_extra(out, ExtraKind::kCacheSalt, cache_salt);
}

uint64_t block_key(const uint32_t* tokens, size_t block_size, std::string_view extras, bool first, uint64_t parent,
                   uint64_t seed, std::string& scratch) {
  uint64_t local;
  if (extras.empty()) {
    local = xxh3_64(tokens, block_size * 4, seed);
  } else {
    scratch.assign(reinterpret_cast<const char*>(tokens), block_size * 4);
    scratch.append(extras);
    local = xxh3_64(scratch.data(), scratch.size(), seed);
  }
  if (first) return local;
  const uint64_t pair[2] = {parent, local};
  return xxh3_64(pair, sizeof pair, seed);
}

void block_keys(const uint32_t* tokens, size_t begin, size_t end, size_t block_size, uint64_t parent, uint64_t seed,
                const QueryExtras& extras, uint64_t* keys) {
  std::string of_block, scratch;
  const bool plain = extras.empty();
  for (size_t i = begin; i < end; ++i) {
    if (!plain) extras.of_block(i, block_size, of_block);
    parent = block_key(tokens + i * block_size, block_size, of_block, i == 0, parent, seed, scratch);
    *keys++ = parent;
  }
}

}  // namespace kvindex
