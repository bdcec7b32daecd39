// The core without Python: behaviour and races, for the sanitizers.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "event_payloads.hpp"
#include "index.hpp"
#include "scan.hpp"
#include "stream.hpp"

using namespace kvindex;

namespace {

std::vector<uint32_t> tokens_of(uint64_t chain, size_t blocks) {
  std::vector<uint32_t> tokens;
  for (size_t i = 0; i < blocks * kBlock; ++i) tokens.push_back(token(chain, i));
  return tokens;
}

uint32_t matched(const Index& index, uint64_t chain, size_t blocks) {
  const auto tokens = tokens_of(chain, blocks);
  uint32_t best = 0;
  for (const Match& each : index.score_tokens(tokens.data(), tokens.size(), {}, {1.0, 0.8, 0.5}, {}))
    best = std::max(best, each.blocks);
  return best;
}

// Integers of every width, also wider than they need be, with others between them: as many are taken, of the same
// values, as one by one, never past the end of a buffer that ends anywhere, and none that are no small integers.
void test_integers_in_bulk() {
  std::mt19937_64 random(5);
  uint64_t taken = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string bytes;
    const size_t count = random() % 300;
    const uint64_t odd_in = round % 3 == 0 ? 40 : UINT64_MAX;  // one of so many is no small integer
    for (size_t i = 0; i < count; ++i) {
      const uint64_t value = random();
      if (random() % odd_in == 0) {
        constexpr uint8_t kHeads[] = {0xcf, 0xd0, 0xd3, 0xff, 0xc0, 0xa3, 0x92, 0xcb};
        bytes.push_back(static_cast<char>(kHeads[random() % 8]));
      } else if (const auto width = random() % 4; width == 0) {
        bytes.push_back(static_cast<char>(value & 0x7f));
      } else {
        bytes.push_back(static_cast<char>(0xcb + width));
        for (int shift = (1 << (width - 1)) * 8 - 8; shift >= 0; shift -= 8)
          bytes.push_back(static_cast<char>(value >> shift & 0xff));
      }
    }
    bytes.resize(bytes.size() - std::min<size_t>(bytes.size(), random() % 4));
    const std::vector<uint8_t> exact(bytes.begin(), bytes.end());  // so that reading past the end is seen
    Cursor in(exact.data(), exact.size()), one_by_one(exact.data(), exact.size());
    std::vector<uint32_t> found{7};
    const auto most = static_cast<uint32_t>(random() % 400);
    const uint32_t many = in.small_integers(most, found);
    CHECK(many <= most && found.size() == many + 1 && found[0] == 7);
    for (uint32_t i = 0; i < many; ++i) {
      uint64_t value;
      bool negative;
      CHECK(one_by_one.integer(value, negative) && !negative && value == found[i + 1]);
    }
    CHECK(one_by_one.position() == in.position());
    taken += many;
  }
  CHECK(taken > 100'000);
}

void test_holes_heal() {
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20);
  auto stream = index->add_stream("pod", 0);
  Applied applied;
  apply(*stream, stored(1, 0, 10), applied);
  CHECK(matched(*index, 1, 10) == 10);
  apply(*stream, removed(1, 4), applied);
  CHECK(matched(*index, 1, 10) == 4);
  apply(*stream, stored(1, 4, 5), applied);
  CHECK(matched(*index, 1, 10) == 10);
  CHECK(stream->close() == 10);
  CHECK(index->blocks() == 0 && index->claims() == 0);
}

void test_orphans_in_any_order() {
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20);
  auto stream = index->add_stream("pod", 0);
  Applied applied;
  apply(*stream, stored(1, 20, 30), applied);
  apply(*stream, stored(1, 10, 20), applied);
  CHECK(matched(*index, 1, 30) == 0 && stream->orphans() == 20);
  apply(*stream, stored(1, 0, 10), applied);
  CHECK(matched(*index, 1, 30) == 30 && stream->orphans() == 0 && stream->unresolved() == 0);
}

void test_copies_are_counted() {
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20);
  auto stream = index->add_stream("pod", 0);
  Applied applied;
  apply(*stream, stored(1, 0, 2), applied);
  apply(*stream, stored(1, 1, 2), applied);
  apply(*stream, removed(1, 1), applied);
  CHECK(matched(*index, 1, 2) == 2);
  apply(*stream, removed(1, 1), applied);
  CHECK(matched(*index, 1, 2) == 1);
}

uint64_t key_of(uint64_t chain, size_t block) {
  const auto tokens = tokens_of(chain, block + 1);
  std::vector<uint64_t> keys(block + 1);
  block_keys(tokens.data(), 0, keys.size(), kBlock, 0, 1337, {}, keys.data());
  return keys[block];
}

Remembered remembered(const Index& index, uint64_t key) { return index.removals("pod", &key, 1).at(0); }

void apply_at(Stream& stream, const std::string& payload, uint64_t sequence) {
  Applied applied;
  stream.apply(reinterpret_cast<const uint8_t*>(payload.data()), payload.size(), 0, applied, sequence);
}

void test_removals_are_remembered() {
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20, 0, 8);
  auto stream = index->add_stream("pod", 0);
  CHECK(remembered(*index, key_of(1, 0)).memory.reach == Removals::Reach::kNothing);
  apply_at(*stream, stored(1, 0, 20), 5);
  for (uint64_t block = 20; block > 10; --block) apply_at(*stream, removed(1, block - 1), 25 - block + 1);
  // One run remains: as many as an eighth of the keys.
  const Remembered last = remembered(*index, key_of(1, 10));
  CHECK(last.memory.reach == Removals::Reach::kFull && last.memory.from.sequence == 14);
  CHECK(last.found[0].size() == 1 && last.found[0][0].at.sequence == 15 && last.found[0][0].left == Left::kRemoved);
  CHECK(remembered(*index, key_of(1, 19)).found[0].empty());
  CHECK(remembered(*index, key_of(1, 3)).found[0].empty());
  // More leave at once than the ring takes: it remembers as many, and says that these are not all.
  stream->clear(Left::kDoubted);
  uint64_t told = 0;
  for (size_t block = 0; block < 10; ++block) {
    const Remembered of = remembered(*index, key_of(1, block));
    for (const Removals::Found& each : of.found[0]) told += each.left == Left::kDoubted;
  }
  CHECK(told == 8);
  CHECK(remembered(*index, key_of(1, 0)).memory.from.sequence == 15);
  stream->clear(Left::kRestarted);
  apply_at(*stream, stored(2, 0, 1), 0);
  CHECK(remembered(*index, key_of(2, 0)).memory.reach == Removals::Reach::kStart);
  std::string state;
  stream->snapshot(state);
  auto other = index->add_stream("pod", 1);
  CHECK(other->restore(state));
  apply_at(*other, removed(2, 0), 1);
  const uint64_t key = key_of(2, 0);
  const auto both = index->removals("pod", &key, 1);
  CHECK(both.size() == 2 && both[0].found[0].empty() && both[1].found[0].size() == 1);
  CHECK(both[1].memory.reach == Removals::Reach::kRestored && both[1].memory.from.sequence == 1);
  stream->close();
  CHECK(index->removals("pod", &key, 1).size() == 1);
}

void test_removals_are_read_beside_writers() {
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20, 0, 64);
  auto stream = index->add_stream("pod", 0);
  const uint64_t keys[] = {key_of(1, 0), key_of(1, 1)};
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> read{0};
  std::thread reader([&] {
    while (!stop) {
      for (const Remembered& each : index->removals("pod", keys, 2))
        for (const auto& found : each.found) {
          CHECK(found.size() <= 1);
          for (const Removals::Found& one : found) CHECK(one.left != Left::kRemoved || one.at.sequence % 3 != 0);
          ++read;
        }
    }
  });
  uint64_t sequence = 0;
  while (sequence < 6000 || read < 100) {
    apply_at(*stream, stored(1, 0, 2), sequence++);
    apply_at(*stream, removed(1, 1), sequence++);
    apply_at(*stream, removed(1, 0), sequence++);
    if (sequence % 600 == 0) stream->clear(sequence % 1200 == 0 ? Left::kRestarted : Left::kDoubted);
  }
  stop = true;
  reader.join();
}

void test_hostile_bytes() {
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20);
  auto stream = index->add_stream("pod", 0);
  Applied applied;
  const std::string good = stored(1, 0, 10);
  for (size_t cut = 0; cut < good.size(); ++cut) apply(*stream, good.substr(0, cut), applied);
  std::mt19937_64 random(7);
  for (int i = 0; i < 20000; ++i) {
    std::string bad = good;
    for (int flips = 0; flips < 3; ++flips) bad[random() % bad.size()] = static_cast<char>(random());
    apply(*stream, bad, applied);
    std::string out;
    (void)scan_packed(bad, 4, 1, 4, out);
  }
  stream->clear();
  apply(*stream, good, applied);
  CHECK(matched(*index, 1, 10) >= 1 || index->block_size() != kBlock);
}

// Writers of several pods, fences and readers at once: a pod nobody touches keeps its whole match.
void test_concurrency() {
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20);
  auto calm = index->add_stream("calm", 0);
  Applied once;
  for (uint64_t chain = 0; chain < 8; ++chain) apply(*calm, stored(chain, 0, 64), once);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int writer = 0; writer < 3; ++writer)
    threads.emplace_back([&, writer] {
      std::mt19937_64 random(writer);
      auto stream = index->add_stream("pod-" + std::to_string(writer), 0);
      Applied applied;
      while (!stop) {
        const uint64_t chain = random() % 8;
        switch (random() % 8) {
          case 0: stream->clear(); break;
          case 1:
            stream->close();
            stream = index->add_stream("pod-" + std::to_string(writer), 0);
            break;
          case 2:
          case 3: apply(*stream, removed(chain, random() % 64), applied); break;
          default: apply(*stream, stored(chain, 0, 64), applied);
        }
      }
    });
  for (int reader = 0; reader < 2; ++reader)
    threads.emplace_back([&, reader] {
      for (uint64_t turn = 0; turn < 3000; ++turn) {
        const auto tokens = tokens_of((turn + reader) % 8, 64);
        const auto matches = index->score_tokens(tokens.data(), tokens.size(), {"calm"}, {1.0}, {});
        if (matches.size() != 1 || matches[0].blocks != 64) std::abort();
        (void)index->holders_of_hashes({turn % 8 << 32}, {});
      }
    });
  for (size_t i = 3; i < threads.size(); ++i) threads[i].join();
  stop = true;
  for (size_t i = 0; i < 3; ++i) threads[i].join();
  CHECK(index->claims() == calm->claims());
  CHECK(index->blocks() == 8 * 64);
}

}  // namespace

int main() {
  test_integers_in_bulk();
  test_holes_heal();
  test_orphans_in_any_order();
  test_copies_are_counted();
  test_removals_are_remembered();
  test_removals_are_read_beside_writers();
  test_hostile_bytes();
  test_concurrency();
  std::printf("%d passed, 0 failed\n", checks);
}
