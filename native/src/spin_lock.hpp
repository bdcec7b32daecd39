// A four-byte lock for critical sections of tens of nanoseconds. In the index only writers ever take one.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace kvindex {

class SpinLock {
 public:
  void lock() {
    for (uint32_t tries = 0; held_.exchange(1, std::memory_order_acquire) != 0; ++tries) {
      // The holder may have been put to sleep by the system: let it run. With many others that only yield to each
      // other it would not.
      while (held_.load(std::memory_order_relaxed) != 0) {
        if (++tries % kTries != 0) continue;
        if (tries < kTries * kYields) {
          std::this_thread::yield();
        } else {
          std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
      }
    }
  }
  void unlock() { held_.store(0, std::memory_order_release); }

 private:
  static constexpr uint32_t kTries = 64, kYields = 16;

  std::atomic<uint32_t> held_{0};
};

}  // namespace kvindex
