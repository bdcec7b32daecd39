#include "module_sources.hpp"

#include <nanobind/stl/string.h>

#include <system_error>

#include "socket_source.hpp"
#include "subscription.hpp"

namespace nb = nanobind;

namespace kvindex {
namespace {

const char* name_of(Connection change) {
  switch (change) {
    case Connection::kMade: return "MADE";
    case Connection::kLost: return "LOST";
    case Connection::kEnded: break;
  }
  return "ENDED";
}

nb::object frames_of(Subscription& self) {
  Message message;
  bool is_there = false;
  {
    nb::gil_scoped_release release;
    is_there = self.receive(message);
  }
  if (!is_there) return nb::none();
  nb::list frames;
  for (const auto& each : message.frames) frames.append(nb::bytes(each.data(), each.size()));
  return frames;
}

}  // namespace

void bind_sources(nb::module_& m) {
  nb::class_<ZeroMq>(m, "ZeroMq").def(nb::init<>());
  nb::class_<MessageSource>(m, "MessageSource");
  nb::class_<SocketSource, MessageSource>(m, "SocketSource")
      .def(
          "__init__",
          [](SocketSource* self, const ZeroMq& zmq, uintptr_t socket) {
            new (self) SocketSource(zmq, reinterpret_cast<void*>(socket));
          },
          nb::arg("zmq"), nb::arg("socket"), nb::keep_alive<1, 2>());
  nb::class_<Subscription, MessageSource>(m, "Subscription")
      .def(
          "__init__",
          [](Subscription* self, const std::string& host, uint16_t port, const nb::bytes& topic, uint64_t max_frame,
             uint32_t heartbeat_ms, uint32_t heartbeat_timeout_ms) {
            Subscription::Settings settings{{topic.c_str(), topic.size()},
                                            max_frame,
                                            std::chrono::milliseconds(heartbeat_ms),
                                            std::chrono::milliseconds(heartbeat_timeout_ms)};
            try {
              new (self) Subscription(host, port, std::move(settings));
            } catch (const std::system_error& error) {
              PyErr_SetString(PyExc_OSError, error.what());
              throw nb::python_error();
            }
          },
          nb::arg("host"), nb::arg("port"), nb::arg("topic"), nb::arg("max_frame"), nb::arg("heartbeat_ms"),
          nb::arg("heartbeat_timeout_ms"))
      .def("fileno", &Subscription::descriptor)
      .def_prop_ro("is_pending", &Subscription::is_pending)
      .def("receive", &frames_of)
      .def("changes",
           [](Subscription& self) {
             nb::list names;
             for (const Connection each : self.changes()) names.append(name_of(each));
             return names;
           })
      .def("close", &Subscription::close);
}

}  // namespace kvindex
