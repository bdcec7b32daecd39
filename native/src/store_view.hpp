// Answers over holders that were read from a shared store: matched by the same walk as the index of this process.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "blocks.hpp"
#include "index.hpp"
#include "pod_names.hpp"
#include "topology.hpp"
#include "walk.hpp"

namespace kvindex {

// A stream as the store describes it.
struct StoredStream {
  std::string pod;
  uint32_t rank = 0;
  uint64_t life = 0;                       // the one that counts; holders of any other are dead
  std::string groups;                      // see Stream::take_changes
  std::array<uint8_t, kMaxTiers> tiers{};  // the reader's bit of the writer's; kMaxTiers when it has none
};

// What one reading of a partition said of the keys asked, in their order: per key a count u16 of holders, then each as
// life u48, group u8, tiers u8; without any tier it is a placement. It may end early: the keys behind are held by
// nobody that could match.
using Reading = std::string_view;

class StoreView {
 public:
  explicit StoreView(const std::vector<StoredStream>& streams);

  // Every stream that can match at all needs all blocks from the first one on: a reading may end at the first hole.
  bool prefix_only() const { return topology_.hybrids.empty(); }
  // False when a reading is malformed.
  bool score(const uint64_t* keys, size_t count, const std::vector<Reading>& readings, uint32_t block_size,
             const Pods& pods, const std::vector<double>& weights, std::vector<Match>& matches);
  bool holders(const uint64_t* keys, size_t count, const std::vector<Reading>& readings, const Pods& pods,
               std::vector<std::vector<Holder>>& found) const;

 private:
  struct Place {
    uint32_t stream = 0;
    std::vector<uint32_t> lanes;  // by group
    std::array<uint8_t, kMaxTiers> tiers;
  };
  struct Filled {
    uint32_t chunk;
    HolderId holder;
    uint64_t bits;
  };

  // Visits (number of the key, lane, tiers) and, for placements, (number of the key, stream); false when a reading is
  // malformed.
  template <typename Visit, typename VisitPlaced>
  bool each(const uint64_t* keys, size_t count, const std::vector<Reading>& readings, Visit visit,
            VisitPlaced visit_placed) const;
  std::unique_ptr<Blocks> borrow();
  // The walk's matches with placements, each (stream, key).
  std::vector<Match> lengthened(Walk& walk, std::vector<std::pair<uint32_t, uint64_t>>& placed, const Blocks& blocks,
                                const uint64_t* keys, size_t count, uint32_t block_size) const;

  PodNames names_;
  Topology topology_;
  std::unordered_map<uint64_t, Place> of_life_;
  // Each query lays what it read into blocks of its own and takes it out again.
  std::mutex mutex_;
  std::vector<std::unique_ptr<Blocks>> free_;
};

// The keys of each partition, 8 bytes each, in order.
std::vector<std::string> split_keys(const uint64_t* keys, size_t count, uint32_t partitions);

}  // namespace kvindex
