// How far the claims of each (pod, rank) can be believed, as last told by whoever follows its stream.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "name_hash.hpp"

namespace kvindex {

// Nanoseconds of a steady clock.
int64_t now_ns();

// The values are those of the proto.
enum class Trust : uint8_t { kCold = 1, kPartial = 2, kExact = 3, kStale = 4 };

struct Believed {
  Trust trust = Trust::kCold;
  std::string reason;
  double age_seconds = -1;  // since the last applied message; -1 when there was none
};

// One stream's standing. What was told is good until the stream is touched again, and then for a short while only:
// some of it changes with time alone, such as the end of a connection's grace.
class Standing {
 public:
  explicit Standing(uint32_t number) : rank(number) {}

  // The stream's claims may have changed, and so may its trust.
  void touch() { touched_.store(now_ns(), std::memory_order_release); }
  void close() { closed_.store(true, std::memory_order_release); }
  bool closed() const { return closed_.load(std::memory_order_acquire); }
  // `asked_at`: when the value was read, so that a touch in between is not missed.
  void tell(Believed believed, int64_t asked_at);
  bool fresh(int64_t now) const;
  // Moves into `out` what is believed at `now` if it is more doubtful than what stands there.
  void doubt(int64_t now, Believed& out, bool first) const;

  const uint32_t rank;

 private:
  std::atomic<int64_t> touched_{0};
  std::atomic<bool> closed_{false};
  mutable std::mutex mutex_;
  Believed believed_{Trust::kCold, "nothing heard", -1};
  int64_t told_at_ = -1;
  int64_t good_until_ = -1;
};

// The standings of one index, by pod.
class Standings {
 public:
  // The standings of one pod; it stays where it is for as long as the index lives.
  using OfPod = std::vector<std::weak_ptr<Standing>>;

  // The standing lives as long as its owner keeps it.
  std::shared_ptr<Standing> open(const std::string& pod, uint32_t rank);
  void tell(const std::string& pod, uint32_t rank, const Believed& believed, int64_t asked_at);
  // Per pod; null for a pod that never had a stream.
  std::vector<const OfPod*> find(const std::vector<std::string>& pods) const;
  // (pod, rank) of these pods whose standing has to be told anew; `found` as of `find`.
  std::vector<std::pair<std::string, uint32_t>> outdated(const std::vector<std::string>& pods,
                                                         const std::vector<const OfPod*>& found, int64_t now) const;
  // Of one rank, or (rank < 0) of the pod's least trusted one. False, and `out` as it was, when there is none.
  bool of(const OfPod& found, int64_t rank, int64_t now, Believed& out) const;

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<std::string, OfPod, NameHash, std::equal_to<>> of_pod_;
};

}  // namespace kvindex
