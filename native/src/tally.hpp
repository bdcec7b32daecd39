// Counts that many threads add to and a scrape reads, without a lock.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace kvindex {

class Counter {
 public:
  void add(uint64_t amount) { total_.fetch_add(amount, std::memory_order_relaxed); }
  uint64_t total() const { return total_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> total_{0};
};

// How many values were at most each bound. A read beside an `observe` may miss that one's part, never anything older.
class Histogram {
 public:
  // `bounds`: rising upper bounds, the last one (infinity) left out.
  explicit Histogram(std::vector<double> bounds) : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}

  void observe(double value) {
    const auto at = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
    counts_[static_cast<size_t>(at)].fetch_add(1, std::memory_order_relaxed);
    sum_.fetch_add(value, std::memory_order_relaxed);
  }
  // One more than bounds: those above the last bound come last.
  std::vector<uint64_t> counts() const {
    std::vector<uint64_t> result;
    result.reserve(counts_.size());
    for (const auto& each : counts_) result.push_back(each.load(std::memory_order_relaxed));
    return result;
  }
  double sum() const { return sum_.load(std::memory_order_relaxed); }

 private:
  const std::vector<double> bounds_;
  std::vector<std::atomic<uint64_t>> counts_;
  std::atomic<double> sum_{0};
};

// What is counted of the lookups of one model.
struct LookupTallies {
  std::shared_ptr<Counter> looked_up, matched;      // blocks
  std::shared_ptr<Histogram> best, ratio;           // blocks, share of the prompt
  std::shared_ptr<Histogram> match_time, all_time;  // seconds, of every model together

  void looked(uint64_t blocks, uint32_t best_match) const {
    looked_up->add(blocks);
    matched->add(best_match);
    best->observe(best_match);
    if (blocks != 0) ratio->observe(static_cast<double>(best_match) / static_cast<double>(blocks));
  }
};

}  // namespace kvindex
