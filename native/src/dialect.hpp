// How an engine writes its events, seen in a sample of its messages, and the adapters and salts in all of them. For
// people: nothing else depends on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "msgpack.hpp"

namespace kvindex {

// What was seen at least once.
enum class Trait : uint8_t {
  kArrayBatch,
  kMapBatch,
  kArrayEvents,
  kMapEvents,
  kEnvelope,  // the names of the Mooncake master's envelope (RFC #1527)
  kUnsignedHashes,
  kSignedHashes,  // a negative one
  kBytes16,
  kBytes32,
  kOtherBytes,
  kTextHashes,
  kOddHashes,
  kTokenPairs,
  kTokenText,
  kOddTokens,
  kLocality,  // fields of a map that tell a release
  kOwnership,
  kSessionId,
  kLookahead,
  kCacheSalt,
  kSpecKind,
  kCount
};
inline constexpr size_t kTraits = static_cast<size_t>(Trait::kCount);
const char* name_of(Trait trait);

class Dialect {
 public:
  // Whether the next message is one of the sample: the first ones, then one of so many.
  bool due() {
    ++seen_;
    return seen_ <= kFirst || seen_ % kEvery == 0;
  }
  // Something in a message was not understood: such messages are looked at too, up to a limit.
  bool odd_due() { return odd_++ < kOdd; }
  void look(const uint8_t* data, size_t size);
  // Of every event that stores blocks: a request under another adapter or salt finds none of them. An empty adapter is
  // none; only the beginning of a prompt tells whether it has a salt.
  void take_context(std::string_view adapter, bool beginning, bool salted);
  void reset() { *this = Dialect{}; }

  bool has(Trait trait) const { return (traits_ >> static_cast<int>(trait) & 1) != 0; }
  uint64_t looked() const { return looked_; }
  // Of BlockStored as an array, the tag counted; 0 when there was none.
  uint32_t shortest() const { return shortest_; }
  uint32_t longest() const { return longest_; }
  // The first tag that nobody knows; empty when there was none.
  const std::string& odd_tag() const { return odd_tag_; }
  // A block at token 0 of plain text, for whoever wants to compute its hash: tokens are empty when none came yet.
  struct Root {
    bool is_int = false;
    uint64_t number = 0;
    std::string bytes;
    std::vector<uint32_t> tokens;
  };
  const Root& root() const { return root_; }
  // The first ones that were named, in that order.
  const std::vector<std::string>& adapters() const { return adapters_; }
  uint64_t beginnings() const { return beginnings_; }
  uint64_t salted() const { return salted_; }

 private:
  static constexpr uint64_t kFirst = 16, kEvery = 256, kOdd = 64;
  static constexpr uint32_t kMaxEvents = 4096, kMaxRoot = 256, kMaxTag = 32;
  static constexpr size_t kMaxAdapters = 64, kMaxName = 256;

  struct Fields;
  void saw(Trait trait) { traits_ |= uint32_t{1} << static_cast<int>(trait); }
  void look_events(Cursor in);
  void look_event(Cursor in);
  void look_field(std::string_view name, Cursor value, Fields& fields);
  void look_hashes(Cursor in);
  void look_tokens(Cursor in);
  void take_root(const Fields& fields);

  uint64_t seen_ = 0, odd_ = 0, looked_ = 0;
  uint32_t traits_ = 0, shortest_ = 0, longest_ = 0;
  std::string odd_tag_;
  Root root_;
  std::vector<std::string> adapters_;
  uint64_t beginnings_ = 0, salted_ = 0;
};

}  // namespace kvindex
