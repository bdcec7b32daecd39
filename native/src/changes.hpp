// What a stream came to hold and no longer holds, in order, until someone takes it: for an index that is kept
// elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvindex {

class Changes {
 public:
  // From now on at most so many more are kept; beyond that all are forgotten, and `lost` says so.
  void limit(size_t more) { limit_ = entries_.size() + more; }
  void held(uint64_t key, uint8_t group, uint8_t tier) { add({key, group, tier, true}); }
  void released(uint64_t key, uint8_t group, uint8_t tier) { add({key, group, tier, false}); }
  // The stream dropped everything.
  void dropped() {
    entries_.clear();
    dropped_ = true;
    lost_ = false;
  }

  struct Taken {
    bool dropped = false;  // everything that was held before these
    bool lost = false;     // there were too many: only a new start tells what is held
    // Per partition, a row for each (key, group) in order of keys: key u64, group u8, tiers now held u8, tiers no
    // longer held u8. Groups are numbered as the stream numbers them.
    std::vector<std::string> rows;
  };
  struct Entry {
    uint64_t key;
    uint8_t group, tier;
    bool held;
  };
  static constexpr size_t kRow = 11;
  // Takes what there is, to be sorted outside the lock.
  std::vector<Entry> take(Taken& taken);
  static void sort(std::vector<Entry>& entries, uint32_t partitions, Taken& taken);

 private:
  void add(const Entry& entry) {
    if (lost_) return;
    if (entries_.size() >= limit_) {
      lost_ = true;
      std::vector<Entry>().swap(entries_);
      return;
    }
    entries_.push_back(entry);
  }

  size_t limit_ = SIZE_MAX;
  bool dropped_ = false, lost_ = false;
  std::vector<Entry> entries_;
};

// The partition of a key; its low bits decide elsewhere, so these are others.
inline uint32_t partition_of(uint64_t key, uint32_t partitions) {
  return static_cast<uint32_t>(((key >> 20 & 0xFFFFFFFFU) * partitions) >> 32);
}

}  // namespace kvindex
