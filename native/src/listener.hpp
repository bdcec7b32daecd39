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
  // A topic, and the IP address that a connection of it came from.
  using Heard = std::pair<std::string, std::string>;

  // A connection whose handshake is made, and what came over it: its first message, or the beginning of that.
  struct Arrival {
    Descriptor socket;
    Zmtp zmtp;
    std::string topic;   // of all its messages
    std::string unread;  // kMostUnread bytes at most
  };

  // Whoever takes the connections of one topic.
  class Taker {
   public:
    // `topic` is a prefix, unless it `is_whole`. std::invalid_argument when another taker's connections could be its
    // too; std::system_error when the process has no descriptor left.
    Taker(std::shared_ptr<Listener> listener, std::string topic, bool is_whole);
    ~Taker();
    Taker(const Taker&) = delete;
    Taker& operator=(const Taker&) = delete;

    // Readable while there is a connection to take.
    int descriptor() const { return woken_.get(); }
    bool has_arrival() const { return has_arrival_; }
    // The latest one; an earlier one that was not taken is closed.
    std::optional<Arrival> take();

   private:
    friend class Listener;

    bool takes(std::string_view topic) const;

    const std::shared_ptr<Listener> listener_;
    const std::string topic_;
    const bool is_whole_;
    const Descriptor woken_;
    std::optional<Arrival> arrival_;
    std::atomic<bool> has_arrival_{false};
    std::optional<Heard> latest_;
  };

  // An IP address. std::system_error when it cannot be bound.
  Listener(const std::string& host, uint16_t port, uint64_t max_frame);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  uint64_t max_frame() const { return max_frame_; }
  // Of connections that nobody takes. They wait, unread, for somebody who does.
  std::vector<Heard> unclaimed() const;
  // Of each taker's latest connection, whether it is still there or not.
  std::vector<Heard> taken() const;

  static constexpr size_t kMostUnread = size_t{32} << 10;
  static constexpr size_t kMostTopic = size_t{8} << 10;
  // Connections that nobody has taken yet.
  static constexpr size_t kMost = 1024;

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
  bool accept_some();
  void make_room();
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
  std::vector<Taker*> takers_;
  std::thread thread_;
};

}  // namespace kvindex
