#include "pod_names.hpp"

namespace kvindex {

struct PodNames::Table {
  explicit Table(size_t room) : mask(room * 2 - 1), slots(room * 2), names(room) {}

  const size_t mask;
  // The upper half of a name's hash, and its number + 1; 0 is free. Half of them stay free.
  std::vector<std::atomic<uint64_t>> slots;
  std::vector<std::string_view> names;  // by number, each written before its slot
};

PodNames::PodNames() {
  constexpr size_t kFirst = 32;
  tables_.push_back(std::make_unique<Table>(kFirst));
  table_.store(tables_.back().get());
}

PodNames::~PodNames() = default;

uint32_t PodNames::put(Table& table, std::string_view name, size_t hash, uint32_t number) const {
  size_t at = hash & table.mask;
  while (table.slots[at].load(std::memory_order_relaxed) != 0) at = (at + 1) & table.mask;
  table.names[number] = name;
  table.slots[at].store((hash >> 32) << 32 | (number + 1U), std::memory_order_release);
  return number;
}

uint32_t PodNames::add(std::string_view name) {
  const size_t hash = NameHash{}(name);
  std::lock_guard lock(mutex_);
  if (const uint32_t known = find(name, hash); known != kNobody) return known;
  const std::string_view kept = names_.emplace_back(name);
  Table* table = tables_.back().get();
  if (names_.size() > table->names.size()) {
    auto larger = std::make_unique<Table>(table->names.size() * 2);
    for (uint32_t number = 0; number + 1 < names_.size(); ++number)
      put(*larger, names_[number], NameHash{}(names_[number]), number);
    table = larger.get();
    tables_.push_back(std::move(larger));
  }
  const uint32_t number = put(*table, kept, hash, static_cast<uint32_t>(names_.size() - 1));
  table_.store(table, std::memory_order_release);
  count_.store(number + 1, std::memory_order_release);
  return number;
}

uint32_t PodNames::find(std::string_view name, size_t hash) const {
  const Table& table = *table_.load(std::memory_order_acquire);
  for (size_t at = hash & table.mask;; at = (at + 1) & table.mask) {
    const uint64_t slot = table.slots[at].load(std::memory_order_acquire);
    if (slot == 0) return kNobody;
    const uint32_t number = static_cast<uint32_t>(slot) - 1;
    if (slot >> 32 == hash >> 32 && table.names[number] == name) return number;
  }
}

std::vector<uint32_t> PodNames::numbers(const Pods& names) const {
  std::vector<uint32_t> result;
  result.reserve(names.size());
  for (const std::string& name : names) result.push_back(find(name));
  return result;
}

std::string_view PodNames::name(uint32_t number) const { return table_.load(std::memory_order_acquire)->names[number]; }

}  // namespace kvindex
