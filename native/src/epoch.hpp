// Readers without locks: what a writer takes out of sight is freed when no reader can still see it.
//
// A reader pins the epoch before it loads any shared pointer. A writer first replaces the pointer, then retires what it
// pointed to. Both load and store those pointers sequentially consistent, so that a reader who pinned later sees the
// replacement.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>

namespace kvindex {

class Epoch {
 public:
  class Pin {
   public:
    explicit Pin(std::atomic<uint64_t>* place) : place_(place) {}
    ~Pin() { place_->store(0, std::memory_order_release); }
    Pin(const Pin&) = delete;
    Pin& operator=(const Pin&) = delete;

   private:
    std::atomic<uint64_t>* place_;
  };

  // Called with (owner, object, size) of a retired thing.
  using Free = void (*)(void* owner, void* object, uint64_t size);

  Epoch() = default;
  ~Epoch();
  Epoch(const Epoch&) = delete;
  Epoch& operator=(const Epoch&) = delete;

  [[nodiscard]] Pin pin() const;
  void retire(Free free, void* owner, void* object, uint64_t size);
  // Frees what nobody can see any more. Not to be called under a lock that a `Free` takes.
  void collect();

 private:
  struct alignas(64) Place {
    std::atomic<uint64_t> epoch{0};  // 0 = not in use
  };
  struct Retired {
    uint64_t at;
    Free free;
    void* owner;
    void* object;
    uint64_t size;
  };

  static constexpr uint32_t kPlaces = 128;

  std::atomic<uint64_t> now_{1};
  mutable std::array<Place, kPlaces> places_;
  std::atomic<uint64_t> waiting_{0};
  std::mutex mutex_;
  std::deque<Retired> retired_;  // oldest first
};

}  // namespace kvindex
