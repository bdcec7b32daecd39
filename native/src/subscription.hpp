// A subscription to one engine's event socket, over a TCP connection that is made again whenever it is lost: by us, or
// by the engine where it dials in.
#pragma once

#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "descriptor.hpp"
#include "listener.hpp"
#include "lookup.hpp"
#include "message_source.hpp"
#include "zmtp.hpp"

namespace kvindex {

// What became of the connection.
enum class Connection : uint8_t {
  kMade,   // to a publisher, which knows what is subscribed to
  kLost,   // it was made, and is no more
  kEnded,  // by us: what came was no publisher's, or a frame above the limit
};

// Memory that is not zeroed: it is written before it is read.
struct Buffer {
  explicit Buffer(size_t bytes = 0) : data(bytes > 0 ? new char[bytes] : nullptr), size(bytes) {}

  std::unique_ptr<char[]> data;
  size_t size;
};

// Belongs to the thread that uses it.
class Subscription final : public MessageSource {
 public:
  struct Settings {
    std::string topic;  // a prefix
    uint64_t max_frame = 0;
    std::chrono::milliseconds heartbeat{0};          // a sign of life is asked for so often
    std::chrono::milliseconds heartbeat_timeout{0};  // and waited for so long
  };

  // A name is looked up before each connection, as it may have moved, and its addresses are tried one after the other.
  // std::system_error when the process has no descriptor left.
  Subscription(const std::string& host, uint16_t port, Settings settings);
  // To the engine that dials in and publishes with such a topic, or with this one where it `is_whole`. One that dials
  // in after it stands for it, and is heard when all that came before is read. std::invalid_argument when somebody
  // takes such connections there already.
  Subscription(std::shared_ptr<Listener> listener, bool is_whole, Settings settings);
  ~Subscription() override;

  // Nothing is received any more.
  void close();

  // Readable when `receive` has something to do.
  int descriptor() const { return events_.get(); }
  // There is news, or what was received already may hold a message: nothing is to be waited for.
  bool is_pending() const { return has_news() || is_unread_; }

  // Also does what time demands: connecting again, signs of life.
  bool receive(Message& message) override;
  bool has_news() const override { return !news_.empty(); }
  ZeroMq::Item item() const override { return {nullptr, events_.get(), POLLIN, 0}; }

  // What has happened since the last call, in order; the messages received since then come behind it.
  std::vector<Connection> changes();

 private:
  using Clock = std::chrono::steady_clock;
  enum class Phase : uint8_t { kWaiting, kLookingUp, kConnecting, kConnected };

  void watch_clock();
  bool read();
  void opened();
  void take_arrival();
  void make_room();
  void take_up();
  void set_aside();
  void flush();
  void connect();
  void look_up();
  void finish_looking_up();
  void give_up_lookup();
  void finish_connecting();
  void lose(bool ended);
  void close_socket();
  void look_at_clock();
  void set_alarm(Clock::time_point at);
  void watch(uint32_t for_what);

  const Settings settings_;
  std::optional<Listener::Taker> taker_;  // where engines dial in; else the following six
  const std::string host_;
  const uint16_t port_ = 0;
  std::optional<Lookup> lookup_;
  std::vector<Address> addresses_;  // of a name, those of its last lookup that are still to be tried
  size_t next_address_ = 0;
  bool is_name_ = false;
  Descriptor events_, timer_;
  int socket_ = -1;
  Phase phase_ = Phase::kWaiting;
  bool open_ = false;  // the handshake is made
  uint32_t watched_ = 0;
  std::optional<Zmtp> zmtp_;
  std::vector<Connection> news_;
  // What was received and not read yet, between two calls that end without a message: a part of one, in `rest_`. Else
  // between these two places of a buffer, which is one for many streams unless a message is larger.
  Buffer buffer_;
  size_t begin_ = 0, end_ = 0;
  std::string rest_;
  bool is_unread_ = false;
  bool is_read_out_ = false;  // the last read got all there was
  // Time.
  std::chrono::milliseconds pause_;  // before the next attempt to connect
  Clock::time_point alarm_{};
  std::optional<Clock::time_point> asked_;  // for a sign of life, and nothing was heard since
};

}  // namespace kvindex
