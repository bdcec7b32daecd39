// The addresses of a host, asked for in a thread of its own: a resolver may take many seconds, and nobody waits for it.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvindex {

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
};

class Lookup {
 public:
  // Shares the answer with whoever asks for the same at this moment. std::system_error when the process has no
  // descriptor or thread left, or kMost others are still being asked for: a resolver that does not answer is not asked
  // without end.
  Lookup(const std::string& host, uint16_t port);

  // Readable when it is done; closed by whoever is last to need it.
  int descriptor() const;
  bool is_done() const;
  // When it is done: in the order to be tried, none when the host is not known.
  const std::vector<Address>& addresses() const;

  // Without asking anyone: what is written as an address, else none.
  static std::vector<Address> written(const std::string& host, uint16_t port);

  static constexpr size_t kMost = 64;

 private:
  struct Answer;
  struct Asked;

  static void find(const std::string& host, uint16_t port, Answer& answer);

  std::shared_ptr<Answer> answer_;
};

}  // namespace kvindex
