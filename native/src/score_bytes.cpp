#include "score_bytes.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string_view>

#include "protobuf.hpp"

namespace kvindex {
namespace {

using protobuf::Writer;

constexpr size_t kLength = 10;  // bytes of a varint at most

uint64_t saturated(uint64_t value) { return std::min<uint64_t>(value, 0xFFFFFFFFULL); }

// Writes a message's one field 1, which is a message of at most `most` bytes.
template <typename Fields>
void write_entry(Output& out, size_t most, Fields fields) {
  Room room = out.room(2 + kLength + most);
  char* const begin = room.at;
  room.at += 2;  // the tag, and a length below 128 as most have
  fields(room);
  const auto length = static_cast<size_t>(room.at - begin) - 2;
  const size_t more = protobuf::size_of(length) - 1;
  if (more != 0) std::memmove(begin + 2 + more, begin + 2, length);
  Room head{begin};
  Writer{head}.varint(1 << 3 | protobuf::kBytes);
  Writer{head}.varint(length);
  room.at += more;
  out.wrote(room);
}

// The tiers as they are named in an answer.
class TierNames {
 public:
  explicit TierNames(const std::vector<std::string>& tiers) {
    for (const std::string& tier : tiers) {
      Writer{encoded_.emplace_back()}.text(1, tier);
      most_ += encoded_.back().size() + 4 * kLength;
    }
  }
  // Bytes of a match with blocks on every tier.
  size_t most() const { return most_; }
  void write(const Match& match, uint64_t block_size, Room& out) const {
    Writer write{out};
    write.real(2, match.score);
    write.number(3, match.blocks);
    write.number(4, saturated(match.blocks * block_size));
    write.number(5, match.rank);
    for (size_t tier = 0; tier < match.tier_blocks.size() && tier < encoded_.size(); ++tier) {
      const uint32_t blocks = match.tier_blocks[tier];
      if (blocks == 0) continue;
      write.varint(6 << 3 | protobuf::kBytes);
      write.varint(encoded_[tier].size() + 1 + protobuf::size_of(blocks));
      out.append(encoded_[tier]);
      write.number(2, blocks);
    }
    write.number(7, match.speculative);
  }

 private:
  std::vector<std::string> encoded_;
  size_t most_ = 6 * kLength;
};

template <typename Out>
void write_believed(const Believed& believed, Out& out) {
  Writer write{out};
  write.number(8, static_cast<uint64_t>(believed.trust));
  write.real(9, believed.age_seconds);
  write.text(10, believed.reason);
}

// What is said of a pod without a stream, as most of a large fleet's may be: always the same.
class Stranger {
 public:
  Stranger() {
    std::string encoded;
    write_believed({Trust::kCold, "pod is not registered", -1}, encoded);
    size_ = encoded.copy(encoded_.data(), encoded_.size());
  }
  // Copies a size known at compile time, which is more than is needed.
  void write(Room& out) const {
    std::memcpy(out.at, encoded_.data(), kMost);
    out.at += size_;
  }
  // All of a pod that has nothing else: its length is known before.
  void write(std::string_view name, Output& out) const {
    Room room = out.room(4 * kLength + name.size() + kMost);
    Writer entry{room};
    entry.varint(1 << 3 | protobuf::kBytes);
    entry.varint(1 + protobuf::size_of(name.size()) + name.size() + size_);
    entry.message(1, name);
    write(room);
    out.wrote(room);
  }

  static constexpr size_t kMost = 64;

 private:
  std::array<char, kMost> encoded_{};
  size_t size_ = 0;
};

// Candidates and their matches, best first, equal ones in the order of the candidates.
class Ranking {
 public:
  Ranking(const std::vector<uint32_t>& pods, const std::vector<Match>& matches)
      : matches_(matches), match_of_(pods.size(), 0) {
    if (matches.empty()) return;
    // By a pod's number, its match + 1. Open addressing, half of it free.
    const size_t mask = std::bit_ceil(matches.size() * 2) - 1;
    const auto place = [&](uint32_t number) {
      return static_cast<size_t>(number * 0x9E3779B97F4A7C15ULL >> 32) & mask;
    };
    std::vector<uint32_t> of_pod(mask + 1, 0);
    for (uint32_t i = 0; i < matches.size(); ++i) {
      size_t at = place(matches[i].number);
      while (of_pod[at] != 0) at = (at + 1) & mask;
      of_pod[at] = i + 1;
    }
    for (uint32_t i = 0; i < pods.size(); ++i) {
      if (pods[i] == PodNames::kNobody) continue;
      size_t at = place(pods[i]);
      while (of_pod[at] != 0 && matches[of_pod[at] - 1].number != pods[i]) at = (at + 1) & mask;
      match_of_[i] = of_pod[at];
      if (score(i) > 0) first_.push_back(i);
      below_none_ = below_none_ || score(i) < 0;
    }
    const auto better = [&](uint32_t a, uint32_t b) { return score(a) > score(b); };
    std::stable_sort(first_.begin(), first_.end(), better);
    if (!below_none_) return;
    const auto rest = static_cast<std::ptrdiff_t>(first_.size());
    for (uint32_t i = 0; i < pods.size(); ++i)
      if (!(score(i) > 0)) first_.push_back(i);
    std::stable_sort(first_.begin() + rest, first_.end(), better);
  }

  // Visits at most so many (candidate, match or null).
  template <typename Visit>
  void each(size_t most, Visit visit) const {
    for (size_t i = 0; i < first_.size() && most > 0; ++i, --most) visit(first_[i], match_of(first_[i]));
    // Most of a large fleet has no match, and stays in its order unsorted.
    if (below_none_) return;
    for (uint32_t i = 0; i < match_of_.size() && most > 0; ++i) {
      if (match_of_[i] != 0 && score(i) > 0) continue;
      visit(i, match_of(i));
      --most;
    }
  }

 private:
  const Match* match_of(uint32_t candidate) const {
    return match_of_[candidate] == 0 ? nullptr : &matches_[match_of_[candidate] - 1];
  }
  double score(uint32_t candidate) const {
    const Match* match = match_of(candidate);
    return match == nullptr ? 0.0 : match->score;
  }

  const std::vector<Match>& matches_;
  std::vector<uint32_t> match_of_;  // by candidate, + 1
  std::vector<uint32_t> first_;     // with a score above 0; all of them when there are scores below 0
  bool below_none_ = false;
};

}  // namespace

TierWeights::TierWeights(std::unordered_map<std::string, double> by_tier) : by_tier_(std::move(by_tier)) {
  bool first = true;
  for (const auto& [tier, weight] : by_tier_) {
    lowest_ = first ? weight : std::min(lowest_, weight);
    first = false;
  }
}

std::vector<double> TierWeights::of(const std::vector<std::string>& tiers) const {
  std::vector<double> weights;
  weights.reserve(tiers.size() + 1);
  for (const std::string& tier : tiers) {
    const auto found = by_tier_.find(tier);
    weights.push_back(found == by_tier_.end() ? lowest_ : found->second);
  }
  return weights;
}

ScoreBytes score_bytes(const Index& index, const Standings& standings, const TierWeights& weights,
                       const ScoreRequest& request, const std::string& lora, const Candidates& pods, Output& out) {
  ScoreBytes result;
  const uint64_t block_size = index.block_size();
  const bool by_keys = request.by_keys();
  const uint64_t tokens = request.text_tokens != 0 ? request.text_tokens
                          : by_keys                ? request.keys.size() * block_size
                                                   : request.tokens.size();
  result.total_blocks = by_keys ? request.keys.size() : block_size == 0 ? 0 : tokens / block_size;

  std::vector<Match> matches;
  const int64_t begun = now_ns();
  if (!pods.names.empty()) {
    const std::vector<double> by_bit = weights.of(index.tiers());
    const Wanted wanted = Wanted::only(pods.numbers);
    if (by_keys) {
      matches = index.score(request.keys.data(), request.keys.size(), wanted, by_bit);
    } else if (request.extras.lora_name.empty() && !lora.empty()) {
      QueryExtras extras = request.extras;
      extras.lora_name = lora;
      matches = index.score_tokens(request.tokens.data(), request.tokens.size(), wanted, by_bit, extras);
    } else {
      matches = index.score_tokens(request.tokens.data(), request.tokens.size(), wanted, by_bit, request.extras);
    }
  }
  for (const Match& match : matches) result.best_match = std::max(result.best_match, match.blocks);
  const Ranking ranking(pods.numbers, matches);
  const size_t most = request.top_k == 0 ? pods.names.size() : request.top_k;

  // Read after the match: a tier first seen a moment ago may be in the answer, and tiers are only ever added.
  const std::vector<std::string> tiers = index.tiers();
  std::array<bool, kMaxTiers> used{};
  const int64_t now = now_ns();
  result.match_ns = now - begun;
  const auto use = [&](const Match& match) {
    for (size_t tier = 0; tier < kMaxTiers; ++tier) used[tier] = used[tier] || match.tier_blocks[tier] != 0;
  };
  const auto name_unknown = [&] {
    for (size_t tier = 0; tier < tiers.size() && tier < kMaxTiers; ++tier)
      if (used[tier] && !weights.knows(tiers[tier])) result.unknown_tiers.push_back(tiers[tier]);
  };
  if (request.hits_only) {
    for (const Match& match : matches) use(match);
    name_unknown();
    ranking.each(most, [&](uint32_t pod, const Match* match) {
      if (match == nullptr || (match->blocks == 0 && match->speculative == 0)) return;
      write_entry(out, 3 * kLength + pods.names[pod].size(), [&](Room& room) {
        Writer{room}.text(1, pods.names[pod]);
        Writer{room}.real(2, match->score);
      });
    });
    return result;
  }
  static const Stranger stranger;
  const TierNames names(tiers);
  const Standings::Reading reading(standings);
  Believed believed;
  ranking.each(most, [&](uint32_t pod, const Match* match) {
    const std::string_view name = pods.names[pod];
    if (pods.numbers[pod] == PodNames::kNobody) {
      stranger.write(name, out);
      return;
    }
    const bool told =
        reading.of(pods.numbers[pod], match == nullptr ? int64_t{-1} : int64_t{match->rank}, now, believed);
    const size_t length = 2 * kLength + name.size() + (match == nullptr ? 0 : names.most()) +
                          (told ? 4 * kLength + believed.reason.size() : Stranger::kMost);
    write_entry(out, length, [&](Room& room) {
      Writer{room}.message(1, name);
      if (match != nullptr) {
        names.write(*match, block_size, room);
        use(*match);
      }
      if (told) {
        write_believed(believed, room);
      } else {
        stranger.write(room);
      }
    });
  });
  Room room = out.room(6 * kLength);
  Writer write{room};
  write.number(2, saturated(result.total_blocks));
  write.number(3, block_size);
  write.number(4, saturated(tokens));
  out.wrote(room);
  name_unknown();
  return result;
}

}  // namespace kvindex
