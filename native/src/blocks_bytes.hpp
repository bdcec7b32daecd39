// GetPodsForBlocks from an encoded request to the encoded answer, without an object per block or holder.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "index.hpp"
#include "score_request.hpp"

namespace kvindex {

struct BlocksRequest {
  std::string model;
  bool by_hash = false;          // `blocks` are the engine's hashes, not our keys
  std::vector<uint64_t> blocks;  // never empty
  Pods pods;                     // as they came; empty means all
};

// The request when it names its blocks by keys or engine hashes; nothing when it is of another kind, malformed, beyond
// a limit or unusual in any way. Such a request is for the reference path.
std::optional<BlocksRequest> read_blocks_request(std::string_view encoded, const RequestLimits& limits);

// The encoded kvindex.v1.GetPodsForBlocksResponse.
std::string blocks_bytes(const Index& index, const BlocksRequest& request);

}  // namespace kvindex
