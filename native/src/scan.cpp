#include "scan.hpp"

#include <algorithm>

#include "protobuf.hpp"

namespace kvindex {
namespace {

using protobuf::Reader;

bool append_u32(uint64_t value, std::string& out) {
  if (value > 0xFFFFFFFFULL) return false;
  const auto narrow = static_cast<uint32_t>(value);
  out.append(reinterpret_cast<const char*>(&narrow), 4);
  return true;
}

Scan scan_inner(std::string_view message, uint32_t inner, int width, std::string& out) {
  Reader in(message);
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
      Reader values(packed);
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
  Reader in(message);
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

bool scan_tags(std::string_view message, uint32_t outer, std::vector<uint32_t>& tags) {
  Reader in(message);
  while (!in.done()) {
    uint64_t tag;
    std::string_view nested;
    if (!in.varint(tag) || tag > 0xFFFFFFFFULL) return false;
    if (outer != 0 && tag == (uint64_t{outer} << 3 | protobuf::kBytes)) {
      if (!in.bytes(nested) || !scan_tags(nested, 0, tags)) return false;
      continue;
    }
    if (!in.skip(static_cast<uint32_t>(tag & 7))) return false;
    if (outer != 0 || std::find(tags.begin(), tags.end(), tag) != tags.end()) continue;
    if (tags.size() == kMaxTags) return false;
    tags.push_back(static_cast<uint32_t>(tag));
  }
  return true;
}

}  // namespace kvindex
