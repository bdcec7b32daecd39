// How far the claims of each (pod, rank) can be believed, as last told by whoever follows its stream.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "pod_names.hpp"
#include "spin_lock.hpp"

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
  // Without the lock: who finds this true while it is being told anew waits for that in `doubt`.
  bool fresh(int64_t now) const {
    return told_at_.load(std::memory_order_acquire) > touched_.load(std::memory_order_acquire) &&
           now < good_until_.load(std::memory_order_acquire);
  }
  // Copies to `out` what is believed at `now` if it is more doubtful than what stands there.
  void doubt(int64_t now, Believed& out, bool first) const;

  const uint32_t rank;

 private:
  std::atomic<int64_t> touched_{0}, told_at_{-1}, good_until_{-1};
  std::atomic<bool> closed_{false};
  mutable SpinLock lock_;
  Believed believed_{Trust::kCold, "nothing heard", -1};
};

// The standings of one index, by the numbers of its pods.
class Standings {
 public:
  explicit Standings(std::shared_ptr<PodNames> names = std::make_shared<PodNames>()) : names_(std::move(names)) {}

  const PodNames& names() const { return *names_; }
  // The standing is closed when its owner lets it go, at the latest.
  std::shared_ptr<Standing> open(const std::string& pod, uint32_t rank);
  void tell(const std::string& pod, uint32_t rank, const Believed& believed, int64_t asked_at);
  // (position in `pods`, rank) of each standing that has to be told anew.
  std::vector<std::pair<size_t, uint32_t>> outdated(const std::vector<uint32_t>& pods, int64_t now) const;

  // What is believed, while no stream can be opened: for the length of one answer.
  class Reading {
   public:
    explicit Reading(const Standings& standings) : standings_(standings), lock_(standings.mutex_) {}
    // Of one rank, or (rank < 0) of the pod's least trusted one. False when there is none.
    bool of(uint32_t pod, int64_t rank, int64_t now, Believed& out) const;

   private:
    const Standings& standings_;
    std::shared_lock<std::shared_mutex> lock_;
  };

 private:
  const std::shared_ptr<PodNames> names_;
  mutable std::shared_mutex mutex_;
  std::vector<std::vector<std::shared_ptr<Standing>>> of_pod_;  // by number
};

}  // namespace kvindex
