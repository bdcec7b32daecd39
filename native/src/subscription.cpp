#include "subscription.hpp"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <mutex>
#include <utility>

#include "tcp.hpp"

namespace kvindex {

namespace {

using std::chrono::milliseconds;

constexpr milliseconds kFirstPause{50}, kLongestPause{2000};
// What broke the protocol once will do so again: it is not worth more.
constexpr milliseconds kEndedPause{1000};
// For TCP's and ZMTP's handshakes together; less where another address is still to be tried.
constexpr milliseconds kHandshake{30'000}, kShortHandshake{2'000};

constexpr size_t kBuffer = size_t{64} << 10;
constexpr size_t kMinRoom = kBuffer / 4;
// So many reads in a row without a message for us, and the thread looks around: a peer may send other things for ever.
constexpr int kReads = 16;

// Buffers between two uses. Few threads read at the same moment, so a few of them serve any number of streams, and
// stay in the cache.
class Buffers {
 public:
  Buffer take() {
    {
      const std::lock_guard guard(lock_);
      if (!idle_.empty()) {
        Buffer buffer = std::move(idle_.back());
        idle_.pop_back();
        return buffer;
      }
    }
    return Buffer(kBuffer);
  }

  void give(Buffer&& buffer) {
    const std::lock_guard guard(lock_);
    if (idle_.size() < kIdle) idle_.push_back(std::move(buffer));
  }

 private:
  static constexpr size_t kIdle = 16;

  std::mutex lock_;
  std::vector<Buffer> idle_;
};

Buffers& buffers() {
  static Buffers* const made = new Buffers;  // for as long as the process lives: a thread may read until its end
  return *made;
}

}  // namespace

Subscription::Subscription(const std::string& host, uint16_t port, Settings settings)
    : settings_(std::move(settings)),
      host_(host),
      port_(port),
      addresses_(Lookup::written(host, port)),
      is_name_(addresses_.empty()),
      pause_(kFirstPause) {
  watch_clock();
  connect();
}

Subscription::Subscription(std::shared_ptr<Listener> listener, bool is_whole, Settings settings)
    : settings_(std::move(settings)), pause_(kFirstPause) {
  taker_.emplace(std::move(listener), settings_.topic, is_whole);
  watch_clock();
  set_alarm(Clock::time_point::max());
  epoll_event event{.events = EPOLLIN, .data = {.fd = taker_->descriptor()}};
  checked(epoll_ctl(events_.get(), EPOLL_CTL_ADD, taker_->descriptor(), &event), "epoll");
}

void Subscription::watch_clock() {
  events_ = Descriptor(checked(epoll_create1(EPOLL_CLOEXEC), "epoll"));
  timer_ = Descriptor(checked(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timer"));
  epoll_event event{.events = EPOLLIN, .data = {.fd = timer_.get()}};
  checked(epoll_ctl(events_.get(), EPOLL_CTL_ADD, timer_.get(), &event), "epoll");
}

Subscription::~Subscription() { close(); }

void Subscription::close() {
  close_socket();
  taker_.reset();
  timer_.reset();
  events_.reset();
}

bool Subscription::receive(Message& message) {
  is_unread_ = is_unread_ && has_news();
  if (events_.get() < 0) return false;
  take_up();
  if (phase_ == Phase::kLookingUp && lookup_->is_done()) finish_looking_up();
  if (phase_ == Phase::kConnecting) finish_connecting();
  if (taker_ && phase_ == Phase::kWaiting) take_arrival();
  bool is_replaced = false;
  for (int reads = 0; news_.empty() && phase_ == Phase::kConnected;) {
    size_t used = 0;
    const Zmtp::Step step = zmtp_->next({buffer_.data.get() + begin_, end_ - begin_}, used, message);
    begin_ += used;
    if (!zmtp_->out().empty()) flush();
    if (step == Zmtp::Step::kMessage) {
      is_unread_ = true;
      return true;
    } else if (step == Zmtp::Step::kBroken) {
      lose(true);
    } else if (step == Zmtp::Step::kOpened) {
      opened();
    } else if (++reads > kReads) {
      is_replaced = false;
      break;
    } else {
      // Asked first: what came before the other connection is still read.
      is_replaced = taker_ && taker_->has_arrival();
      is_read_out_ = is_read_out_ && !is_replaced;
      if (!read()) break;
    }
  }
  if (is_replaced && phase_ == Phase::kConnected) {
    lose(false);
    take_arrival();
  }
  is_read_out_ = false;  // by the next call there may be more
  set_aside();
  if (Clock::now() >= alarm_) look_at_clock();
  return false;
}

void Subscription::opened() {
  open_ = is_unread_ = true;
  pause_ = kFirstPause;
  if (is_name_) next_address_ = addresses_.size();
  const bool asks = settings_.heartbeat.count() > 0 && zmtp_->can_ping();
  set_alarm(asks ? Clock::now() + settings_.heartbeat : Clock::time_point::max());
  news_.push_back(Connection::kMade);
}

void Subscription::take_arrival() {
  std::optional<Listener::Arrival> arrival = taker_->take();
  if (!arrival) return;
  epoll_event event{.events = EPOLLIN, .data = {.fd = arrival->socket.get()}};
  if (epoll_ctl(events_.get(), EPOLL_CTL_ADD, arrival->socket.get(), &event) != 0)
    return;  // the engine will dial in again
  socket_ = arrival->socket.release();
  watched_ = EPOLLIN;
  phase_ = Phase::kConnected;
  zmtp_.emplace(std::move(arrival->zmtp));
  zmtp_->insist(std::move(arrival->topic));
  rest_ = std::move(arrival->unread);
  take_up();
  opened();
}

std::vector<Connection> Subscription::changes() { return std::exchange(news_, {}); }

// False when nothing came: there is no more for now, or the connection is lost.
bool Subscription::read() {
  if (is_read_out_) return false;
  make_room();
  const size_t room = buffer_.size - end_;
  const ssize_t got = recv(socket_, buffer_.data.get() + end_, room, MSG_DONTWAIT);
  if (got > 0) {
    end_ += static_cast<size_t>(got);
    is_read_out_ = static_cast<size_t>(got) < room;
    asked_.reset();
    return true;
  }
  if (got == 0 || (errno != EAGAIN && errno != EINTR)) lose(false);
  return false;
}

void Subscription::make_room() {
  if (buffer_.size == 0) buffer_ = buffers().take();
  if (begin_ > 0 && buffer_.size - end_ < kMinRoom) {
    std::memmove(buffer_.data.get(), buffer_.data.get() + begin_, end_ - begin_);
    end_ -= std::exchange(begin_, 0);
  }
  // Room for a large message is made as it comes, not as it is announced.
  if (end_ == buffer_.size) {
    Buffer larger(std::min(std::max(zmtp_->needed(), end_ + 1), end_ * 2));
    std::memcpy(larger.data.get(), buffer_.data.get(), end_);
    buffer_ = std::move(larger);
  }
}

void Subscription::take_up() {
  if (rest_.empty()) return;
  buffer_ = buffers().take();
  std::memcpy(buffer_.data.get(), rest_.data(), rest_.size());
  begin_ = 0;
  end_ = std::exchange(rest_, {}).size();
}

void Subscription::set_aside() {
  const size_t size = end_ - begin_;
  if (buffer_.size == 0 || size > kBuffer) return;
  rest_.assign(buffer_.data.get() + begin_, size);
  if (buffer_.size == kBuffer) buffers().give(std::move(buffer_));
  buffer_ = Buffer();
  begin_ = end_ = 0;
}

// A peer that takes nothing any more may still have sent something: it is lost when all of that has been read.
void Subscription::flush() {
  std::string& out = zmtp_->out();
  const ssize_t sent = send(socket_, out.data(), out.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent > 0) out.erase(0, static_cast<size_t>(sent));
  if (sent < 0 && errno != EAGAIN && errno != EINTR) out.clear();
  watch(out.empty() ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

void Subscription::connect() {
  if (next_address_ == addresses_.size()) {
    if (is_name_) return look_up();
    next_address_ = 0;
  }
  const Address& address = addresses_[next_address_++];
  socket_ = socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (socket_ < 0) {
    lose(false);
    return;
  }
  set_up_connection(socket_);
  epoll_event event{.events = EPOLLOUT, .data = {.fd = socket_}};
  const bool is_begun = ::connect(socket_, reinterpret_cast<const sockaddr*>(&address.storage), address.size) == 0 ||
                        errno == EINPROGRESS;
  if (!is_begun || epoll_ctl(events_.get(), EPOLL_CTL_ADD, socket_, &event) != 0) {
    lose(false);
    return;
  }
  watched_ = EPOLLOUT;
  phase_ = Phase::kConnecting;
  set_alarm(Clock::now() + (next_address_ < addresses_.size() ? kShortHandshake : kHandshake));
}

// For as long as it takes: nobody is helped by asking once more meanwhile.
void Subscription::look_up() {
  try {
    lookup_.emplace(host_, port_);
  } catch (const std::exception&) {
    return lose(false);
  }
  phase_ = Phase::kLookingUp;
  set_alarm(Clock::time_point::max());
  epoll_event event{.events = EPOLLIN, .data = {.fd = lookup_->descriptor()}};
  if (epoll_ctl(events_.get(), EPOLL_CTL_ADD, lookup_->descriptor(), &event) != 0) lose(false);
}

void Subscription::finish_looking_up() {
  addresses_ = lookup_->addresses();
  next_address_ = 0;
  if (addresses_.empty()) return lose(false);
  give_up_lookup();
  connect();
}

void Subscription::give_up_lookup() {
  if (!lookup_) return;
  epoll_ctl(events_.get(), EPOLL_CTL_DEL, lookup_->descriptor(), nullptr);
  lookup_.reset();
}

void Subscription::finish_connecting() {
  pollfd state{socket_, POLLOUT, 0};
  if (poll(&state, 1, 0) == 0) return;
  int error = 0;
  socklen_t size = sizeof error;
  if (getsockopt(socket_, SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0) {
    lose(false);
    return;
  }
  phase_ = Phase::kConnected;
  zmtp_.emplace(settings_.topic, settings_.max_frame);
  flush();
}

void Subscription::lose(bool ended) {
  close_socket();
  if (std::exchange(open_, false)) news_.push_back(Connection::kLost);
  if (ended) {
    news_.push_back(Connection::kEnded);
    pause_ = std::max(pause_, kEndedPause);
  }
  if (taker_) return set_alarm(Clock::time_point::max());  // it is for the engine to dial in again
  // A name's other addresses are not made to wait for it.
  if (!ended && is_name_ && next_address_ < addresses_.size()) return set_alarm(Clock::now());
  set_alarm(Clock::now() + pause_);
  pause_ = std::min(pause_ * 2, kLongestPause);
}

void Subscription::close_socket() {
  give_up_lookup();
  if (socket_ >= 0) ::close(std::exchange(socket_, -1));
  phase_ = Phase::kWaiting;
  zmtp_.reset();
  asked_.reset();
  is_read_out_ = is_unread_ = false;
  begin_ = end_ = 0;
  rest_ = {};
  set_aside();
}

void Subscription::look_at_clock() {
  const Clock::time_point now = Clock::now();
  if (phase_ == Phase::kWaiting) {
    connect();
  } else if (!open_ || (asked_ && now >= *asked_ + settings_.heartbeat_timeout)) {
    lose(false);
  } else {
    if (!asked_) asked_ = now;
    zmtp_->ping();
    flush();
    set_alarm(std::min(now + settings_.heartbeat, *asked_ + settings_.heartbeat_timeout));
  }
}

void Subscription::set_alarm(Clock::time_point at) {
  alarm_ = at;
  itimerspec when{};
  if (at != Clock::time_point::max()) {
    const auto since = at.time_since_epoch();
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(since);
    when.it_value.tv_sec = seconds.count();
    when.it_value.tv_nsec = std::chrono::duration_cast<std::chrono::nanoseconds>(since - seconds).count();
  }
  timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
}

void Subscription::watch(uint32_t for_what) {
  if (watched_ == for_what) return;
  watched_ = for_what;
  epoll_event event{.events = for_what, .data = {.fd = socket_}};
  epoll_ctl(events_.get(), EPOLL_CTL_MOD, socket_, &event);
}

}  // namespace kvindex
