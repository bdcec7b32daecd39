// The libzmq that this process has loaded already, with pyzmq.
#pragma once

#include <cstddef>

namespace kvindex {

class ZeroMq {
 public:
  // Throws std::runtime_error when no loaded library has the functions.
  ZeroMq();

  struct Message {
    alignas(8) unsigned char opaque[64];  // zmq_msg_t
  };
  struct Item {  // zmq_pollitem_t
    void* socket;
    int fd;
    short events, revents;
  };

  int (*init)(Message*) = nullptr;
  int (*receive)(Message*, void* socket, int flags) = nullptr;
  int (*close)(Message*) = nullptr;
  void* (*data)(Message*) = nullptr;
  size_t (*size)(const Message*) = nullptr;
  int (*more)(const Message*) = nullptr;
  int (*poll)(Item*, int count, long timeout_ms) = nullptr;
};

}  // namespace kvindex
