#include "pod_list.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "request_fields.hpp"

namespace kvindex {
namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string bytes;
  for (const std::string& name : names) bytes += name;
  return bytes;
}

}  // namespace

PodList::PodList(std::string_view encoded, std::vector<std::string_view> names)
    : bytes_(encoded), names_(std::move(names)) {
  for (std::string_view& name : names_) name = {bytes_.data() + (name.data() - encoded.data()), name.size()};
}

PodList::PodList(const std::vector<std::string>& names) : bytes_(joined(names)) {
  names_.reserve(names.size());
  size_t at = 0;
  for (const std::string& name : names) {
    names_.emplace_back(bytes_.data() + at, name.size());
    at += name.size();
  }
}

std::shared_ptr<const PodList> PodList::read(protobuf::Reader& in, size_t most) {
  constexpr size_t kKeep = 1U << 20;  // bytes of a list that a thread remembers
  thread_local std::shared_ptr<const PodList> last;
  const uint8_t* const begin = in.at;
  if (last != nullptr) {
    const std::string& bytes = last->bytes_;
    if (bytes.size() <= in.rest() && std::memcmp(begin, bytes.data(), bytes.size()) == 0 &&
        (bytes.size() == in.rest() || begin[bytes.size()] != *begin) && last->names_.size() <= most) {
      in.at += bytes.size();
      return last;
    }
  }
  std::vector<std::string_view> names;
  while (!in.done() && *in.at == *begin) {
    ++in.at;
    std::string_view name;
    if (!in.bytes(name) || name.empty() || names.size() >= most || !is_utf8_name(name)) return nullptr;
    // The others will have names about as long.
    if (names.empty()) names.reserve(std::min(most, 1 + in.rest() / (name.size() + 2)));
    names.push_back(name);
  }
  const std::string_view encoded(reinterpret_cast<const char*>(begin), static_cast<size_t>(in.at - begin));
  std::shared_ptr<const PodList> made(new PodList(encoded, std::move(names)));
  if (encoded.size() <= kKeep) last = made;
  return made;
}

}  // namespace kvindex
