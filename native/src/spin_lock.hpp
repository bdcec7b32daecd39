// A four-byte lock for critical sections of tens of nanoseconds. In the index only writers ever take one.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace kvindex {

class SpinLock {
 public:
  void lock() {
    for (uint32_t tries = 0; held_.exchange(1, std::memory_order_acquire) != 0; ++tries) {
      // The holder may have been put to sleep by the system: let it run.
      while (held_.load(std::memory_order_relaxed) != 0)
        if (++tries % 64 == 0) std::this_thread::yield();
    }
  }
  void unlock() { held_.store(0, std::memory_order_release); }

 private:
  std::atomic<uint32_t> held_{0};
};

}  // namespace kvindex
