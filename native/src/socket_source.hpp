// Messages of a socket of libzmq.
#pragma once

#include <deque>

#include "message_source.hpp"

namespace kvindex {

class SocketSource final : public MessageSource {
 public:
  SocketSource(const ZeroMq& zmq, void* socket) : zmq_(zmq), socket_(socket) {}
  ~SocketSource() override { drop(); }

  bool receive(Message& message) override;
  bool has_news() const override { return false; }  // a socket of its own tells
  ZeroMq::Item item() const override { return {socket_, 0, POLLIN, 0}; }

 private:
  void drop();

  const ZeroMq& zmq_;
  void* socket_;
  std::deque<ZeroMq::Message> held_;  // the current message's frames are `count_` of these, and must not be moved
  size_t count_ = 0;
};

}  // namespace kvindex
