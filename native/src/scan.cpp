#include "scan.hpp"

#include <cstring>

namespace kvindex {
namespace {

struct Reader {
  const uint8_t* at;
  const uint8_t* end;

  bool varint(uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 70 && at < end; shift += 7) {
      const uint8_t b = *at++;
      if (shift < 64) value |= static_cast<uint64_t>(b & 0x7f) << shift;
      if (b < 0x80) return true;
    }
    return false;
  }
  bool bytes(std::string_view& value) {
    uint64_t length;
    if (!varint(length) || length > static_cast<uint64_t>(end - at)) return false;
    value = {reinterpret_cast<const char*>(at), static_cast<size_t>(length)};
    at += length;
    return true;
  }
  bool skip(uint32_t wire) {
    uint64_t ignored;
    std::string_view view;
    switch (wire) {
      case 0: return varint(ignored);
      case 1:
        if (end - at < 8) return false;
        at += 8;
        return true;
      case 2: return bytes(view);
      case 5:
        if (end - at < 4) return false;
        at += 4;
        return true;
      default: return false;
    }
  }
};

Reader reader(std::string_view bytes) {
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  return {data, data + bytes.size()};
}

bool append_u32(uint64_t value, std::string& out) {
  if (value > 0xFFFFFFFFULL) return false;
  const auto narrow = static_cast<uint32_t>(value);
  out.append(reinterpret_cast<const char*>(&narrow), 4);
  return true;
}

Scan scan_inner(std::string_view message, uint32_t inner, int width, std::string& out) {
  Reader in = reader(message);
  uint64_t value;
  while (in.at < in.end) {
    uint64_t tag;
    if (!in.varint(tag)) return Scan::kMalformed;
    const auto wire = static_cast<uint32_t>(tag & 7);
    if (tag >> 3 != inner) {
      if (!in.skip(wire)) return Scan::kMalformed;
    } else if (wire == 2) {
      std::string_view packed;
      if (!in.bytes(packed)) return Scan::kMalformed;
      if (width == 8) {
        if (packed.size() % 8 != 0) return Scan::kMalformed;
        out.append(packed);
        continue;
      }
      Reader values = reader(packed);
      out.reserve(out.size() + packed.size() * 2);
      while (values.at < values.end) {
        if (!values.varint(value)) return Scan::kMalformed;
        if (!append_u32(value, out)) return Scan::kOutOfRange;
      }
    } else if (width == 4 && wire == 0) {
      if (!in.varint(value)) return Scan::kMalformed;
      if (!append_u32(value, out)) return Scan::kOutOfRange;
    } else if (width == 8 && wire == 1) {
      if (in.end - in.at < 8) return Scan::kMalformed;
      out.append(reinterpret_cast<const char*>(in.at), 8);
      in.at += 8;
    } else {
      return Scan::kMalformed;
    }
  }
  return Scan::kFound;
}

}  // namespace

Scan scan_packed(std::string_view message, uint32_t outer, uint32_t inner, int width, std::string& out) {
  Reader in = reader(message);
  bool found = false;
  while (in.at < in.end) {
    uint64_t tag;
    if (!in.varint(tag)) return Scan::kMalformed;
    const auto wire = static_cast<uint32_t>(tag & 7);
    if (tag >> 3 != outer || wire != 2) {
      if (!in.skip(wire)) return Scan::kMalformed;
      continue;
    }
    std::string_view nested;
    if (!in.bytes(nested)) return Scan::kMalformed;
    found = true;
    const Scan result = scan_inner(nested, inner, width, out);
    if (result != Scan::kFound) return result;
  }
  return found ? Scan::kFound : Scan::kAbsent;
}

}  // namespace kvindex
