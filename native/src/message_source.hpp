// Where a stream's thread takes published messages from, one after the other.
#pragma once

#include <poll.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "zeromq.hpp"

namespace kvindex {

// The frames of one message, which belong to the source until it is asked for the next one.
struct Message {
  std::vector<std::span<const uint8_t>> frames;

  std::vector<std::string> texts() const {
    std::vector<std::string> all;
    all.reserve(frames.size());
    for (const auto& each : frames) all.emplace_back(reinterpret_cast<const char*>(each.data()), each.size());
    return all;
  }
};

class MessageSource {
 public:
  MessageSource() = default;
  MessageSource(const MessageSource&) = delete;
  MessageSource& operator=(const MessageSource&) = delete;
  virtual ~MessageSource() = default;

  // False when there is none for now.
  virtual bool receive(Message& message) = 0;
  // Something else than a message comes first: the connection was made or lost. Until it is taken note of, there are
  // no messages.
  virtual bool has_news() const = 0;
  // What a wait for the next message waits on.
  virtual ZeroMq::Item item() const = 0;

  // Kept here by who drains it: after a first message, several more came within moments.
  bool comes_in_bursts = false;
};

}  // namespace kvindex
