// Mutated payloads into the event decoder and a stream: nothing crashes, reads past the end or leaves the books wrong.
// Usage: fuzz_test CORPUS SECONDS. CORPUS is a file of JSON lines with "payload_b64". Same seeds, same order, every
// run.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "index.hpp"
#include "stream.hpp"

using namespace kvindex;

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

std::string decoded(std::string_view text) {
  static const std::string kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  uint32_t bits = 0, count = 0;
  for (const char c : text) {
    const size_t value = kAlphabet.find(c);
    if (value == std::string::npos) break;
    bits = bits << 6 | static_cast<uint32_t>(value);
    if (++count % 4 != 1) out.push_back(static_cast<char>(bits >> (count % 4 == 0 ? 0 : count % 4 == 3 ? 2 : 4)));
  }
  return out;
}

std::vector<std::string> read_corpus(const char* path) {
  std::ifstream file(path);
  std::vector<std::string> corpus;
  const std::string name = "\"payload_b64\": \"";
  for (std::string line; std::getline(file, line);) {
    const size_t at = line.find(name);
    if (at != std::string::npos) corpus.push_back(decoded(std::string_view(line).substr(at + name.size())));
  }
  return corpus;
}

// Heads of msgpack values that claim much or mean something else.
constexpr unsigned char kHeads[] = {0x00, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2,
                                    0xc4, 0xc6, 0xc7, 0xc9, 0xca, 0xcb, 0xcc, 0xcd, 0xce, 0xcf, 0xd0,
                                    0xd3, 0xd4, 0xd8, 0xd9, 0xdb, 0xdc, 0xdd, 0xde, 0xdf, 0xe0, 0xff};

std::string mutated(const std::vector<std::string>& corpus, std::mt19937_64& random) {
  std::string bytes = corpus[random() % corpus.size()];
  for (uint64_t left = random() % 5; left > 0 && !bytes.empty(); --left) {
    const size_t at = random() % bytes.size(), length = 1 + random() % std::min<size_t>(bytes.size() - at, 24);
    switch (random() % 7) {
      case 0: bytes[at] = static_cast<char>(random()); break;
      case 1: bytes[at] = static_cast<char>(kHeads[random() % sizeof kHeads]); break;
      case 2: bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8); break;
      case 3: bytes.erase(at, length); break;
      case 4: bytes.insert(at, bytes.substr(at, length)); break;
      case 5: bytes.resize(at); break;
      case 6: {
        const std::string& other = corpus[random() % corpus.size()];
        if (!other.empty()) bytes.insert(at, other.substr(random() % other.size(), length * 4));
      }
    }
  }
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 3, "usage: fuzz_test CORPUS SECONDS");
  const auto corpus = read_corpus(argv[1]);
  require(corpus.size() > 10, "the corpus is empty");
  const auto ends = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[2]));
  std::mt19937_64 random(1);
  uint64_t inputs = 0, events = 0;
  while (std::chrono::steady_clock::now() < ends) {
    auto index = std::make_shared<Index>(random() % 2 ? 0 : 4, 1337, random() % 4 ? 0 : 50, 1 << 20);
    auto stream = index->add_stream("pod", 0);
    for (int i = 0; i < 200; ++i, ++inputs) {
      // Exactly as large as the payload, so that a read behind it is seen.
      const std::string payload = mutated(corpus, random);
      const std::vector<uint8_t> exact(payload.begin(), payload.end());
      Applied applied;
      stream->apply(exact.data(), exact.size(), 0, applied);
      require(applied.messages + applied.reasons[static_cast<size_t>(Reason::kBadBatch)] == 1,
              "a message is uncounted");
      require(index->claims() == stream->claims(), "claims of the index and of its stream differ");
      events += applied.events;
    }
    stream->close();
    require(index->claims() == 0 && index->blocks() == 0, "something stayed after the stream had gone");
  }
  require(events > 100, "hardly anything was understood");
  std::printf("%llu inputs, %llu events\n", static_cast<unsigned long long>(inputs),
              static_cast<unsigned long long>(events));
}
