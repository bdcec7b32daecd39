// Bytes objects of Python as whole numbers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace kvindex {

// In place; a copy only where they are not aligned for them.
template <typename T>
class Numbers {
 public:
  Numbers(const nanobind::bytes& bytes, const char* name)
      : data_(static_cast<const T*>(bytes.data())), size_(bytes.size() / sizeof(T)) {
    if (bytes.size() % sizeof(T) != 0) throw nanobind::value_error(name);
    if (reinterpret_cast<uintptr_t>(data_) % alignof(T) == 0) return;
    copy_.resize(size_);
    std::memcpy(copy_.data(), bytes.data(), bytes.size());
    data_ = copy_.data();
  }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  std::vector<T> copy() const { return {data_, data_ + size_}; }

 private:
  const T* data_;
  size_t size_;
  std::vector<T> copy_;
};

}  // namespace kvindex
