#include "standings.hpp"

#include <chrono>

namespace kvindex {
namespace {

constexpr int64_t kMillisecond = 1'000'000;
// Whoever follows a stream says what a message meant only after it was applied; by then it surely has.
constexpr int64_t kSettled = 20 * kMillisecond;
constexpr int64_t kGoodUnsettled = 5 * kMillisecond;
// Between 50 and 100 ms, different for each telling, so that a large fleet is not asked all at once.
constexpr int64_t kGood = 50 * kMillisecond;

// Least trusted first.
int doubt_of(Trust trust) {
  switch (trust) {
    case Trust::kStale: return 0;
    case Trust::kCold: return 1;
    case Trust::kPartial: return 2;
    case Trust::kExact: break;
  }
  return 3;
}

}  // namespace

int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

void Standing::tell(Believed believed, int64_t asked_at) {
  const bool settled = asked_at - touched_.load(std::memory_order_acquire) > kSettled;
  const auto spread = static_cast<int64_t>((static_cast<uint64_t>(asked_at) * 0x9E3779B97F4A7C15ULL) >> 39) % kGood;
  std::lock_guard lock(lock_);
  std::swap(believed_, believed);  // the old one is freed without the lock
  told_at_.store(asked_at, std::memory_order_release);
  good_until_.store(asked_at + (settled ? kGood + spread : kGoodUnsettled), std::memory_order_release);
}

void Standing::doubt(int64_t now, Believed& out, bool first) const {
  std::lock_guard lock(lock_);
  if (!first && doubt_of(believed_.trust) >= doubt_of(out.trust)) return;
  out = believed_;
  const int64_t told_at = told_at_.load(std::memory_order_relaxed);
  if (out.age_seconds >= 0 && now > told_at) out.age_seconds += static_cast<double>(now - told_at) * 1e-9;
}

std::shared_ptr<Standing> Standings::open(const std::string& pod, uint32_t rank) {
  const auto standing = std::make_shared<Standing>(rank);
  const uint32_t number = names_->add(pod);
  std::unique_lock lock(mutex_);
  if (of_pod_.size() <= number) of_pod_.resize(number + 1);
  auto& ranks = of_pod_[number];
  std::erase_if(ranks, [](const auto& each) { return each->closed(); });
  ranks.push_back(standing);
  return {standing.get(), [standing](Standing* owned) { owned->close(); }};
}

void Standings::tell(const std::string& pod, uint32_t rank, const Believed& believed, int64_t asked_at) {
  const uint32_t number = names_->find(pod);
  std::shared_lock lock(mutex_);
  if (number >= of_pod_.size()) return;
  for (const auto& each : of_pod_[number])
    if (each->rank == rank && !each->closed()) each->tell(believed, asked_at);
}

std::vector<std::pair<size_t, uint32_t>> Standings::outdated(const std::vector<uint32_t>& pods, int64_t now) const {
  std::vector<std::pair<size_t, uint32_t>> result;
  std::shared_lock lock(mutex_);
  for (size_t i = 0; i < pods.size(); ++i) {
    if (pods[i] >= of_pod_.size()) continue;
    for (const auto& each : of_pod_[pods[i]])
      if (!each->closed() && !each->fresh(now)) result.emplace_back(i, each->rank);
  }
  return result;
}

bool Standings::Reading::of(uint32_t pod, int64_t rank, int64_t now, Believed& out) const {
  if (pod >= standings_.of_pod_.size()) return false;
  bool first = true;
  for (const auto& each : standings_.of_pod_[pod]) {
    if (each->closed() || (rank >= 0 && each->rank != rank)) continue;
    each->doubt(now, out, first);
    first = false;
  }
  return !first;
}

}  // namespace kvindex
