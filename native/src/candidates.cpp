#include "candidates.hpp"

#include <bit>

namespace kvindex {

Candidates distinct(const std::vector<std::string_view>& named, const PodNames& known) {
  Candidates result;
  result.names.reserve(named.size());
  result.numbers.reserve(named.size());
  // Open addressing: a set would allocate once per name. The upper half of the hash, and the position + 1.
  const size_t mask = std::bit_ceil(named.size() * 2 | 2) - 1;  // half of them stay free
  std::vector<uint64_t> seen(mask + 1, 0);
  const NameHash hash_of;
  const auto repeated = [&](uint64_t each, std::string_view name, size_t hash) {
    return each >> 32 == hash >> 32 && result.names[static_cast<uint32_t>(each) - 1] == name;
  };
  for (const std::string_view name : named) {
    const size_t hash = hash_of(name);
    size_t at = hash & mask;
    while (seen[at] != 0 && !repeated(seen[at], name, hash)) at = (at + 1) & mask;
    if (seen[at] != 0) continue;
    result.names.push_back(name);
    result.numbers.push_back(known.find(name, hash));
    seen[at] = (hash >> 32) << 32 | static_cast<uint32_t>(result.names.size());
  }
  return result;
}

}  // namespace kvindex
