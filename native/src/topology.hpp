// Who is who in one model, as one immutable value: a query works on the one it started with.
//
// A lane is one KV-cache group of one stream in one life of its engine. Dropping a stream's claims gives it new lanes
// at once, so that nothing old is ever answered, and takes the old claims out afterwards.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvindex {

inline constexpr uint32_t kMaxTiers = 8;
inline constexpr uint32_t kMaxGroups = 32;

enum class GroupKind : uint8_t { kFull, kSliding, kMamba, kUnknown };

struct Lane {
  uint32_t stream = 0;  // index into Topology::streams
  uint32_t group = 0;
  uint32_t window = 0;  // tokens, for kSliding
  GroupKind kind = GroupKind::kFull;
  bool alive = false;
};

struct StreamPlace {
  // kSimple: one group, of full attention. kHybrid: judged group by group. kBlind: nothing that could be matched.
  enum class Shape : uint8_t { kBlind, kSimple, kHybrid };

  uint32_t pod = 0;  // index into Topology::pods
  uint32_t rank = 0;
  bool alive = false;
  Shape shape = Shape::kBlind;
  std::vector<uint32_t> lanes;
};

struct PodPlace {
  std::string_view name;  // lives as long as the index
  std::vector<uint32_t> streams;
};

struct Topology {
  std::vector<PodPlace> pods;  // by the number that PodNames gave
  std::vector<StreamPlace> streams;
  std::vector<Lane> lanes;        // lane 0 is never used
  std::vector<uint32_t> hybrids;  // streams of that shape

  // Fills in what follows from the lanes.
  void settle();
};

inline void Topology::settle() {
  hybrids.clear();
  for (uint32_t number = 0; number < streams.size(); ++number) {
    StreamPlace& stream = streams[number];
    stream.shape = StreamPlace::Shape::kBlind;
    if (!stream.alive || stream.lanes.empty()) continue;
    bool unknown = false;
    for (const uint32_t lane : stream.lanes) unknown = unknown || lanes[lane].kind == GroupKind::kUnknown;
    if (unknown) continue;  // fails closed: nobody knows what such a group needs
    if (stream.lanes.size() == 1 && lanes[stream.lanes[0]].kind == GroupKind::kFull) {
      stream.shape = StreamPlace::Shape::kSimple;
      continue;
    }
    stream.shape = StreamPlace::Shape::kHybrid;
    hybrids.push_back(number);
  }
}

}  // namespace kvindex
