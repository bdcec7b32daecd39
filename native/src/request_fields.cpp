#include "request_fields.hpp"

#include <cstring>

#include "protobuf.hpp"

namespace kvindex {

bool is_utf8(std::string_view text) {
  const auto* at = reinterpret_cast<const uint8_t*>(text.data());
  const auto* end = at + text.size();
  constexpr uint64_t kAbove = 0x8080808080808080ULL;
  uint64_t eight = 0;
  while (at < end) {
    for (; end - at >= 8; at += 8) {  // mostly ASCII
      std::memcpy(&eight, at, 8);
      if ((eight & kAbove) != 0) break;
    }
    if (at >= end) break;
    if (end - at < 8 && text.size() >= 8) {
      std::memcpy(&eight, end - 8, 8);  // looked at twice in part, which costs less than byte by byte
      if ((eight & kAbove) == 0) return true;
    }
    const uint8_t lead = *at++;
    if (lead < 0x80) continue;
    int more;
    uint8_t low = 0x80, high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
      more = 1;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      more = 2;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      more = 3;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    } else {
      return false;
    }
    for (; more > 0; --more) {
      if (at >= end || *at < low || *at > high) return false;
      ++at;
      low = 0x80;
      high = 0xBF;
    }
  }
  return true;
}

bool read_name(std::string_view value, std::string& out) {
  if (value.size() > kMaxName || !is_utf8(value)) return false;
  out.assign(value);
  return true;
}

bool read_packed(std::string_view nested, uint64_t limit, std::vector<uint64_t>& out) {
  protobuf::Reader in(nested);
  uint64_t tag;
  std::string_view packed;
  while (!in.done()) {
    if (!in.tag(tag) || tag != (1 << 3 | protobuf::kBytes) || !in.bytes(packed)) return false;
    if (packed.size() % 8 != 0 || out.size() + packed.size() / 8 > limit) return false;
    const size_t before = out.size();
    out.resize(before + packed.size() / 8);
    if (!packed.empty()) std::memcpy(out.data() + before, packed.data(), packed.size());
  }
  return true;
}

}  // namespace kvindex
