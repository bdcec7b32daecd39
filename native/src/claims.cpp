#include "claims.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>

#include "memory.hpp"

namespace kvindex {
namespace {

// Unknown to whoever sends hashes, so that nobody can aim at one place.
uint64_t secret() {
  static const uint64_t made = [] {
    std::random_device device;
    return uint64_t{device()} << 32 | device();
  }();
  return made;
}

constexpr size_t kReach = 192;

constexpr uint32_t larger(uint32_t capacity) { return capacity + capacity / 6 + 8; }
constexpr uint32_t spare_of(uint32_t capacity) { return 16 + capacity / 64; }

}  // namespace

Claims::Claims(std::atomic<int64_t>& bytes) : bytes_(bytes), secret_(secret()), directory_{new Segment} {}

Claims::Claims(Claims&& other) noexcept
    : bytes_(other.bytes_),
      secret_(other.secret_),
      depth_(other.depth_),
      size_(other.size_),
      directory_(std::move(other.directory_)) {
  other.directory_.clear();
}

Claims::~Claims() {
  for (size_t i = 0; i < directory_.size(); ++i) {
    if (i + 1 < directory_.size() && directory_[i + 1] == directory_[i]) continue;
    release(*directory_[i]);
    delete directory_[i];
  }
}

namespace {

constexpr uint64_t kFirst = 0x9E3779B97F4A7C15ULL, kSecond = 0xD6E8FEB86659FD93ULL;

// Of an odd number, modulo 2^64: each step doubles the bits that are right.
constexpr uint64_t inverse(uint64_t odd) {
  uint64_t found = odd;
  for (int i = 0; i < 5; ++i) found *= 2 - odd * found;
  return found;
}
static_assert(inverse(kFirst) * kFirst == 1 && inverse(kSecond) * kSecond == 1);

}  // namespace

inline uint64_t Claims::mix(uint64_t hash) const {
  hash ^= secret_;
  hash *= kFirst;
  hash ^= hash >> 32;
  hash *= kSecond;
  return hash;
}

uint64_t Claims::unmix(uint64_t mixed) const {
  mixed *= inverse(kSecond);
  mixed ^= mixed >> 32;
  mixed *= inverse(kFirst);
  return mixed ^ secret_;
}

void Claims::allocate(Segment& segment, uint32_t capacity) {
  segment.capacity = capacity;
  segment.end = capacity + spare_of(capacity);
  segment.entries = static_cast<Entry*>(take_memory(segment.end * sizeof(Entry)));
  bytes_.fetch_add(static_cast<int64_t>(footprint(segment.end * sizeof(Entry))), std::memory_order_relaxed);
}

void Claims::release(Segment& segment) {
  if (segment.entries == nullptr) return;
  give_memory(segment.entries, segment.end * sizeof(Entry));
  bytes_.fetch_sub(static_cast<int64_t>(footprint(segment.end * sizeof(Entry))), std::memory_order_relaxed);
  segment.entries = nullptr;
  segment.capacity = segment.end = 0;
}

void Claims::prefetch(uint64_t hash) const {
  const uint64_t mixed = mix(hash);
  const Segment& segment = segment_of(mixed);
  if (segment.end == 0) return;
  // Where it probably is, and up to where others have to move for it.
  const auto* home = reinterpret_cast<const char*>(segment.entries + segment.home(mixed));
  for (size_t offset = 0; offset < kReach; offset += 64) __builtin_prefetch(home + offset);
}

uint32_t Claims::search(const Segment& segment, uint64_t mixed) {
  uint32_t at = segment.home(mixed);
  while (at < segment.end && segment.entries[at].ref != 0 && segment.entries[at].mixed() < mixed) ++at;
  return at;
}

uint32_t* Claims::find(uint64_t hash) {
  const uint64_t mixed = mix(hash);
  Segment& segment = segment_of(mixed);
  const uint32_t at = search(segment, mixed);
  if (at == segment.end || segment.entries[at].ref == 0 || segment.entries[at].mixed() != mixed) return nullptr;
  return &segment.entries[at].ref;
}

uint32_t* Claims::insert(uint64_t hash, uint32_t ref, bool& is_new) {
  const uint64_t mixed = mix(hash);
  for (;;) {
    Segment& segment = segment_of(mixed);
    const uint32_t at = search(segment, mixed);
    if (at < segment.end && segment.entries[at].ref != 0 && segment.entries[at].mixed() == mixed) {
      is_new = false;
      return &segment.entries[at].ref;
    }
    if (segment.used * uint64_t{8} >= segment.capacity * uint64_t{7}) {
      if (segment.used >= kSegmentMost && segment.depth < kMaxDepth) {
        split(segment);
        continue;
      }
      rebuild(segment, larger(segment.capacity));
      continue;
    }
    uint32_t empty = at;
    while (empty < segment.end && segment.entries[empty].ref != 0) ++empty;
    if (empty == segment.end) {
      rebuild(segment, larger(segment.capacity));
      continue;
    }
    std::memmove(segment.entries + at + 1, segment.entries + at, (empty - at) * sizeof(Entry));
    segment.entries[at] = {static_cast<uint32_t>(mixed), static_cast<uint32_t>(mixed >> 32), ref};
    ++segment.used;
    ++size_;
    is_new = true;
    return &segment.entries[at].ref;
  }
}

void Claims::erase(uint64_t hash, const uint32_t* ref) {
  Segment& segment = segment_of(mix(hash));
  const auto at = static_cast<uint32_t>(
      (reinterpret_cast<const char*>(ref) - reinterpret_cast<const char*>(segment.entries)) / sizeof(Entry));
  // Those behind it that do not stand where they belong move up by one.
  uint32_t last = at + 1;
  while (last < segment.end && segment.entries[last].ref != 0 && segment.home(segment.entries[last].mixed()) < last)
    ++last;
  std::memmove(segment.entries + at, segment.entries + at + 1, (last - at - 1) * sizeof(Entry));
  segment.entries[last - 1] = {};
  --segment.used;
  --size_;
  if (segment.used == 0) {
    release(segment);
  } else if (segment.capacity > 64 && segment.used * uint64_t{2} < segment.capacity) {
    rebuild(segment, segment.used + segment.used / 4);
  }
}

void Claims::resize(Segment& segment, uint32_t end) {
  if (end == segment.end) return;
  void* const moved = resize_memory(segment.entries, segment.end * sizeof(Entry), end * sizeof(Entry));
  bytes_.fetch_add(static_cast<int64_t>(footprint(end * sizeof(Entry))) -
                       static_cast<int64_t>(footprint(segment.end * sizeof(Entry))),
                   std::memory_order_relaxed);
  segment.entries = static_cast<Entry*>(moved);
  segment.end = end;
}

// Moves what entries there are up to the end, in order; the place of the first one then.
uint32_t Claims::push(Entry* const begin, const Entry* from, Entry* const end) {
  Entry* to = end;
  while (from != begin) {
    const Entry entry = *--from;
    begin[from - begin] = {};
    // No branch: empty entries lie where nobody can foresee them. Where one would stand, the next used one is written.
    to[-1] = entry;
    to -= entry.ref != 0 ? 1 : 0;
  }
  if (to != begin) to[-1] = {};
  return static_cast<uint32_t>(to - begin);
}

// Spreads the claims over another capacity, in the memory they are in: all are pushed together at its end, from where
// each finds its new place. What is not placed yet is always behind what is: it needs as many places as there are
// claims. More capacity than asked for is taken only when the spare places behind the end do not suffice.
void Claims::rebuild(Segment& segment, uint32_t capacity) {
  if (segment.entries == nullptr) {
    allocate(segment, capacity);
    return;
  }
  for (;; capacity = larger(capacity)) {
    const uint32_t before = segment.end, end = capacity + spare_of(capacity);
    if (end > segment.end) resize(segment, end);
    Entry* const entries = segment.entries;
    uint32_t first = push(entries, entries + before, entries + segment.end);
    segment.capacity = capacity;
    const Segment spread_over = segment;  // in registers
    uint32_t next = 0;
    for (; first < segment.end; ++first) {
      const Entry entry = entries[first];
      const uint32_t home = spread_over.home(entry.mixed());
      const uint32_t at = home > next ? home : next;
      if (at > first || at >= end) break;
      entries[first] = {};
      entries[at] = entry;
      next = at + 1;
    }
    if (first < segment.end) continue;
    resize(segment, end);
    return;
  }
}

void Claims::split(Segment& segment) {
  if (segment.depth == depth_) {
    std::vector<Segment*> twice;
    twice.reserve(directory_.size() * 2);
    for (Segment* each : directory_) twice.insert(twice.end(), 2, each);
    directory_.swap(twice);
    ++depth_;
  }
  const size_t each = size_t{1} << (depth_ - segment.depth - 1);
  size_t first = 0;
  while (directory_[first] != &segment) ++first;
  // The upper half of the hashes goes to a new segment.
  auto upper = std::make_unique<Segment>();
  upper->depth = segment.depth + 1;
  const uint64_t bit = uint64_t{1} << (63 - segment.depth);
  Entry* const end = segment.entries + segment.end;
  Entry* begin = segment.entries + push(segment.entries, end, end);
  begin = std::partition_point(begin, end, [&](const Entry& entry) { return (entry.mixed() & bit) == 0; });
  const uint32_t half = larger(segment.capacity / 2);
  upper->used = static_cast<uint32_t>(end - begin);
  allocate(*upper, std::max(half, upper->used));
  std::copy(begin, end, upper->entries);
  std::fill(begin, end, Entry{});
  segment.used -= upper->used;
  segment.depth = upper->depth;
  rebuild(segment, half);
  rebuild(*upper, half);
  std::fill_n(directory_.begin() + static_cast<ptrdiff_t>(first + each), each, upper.release());
}

}  // namespace kvindex
