// From a read ScoreRequest to an encoded ScoreResponse: hash, match, order and write, in one go.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "candidates.hpp"
#include "index.hpp"
#include "output.hpp"
#include "score_request.hpp"
#include "standings.hpp"

namespace kvindex {

// What is to be counted of an answer.
struct ScoreBytes {
  uint64_t total_blocks = 0;
  uint32_t best_match = 0;                 // blocks
  int64_t match_ns = 0;                    // time that matching took
  std::vector<std::string> unknown_tiers;  // in the answer, without a weight of their own
};

class TierWeights {
 public:
  explicit TierWeights(std::unordered_map<std::string, double> by_tier);
  // By tier bit; a tier nobody configured weighs as the lowest.
  std::vector<double> of(const std::vector<std::string>& tiers) const;
  bool knows(const std::string& tier) const { return by_tier_.count(tier) != 0; }

 private:
  std::unordered_map<std::string, double> by_tier_;
  double lowest_ = 0;
};

// Appends to `out` a kvindex.v1.ScoreResponse, or for a request of hits only an indexer.v1.GetPodScoresResponse. `pods`
// are in the order that ties keep, numbered as `standings` numbers them. `lora` is used where the request names none.
ScoreBytes score_bytes(const Index& index, const Standings& standings, const TierWeights& weights,
                       const ScoreRequest& request, const std::string& lora, const Candidates& pods, Output& out);

}  // namespace kvindex
