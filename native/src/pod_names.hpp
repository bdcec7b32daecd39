// The names of pods, numbered in the order they were first seen. A name keeps its number for as long as the index
// lives, so that a query looks each of its candidates up once and goes on with numbers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "name_hash.hpp"

namespace kvindex {

using Pods = std::vector<std::string>;

// Which pods a query is about, by number; numbers beyond those in use are nobody's.
class Wanted {
 public:
  static Wanted all() { return Wanted(nullptr); }
  static Wanted only(const std::vector<uint32_t>& pods) { return Wanted(&pods); }

  // Null: all of them.
  const std::vector<uint32_t>* pods() const { return pods_; }

 private:
  explicit Wanted(const std::vector<uint32_t>* pods) : pods_(pods) {}

  const std::vector<uint32_t>* pods_;
};

// Names are added under a lock and found without one.
class PodNames {
 public:
  static constexpr uint32_t kNobody = 0xFFFFFFFFU;

  PodNames();
  ~PodNames();
  PodNames(const PodNames&) = delete;
  PodNames& operator=(const PodNames&) = delete;

  // The name's number, a new one where it has none.
  uint32_t add(std::string_view name);
  // kNobody for a name never added. `hash` is the name's NameHash.
  uint32_t find(std::string_view name, size_t hash) const;
  uint32_t find(std::string_view name) const { return find(name, NameHash{}(name)); }
  // Of each name, in its order, kNobody among them.
  std::vector<uint32_t> numbers(const Pods& names) const;
  // How many there are: as long as it does not change, `find` says the same of every name.
  uint32_t count() const { return count_.load(std::memory_order_acquire); }
  // Of a number that `add` gave; it lives as long as this object.
  std::string_view name(uint32_t number) const;

 private:
  struct Table;

  uint32_t put(Table& table, std::string_view name, size_t hash, uint32_t number) const;

  std::mutex mutex_;
  std::deque<std::string> names_;  // by number
  // The last one is in use. Those before it may still be looked into; all of them together are no larger than it.
  std::vector<std::unique_ptr<Table>> tables_;
  std::atomic<const Table*> table_;
  std::atomic<uint32_t> count_{0};
};

}  // namespace kvindex
