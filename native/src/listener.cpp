#include "listener.hpp"

#include <netdb.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "lookup.hpp"
#include "tcp.hpp"

namespace kvindex {

namespace {

constexpr std::chrono::seconds kHandshake{10};
constexpr std::chrono::milliseconds kLookAround{1000};
constexpr std::chrono::milliseconds kAcceptPause{50};
constexpr int kBacklog = 1024;
// Accepted in a row, before those that are there already are heard: others wait for the lock meanwhile.
constexpr int kAccepts = 64;
constexpr size_t kRead = 4096;

void watch(int events, int operation, int descriptor, uint32_t for_what) {
  epoll_event event{.events = for_what, .data = {.fd = descriptor}};
  checked(epoll_ctl(events, operation, descriptor, &event), "epoll");
}

int listen_at(const std::string& host, uint16_t port) {
  const std::vector<Address> addresses = Lookup::written(host, port);
  if (addresses.empty()) throw std::system_error(EADDRNOTAVAIL, std::generic_category(), "bind");
  const Address& address = addresses.front();
  Descriptor made(checked(socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), "socket"));
  const int on = 1;
  setsockopt(made.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  checked(bind(made.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.size), "bind");
  checked(listen(made.get(), kBacklog), "listen");
  return made.release();
}

std::string written(const sockaddr_storage& address, socklen_t size) {
  std::array<char, NI_MAXHOST> host{};
  const auto* any = reinterpret_cast<const sockaddr*>(&address);
  if (getnameinfo(any, size, host.data(), host.size(), nullptr, 0, NI_NUMERICHOST) != 0) return {};
  constexpr std::string_view kMapped = "::ffff:";  // IPv4, at an endpoint of both
  std::string_view text(host.data());
  if (text.starts_with(kMapped) && text.find('.') != std::string_view::npos) text.remove_prefix(kMapped.size());
  return std::string(text);
}

bool begins(std::string_view text, std::string_view with) { return text.substr(0, with.size()) == with; }

}  // namespace

// --- takers ---

Listener::Taker::Taker(std::shared_ptr<Listener> listener, std::string topic, bool is_whole)
    : listener_(std::move(listener)),
      topic_(std::move(topic)),
      is_whole_(is_whole),
      woken_(checked(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd")) {
  const std::lock_guard guard(listener_->lock_);
  for (const Taker* other : listener_->takers_)
    if (takes(other->topic_) || other->takes(topic_))
      throw std::invalid_argument("connections of the topic " + other->topic_ + " are taken already");
  listener_->takers_.push_back(this);
  Callers& callers = listener_->callers_;
  std::vector<Callers::iterator> waiting;
  for (auto each = callers.begin(); each != callers.end(); ++each)
    if (each->second.topic && takes(*each->second.topic)) waiting.push_back(each);
  std::sort(waiting.begin(), waiting.end(),
            [](const auto& one, const auto& other) { return one->second.since < other->second.since; });
  for (const auto each : waiting) listener_->offer(each);
}

Listener::Taker::~Taker() {
  const std::lock_guard guard(listener_->lock_);
  auto& takers = listener_->takers_;
  takers.erase(std::remove(takers.begin(), takers.end(), this), takers.end());
}

bool Listener::Taker::takes(std::string_view topic) const {
  return is_whole_ ? topic == topic_ : begins(topic, topic_);
}

std::optional<Listener::Arrival> Listener::Taker::take() {
  const std::lock_guard guard(listener_->lock_);
  // Within the lock: else it may stay readable with nothing to take, and its stream's thread would never sleep again.
  uint64_t ignored;
  // NOLINTNEXTLINE(clang-analyzer-unix.BlockInCriticalSection): it does not wait
  (void)!::read(woken_.get(), &ignored, sizeof ignored);
  has_arrival_ = false;
  return std::exchange(arrival_, std::nullopt);
}

// --- the endpoint ---

Listener::Listener(const std::string& host, uint16_t port, uint64_t max_frame)
    : max_frame_(max_frame),
      listening_(listen_at(host, port)),
      events_(checked(epoll_create1(EPOLL_CLOEXEC), "epoll")),
      woken_(checked(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd")) {
  for (const Descriptor* each : {&listening_, &woken_}) watch(events_.get(), EPOLL_CTL_ADD, each->get(), EPOLLIN);
  thread_ = std::thread([this] { run(); });
}

Listener::~Listener() {
  halt_ = true;
  const uint64_t one = 1;
  (void)!write(woken_.get(), &one, sizeof one);
  thread_.join();
}

std::vector<Listener::Heard> Listener::unclaimed() const {
  const std::lock_guard guard(lock_);
  std::vector<Heard> all;
  for (const auto& [socket, caller] : callers_)
    if (caller.topic) all.emplace_back(*caller.topic, caller.address);
  return all;
}

std::vector<Listener::Heard> Listener::taken() const {
  const std::lock_guard guard(lock_);
  std::vector<Heard> all;
  for (const Taker* each : takers_)
    if (each->latest_) all.push_back(*each->latest_);
  return all;
}

void Listener::run() {
  std::array<epoll_event, 64> ready{};
  bool waits = false;  // for a handshake
  while (!halt_) {
    const int timeout = waits ? static_cast<int>(kLookAround.count()) : -1;
    const int count = epoll_wait(events_.get(), ready.data(), static_cast<int>(ready.size()), timeout);
    bool is_full = false;
    std::unique_lock guard(lock_);
    for (int i = 0; i < count; ++i) {
      const epoll_event& event = ready[static_cast<size_t>(i)];
      if (event.data.fd == listening_.get()) {
        is_full = !accept_some();
      } else if (event.data.fd != woken_.get()) {
        serve(event.data.fd, event.events);
      }
    }
    expire();
    waits = std::any_of(callers_.begin(), callers_.end(), [](const auto& each) { return !each.second.is_open; });
    guard.unlock();
    if (is_full) std::this_thread::sleep_for(kAcceptPause);
  }
}

// False when the process has no descriptor left.
bool Listener::accept_some() {
  for (int accepted = 0; accepted < kAccepts; ++accepted) {
    sockaddr_storage from{};
    socklen_t size = sizeof from;
    auto* const any = reinterpret_cast<sockaddr*>(&from);
    Descriptor socket(accept4(listening_.get(), any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket.get() < 0) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      return errno == EAGAIN;
    }
    make_room();
    set_up_connection(socket.get());
    const int number = socket.get();
    callers_.try_emplace(number, Caller(std::move(socket), written(from, size), max_frame_));
    epoll_event event{.events = EPOLLIN, .data = {.fd = number}};
    if (epoll_ctl(events_.get(), EPOLL_CTL_ADD, number, &event) == 0) {
      serve(number, EPOLLIN);  // our greeting goes at once: a peer may wait for it
    } else {
      callers_.erase(number);
    }
  }
  return true;
}

// Whoever has not even made a handshake goes first, then one of the address that most come from: neither scans and
// probes nor one client's connections shall keep engines out.
void Listener::make_room() {
  if (callers_.size() < kMost) return;
  std::unordered_map<std::string_view, size_t> open_from;
  for (const auto& [socket, caller] : callers_)
    if (caller.is_open) ++open_from[caller.address];
  const auto of_its_address = [&](const Caller& caller) {
    return caller.is_open ? open_from.at(caller.address) : callers_.size() + 1;
  };
  callers_.erase(std::max_element(callers_.begin(), callers_.end(), [&](const auto& one, const auto& other) {
    const size_t first = of_its_address(one.second), second = of_its_address(other.second);
    return first != second ? first < second : one.second.since > other.second.since;
  }));
}

void Listener::serve(int socket, uint32_t events) {
  const auto found = callers_.find(socket);
  if (found == callers_.end()) return;  // taken meanwhile
  // One that nobody takes is only watched for its end.
  if (found->second.topic ? (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0 : !read(found->second)) {
    callers_.erase(found);
  } else {
    offer(found);
  }
}

// False when the connection is of no use any more.
bool Listener::read(Caller& caller) {
  std::array<char, kRead> buffer;
  // NOLINTNEXTLINE(clang-analyzer-unix.BlockInCriticalSection): it does not wait
  const ssize_t got = recv(caller.socket.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
  if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) return false;
  if (got > 0) caller.bytes.append(buffer.data(), static_cast<size_t>(got));
  for (size_t used = 1; used > 0 && !caller.topic;) {
    used = 0;
    // No further than to its topic: whoever takes the connection reads the message.
    if (const auto topic = caller.is_open ? Zmtp::topic_at(caller.bytes) : std::nullopt) {
      caller.topic = *topic;
      break;
    }
    Message message;
    const Zmtp::Step step = caller.zmtp.next(caller.bytes, used, message);
    if (step == Zmtp::Step::kBroken) return false;
    caller.is_open = caller.is_open || step == Zmtp::Step::kOpened;
    if (step == Zmtp::Step::kMessage) {  // behind a command; both will be read once more
      caller.topic.emplace(reinterpret_cast<const char*>(message.frames[0].data()), message.frames[0].size());
    } else {
      caller.bytes.erase(0, used);
    }
  }
  // A few bytes, for which a connection's buffer has room.
  std::string& out = caller.zmtp.out();
  if (!out.empty() && send(caller.socket.get(), out.data(), out.size(), MSG_DONTWAIT | MSG_NOSIGNAL) !=
                          static_cast<ssize_t>(out.size()))
    return false;
  out.clear();
  return caller.topic ? caller.topic->size() <= kMostTopic : caller.bytes.size() <= kMostUnread - kRead;
}

// To whoever takes its topic, if that is known and somebody does.
void Listener::offer(Callers::iterator found) {
  Caller& caller = found->second;
  if (!caller.topic) return;
  Taker* const taker = taker_of(*caller.topic);
  if (taker == nullptr) {
    watch(events_.get(), EPOLL_CTL_MOD, found->first, EPOLLRDHUP);  // watched since it was accepted: cannot fail
    return;
  }
  epoll_ctl(events_.get(), EPOLL_CTL_DEL, found->first, nullptr);
  taker->latest_.emplace(*caller.topic, std::move(caller.address));
  taker->arrival_ =
      Arrival{std::move(caller.socket), std::move(caller.zmtp), std::move(*caller.topic), std::move(caller.bytes)};
  taker->has_arrival_ = true;
  callers_.erase(found);
  const uint64_t one = 1;
  (void)!write(taker->woken_.get(), &one, sizeof one);
}

void Listener::expire() {
  const Clock::time_point since = Clock::now() - kHandshake;
  for (auto each = callers_.begin(); each != callers_.end();)
    each = !each->second.is_open && each->second.since < since ? callers_.erase(each) : std::next(each);
}

Listener::Taker* Listener::taker_of(std::string_view topic) const {
  for (Taker* each : takers_)
    if (each->takes(topic)) return each;
  return nullptr;
}

}  // namespace kvindex
