// Zeroed memory for tables that are read at random: in huge pages where the system has them, taken as it is written.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>

namespace kvindex {

template <typename T>
class Zeroed {
  static_assert(std::is_trivial_v<T>);

 public:
  Zeroed() = default;
  explicit Zeroed(size_t count) : count_(count) {
    if (count == 0) return;
    void* const memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // Small pages miss the translation cache at nearly every read; without huge ones it is only slower.
    (void)madvise(memory, bytes(), MADV_HUGEPAGE);
    data_ = static_cast<T*>(memory);
  }
  ~Zeroed() {
    if (data_ != nullptr) munmap(data_, bytes());
  }
  Zeroed(Zeroed&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Zeroed& operator=(Zeroed&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }

  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](size_t at) { return data_[at]; }
  const T& operator[](size_t at) const { return data_[at]; }

 private:
  size_t bytes() const { return count_ * sizeof(T); }

  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace kvindex
