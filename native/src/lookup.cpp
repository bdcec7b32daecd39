#include "lookup.hpp"

#include <netdb.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

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

  const int descriptor;  // never read, so that it stays readable for all who share the answer
  std::atomic<bool> done{false};
  std::vector<Address> addresses;
};

// What is being asked for. It lives as long as the process: a resolver may answer until its end.
struct Lookup::Asked {
  std::mutex lock;
  std::map<std::pair<std::string, uint16_t>, std::shared_ptr<Answer>> answers;

  static Asked& all() {
    static auto* const made = new Asked;
    return *made;
  }
};

void Lookup::find(const std::string& host, uint16_t port, Answer& answer) {
  try {
    answer.addresses = addresses_of(host, port, 0);
  } catch (const std::bad_alloc&) {
    answer.addresses.clear();
  }
  {
    const std::lock_guard guard(Asked::all().lock);
    Asked::all().answers.erase({host, port});
  }
  answer.done.store(true, std::memory_order_release);
  const uint64_t one = 1;
  (void)!write(answer.descriptor, &one, sizeof one);
}

Lookup::Lookup(const std::string& host, uint16_t port) {
  const std::lock_guard guard(Asked::all().lock);
  auto& answers = Asked::all().answers;
  const auto asked = answers.find({host, port});
  if (asked != answers.end()) {
    answer_ = asked->second;
    return;
  }
  if (answers.size() == kMost) throw std::system_error(EAGAIN, std::generic_category(), "lookup");
  answer_ = std::make_shared<Answer>();
  const auto added = answers.emplace(std::pair(host, port), answer_).first;
  try {
    std::thread([answer = answer_, host, port] { find(host, port, *answer); }).detach();
  } catch (...) {
    answers.erase(added);
    throw;
  }
}

int Lookup::descriptor() const { return answer_->descriptor; }

bool Lookup::is_done() const { return answer_->done.load(std::memory_order_acquire); }

const std::vector<Address>& Lookup::addresses() const { return answer_->addresses; }

std::vector<Address> Lookup::written(const std::string& host, uint16_t port) {
  return addresses_of(host, port, AI_NUMERICHOST);
}

}  // namespace kvindex
