#include "socket_source.hpp"

namespace kvindex {

namespace {

constexpr int kDontWait = 1;
constexpr size_t kFrames = 3;

}  // namespace

bool SocketSource::receive(Message& message) {
  drop();
  message.frames.clear();
  bool more = true;
  while (more) {
    if (held_.size() == count_) held_.emplace_back();
    ZeroMq::Message& into = held_[count_];
    zmq_.init(&into);
    // The frames of one message come at once: only the first can be missing.
    if (zmq_.receive(&into, socket_, kDontWait) < 0) return false;
    ++count_;
    message.frames.emplace_back(static_cast<const uint8_t*>(zmq_.data(&into)), zmq_.size(&into));
    more = zmq_.more(&into) != 0;
  }
  return true;
}

void SocketSource::drop() {
  for (size_t i = 0; i < count_; ++i) zmq_.close(&held_[i]);
  if (count_ > kFrames) held_.clear();
  count_ = 0;
}

}  // namespace kvindex
