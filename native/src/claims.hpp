// Engine hash -> 32-bit reference, for the claims of one stream on one group and tier: 12 bytes each, seven in eight
// used at most.
//
// Hashes are mixed by a bijection and kept in order of the mixed value, each at or shortly behind the place where an
// even spread would put it. That makes a search end early and growing a copy from front to back. A segment that grew
// large is split in two, so that no single step costs more than a segment.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvindex {

class Claims {
 public:
  explicit Claims(std::atomic<int64_t>& bytes);
  ~Claims();
  Claims(Claims&& other) noexcept;
  Claims(const Claims&) = delete;
  Claims& operator=(const Claims&) = delete;
  Claims& operator=(Claims&&) = delete;

  size_t size() const { return size_; }
  void prefetch(uint64_t hash) const;
  // The reference of a hash, to be read or replaced (never by 0) until the next change; null when there is none.
  uint32_t* find(uint64_t hash);
  const uint32_t* find(uint64_t hash) const { return const_cast<Claims*>(this)->find(hash); }
  // Gives a hash that is not there yet the reference, which must not be 0. Returns the reference it has now, as `find`.
  uint32_t* insert(uint64_t hash, uint32_t ref, bool& is_new);
  void erase(uint64_t hash) { erase(hash, find(hash)); }
  // With its reference, as `find` has given it.
  void erase(uint64_t hash, const uint32_t* ref);

  template <typename Visit>
  void each(Visit visit) const {
    for (size_t i = 0; i < directory_.size(); ++i) {
      const Segment& segment = *directory_[i];
      if (i > 0 && directory_[i - 1] == &segment) continue;
      for (uint32_t at = 0; at < segment.end; ++at)
        if (segment.entries[at].ref != 0) visit(segment.entries[at].ref);
    }
  }
  // The same as (reference, hash).
  template <typename Visit>
  void each_hash(Visit visit) const {
    for (size_t i = 0; i < directory_.size(); ++i) {
      const Segment& segment = *directory_[i];
      if (i > 0 && directory_[i - 1] == &segment) continue;
      for (uint32_t at = 0; at < segment.end; ++at)
        if (segment.entries[at].ref != 0) visit(segment.entries[at].ref, unmix(segment.entries[at].mixed()));
    }
  }

 private:
  struct Entry {
    uint32_t low, high;  // the mixed hash; apart, so that an entry takes 12 bytes
    uint32_t ref;        // 0 = empty
    uint64_t mixed() const { return uint64_t{high} << 32 | low; }
  };
  struct Segment {
    uint32_t depth = 0;     // leading bits that all its hashes share
    uint32_t capacity = 0;  // places that hashes are spread over
    uint32_t end = 0;       // places there are: some more, for those pushed behind the last
    uint32_t used = 0;
    Entry* entries = nullptr;
    uint32_t home(uint64_t mixed) const { return static_cast<uint32_t>(((mixed << depth) >> 32) * capacity >> 32); }
  };

  static constexpr uint32_t kSegmentMost = 32768;  // claims
  static constexpr uint32_t kMaxDepth = 24;

  uint64_t mix(uint64_t hash) const;
  uint64_t unmix(uint64_t mixed) const;
  Segment& segment_of(uint64_t mixed) const {
    return *directory_[depth_ == 0 ? 0 : static_cast<size_t>(mixed >> (64 - depth_))];
  }
  // First place of the segment whose entry is not below `mixed`, or that is empty.
  static uint32_t search(const Segment& segment, uint64_t mixed);
  void allocate(Segment& segment, uint32_t capacity);
  void release(Segment& segment);
  static uint32_t push(Entry* begin, const Entry* from, Entry* end);
  void resize(Segment& segment, uint32_t end);
  void rebuild(Segment& segment, uint32_t capacity);
  void split(Segment& segment);

  std::atomic<int64_t>& bytes_;
  const uint64_t secret_;
  uint32_t depth_ = 0;
  size_t size_ = 0;
  std::vector<Segment*> directory_;  // by leading bits; neighbours may be the same
};

}  // namespace kvindex
