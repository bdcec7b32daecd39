#include "score_bytes.hpp"

#include <algorithm>
#include <array>
#include <string_view>

#include "name_hash.hpp"
#include "protobuf.hpp"

namespace kvindex {
namespace {

using protobuf::Writer;

uint64_t saturated(uint64_t value) { return std::min<uint64_t>(value, 0xFFFFFFFFULL); }

struct Ranked {
  uint32_t pod;        // position among the candidates
  const Match* match;  // null without a match
  double score() const { return match == nullptr ? 0.0 : match->score; }
};

void write_match(const Match& match, const std::vector<std::string>& tiers, uint64_t block_size, std::string& out,
                 std::string& entry) {
  Writer write{out};
  write.real(2, match.score);
  write.number(3, match.blocks);
  write.number(4, saturated(match.blocks * block_size));
  write.number(5, match.rank);
  for (size_t tier = 0; tier < match.tier_blocks.size() && tier < tiers.size(); ++tier) {
    if (match.tier_blocks[tier] == 0) continue;
    entry.clear();
    Writer{entry}.text(1, tiers[tier]);
    Writer{entry}.number(2, match.tier_blocks[tier]);
    write.message(6, entry);
  }
  write.number(7, match.speculative);
}

void write_believed(const Believed& believed, std::string& out) {
  Writer write{out};
  write.number(8, static_cast<uint64_t>(believed.trust));
  write.real(9, believed.age_seconds);
  write.text(10, believed.reason);
}

std::string stranger() {
  std::string encoded;
  write_believed({Trust::kCold, "pod is not registered", -1}, encoded);
  return encoded;
}

// A PodScore of nothing but a name and `unknown`, which most of a large fleet's may be.
void write_stranger(const std::string& pod, const std::string& unknown, std::string& out) {
  Writer write{out};
  write.varint(1 << 3 | protobuf::kBytes);
  write.varint(1 + protobuf::size_of(pod.size()) + pod.size() + unknown.size());
  write.message(1, pod);
  out += unknown;
}

// An indexer.v1 GetPodScoresResponse.
void write_hits(const std::vector<Ranked>& order, const std::vector<std::string>& pods, std::string& out) {
  std::string score;
  for (const Ranked& each : order) {
    if (each.match == nullptr || (each.match->blocks == 0 && each.match->speculative == 0)) continue;
    score.clear();
    Writer{score}.text(1, pods[each.pod]);
    Writer{score}.real(2, each.match->score);
    Writer{out}.message(1, score);
  }
}

// Best first, equal ones in the order of the candidates. Most of a large fleet has no match, and stays in order
// unsorted.
std::vector<Ranked> ranked(const std::vector<std::string>& pods, const std::vector<Match>& matches) {
  std::unordered_map<std::string_view, const Match*, NameHash> of_pod;
  of_pod.reserve(matches.size());
  for (const Match& match : matches) of_pod[match.pod] = &match;
  std::vector<Ranked> order, rest;
  order.reserve(pods.size());
  bool below_none = false;
  for (uint32_t at = 0; at < pods.size(); ++at) {
    const auto found = of_pod.empty() ? of_pod.end() : of_pod.find(pods[at]);
    const Ranked each{at, found == of_pod.end() ? nullptr : found->second};
    (each.score() > 0 ? order : rest).push_back(each);
    below_none = below_none || each.score() < 0;
  }
  const auto better = [](const Ranked& a, const Ranked& b) { return a.score() > b.score(); };
  std::stable_sort(order.begin(), order.end(), better);
  if (below_none) std::stable_sort(rest.begin(), rest.end(), better);
  order.insert(order.end(), rest.begin(), rest.end());
  return order;
}

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
                       const ScoreRequest& request, const std::string& lora, const std::vector<std::string>& pods,
                       const std::vector<const Standings::OfPod*>& found) {
  ScoreBytes result;
  const uint64_t block_size = index.block_size();
  const bool by_keys = request.by_keys();
  const uint64_t tokens = request.text_tokens != 0 ? request.text_tokens
                          : by_keys                ? request.keys.size() * block_size
                                                   : request.tokens.size();
  result.total_blocks = by_keys ? request.keys.size() : block_size == 0 ? 0 : tokens / block_size;

  std::vector<Match> matches;
  const int64_t begun = now_ns();
  if (!pods.empty()) {
    const std::vector<double> by_bit = weights.of(index.tiers());
    if (by_keys) {
      matches = index.score(request.keys.data(), request.keys.size(), pods, by_bit);
    } else if (request.extras.lora_name.empty() && !lora.empty()) {
      QueryExtras extras = request.extras;
      extras.lora_name = lora;
      matches = index.score_tokens(request.tokens.data(), request.tokens.size(), pods, by_bit, extras);
    } else {
      matches = index.score_tokens(request.tokens.data(), request.tokens.size(), pods, by_bit, request.extras);
    }
  }
  for (const Match& match : matches) result.best_match = std::max(result.best_match, match.blocks);
  std::vector<Ranked> order = ranked(pods, matches);
  if (request.top_k != 0 && request.top_k < order.size()) order.resize(request.top_k);

  // Read after the match: a tier first seen a moment ago may be in the answer, and tiers are only ever added.
  const std::vector<std::string> tiers = index.tiers();
  std::array<bool, kMaxTiers> used{};
  const int64_t now = now_ns();
  result.match_ns = now - begun;
  static const std::string unknown = stranger();
  const auto name_unknown = [&] {
    for (size_t tier = 0; tier < tiers.size() && tier < kMaxTiers; ++tier)
      if (used[tier] && !weights.knows(tiers[tier])) result.unknown_tiers.push_back(tiers[tier]);
  };
  std::string score, entry;
  Believed believed;
  Writer write{result.response};
  if (request.hits_only) {
    for (const Match& match : matches)
      for (size_t tier = 0; tier < kMaxTiers; ++tier) used[tier] = used[tier] || match.tier_blocks[tier] != 0;
    name_unknown();
    write_hits(order, pods, result.response);
    return result;
  }
  result.response.reserve(order.size() * 80 + 32);
  for (const Ranked& each : order) {
    if (each.match == nullptr && found[each.pod] == nullptr) {
      write_stranger(pods[each.pod], unknown, result.response);
      continue;
    }
    score.clear();
    Writer{score}.text(1, pods[each.pod]);
    if (each.match != nullptr) {
      write_match(*each.match, tiers, block_size, score, entry);
      for (size_t tier = 0; tier < kMaxTiers; ++tier) used[tier] = used[tier] || each.match->tier_blocks[tier] != 0;
    }
    const int64_t rank = each.match == nullptr ? int64_t{-1} : int64_t{each.match->rank};
    if (found[each.pod] != nullptr && standings.of(*found[each.pod], rank, now, believed)) {
      write_believed(believed, score);
    } else {
      score += unknown;
    }
    write.message(1, score);
  }
  write.number(2, saturated(result.total_blocks));
  write.number(3, block_size);
  write.number(4, saturated(tokens));
  name_unknown();
  return result;
}

}  // namespace kvindex
