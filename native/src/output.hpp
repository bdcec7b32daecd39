// Bytes written one after the other into memory that is neither cleared first nor given back after.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string_view>

namespace kvindex {

// Room that was made before: nothing is checked. Takes what a string takes, so that a protobuf::Writer can write to it.
struct Room {
  char* at;

  void push_back(char value) { *at++ = value; }
  void append(const char* data, size_t size) {
    std::memcpy(at, data, size);
    at += size;
  }
  void append(std::string_view bytes) { append(bytes.data(), bytes.size()); }
};

class Output {
 public:
  std::string_view view() const { return {data_.get(), size_}; }

  // Room for `most` more bytes; `wrote` says where those that were written end.
  Room room(size_t most) {
    if (capacity_ - size_ < most) grow(most);
    return {data_.get() + size_};
  }
  void wrote(Room room) { size_ = static_cast<size_t>(room.at - data_.get()); }

  // Starts anew; a very large memory is not kept.
  void clear() {
    constexpr size_t kKeep = 1U << 20;
    size_ = 0;
    if (capacity_ <= kKeep) return;
    data_.reset();
    capacity_ = 0;
  }

 private:
  void grow(size_t most) {
    const size_t larger = std::max(size_ + most, capacity_ * 2);
    auto data = std::make_unique_for_overwrite<char[]>(larger);
    if (size_ != 0) std::memcpy(data.get(), data_.get(), size_);
    data_ = std::move(data);
    capacity_ = larger;
  }

  std::unique_ptr<char[]> data_;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace kvindex
