#include "changes.hpp"

#include <algorithm>
#include <tuple>

#include "stream.hpp"

namespace kvindex {

std::vector<Changes::Entry> Changes::take(Taken& taken) {
  taken.dropped = dropped_;
  taken.lost = lost_;
  dropped_ = lost_ = false;
  std::vector<Entry> entries;
  entries.swap(entries_);
  return entries;
}

// Of several changes of one (key, group, tier) the last one counts.
void Changes::sort(std::vector<Entry>& entries, uint32_t partitions, Taken& taken) {
  std::stable_sort(entries.begin(), entries.end(),
                   [](const Entry& a, const Entry& b) { return std::tie(a.key, a.group) < std::tie(b.key, b.group); });
  taken.rows.resize(partitions);
  for (size_t i = 0; i < entries.size();) {
    const Entry& first = entries[i];
    uint8_t held = 0, gone = 0;
    for (; i < entries.size() && entries[i].key == first.key && entries[i].group == first.group; ++i) {
      const auto bit = static_cast<uint8_t>(1U << entries[i].tier);
      (entries[i].held ? held : gone) |= bit;
      (entries[i].held ? gone : held) &= static_cast<uint8_t>(~bit);
    }
    std::string& rows = taken.rows[partition_of(first.key, partitions)];
    rows.append(reinterpret_cast<const char*>(&first.key), sizeof first.key);
    rows.push_back(static_cast<char>(first.group));
    rows.push_back(static_cast<char>(held));
    rows.push_back(static_cast<char>(gone));
  }
}

void Stream::follow_changes(size_t limit) {
  std::lock_guard lock(mutex_);
  const auto pin = index_->held().epoch().pin();
  changes_ = std::make_unique<Changes>();
  const Blocks& blocks = index_->held();
  for (const auto& [id, part] : parts_)
    for (const auto& [holder, held] : part.held)
      if (held == parts_of(id.size))
        changes_->held(part.key, static_cast<uint8_t>(holder >> 8), static_cast<uint8_t>(holder));
  for (const Book& book : books_) {
    book.claims.each([&](uint32_t ref) {
      if ((ref & kSpecial) == 0) return changes_->held(blocks.key_of(ref), book.group, book.tier);
      const Special& claim = specials_[ref & ~kSpecial];
      if (claim.node != 0) changes_->held(claim.key, book.group, book.tier);
      if (!claim.wide) return;
      const auto [from, to] = span_of(claim);
      for (const uint64_t* key = from; key != to; ++key) changes_->held(*key, book.group, book.tier);
    });
  }
  changes_->limit(limit);
}

Changes::Taken Stream::take_changes(uint32_t partitions, std::string& groups) {
  Changes::Taken taken;
  std::vector<Changes::Entry> entries;
  {
    std::lock_guard lock(mutex_);
    if (changes_ == nullptr) return taken;
    entries = changes_->take(taken);
    for (const Group& each : groups_) {
      groups.append(reinterpret_cast<const char*>(&each.index), sizeof each.index);
      groups.push_back(static_cast<char>(each.kind));
      groups.append(reinterpret_cast<const char*>(&each.window), sizeof each.window);
    }
  }
  Changes::sort(entries, partitions, taken);
  return taken;
}

}  // namespace kvindex
