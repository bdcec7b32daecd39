// Published messages from a ZeroMQ socket straight into a stream, as long as they are in order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "order.hpp"
#include "stream.hpp"

namespace kvindex {

// The functions of the libzmq that this process has loaded already, with pyzmq.
class ZeroMq {
 public:
  // Throws std::runtime_error when no loaded library has them.
  ZeroMq();

  struct Message {
    alignas(8) unsigned char opaque[64];  // zmq_msg_t
  };

  int (*init)(Message*) = nullptr;
  int (*receive)(Message*, void* socket, int flags) = nullptr;
  int (*close)(Message*) = nullptr;
  void* (*data)(Message*) = nullptr;
  size_t (*size)(const Message*) = nullptr;
  int (*more)(const Message*) = nullptr;
};

struct Drained {
  Applied applied;
  uint64_t messages = 0;
  uint64_t first = 0;  // sequence of the first message applied
  bool empty = false;  // the socket has no more for now
  // The frames of a message that was received but not applied: not next in order, or no event message.
  std::vector<std::string> odd;
};

// Applies messages [topic, sequence, payload] while each is the next one, at most `limit` of them.
Drained drain(const ZeroMq& zmq, void* socket, Stream& stream, uint32_t rank, Order& order, uint64_t limit,
              uint64_t max_payload);

}  // namespace kvindex
