// An endpoint that many engines dial into: the topic of its first message tells for whom a connection is.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "descriptor.hpp"
#include "zmtp.hpp"

namespace kvindex {

class Listener {
 public:
  // A connection whose handshake is made, and what came over it: its first message, or the beginning of that.
  struct Arrival {
    Descriptor socket;
    Zmtp zmtp;
    std::string unread;  // kMostUnread bytes at most
  };

  // Whoever takes the connections of one topic.
  class Taker {
   public:
    // `topic` is a prefix. std::invalid_argument when it begins with another taker's, or that with it;
    // std::system_error when the process has no descriptor left.
    Taker(std::shared_ptr<Listener> listener, std::string topic);
    ~Taker();
    Taker(const Taker&) = delete;
    Taker& operator=(const Taker&) = delete;

    // Readable while there is a connection to take.
    int descriptor() const { return woken_.get(); }
    bool has_arrival() const;
    // The latest one; an earlier one that was not taken is closed.
    std::optional<Arrival> take();

   private:
    friend class Listener;

    const std::shared_ptr<Listener> listener_;
    const std::string topic_;
    const Descriptor woken_;
    std::optional<Arrival> arrival_;
  };

  // An IP address. std::system_error when it cannot be bound.
  Listener(const std::string& host, uint16_t port, uint64_t max_frame);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  uint64_t max_frame() const { return max_frame_; }
  // A topic, and the IP address that a connection of it came from.
  using Heard = std::pair<std::string, std::string>;
  // Of connections that nobody takes. They wait, unread, for somebody who does.
  std::vector<Heard> unclaimed() const;
  // Of the latest connection of each topic, taken or not, whether it is still there or not; of kMostHeard at most.
  std::vector<Heard> heard() const;

  static constexpr size_t kMostUnread = size_t{32} << 10;
  static constexpr size_t kMostTopic = size_t{8} << 10;
  // Connections that nobody has taken yet.
  static constexpr size_t kMost = 1024;
  static constexpr size_t kMostHeard = 16384;

 private:
  using Clock = std::chrono::steady_clock;

  struct Caller {
    Caller(Descriptor accepted, std::string from, uint64_t max_frame)
        : socket(std::move(accepted)), address(std::move(from)), zmtp("", max_frame) {}

    Descriptor socket;
    std::string address;
    Zmtp zmtp;
    Clock::time_point since = Clock::now();
    bool is_open = false;  // the handshake is made
    std::string bytes;     // not done with
    std::optional<std::string> topic;
  };
  using Callers = std::map<int, Caller>;

  void run();
  bool accept_all();
  bool make_room();
  void serve(int socket, uint32_t events);
  bool read(Caller& caller);
  void offer(Callers::iterator caller);
  void expire();
  Taker* taker_of(std::string_view topic) const;

  const uint64_t max_frame_;
  Descriptor listening_, events_, woken_;
  std::atomic<bool> halt_{false};
  mutable std::mutex lock_;  // of all below
  Callers callers_;          // by their sockets
  std::map<std::string, std::string> heard_;
  std::vector<Taker*> takers_;
  std::thread thread_;
};

}  // namespace kvindex
