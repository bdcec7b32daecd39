// The protobuf wire format, as far as the read path needs it: a bounds-checked reader and an appending writer.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace kvindex::protobuf {

enum Wire : uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

struct Reader {
  const uint8_t* at;
  const uint8_t* end;

  explicit Reader(std::string_view bytes)
      : at(reinterpret_cast<const uint8_t*>(bytes.data())), end(at + bytes.size()) {}

  bool done() const { return at >= end; }
  size_t rest() const { return static_cast<size_t>(end - at); }
  bool varint(uint64_t& value) {
    if (at < end && *at < 0x80) {  // most values are small
      value = *at++;
      return true;
    }
    if (end - at >= 3) {  // and most others take two or three bytes
      const uint64_t low = (at[0] & 0x7fU) | (at[1] & 0x7fU) << 7;
      if (at[1] < 0x80) {
        value = low;
        at += 2;
        return true;
      }
      if (at[2] < 0x80) {
        value = low | static_cast<uint64_t>(at[2]) << 14;
        at += 3;
        return true;
      }
    }
    value = 0;
    for (int shift = 0; shift < 70 && at < end; shift += 7) {
      const uint8_t b = *at++;
      if (shift < 64) value |= static_cast<uint64_t>(b & 0x7f) << shift;
      if (b < 0x80) return true;
    }
    return false;
  }
  // A tag or a length: parsers take at most five bytes for one.
  bool tag(uint64_t& value) {
    const uint8_t* const begin = at;
    return varint(value) && at - begin <= 5;
  }
  bool bytes(std::string_view& value) {
    uint64_t length;
    if (!tag(length) || length > static_cast<uint64_t>(end - at)) return false;
    value = {reinterpret_cast<const char*>(at), static_cast<size_t>(length)};
    at += length;
    return true;
  }
  bool skip(uint32_t wire) {
    uint64_t ignored;
    std::string_view view;
    switch (wire) {
      case kVarint: return varint(ignored);
      case kFixed64: return advance(8);
      case kBytes: return bytes(view);
      case kFixed32: return advance(4);
      default: return false;  // groups: no proto3 message has them
    }
  }

 private:
  bool advance(int count) {
    if (end - at < count) return false;
    at += count;
    return true;
  }
};

// Bytes that a value takes as a varint.
inline uint64_t size_of(uint64_t value) { return static_cast<uint64_t>(std::bit_width(value | 1) + 6) / 7; }

// Fields of one message, appended to `out`: a string, or room made before. A value that is its type's default is not
// written.
template <typename Out>
struct Writer {
  Out& out;

  void varint(uint64_t value) {
    while (value >= 0x80) {
      out.push_back(static_cast<char>(value | 0x80));
      value >>= 7;
    }
    out.push_back(static_cast<char>(value));
  }
  void number(uint32_t field, uint64_t value) {
    if (value == 0) return;
    varint(field << 3 | kVarint);
    varint(value);
  }
  void fixed(uint32_t field, uint64_t value) {
    if (value == 0) return;
    varint(field << 3 | kFixed64);
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void real(uint32_t field, double value) { fixed(field, std::bit_cast<uint64_t>(value)); }
  void text(uint32_t field, std::string_view value) {
    if (!value.empty()) message(field, value);
  }
  void message(uint32_t field, std::string_view encoded) {
    varint(field << 3 | kBytes);
    varint(encoded.size());
    out.append(encoded);
  }
};
template <typename Out>
Writer(Out&) -> Writer<Out>;

}  // namespace kvindex::protobuf
