// An encoded kvindex.v1.ScoreRequest or indexer.v1.GetPodScoresRequest, read without an object per token, key or pod.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "keys.hpp"
#include "pod_list.hpp"

namespace kvindex {

struct RequestLimits {
  uint64_t max_tokens, max_pods, max_keys, max_prompt_bytes;
};

struct ScoreRequest {
  enum class Input { kPrompt = 2, kChat = 3, kTokens = 4, kKeys = 5 };

  std::string model;
  Input input = Input::kTokens;
  std::string text;
  std::vector<uint32_t> tokens;
  std::vector<uint64_t> keys;
  uint64_t text_tokens = 0;             // of a text whose keys have been set
  std::shared_ptr<const PodList> pods;  // null: it names none
  QueryExtras extras;                   // media ordered by offset
  uint32_t top_k = 0;
  bool hits_only = false;  // the answer is an indexer.v1 GetPodScoresResponse: pods with a match, and their scores

  // The prompt is known by its keys, whether it came so or not.
  bool by_keys() const { return !keys.empty() || input == Input::kKeys || text_tokens != 0; }
  // Every media item lies within the tokens, and what the blocks' keys cover of them is no work that must be refused.
  // Keys have their media in them already.
  bool media_fit() const;
};

// The request, or nothing when it is malformed, beyond a limit or unusual in any way. Such a request is for the
// reference path, which either answers it or says what is wrong with it.
std::optional<ScoreRequest> read_score_request(std::string_view encoded, const RequestLimits& limits);

// The same of an encoded indexer.v1 GetPodScoresRequest.
std::optional<ScoreRequest> read_pod_scores_request(std::string_view encoded, const RequestLimits& limits);

}  // namespace kvindex
