// Published messages straight into a stream, as long as they are in order.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "message_source.hpp"
#include "order.hpp"
#include "stream.hpp"

namespace kvindex {

// What a stream held right after one message, for comparing replicas that follow the same engine.
struct Mark {
  uint64_t sequence = 0;
  uint64_t digest = 0;  // of the message
  uint64_t held = 0;    // a digest of the claims
  uint64_t claims = 0;
};

struct Drained {
  Applied applied;
  uint64_t messages = 0;
  uint64_t first = 0;   // sequence of the first message applied
  bool empty = false;   // the source has no more for now
  bool others = false;  // another socket has a message, or the source has news
  // (sequence, digest) of a last message that may change how far the stream can be trusted: applied, but it is for the
  // caller to say so to the order, once that is settled. Nobody sees its number beside the trust of before.
  std::optional<std::pair<uint64_t, uint64_t>> withheld;
  // After each message told to the order whose number is a multiple of what was asked for.
  std::vector<Mark> marks;
  // How old the last message was when it had been applied, seconds, each time the source had no more.
  std::vector<double> lags;
  // The frames of a message that was received but not applied: not next in order, or no event message.
  std::vector<std::string> odd;
};

// How long the thread stays here, so that it need not wake up in Python for every message.
struct Waiting {
  std::vector<ZeroMq::Item> others;      // end the wait
  std::chrono::milliseconds idle{0};     // for a first message; 0: none is waited for
  std::chrono::milliseconds further{0};  // for further ones, from the first on; not much longer in a flood either
};

// Applies messages [topic, sequence, payload] while each is the next one, at most `limit` of them. Calls `told`
// whenever some were applied and the source has no more, or there were many. Ends behind a message of which something
// was dropped or that cleared all, as that may change how far the stream can be trusted.
Drained drain(MessageSource& source, Stream& stream, uint32_t rank, Order& order, uint64_t limit, uint64_t max_payload,
              uint64_t mark_every, const ZeroMq& zmq, const Waiting& waiting, const std::function<void()>& told);

}  // namespace kvindex
