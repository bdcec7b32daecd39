#include "lookup.hpp"

#include <netdb.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>

namespace kvindex {

namespace {

std::vector<Address> addresses_of(const std::string& host, uint16_t port, int flags) {
  addrinfo hints{};
  hints.ai_flags = flags | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  std::vector<Address> addresses;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return addresses;
  for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
    Address& address = addresses.emplace_back();
    std::memcpy(&address.storage, each->ai_addr, each->ai_addrlen);
    address.size = each->ai_addrlen;
  }
  freeaddrinfo(found);
  return addresses;
}

}  // namespace

struct Lookup::Answer {
  Answer() : descriptor(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (descriptor < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  ~Answer() { close(descriptor); }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  const int descriptor;
  std::atomic<bool> done{false};
  std::vector<Address> addresses;
};

Lookup::Lookup(const std::string& host, uint16_t port) : answer_(std::make_shared<Answer>()) {
  std::thread([answer = answer_, host, port] {
    answer->addresses = addresses_of(host, port, 0);
    answer->done.store(true, std::memory_order_release);
    const uint64_t one = 1;
    (void)!write(answer->descriptor, &one, sizeof one);
  }).detach();
}

int Lookup::descriptor() const { return answer_->descriptor; }

bool Lookup::is_done() const { return answer_->done.load(std::memory_order_acquire); }

const std::vector<Address>& Lookup::addresses() const { return answer_->addresses; }

std::vector<Address> Lookup::written(const std::string& host, uint16_t port) {
  return addresses_of(host, port, AI_NUMERICHOST);
}

}  // namespace kvindex
