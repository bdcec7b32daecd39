// One connection of a subscriber in ZMTP 3 (RFC 23 and 37), mechanism NULL: bytes in, messages and bytes out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "message_source.hpp"

namespace kvindex {

class Zmtp {
 public:
  enum class Step : uint8_t {
    kMore,     // the bytes end within something
    kOpened,   // the handshake is made
    kMessage,  // a message whose topic fits
    kBroken,   // these are no bytes of a publisher that can be followed; the connection is of no use any more
  };

  // A larger frame breaks the connection, before its bytes are there; so does a message of many that is much larger.
  Zmtp(std::string topic, uint64_t max_frame);

  // The next thing in `bytes`, which begin where the last call's `used` ended. `used` of them are done with; while the
  // answer is kMore the others have to be given again, with more behind them. A message's frames point into `bytes`.
  Step next(std::string_view bytes, size_t& used, Message& message);
  // After kMore: that many bytes, counted from behind the used ones, are needed to get any further.
  size_t needed() const { return needed_; }

  // The first frame of the message that `bytes` begin with, if all of it is there.
  static std::optional<std::string_view> topic_at(std::string_view bytes);
  // For a subscription to everything, from now on: the connection is broken by any other topic.
  void insist(std::string topic);

  // What is to be sent; the caller takes away what was.
  std::string& out() { return out_; }
  // Whether the peer knows how to give a sign of life (ZMTP 3.1), and asking it for one.
  bool can_ping() const { return phase_ == Phase::kOpen && minor_ >= 1; }
  void ping();

 private:
  enum class Phase : uint8_t { kGreeting, kReady, kOpen };

  Step greeting(std::string_view bytes, size_t& used);
  // False when its topic does not fit.
  bool deliver(std::string_view bytes, size_t& used, Message& message);
  bool ready(std::string_view body);
  void command(std::string_view body);
  void send_command(std::string_view name, std::string_view rest);

  std::string topic_;
  bool insists_ = false;
  uint64_t max_frame_;
  Phase phase_ = Phase::kGreeting;
  uint8_t minor_ = 0;
  size_t needed_;
  std::string out_;
  // Of the message under way: how far it has been read, and where its frames are.
  size_t read_ = 0;
  std::vector<std::pair<size_t, size_t>> frames_;
};

}  // namespace kvindex
