// A cursor over msgpack bytes: reads values in place, never allocates, never reads past the end.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace kvindex {

enum class Type : uint8_t { kNil, kBool, kInt, kFloat, kStr, kBin, kArray, kMap, kExt, kEnd };

class Cursor {
 public:
  Cursor() = default;
  Cursor(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  const uint8_t* position() const { return at_; }
  // To where it stood before. (A copy kept for that costs more: it is read as a whole right after a part was written.)
  void back_to(const uint8_t* position) { at_ = position; }
  bool at_end() const { return at_ == end_; }

  Type peek() const {
    if (at_ == end_) return Type::kEnd;
    const uint8_t b = *at_;
    if (b <= 0x7f || b >= 0xe0) return Type::kInt;
    if (b <= 0x8f) return Type::kMap;
    if (b <= 0x9f) return Type::kArray;
    if (b <= 0xbf) return Type::kStr;
    switch (b) {
      case 0xc0: return Type::kNil;
      case 0xc2:
      case 0xc3: return Type::kBool;
      case 0xc4:
      case 0xc5:
      case 0xc6: return Type::kBin;
      case 0xca:
      case 0xcb: return Type::kFloat;
      case 0xcc:
      case 0xcd:
      case 0xce:
      case 0xcf:
      case 0xd0:
      case 0xd1:
      case 0xd2:
      case 0xd3: return Type::kInt;
      case 0xd9:
      case 0xda:
      case 0xdb: return Type::kStr;
      case 0xdc:
      case 0xdd: return Type::kArray;
      case 0xde:
      case 0xdf: return Type::kMap;
      case 0xc1: return Type::kEnd;  // never used by the format
      default: return Type::kExt;
    }
  }

  bool nil() {
    if (peek() != Type::kNil) return false;
    ++at_;
    return true;
  }

  // An integer as its 64-bit two's complement; `negative` tells the sign.
  bool integer(uint64_t& value, bool& negative) {
    if (at_ == end_) return false;
    const uint8_t b = *at_;
    negative = false;
    if (b <= 0x7f) return ++at_, value = b, true;
    if (b >= 0xe0) return ++at_, negative = true, value = static_cast<uint64_t>(b) | ~uint64_t{0xff}, true;
    switch (b) {
      case 0xcc: return unsigned_of<uint8_t>(value);
      case 0xcd: return unsigned_of<uint16_t>(value);
      case 0xce: return unsigned_of<uint32_t>(value);
      case 0xcf: return unsigned_of<uint64_t>(value);
      case 0xd0: return signed_of<uint8_t, int8_t>(value, negative);
      case 0xd1: return signed_of<uint16_t, int16_t>(value, negative);
      case 0xd2: return signed_of<uint32_t, int32_t>(value, negative);
      case 0xd3: return signed_of<uint64_t, int64_t>(value, negative);
      default: return false;
    }
  }

  // Appends integers of at most 32 bits, non-negative, as long as they come and the end is far; returns how many.
  // No processor can foresee their widths, so there is no branch on them: how wide it and the next one would be is
  // found for every byte of a stretch at once, and going on by two integers is one load and one addition.
  template <typename Numbers>
  uint32_t small_integers(uint32_t most, Numbers& out) {
    constexpr size_t kStretch = 512, kVector = sizeof(Bytes);
    constexpr size_t kSafe = 2 * kVector + sizeof(uint64_t);  // read behind a stretch
    if (left() < kVector + kSafe || most < 2) return 0;
    const size_t before = out.size();
    const uint32_t count = most & ~1U;
    const uint8_t* at = at_;
    uint32_t i = 0;
    bool small = true;
    while (small && i < count && static_cast<size_t>(end_ - at) >= kVector + kSafe) {
      // Room for one stretch: a number that is announced but not there reserves nothing.
      out.resize(before + std::min<size_t>(count, i + kStretch));
      auto* to = out.data() + before;
      uint8_t widths[kStretch + kVector], of_two[kStretch];
      // Not more than this many integers can need, nor than there is.
      size_t stretch = static_cast<size_t>(end_ - at) - kSafe;
      if (stretch > kStretch) stretch = kStretch;
      if (stretch > 5UL * (count - i)) stretch = 5UL * (count - i);
      stretch = (stretch + kVector - 1) / kVector * kVector;
      for (size_t offset = 0; offset < stretch + kVector; offset += kVector) widths_at(at + offset, widths + offset);
      for (size_t offset = 0; offset < stretch; offset += kVector) add_next(widths + offset, of_two + offset);
      size_t place = 0;
      for (; place < stretch && i < count; i += 2) {
        const size_t both = of_two[place];
        if (both == 0) {
          small = false;
          break;
        }
        const uint8_t* first = at + place;
        const size_t width = widths[place];
        to[i] = small_at(first, width);
        to[i + 1] = small_at(first + width, both - width);
        place += both;
      }
      at += place;
    }
    at_ = at;
    out.resize(before + i);
    return i;
  }

  // Appends integers of 64 bits, as long as they come; returns how many.
  uint32_t wide_integers(uint32_t most, std::vector<uint64_t>& out) {
    constexpr size_t kWidth = 1 + sizeof(uint64_t), kStretch = 512;
    const size_t before = out.size(), count = std::min<size_t>(most, left() / kWidth);
    size_t i = 0;
    if (count < 2 || at_[0] != 0xcf || at_[kWidth] != 0xcf) return 0;  // not worth making room
    while (i < count && *at_ == 0xcf) {
      const size_t end = std::min(count, i + kStretch);  // room for one stretch: others may come soon
      out.resize(before + end);
      for (; i < end && *at_ == 0xcf; ++i, at_ += kWidth) out[before + i] = word_at(at_ + 1);
    }
    out.resize(before + i);
    return static_cast<uint32_t>(i);
  }

  bool number(double& value) {
    const Type type = peek();
    if (type == Type::kInt) {
      uint64_t bits;
      bool negative;
      if (!integer(bits, negative)) return false;
      value = negative ? static_cast<double>(static_cast<int64_t>(bits)) : static_cast<double>(bits);
      return true;
    }
    if (type != Type::kFloat) return false;
    if (*at_ == 0xca) {
      uint64_t bits;
      if (!unsigned_of<uint32_t>(bits)) return false;
      const auto narrow = static_cast<uint32_t>(bits);
      float f;
      std::memcpy(&f, &narrow, 4);
      value = f;
      return true;
    }
    uint64_t bits;
    if (!unsigned_of<uint64_t>(bits)) return false;
    std::memcpy(&value, &bits, 8);
    return true;
  }

  bool str(std::string_view& value) {
    if (peek() != Type::kStr) return false;
    const uint8_t b = *at_;
    return sized(b <= 0xbf ? -1 : b - 0xd9, b & 0x1f, value);
  }

  bool bin(std::string_view& value) {
    if (peek() != Type::kBin) return false;
    return sized(*at_ - 0xc4, 0, value);
  }

  bool array(uint32_t& count) { return header(Type::kArray, 0xdc, count); }
  bool map(uint32_t& count) { return header(Type::kMap, 0xde, count); }

  // Past one whole value of any kind; false when it is truncated or no msgpack.
  bool skip() {
    uint64_t open = 1;  // values still to be passed; no recursion, so depth costs nothing
    while (open > 0) {
      --open;
      if (at_ == end_) return false;
      if (const size_t width = kWidths[*at_]) {
        if (left() < width) return false;
        at_ += width;
        continue;
      }
      uint32_t count;
      std::string_view bytes;
      switch (peek()) {
        case Type::kStr:
          if (!str(bytes)) return false;
          break;
        case Type::kBin:
          if (!bin(bytes)) return false;
          break;
        case Type::kArray:
          if (!array(count)) return false;
          open += count;
          break;
        case Type::kMap:
          if (!map(count)) return false;
          open += 2ULL * count;
          break;
        case Type::kExt:
          if (!ext()) return false;
          break;
        default: return false;
      }
    }
    return true;
  }

 private:
  // Of values whose first byte says how wide they are; 0 for all others.
  static constexpr std::array<uint8_t, 256> kWidths = [] {
    std::array<uint8_t, 256> widths{};
    for (size_t head = 0; head < 256; ++head) widths[head] = head <= 0x7f || head >= 0xe0 ? 1 : 0;
    for (const size_t head : {0xc0, 0xc2, 0xc3}) widths[head] = 1;
    for (const size_t head : {0xcc, 0xd0}) widths[head] = 2;
    for (const size_t head : {0xcd, 0xd1}) widths[head] = 3;
    for (const size_t head : {0xca, 0xce, 0xd2}) widths[head] = 5;
    for (const size_t head : {0xcb, 0xcf, 0xd3}) widths[head] = 9;
    return widths;
  }();

  static uint64_t word_at(const uint8_t* at) {
    uint64_t raw;
    std::memcpy(&raw, at, 8);
    return __builtin_bswap64(raw);
  }
  using Bytes = uint8_t __attribute__((vector_size(16)));
  static Bytes load(const uint8_t* from) {
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
  }
  // For each byte how wide an integer is that it is the head of; 0 when it is no head of a small one.
  static void widths_at(const uint8_t* at, uint8_t* widths) {
    const Bytes heads = load(at);
    const Bytes found = (reinterpret_cast<Bytes>(heads < 0x80) & 1) | (reinterpret_cast<Bytes>(heads == 0xcc) & 2) |
                        (reinterpret_cast<Bytes>(heads == 0xcd) & 3) | (reinterpret_cast<Bytes>(heads == 0xce) & 5);
    std::memcpy(widths, &found, sizeof found);
  }
  // The same of an integer and the one behind it together; 0 unless both are small.
  static void add_next(const uint8_t* widths, uint8_t* of_two) {
    const Bytes own = load(widths);
    Bytes next{};
    for (const uint8_t width : {1, 2, 3, 5}) next |= reinterpret_cast<Bytes>(own == width) & load(widths + width);
    const Bytes both = (own + next) & reinterpret_cast<Bytes>(next != 0);
    std::memcpy(of_two, &both, sizeof both);
  }
  static uint32_t small_at(const uint8_t* at, size_t width) {
    static constexpr uint8_t kShift[] = {0, 56, 48, 40, 0, 24};
    static constexpr uint32_t kMask[] = {0, 0x7f, 0xff, 0xffff, 0, 0xffffffff};
    return static_cast<uint32_t>(word_at(at) >> kShift[width]) & kMask[width];
  }

  size_t left() const { return static_cast<size_t>(end_ - at_); }

  template <typename T>
  bool big_endian(size_t offset, T& value) const {
    if (left() < offset + sizeof(T)) return false;
    T raw;
    std::memcpy(&raw, at_ + offset, sizeof(T));
    if constexpr (sizeof(T) == 2) raw = __builtin_bswap16(raw);
    if constexpr (sizeof(T) == 4) raw = __builtin_bswap32(raw);
    if constexpr (sizeof(T) == 8) raw = __builtin_bswap64(raw);
    value = raw;
    return true;
  }

  template <typename T>
  bool unsigned_of(uint64_t& value) {
    T raw;
    if (!big_endian(1, raw)) return false;
    at_ += 1 + sizeof(T);
    value = raw;
    return true;
  }

  template <typename U, typename S>
  bool signed_of(uint64_t& value, bool& negative) {
    U raw;
    if (!big_endian(1, raw)) return false;
    at_ += 1 + sizeof(U);
    const auto as_signed = static_cast<S>(raw);
    negative = as_signed < 0;
    value = static_cast<uint64_t>(static_cast<int64_t>(as_signed));
    return true;
  }

  // width: -1 = the length is in the first byte; 0, 1, 2 = a length of 1, 2, 4 bytes follows.
  bool sized(int width, size_t fixed, std::string_view& value) {
    size_t length = fixed, head = 1;
    if (width >= 0 && !length_of(width, 1, length, head)) return false;
    if (left() < head || left() - head < length) return false;
    value = {reinterpret_cast<const char*>(at_ + head), length};
    at_ += head + length;
    return true;
  }

  bool length_of(int width, size_t offset, size_t& length, size_t& head) const {
    uint8_t one;
    uint16_t two;
    uint32_t four;
    switch (width) {
      case 0:
        if (!big_endian(offset, one)) return false;
        length = one;
        head = offset + 1;
        return true;
      case 1:
        if (!big_endian(offset, two)) return false;
        length = two;
        head = offset + 2;
        return true;
      default:
        if (!big_endian(offset, four)) return false;
        length = four;
        head = offset + 4;
        return true;
    }
  }

  bool header(Type type, uint8_t wide, uint32_t& count) {
    if (peek() != type) return false;
    const uint8_t b = *at_;
    if (b < 0xa0) return ++at_, count = b & 0x0f, true;
    size_t length = 0, head = 0;
    if (!length_of(b == wide ? 1 : 2, 1, length, head)) return false;
    count = static_cast<uint32_t>(length);
    at_ += head;
    return true;
  }

  bool ext() {
    const uint8_t b = *at_;
    size_t length = 0, head = 1;
    if (b >= 0xd4 && b <= 0xd8) {
      length = size_t{1} << (b - 0xd4);
    } else if (!length_of(b - 0xc7, 1, length, head)) {
      return false;
    }
    if (left() < head + 1 || left() - head - 1 < length) return false;
    at_ += head + 1 + length;
    return true;
  }

  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
};

}  // namespace kvindex
