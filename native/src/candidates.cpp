#include "candidates.hpp"

#include <bit>

namespace kvindex {
namespace {

std::shared_ptr<const Candidates> find_all(const std::shared_ptr<const PodList>& list, const PodNames& known) {
  const std::vector<std::string_view>& named = list->names();
  const auto result = std::make_shared<Candidates>();
  result->list = list;
  std::vector<std::string_view>& names = result->names;
  names.reserve(named.size());
  result->numbers.reserve(named.size());
  // Open addressing: a set would allocate once per name. The upper half of the hash, and the position + 1.
  const size_t mask = std::bit_ceil(named.size() * 2 | 2) - 1;  // half of them stay free
  std::vector<uint64_t> seen(mask + 1, 0);
  const NameHash hash_of;
  const auto repeated = [&](uint64_t each, std::string_view name, size_t hash) {
    return each >> 32 == hash >> 32 && names[static_cast<uint32_t>(each) - 1] == name;
  };
  for (const std::string_view name : named) {
    const size_t hash = hash_of(name);
    size_t at = hash & mask;
    while (seen[at] != 0 && !repeated(seen[at], name, hash)) at = (at + 1) & mask;
    if (seen[at] != 0) continue;
    names.push_back(name);
    result->numbers.push_back(known.find(name, hash));
    seen[at] = (hash >> 32) << 32 | static_cast<uint32_t>(names.size());
  }
  return result;
}

}  // namespace

std::shared_ptr<const Candidates> distinct(const std::shared_ptr<const PodList>& list,
                                           const std::shared_ptr<const PodNames>& known) {
  struct Last {
    std::shared_ptr<const PodNames> known;
    uint32_t count = 0;  // of known names, before any was looked up
    std::shared_ptr<const Candidates> found;
  };
  thread_local Last last;
  const uint32_t count = known->count();
  if (last.found == nullptr || last.found->list != list || last.known != known || last.count != count)
    last = {known, count, find_all(list, *known)};
  return last.found;
}

}  // namespace kvindex
