#include "score_request.hpp"

#include <algorithm>
#include <cstring>

#include "protobuf.hpp"
#include "request_fields.hpp"

namespace kvindex {
namespace {

using protobuf::Reader;

constexpr size_t kMaxMmFeatures = 1024;

// How many bytes are the last of a varint.
uint64_t last_bytes(std::string_view packed) {
  constexpr uint64_t kOnes = 0x0101010101010101ULL;
  uint64_t count = 0;
  size_t at = 0;
  for (uint64_t eight = 0; packed.size() - at >= 8; at += 8) {
    std::memcpy(&eight, packed.data() + at, 8);
    count += ((~eight >> 7 & kOnes) * kOnes) >> 56;
  }
  for (; at < packed.size(); ++at) count += static_cast<uint8_t>(packed[at]) < 0x80 ? 1 : 0;
  return count;
}

bool read_tokens(std::string_view nested, uint64_t limit, std::vector<uint32_t>& out) {
  Reader in(nested);
  uint64_t tag, value;
  std::string_view packed;
  while (!in.done()) {
    if (!in.tag(tag) || tag != (1 << 3 | protobuf::kBytes) || !in.bytes(packed)) return false;
    // As many values as last bytes of one, so that their room is made once.
    const uint64_t count = last_bytes(packed);
    if (count > limit || out.size() > limit - count) return false;
    Reader values(packed);
    const size_t before = out.size();
    out.resize(before + count);
    uint32_t* next = out.data() + before;
    while (!values.done()) {
      if (!values.varint(value) || value > kU32) return false;
      *next++ = static_cast<uint32_t>(value);
    }
  }
  return true;
}

bool read_feature(std::string_view nested, MmFeature& feature) {
  Reader in(nested);
  uint64_t tag;
  std::string_view hash;
  while (!in.done()) {
    if (!in.tag(tag)) return false;
    switch (tag) {
      case 1 << 3 | protobuf::kBytes:
        if (!in.bytes(hash) || !read_name(hash, feature.hash)) return false;
        break;
      case 2 << 3 | protobuf::kVarint:
        if (!in.varint(feature.offset) || feature.offset > kU32) return false;
        break;
      case 3 << 3 | protobuf::kVarint:
        if (!in.varint(feature.length) || feature.length > kU32) return false;
        break;
      default: return false;
    }
  }
  return !feature.hash.empty() && feature.length != 0;
}

// The fields at `begin`, whose tag `in` has just read. Those that do not stand together are for the reference path.
bool read_pods(Reader& in, const uint8_t* begin, const RequestLimits& limits, ScoreRequest& request) {
  if (request.pods != nullptr || in.at - begin != 1) return false;
  in.at = begin;
  request.pods = PodList::read(in, limits.max_pods);
  return request.pods != nullptr;
}

// One occurrence of a field; false sends the request to the reference path.
bool read_field(uint32_t field, std::string_view value, const RequestLimits& limits, ScoreRequest& request) {
  switch (field) {
    case 1: return read_name(value, request.model);
    case 2:
    case 3:
      if (value.empty() || value.size() > limits.max_prompt_bytes || !is_utf8(value)) return false;
      request.text.assign(value);
      return true;
    case 4: return read_tokens(value, limits.max_tokens, request.tokens);
    case 5: return read_packed(value, limits.max_keys, request.keys);
    case 7: return read_name(value, request.extras.lora_name);
    case 8: return read_name(value, request.extras.cache_salt);
    case 9: {
      auto& features = request.extras.mm_features;
      if (features.size() >= kMaxMmFeatures) return false;
      features.push_back({"", 0, 0});
      return read_feature(value, features.back());
    }
    default: return false;
  }
}

}  // namespace

bool ScoreRequest::media_fit() const {
  if (input == Input::kKeys) return true;
  // As if every block were one token, since the model's block size is not known here.
  constexpr uint64_t kMaxMedia = 64U << 20;
  uint64_t bytes = 0;
  for (const MmFeature& each : extras.mm_features) {
    if (each.offset + each.length > tokens.size()) return false;
    bytes += (each.length + 2) * (each.hash.size() + 5);
  }
  return bytes <= kMaxMedia;
}

std::optional<ScoreRequest> read_score_request(std::string_view encoded, const RequestLimits& limits) {
  ScoreRequest request;
  Reader in(encoded);
  uint32_t inputs = 0;  // bit per field number
  while (!in.done()) {
    uint64_t tag, value;
    std::string_view bytes;
    const uint8_t* const begin = in.at;
    if (!in.tag(tag) || tag > kU32) return std::nullopt;
    if (tag == (6 << 3 | protobuf::kBytes)) {
      if (!read_pods(in, begin, limits, request)) return std::nullopt;
      continue;
    }
    const auto field = static_cast<uint32_t>(tag >> 3);
    if (field >= 2 && field <= 5) inputs |= 1U << field;
    if (tag == (10 << 3 | protobuf::kVarint)) {
      if (!in.varint(value) || value > kU32) return std::nullopt;
      request.top_k = static_cast<uint32_t>(value);
    } else if ((tag & 7) != protobuf::kBytes || !in.bytes(bytes) || !read_field(field, bytes, limits, request)) {
      return std::nullopt;
    }
  }
  switch (inputs) {
    case 1U << 2: request.input = ScoreRequest::Input::kPrompt; break;
    case 1U << 3: request.input = ScoreRequest::Input::kChat; break;
    case 1U << 4: request.input = ScoreRequest::Input::kTokens; break;
    case 1U << 5: request.input = ScoreRequest::Input::kKeys; break;
    default: return std::nullopt;
  }
  if (request.model.empty()) return std::nullopt;
  if (request.input == ScoreRequest::Input::kTokens && request.tokens.empty()) return std::nullopt;
  if (request.input == ScoreRequest::Input::kKeys && request.keys.empty()) return std::nullopt;
  std::stable_sort(request.extras.mm_features.begin(), request.extras.mm_features.end(),
                   [](const MmFeature& a, const MmFeature& b) { return a.offset < b.offset; });
  return request;
}

std::optional<ScoreRequest> read_pod_scores_request(std::string_view encoded, const RequestLimits& limits) {
  // Its fields mean what these of a ScoreRequest mean.
  constexpr uint32_t kAs[] = {0, 2, 1};
  ScoreRequest request;
  request.input = ScoreRequest::Input::kPrompt;
  request.hits_only = true;
  Reader in(encoded);
  while (!in.done()) {
    uint64_t tag;
    std::string_view bytes;
    const uint8_t* const begin = in.at;
    if (!in.tag(tag) || (tag & 7) != protobuf::kBytes || tag >> 3 < 1 || tag >> 3 > 3) return std::nullopt;
    if (tag >> 3 == 3) {
      if (!read_pods(in, begin, limits, request)) return std::nullopt;
      continue;
    }
    if (!in.bytes(bytes) || !read_field(kAs[tag >> 3], bytes, limits, request)) return std::nullopt;
  }
  if (request.model.empty() || request.text.empty()) return std::nullopt;
  return request;
}

}  // namespace kvindex
