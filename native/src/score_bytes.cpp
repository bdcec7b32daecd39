#include "score_bytes.hpp"

#include <algorithm>
#include <array>
#include <string_view>

#include "protobuf.hpp"

namespace kvindex {
namespace {

using protobuf::Writer;

uint64_t saturated(uint64_t value) { return std::min<uint64_t>(value, 0xFFFFFFFFULL); }

struct Ranked {
  const std::string* pod;
  const Match* match;  // null without a match
  double score() const { return match == nullptr ? 0.0 : match->score; }
};

void write_score(const Ranked& each, const Believed& believed, const std::vector<std::string>& tiers,
                 uint64_t block_size, std::string& out, std::string& entry) {
  Writer write{out};
  uint32_t speculative = 0;
  write.text(1, *each.pod);
  if (each.match != nullptr) {
    const Match& match = *each.match;
    write.real(2, match.score);
    write.number(3, match.blocks);
    write.number(4, saturated(match.blocks * block_size));
    write.number(5, match.rank);
    speculative = match.speculative;
    for (size_t tier = 0; tier < match.tier_blocks.size() && tier < tiers.size(); ++tier) {
      if (match.tier_blocks[tier] == 0) continue;
      entry.clear();
      Writer{entry}.text(1, tiers[tier]);
      Writer{entry}.number(2, match.tier_blocks[tier]);
      write.message(6, entry);
    }
  }
  if (speculative != 0) write.number(7, speculative);
  write.number(8, static_cast<uint64_t>(believed.trust));
  write.real(9, believed.age_seconds);
  write.text(10, believed.reason);
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
                       const ScoreRequest& request, const std::string& lora, const std::vector<std::string>& pods) {
  ScoreBytes result;
  const uint64_t block_size = index.block_size();
  const bool by_keys = request.by_keys();
  const uint64_t tokens = request.text_tokens != 0 ? request.text_tokens
                          : by_keys                ? request.keys.size() * block_size
                                                   : request.tokens.size();
  result.total_blocks = by_keys ? request.keys.size() : block_size == 0 ? 0 : tokens / block_size;

  std::vector<Match> matches;
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
  std::unordered_map<std::string_view, const Match*> of_pod;
  of_pod.reserve(matches.size());
  for (const Match& match : matches) {
    of_pod[match.pod] = &match;
    result.best_match = std::max(result.best_match, match.blocks);
  }
  std::vector<Ranked> ranked;
  ranked.reserve(pods.size());
  for (const std::string& pod : pods) {
    const auto found = of_pod.find(pod);
    ranked.push_back({&pod, found == of_pod.end() ? nullptr : found->second});
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const Ranked& a, const Ranked& b) { return a.score() > b.score(); });
  if (request.top_k != 0 && request.top_k < ranked.size()) ranked.resize(request.top_k);

  // Read after the match: a tier first seen a moment ago may be in the answer, and tiers are only ever added.
  const std::vector<std::string> tiers = index.tiers();
  std::array<bool, kMaxTiers> used{};
  const int64_t now = now_ns();
  std::string score, entry;
  Believed believed;
  Writer write{result.response};
  result.response.reserve(ranked.size() * 80 + 32);
  for (const Ranked& each : ranked) {
    const int64_t rank = each.match == nullptr ? int64_t{-1} : int64_t{each.match->rank};
    score.clear();
    standings.of(*each.pod, rank, now, believed);
    write_score(each, believed, tiers, block_size, score, entry);
    write.message(1, score);
    if (each.match != nullptr)
      for (size_t tier = 0; tier < kMaxTiers; ++tier) used[tier] = used[tier] || each.match->tier_blocks[tier] != 0;
  }
  write.number(2, saturated(result.total_blocks));
  write.number(3, block_size);
  write.number(4, saturated(tokens));
  for (size_t tier = 0; tier < tiers.size() && tier < kMaxTiers; ++tier)
    if (used[tier] && !weights.knows(tiers[tier])) result.unknown_tiers.push_back(tiers[tier]);
  return result;
}

}  // namespace kvindex
