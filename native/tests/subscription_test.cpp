// A subscription to a host by its name: looked up before each connection, all its addresses tried, nobody kept waiting.
//
// This program's own `getaddrinfo` stands before the system's.
#include "subscription.hpp"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"

using namespace kvindex;

namespace {

using Clock = std::chrono::steady_clock;

std::mutex names_lock;
std::map<std::string, std::vector<std::string>> names;  // -> addresses
std::map<std::string, int> lookups;                     // how often each name was asked for
std::shared_future<void> held_up;                       // every lookup waits for it, when there is one

void tell(const std::string& name, std::vector<std::string> addresses) {
  const std::lock_guard lock(names_lock);
  names[name] = std::move(addresses);
}

int lookups_of(const std::string& name) {
  const std::lock_guard lock(names_lock);
  return lookups[name];
}

}  // namespace

extern "C" int getaddrinfo(const char* host, const char* service, const addrinfo* hints, addrinfo** found) {
  std::vector<std::string> addresses;
  in_addr written;
  if (inet_pton(AF_INET, host, &written) == 1) {
    addresses = {host};
  } else if ((hints->ai_flags & AI_NUMERICHOST) == 0) {
    if (held_up.valid()) held_up.wait();
    const std::lock_guard lock(names_lock);
    ++lookups[host];
    addresses = names[host];
  }
  *found = nullptr;
  for (auto each = addresses.rbegin(); each != addresses.rend(); ++each) {
    auto* address = new sockaddr_in{};
    address->sin_family = AF_INET;
    address->sin_port = htons(static_cast<uint16_t>(std::stoi(service)));
    inet_pton(AF_INET, each->c_str(), &address->sin_addr);
    auto* made = new addrinfo{};
    made->ai_family = AF_INET;
    made->ai_socktype = SOCK_STREAM;
    made->ai_addrlen = sizeof *address;
    made->ai_addr = reinterpret_cast<sockaddr*>(address);
    made->ai_next = *found;
    *found = made;
  }
  return *found == nullptr ? EAI_NONAME : 0;
}

extern "C" void freeaddrinfo(addrinfo* found) {
  while (found != nullptr) {
    addrinfo* const next = found->ai_next;
    delete reinterpret_cast<sockaddr_in*>(found->ai_addr);
    delete found;
    found = next;
  }
}

namespace {

// Accepts at an address, and says what a publisher says.
class Publisher {
 public:
  explicit Publisher(const char* address, uint16_t port = 0) : listener_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_port = htons(port);
    inet_pton(AF_INET, address, &at.sin_addr);
    const int on = 1;
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0);
    CHECK(listen(listener_, 8) == 0);
    socklen_t size = sizeof at;
    getsockname(listener_, reinterpret_cast<sockaddr*>(&at), &size);
    port_ = ntohs(at.sin_port);
  }
  ~Publisher() {
    leave();
    close(listener_);
  }
  Publisher(const Publisher&) = delete;
  Publisher& operator=(const Publisher&) = delete;

  uint16_t port() const { return port_; }
  void leave() {
    if (peer_ >= 0) close(std::exchange(peer_, -1));
  }
  void look() {
    pollfd waiting{listener_, POLLIN, 0};
    if (poll(&waiting, 1, 0) != 1) return;
    leave();
    peer_ = accept(listener_, nullptr, nullptr);
    std::string greeting = std::string("\xff\0\0\0\0\0\0\0\1\x7f\3\1NULL", 16);
    greeting.resize(64);
    greeting += std::string("\4\x1a\5READY\13Socket-Type\0\0\0\4XPUB", 28);
    CHECK(send(peer_, greeting.data(), greeting.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(greeting.size()));
  }

 private:
  const int listener_;
  int peer_ = -1;
  uint16_t port_ = 0;
};

Subscription::Settings settings() {
  return {"", 1 << 20, std::chrono::milliseconds(10'000), std::chrono::milliseconds(10'000)};
}

// Drives both until it has come about; false when it has not in time.
bool eventually_within(std::chrono::milliseconds most, Subscription& subscription, Publisher* publisher,
                       const std::function<bool()>& condition) {
  for (const auto ends = Clock::now() + most; Clock::now() < ends;) {
    if (publisher != nullptr) publisher->look();
    Message message;
    subscription.receive(message);
    if (condition()) return true;
    pollfd waiting{subscription.descriptor(), POLLIN, 0};
    poll(&waiting, 1, 5);
  }
  return false;
}

bool eventually(Subscription& subscription, Publisher* publisher, const std::function<bool()>& condition) {
  return eventually_within(std::chrono::seconds(10), subscription, publisher, condition);
}

bool tells(Subscription& subscription, Publisher* publisher, Connection expected) {
  std::vector<Connection> told;
  const bool came = eventually(subscription, publisher, [&] {
    for (const Connection each : subscription.changes()) told.push_back(each);
    return !told.empty();
  });
  return came && told == std::vector{expected};
}

void test_all_addresses_are_tried() {
  Publisher publisher("127.0.0.1");
  tell("many", {"127.0.0.2", "127.0.0.3", "127.0.0.1"});
  Subscription subscription("many", publisher.port(), settings());
  CHECK(tells(subscription, &publisher, Connection::kMade));
  CHECK(lookups_of("many") == 1);
}

void test_a_name_that_moves() {
  tell("moves", {"127.0.0.1"});
  Publisher here("127.0.0.1");
  Publisher there("127.0.0.2", here.port());
  Subscription subscription("moves", here.port(), settings());
  CHECK(tells(subscription, &here, Connection::kMade));
  tell("moves", {"127.0.0.2"});
  here.leave();
  CHECK(tells(subscription, nullptr, Connection::kLost));
  CHECK(tells(subscription, &there, Connection::kMade));
}

void test_a_name_that_is_not_known_yet() {
  Publisher publisher("127.0.0.1");
  Subscription subscription("late", publisher.port(), settings());
  CHECK(eventually(subscription, &publisher, [] { return lookups_of("late") >= 2; }));
  CHECK(!subscription.has_news());
  tell("late", {"127.0.0.1"});
  CHECK(tells(subscription, &publisher, Connection::kMade));
}

void test_a_slow_lookup_holds_nobody_up() {
  std::promise<void> answer;
  held_up = answer.get_future().share();
  tell("slow", {"127.0.0.1"});
  Publisher publisher("127.0.0.1");
  {
    Subscription given_up("slow", publisher.port(), settings());
    Message message;
    CHECK(!given_up.receive(message));
    pollfd waiting{given_up.descriptor(), POLLIN, 0};
    CHECK(poll(&waiting, 1, 0) == 0);  // there is nothing to do until the answer comes
  }
  Subscription subscription("slow", publisher.port(), settings());
  Message message;
  CHECK(!subscription.receive(message));
  CHECK(lookups_of("slow") == 0);
  answer.set_value();
  CHECK(tells(subscription, &publisher, Connection::kMade));
  CHECK(lookups_of("slow") == 1);  // they have asked together
  pollfd waiting{subscription.descriptor(), POLLIN, 0};
  CHECK(poll(&waiting, 1, 50) == 0);  // nor is there any of a lookup that is done
}

// However many names there are, and however often they are given up, few of them are asked for at once.
void test_many_slow_lookups() {
  constexpr size_t kNames = Lookup::kMost + 20;
  std::promise<void> answer;
  held_up = answer.get_future().share();
  const auto name = [](size_t number) { return "slow-" + std::to_string(number); };
  Publisher publisher("127.0.0.1");
  for (size_t i = 0; i < kNames; ++i) {
    tell(name(i), {"127.0.0.1"});
    for (int times = 0; times < 3; ++times) const Subscription given_up(name(i), publisher.port(), settings());
  }
  Subscription last(name(kNames - 1), publisher.port(), settings());
  CHECK(!eventually_within(std::chrono::milliseconds(200), last, nullptr, [&] { return last.has_news(); }));
  answer.set_value();
  CHECK(tells(last, &publisher, Connection::kMade));
  int asked = 0;
  for (size_t i = 0; i < kNames; ++i) asked += lookups_of(name(i));
  CHECK(asked <= static_cast<int>(Lookup::kMost) + 1);
}

// An address where nobody answers does not keep the next one waiting for as long as a slow engine is waited for.
void test_a_silent_address() {
  Publisher publisher("127.0.0.1");
  const Publisher silent("127.0.0.2", publisher.port());
  tell("silent", {"127.0.0.2", "127.0.0.1"});
  Subscription subscription("silent", publisher.port(), settings());
  CHECK(tells(subscription, &publisher, Connection::kMade));
}

}  // namespace

int main() {
  test_all_addresses_are_tried();
  test_a_name_that_moves();
  test_a_name_that_is_not_known_yet();
  test_a_slow_lookup_holds_nobody_up();
  test_many_slow_lookups();
  test_a_silent_address();
  std::printf("%d passed, 0 failed\n", checks);
}
