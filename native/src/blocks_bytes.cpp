#include "blocks_bytes.hpp"

#include "events.hpp"
#include "protobuf.hpp"
#include "request_fields.hpp"

namespace kvindex {
namespace {

using protobuf::Reader;
using protobuf::Writer;

// A message EngineHashes: ints packed, or byte strings. Whether both occur is for the caller to see.
bool read_hashes(std::string_view nested, uint64_t limit, BlocksRequest& request, bool& ints, bool& strings) {
  Reader in(nested);
  uint64_t tag;
  std::string_view value;
  while (!in.done()) {
    const auto* begin = in.at;
    if (!in.tag(tag) || !in.bytes(value)) return false;
    if (tag == (1 << 3 | protobuf::kBytes)) {
      ints = true;
      const std::string_view field(reinterpret_cast<const char*>(begin), static_cast<size_t>(in.at - begin));
      if (!read_packed(field, limit, request.blocks)) return false;
    } else if (tag == (2 << 3 | protobuf::kBytes)) {
      strings = true;
      if (request.blocks.size() >= limit) return false;
      request.blocks.push_back(hash_of_bytes(value));
    } else {
      return false;
    }
  }
  return true;
}

void write_holder(const Holder& holder, const std::string& tier, std::string& out) {
  Writer write{out};
  write.text(1, holder.pod);
  write.number(2, holder.rank);
  write.text(3, tier);
  write.number(4, holder.speculative ? 1 : 0);
  write.number(5, holder.group);
}

// One block after another. Neighbouring blocks mostly have the same holders, whose encoding is then taken again.
class Answer {
 public:
  explicit Answer(std::vector<std::string> tiers) : tiers_(std::move(tiers)) {}

  void add(uint64_t key, const std::vector<Holder>& holders) {
    if (holders != last_) {
      holders_.clear();
      for (const Holder& each : holders) {
        one_.clear();
        write_holder(each, tiers_[each.tier], one_);
        Writer{holders_}.message(2, one_);
      }
      last_ = holders;
    }
    Writer write{out};
    write.varint(1 << 3 | protobuf::kBytes);
    write.varint((key == 0 ? 0 : 1 + sizeof key) + holders_.size());
    write.fixed(1, key);
    out += holders_;
  }

  std::string out;

 private:
  const std::vector<std::string> tiers_;
  std::vector<Holder> last_;
  std::string holders_, one_;
};

}  // namespace

std::optional<BlocksRequest> read_blocks_request(std::string_view encoded, const RequestLimits& limits) {
  BlocksRequest request;
  Reader in(encoded);
  bool keys = false, hashes = false, ints = false, strings = false;
  std::string ignored;
  while (!in.done()) {
    uint64_t tag;
    std::string_view value;
    if (!in.tag(tag) || tag > kU32 || (tag & 7) != protobuf::kBytes || !in.bytes(value)) return std::nullopt;
    switch (tag >> 3) {
      case 1:
        if (!read_name(value, request.model)) return std::nullopt;
        break;
      case 2:
        keys = true;
        if (!read_packed(value, limits.max_keys, request.blocks)) return std::nullopt;
        break;
      case 3:
        hashes = true;
        if (!read_hashes(value, limits.max_keys, request, ints, strings)) return std::nullopt;
        break;
      case 7:
        if (value.empty() || request.pods.size() >= limits.max_pods || !is_utf8(value)) return std::nullopt;
        request.pods.emplace_back(value);
        break;
      case 8:
      case 9:  // LoRA and salt: keys and hashes have them in them already
        if (!read_name(value, ignored)) return std::nullopt;
        break;
      default: return std::nullopt;
    }
  }
  if (request.model.empty() || request.blocks.empty() || (keys && hashes) || (ints && strings)) return std::nullopt;
  request.by_hash = hashes;
  return request;
}

std::string blocks_bytes(const Index& index, const BlocksRequest& request) {
  const auto& blocks = request.blocks;
  std::string out;
  // The tiers are read after the holders: one first seen a moment ago may be among them, and they are only ever added.
  if (request.by_hash) {
    const auto found = index.holders_of_hashes(blocks, request.pods);
    Answer answer(index.tiers());
    for (const HashHolders& each : found) answer.add(each.key, each.holders);
    out = std::move(answer.out);
  } else {
    const auto found = index.holders(blocks.data(), blocks.size(), request.pods);
    Answer answer(index.tiers());
    for (size_t at = 0; at < found.size(); ++at) answer.add(blocks[at], found[at]);
    out = std::move(answer.out);
  }
  Writer{out}.number(2, index.block_size());
  return out;
}

}  // namespace kvindex
