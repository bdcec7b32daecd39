// What a stream tells an index that is kept elsewhere, and what is answered from there: against models, and at once.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "changes.hpp"
#include "check.hpp"
#include "event_payloads.hpp"
#include "index.hpp"
#include "store_view.hpp"
#include "stream.hpp"

using namespace kvindex;

namespace {

using Cell = std::pair<uint64_t, uint8_t>;  // key, group
using Table = std::map<Cell, uint8_t>;      // tiers held

// Applies rows as a store would; false when one is not of its partition, out of order, or says nothing.
bool take_in(const Changes::Taken& taken, Table& table) {
  if (taken.dropped) table.clear();
  const auto partitions = static_cast<uint32_t>(taken.rows.size());
  for (uint32_t partition = 0; partition < partitions; ++partition) {
    const std::string& rows = taken.rows[partition];
    if (rows.size() % Changes::kRow != 0) return false;
    Cell before{};
    for (size_t at = 0; at < rows.size(); at += Changes::kRow) {
      Cell cell;
      std::memcpy(&cell.first, rows.data() + at, sizeof cell.first);
      cell.second = static_cast<uint8_t>(rows[at + 8]);
      const auto held = static_cast<uint8_t>(rows[at + 9]), gone = static_cast<uint8_t>(rows[at + 10]);
      if (partition_of(cell.first, partitions) != partition || (held & gone) != 0 || (held | gone) == 0) return false;
      if (at > 0 && cell <= before) return false;
      before = cell;
      uint8_t& tiers = table[cell];
      tiers = static_cast<uint8_t>((tiers | held) & ~gone);
      if (tiers == 0) table.erase(cell);
    }
  }
  return true;
}

// Of several changes of one cell the last counts, in whatever partition it lies; a drop forgets what came before it.
void test_changes_add_up() {
  std::mt19937_64 random(3);
  Changes changes;
  Table model, table;
  for (int round = 0; round < 400; ++round) {
    for (uint64_t i = random() % 60; i > 0; --i) {
      const Cell cell{random() % 20 * 0x9E3779B97F4A7C15ULL, static_cast<uint8_t>(random() % 2)};
      const auto tier = static_cast<uint8_t>(random() % 3);
      if (random() % 40 == 0) {
        changes.dropped();
        model.clear();
      } else if (random() % 2 == 0) {
        changes.held(cell.first, cell.second, tier);
        model[cell] |= static_cast<uint8_t>(1U << tier);
      } else {
        changes.released(cell.first, cell.second, tier);
        uint8_t& tiers = model[cell];
        tiers = static_cast<uint8_t>(tiers & ~(1U << tier));
        if (tiers == 0) model.erase(cell);
      }
    }
    Changes::Taken taken;
    auto entries = changes.take(taken);
    Changes::sort(entries, 1 + round % 5, taken);
    CHECK(!taken.lost && take_in(taken, table));
    CHECK(table == model);
  }
}

void test_too_many_changes_are_told_once() {
  Changes changes;
  changes.limit(3);
  for (uint64_t key = 0; key < 5; ++key) changes.held(key, 0, 0);
  Changes::Taken taken;
  CHECK(changes.take(taken).empty() && taken.lost && !taken.dropped);
  changes.held(9, 0, 0);
  CHECK(changes.take(taken).size() == 1 && !taken.lost);
  for (uint64_t key = 0; key < 5; ++key) changes.held(key, 0, 0);
  changes.dropped();  // what was lost before it does not matter any more
  changes.held(7, 0, 0);
  CHECK(changes.take(taken).size() == 1 && taken.dropped && !taken.lost);
}

// A stream followed from some point on, while it goes on: the table has what the index holds, and so has its digest.
void test_a_followed_stream_and_its_digest() {
  std::mt19937_64 random(4);
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20);
  auto stream = index->add_stream("pod", 0);
  Applied applied;
  Table table;
  std::string groups;
  const uint64_t empty = stream->digest();
  for (int step = 0; step < 3000; ++step) {
    if (step == 500) stream->follow_changes(1 << 20);
    const uint64_t chain = random() % 6;
    if (random() % 200 == 0) {
      stream->clear();
      CHECK(stream->digest() == empty);
    } else if (random() % 2 == 0) {
      const size_t begin = random() % 10;
      apply(*stream, stored(chain, begin, begin + 1 + random() % 10), applied);
    } else {
      apply(*stream, removed(chain, random() % 20), applied);
    }
    if (step < 500 || random() % 20 != 0) continue;
    CHECK(take_in(stream->take_changes(3, groups), table));
    CHECK(table.size() == index->blocks());
    std::string state;
    stream->snapshot(state);
    auto other = std::make_shared<Index>(0, 1337, 0, 1 << 20);
    auto moved = other->add_stream("elsewhere", 3);
    CHECK(moved->restore(state) && moved->digest() == stream->digest());
    if (moved->claims() > 0) {
      Table all;
      moved->follow_changes(1 << 20);
      CHECK(take_in(moved->take_changes(1, groups), all) && all == table);
    }
  }
}

const std::string kFull("\0\0\0\0\0\0\0\0\0", 9);

StoredStream stored_stream(const std::string& pod, uint64_t life) {
  StoredStream stream;
  stream.pod = pod;
  stream.life = life;
  stream.groups = kFull;
  stream.tiers.fill(kMaxTiers);
  stream.tiers[0] = 0;
  return stream;
}

std::string reading_of(const std::vector<std::vector<uint64_t>>& lives) {
  std::string out;
  for (const auto& holders : lives) {
    const auto count = static_cast<uint16_t>(holders.size());
    out.append(reinterpret_cast<const char*>(&count), sizeof count);
    for (const uint64_t life : holders) {
      out.append(reinterpret_cast<const char*>(&life), 6);
      out.push_back(0);
      out.push_back(1);
    }
  }
  return out;
}

// Threads that share a view, each with keys of its own: every answer is its own, and nothing is left behind.
void test_a_view_is_shared() {
  StoreView view({stored_stream("a", 1), stored_stream("b", 2)});
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < 4; ++number)
    threads.emplace_back([&, number] {
      std::mt19937_64 random(number);
      for (int turn = 0; turn < 500; ++turn) {
        std::vector<uint64_t> keys(1 + random() % 90);
        for (uint64_t& key : keys) key = random();
        const size_t a = random() % (keys.size() + 1), b = random() % (keys.size() + 1);
        std::vector<std::vector<uint64_t>> lives(keys.size());
        for (size_t i = 0; i < keys.size(); ++i) {
          if (i < a) lives[i].push_back(1);
          if (i < b) lives[i].push_back(2);
          if (random() % 3 == 0) lives[i].push_back(3);  // a life that is over
        }
        const std::string reading = reading_of(lives);
        std::vector<Match> matches;
        if (!view.score(keys.data(), keys.size(), {reading}, 16, {}, {1.0}, matches)) ++wrong;
        std::map<std::string, size_t> found, expected;
        for (const Match& each : matches) found.emplace(each.pod, each.blocks);
        if (a > 0) expected["a"] = a;
        if (b > 0) expected["b"] = b;
        if (found != expected) ++wrong;
      }
    });
  for (std::thread& each : threads) each.join();
  CHECK(wrong == 0);
}

// Readings that end anywhere or are made of anything: refused or harmless, and the next good one is answered.
void test_hostile_readings() {
  StoreView view({stored_stream("a", 1), stored_stream("b", 2)});
  const std::vector<uint64_t> keys{11, 12, 13};
  const std::string good = reading_of({{1, 2}, {1}, {1, 2}});
  std::mt19937_64 random(6);
  for (int i = 0; i < 20000; ++i) {
    std::string bad = good.substr(0, random() % (good.size() + 1));
    for (uint64_t turns = random() % 4; turns > 0 && !bad.empty(); --turns)
      bad[random() % bad.size()] = static_cast<char>(random());
    const std::vector<char> exact(bad.begin(), bad.end());  // so that reading past the end is seen
    const Reading reading(exact.data(), exact.size());
    std::vector<Match> matches;
    std::vector<std::vector<Holder>> found;
    view.score(keys.data(), keys.size(), {reading}, 16, {}, {1.0}, matches);
    view.holders(keys.data(), keys.size(), {reading}, {}, found);
  }
  std::vector<Match> matches;
  CHECK(view.score(keys.data(), keys.size(), {good}, 16, {}, {1.0}, matches) && matches.size() == 2);
  CHECK(std::max(matches[0].blocks, matches[1].blocks) == 3 && std::min(matches[0].blocks, matches[1].blocks) == 1);
}

}  // namespace

int main() {
  test_changes_add_up();
  test_too_many_changes_are_told_once();
  test_a_followed_stream_and_its_digest();
  test_a_view_is_shared();
  test_hostile_readings();
  std::printf("%d passed, 0 failed\n", checks);
}
