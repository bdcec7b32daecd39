#include "standings.hpp"

#include <algorithm>
#include <array>
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
  std::lock_guard lock(mutex_);
  believed_ = std::move(believed);
  told_at_ = asked_at;
  good_until_ = asked_at + (settled ? kGood + spread : kGoodUnsettled);
}

bool Standing::fresh(int64_t now) const {
  std::lock_guard lock(mutex_);
  return told_at_ > touched_.load(std::memory_order_acquire) && now < good_until_;
}

void Standing::doubt(int64_t now, Believed& out, bool first) const {
  std::lock_guard lock(mutex_);
  if (!first && doubt_of(believed_.trust) >= doubt_of(out.trust)) return;
  out = believed_;
  if (out.age_seconds >= 0 && now > told_at_) out.age_seconds += static_cast<double>(now - told_at_) * 1e-9;
}

std::shared_ptr<Standing> Standings::open(const std::string& pod, uint32_t rank) {
  auto standing = std::make_shared<Standing>(rank);
  std::unique_lock lock(mutex_);
  auto& ranks = of_pod_[pod];
  std::erase_if(ranks, [](const auto& each) {
    const auto alive = each.lock();
    return alive == nullptr || alive->closed();
  });
  ranks.push_back(standing);
  return standing;
}

void Standings::tell(const std::string& pod, uint32_t rank, const Believed& believed, int64_t asked_at) {
  std::shared_lock lock(mutex_);
  const auto found = of_pod_.find(pod);
  if (found == of_pod_.end()) return;
  for (const auto& each : found->second)
    if (const auto standing = each.lock(); standing && standing->rank == rank && !standing->closed())
      standing->tell(believed, asked_at);
}

std::vector<const Standings::OfPod*> Standings::find(const std::vector<std::string>& pods) const {
  std::vector<const OfPod*> result(pods.size(), nullptr);
  std::shared_lock lock(mutex_);
  for (size_t i = 0; i < pods.size(); ++i)
    if (const auto found = of_pod_.find(std::string_view(pods[i])); found != of_pod_.end()) result[i] = &found->second;
  return result;
}

std::vector<std::pair<std::string, uint32_t>> Standings::outdated(const std::vector<std::string>& pods,
                                                                  const std::vector<const OfPod*>& found,
                                                                  int64_t now) const {
  std::vector<std::pair<std::string, uint32_t>> result;
  std::shared_lock lock(mutex_);
  for (size_t i = 0; i < pods.size(); ++i) {
    if (found[i] == nullptr) continue;
    for (const auto& each : *found[i])
      if (const auto standing = each.lock(); standing && !standing->closed() && !standing->fresh(now))
        result.emplace_back(pods[i], standing->rank);
  }
  return result;
}

bool Standings::of(const OfPod& found, int64_t rank, int64_t now, Believed& out) const {
  std::shared_lock lock(mutex_);
  bool first = true;
  for (const auto& each : found) {
    const auto standing = each.lock();
    if (standing == nullptr || standing->closed() || (rank >= 0 && standing->rank != rank)) continue;
    standing->doubt(now, out, first);
    first = false;
  }
  return !first;
}

}  // namespace kvindex
