// Block keys: XXH3-64 of a block's tokens and extras, chained over the prefix (contract section 1).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvindex {

// What makes equal tokens different. Each item is encoded as kind (u8), length (u32 LE), bytes.
enum class ExtraKind : uint8_t { kLora = 1, kMultimodal = 2, kCacheSalt = 3, kPromptEmbeds = 4, kLoraId = 5 };

void append_extra(std::string& extras, ExtraKind kind, std::string_view bytes);

struct MmFeature {
  std::string hash;
  uint64_t offset;  // first placeholder token
  uint64_t length;  // placeholder tokens
};

// The extras of a query's blocks.
struct QueryExtras {
  std::string lora_name;
  std::string cache_salt;
  std::vector<MmFeature> mm_features;  // any order

  bool empty() const { return lora_name.empty() && cache_salt.empty() && mm_features.empty(); }
  // Extras of block `block` into `out` (replaced).
  void of_block(size_t block, size_t block_size, std::string& out) const;
};

// Key of one block. `scratch` is reused between calls; `first` = the block starts at token 0.
uint64_t block_key(const uint32_t* tokens, size_t block_size, std::string_view extras, bool first, uint64_t parent,
                   uint64_t seed, std::string& scratch);

// Keys of the full blocks of `tokens` from block `begin` (whose parent key is `parent`) up to `end`, into `keys`.
void block_keys(const uint32_t* tokens, size_t begin, size_t end, size_t block_size, uint64_t parent, uint64_t seed,
                const QueryExtras& extras, uint64_t* keys);

}  // namespace kvindex
