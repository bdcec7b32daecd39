#include "module_sources.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <stdexcept>
#include <system_error>

#include "listener.hpp"
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

nb::list pairs_of(const Listener& listener, std::vector<Listener::Heard> (Listener::*ask)() const) {
  std::vector<Listener::Heard> heard;
  {
    nb::gil_scoped_release release;  // its thread may be busy with many who dial in
    heard = (listener.*ask)();
  }
  nb::list pairs;
  for (const auto& [topic, address] : heard)
    pairs.append(nb::make_tuple(nb::bytes(topic.data(), topic.size()), nb::str(address.c_str())));
  return pairs;
}

Subscription::Settings settings_of(const nb::bytes& topic, uint64_t max_frame, uint32_t heartbeat_ms,
                                   uint32_t heartbeat_timeout_ms) {
  return {{topic.c_str(), topic.size()},
          max_frame,
          std::chrono::milliseconds(heartbeat_ms),
          std::chrono::milliseconds(heartbeat_timeout_ms)};
}

// What the system has refused, as Python tells it: with its number.
template <typename Make>
void or_os_error(Make make) {
  try {
    make();
  } catch (const std::system_error& error) {
    PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.code().message()).ptr());
    throw nb::python_error();
  }
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
  nb::class_<Listener>(m, "Listener")
      .def(
          "__init__",
          [](Listener* self, const std::string& host, uint16_t port, uint64_t max_frame) {
            or_os_error([&] { new (self) Listener(host, port, max_frame); });
          },
          nb::arg("host"), nb::arg("port"), nb::arg("max_frame"))
      .def("unclaimed", [](const Listener& self) { return pairs_of(self, &Listener::unclaimed); })
      .def("taken", [](const Listener& self) { return pairs_of(self, &Listener::taken); });
  nb::class_<Subscription, MessageSource>(m, "Subscription")
      .def(
          "__init__",
          [](Subscription* self, const std::string& host, uint16_t port, const nb::bytes& topic, uint64_t max_frame,
             uint32_t heartbeat_ms, uint32_t heartbeat_timeout_ms) {
            or_os_error([&] {
              new (self) Subscription(host, port, settings_of(topic, max_frame, heartbeat_ms, heartbeat_timeout_ms));
            });
          },
          nb::arg("host"), nb::arg("port"), nb::arg("topic"), nb::arg("max_frame"), nb::arg("heartbeat_ms"),
          nb::arg("heartbeat_timeout_ms"))
      .def(
          "__init__",
          [](Subscription* self, std::shared_ptr<Listener> listener, const nb::bytes& topic, bool is_whole,
             uint32_t heartbeat_ms, uint32_t heartbeat_timeout_ms) {
            or_os_error([&] {
              const uint64_t max_frame = listener->max_frame();
              new (self) Subscription(std::move(listener), is_whole,
                                      settings_of(topic, max_frame, heartbeat_ms, heartbeat_timeout_ms));
            });
          },
          nb::arg("listener"), nb::arg("topic"), nb::arg("is_whole"), nb::arg("heartbeat_ms"),
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
