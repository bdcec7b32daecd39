#include "epoch.hpp"

#include <algorithm>
#include <thread>
#include <vector>

namespace kvindex {

namespace {

// Where a thread looks for a free place first: threads start apart, so that they rarely meet.
uint32_t first_place() {
  static std::atomic<uint32_t> threads{0};
  thread_local const uint32_t mine = threads.fetch_add(1, std::memory_order_relaxed);
  return mine;
}

}  // namespace

Epoch::~Epoch() {
  for (const Retired& each : retired_) each.free(each.owner, each.object, each.size);
}

Epoch::Pin Epoch::pin() const {
  const uint32_t first = first_place();
  for (uint32_t i = 0;; ++i) {
    auto& place = places_[(first + i) % kPlaces].epoch;
    uint64_t unused = 0;
    if (place.load(std::memory_order_relaxed) == 0 && place.compare_exchange_strong(unused, now_.load())) {
      return Pin(&place);
    }
    if (i % kPlaces == kPlaces - 1) std::this_thread::yield();
  }
}

void Epoch::retire(Free free, void* owner, void* object, uint64_t size) {
  std::lock_guard lock(mutex_);
  retired_.push_back({now_.fetch_add(1) + 1, free, owner, object, size});
  waiting_.store(retired_.size(), std::memory_order_relaxed);
}

void Epoch::collect() {
  if (waiting_.load(std::memory_order_relaxed) == 0) return;
  std::vector<Retired> ready;
  {
    std::lock_guard lock(mutex_);
    uint64_t oldest = UINT64_MAX;
    for (const Place& place : places_) {
      const uint64_t epoch = place.epoch.load();
      if (epoch != 0) oldest = std::min(oldest, epoch);
    }
    while (!retired_.empty() && retired_.front().at <= oldest) {
      ready.push_back(retired_.front());
      retired_.pop_front();
    }
    waiting_.store(retired_.size(), std::memory_order_relaxed);
  }
  for (const Retired& each : ready) each.free(each.owner, each.object, each.size);
}

}  // namespace kvindex
