// Placements without Python: expiry by a clock that is put forward, counts that add up, and races.
#include "placements.hpp"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.hpp"
#include "index.hpp"
#include "stream.hpp"

using namespace kvindex;

namespace {

constexpr uint64_t kSecond = 1'000'000'000;
constexpr Placements::Place kA0{0, 0}, kA1{0, 1}, kB0{1, 2};

bool adds_up(const Placements& placements) {
  const auto counts = placements.counts();
  return counts.recorded == counts.confirmed + counts.expired + counts.fenced + counts.blocks;
}

uint64_t bits(const Placements& placements, Placements::Place place, std::vector<uint64_t> keys) {
  return placements.placed(place, keys.data(), keys.size(), placements.now());
}

void test_expiry_needs_no_event() {
  Placements placements(100);
  CHECK(!placements.any());
  CHECK(placements.record(kA0, 0, {1, 2}, 1000 * kSecond, false));
  CHECK(placements.record(kA0, 0, {2, 3}, 3000 * kSecond, false));
  CHECK(bits(placements, kA0, {1, 2, 3, 4}) == 0b0111);
  CHECK(bits(placements, kA1, {1, 2, 3, 4}) == 0);
  placements.advance(1000 * kSecond);
  CHECK(bits(placements, kA0, {1, 2, 3, 4}) == 0b0110);  // the later end of a renewed one holds
  CHECK(placements.counts().blocks == 3 && placements.counts().expired == 0);
  placements.sweep(placements.now());
  CHECK(placements.counts().blocks == 2 && placements.counts().expired == 1);
  placements.advance(2000 * kSecond);
  CHECK(bits(placements, kA0, {1, 2, 3, 4}) == 0);
  placements.confirm(kA0, 2);  // too late
  CHECK(placements.counts().confirmed == 0 && placements.counts().expired == 2);
  placements.sweep(placements.now());
  CHECK(!placements.any() && adds_up(placements) && placements.places().empty());
}

void test_the_end_is_exact() {
  Placements placements(100);
  CHECK(placements.record(kA0, 0, {1}, 1000 * kSecond, false));
  const uint64_t key = 1;
  const uint64_t latest = placements.now() + 1000 * kSecond;
  CHECK(placements.placed(kA0, &key, 1, latest - kSecond) == 1);
  CHECK(placements.placed(kA0, &key, 1, latest) == 0);
}

void test_confirmed_on_its_rank_or_where_it_was_a_guess() {
  Placements placements(100);
  CHECK(placements.record(kA0, 0, {1, 2}, kSecond * 1000, false));
  CHECK(placements.record(kA1, 0, {1, 3}, kSecond * 1000, true));
  placements.confirm(kB0, 1);
  CHECK(placements.counts().confirmed == 0);
  placements.confirm(kA0, 1);  // at the named rank, and the guess at the other
  CHECK(placements.counts().confirmed == 2);
  placements.confirm(kA1, 2);  // named, and at another rank
  CHECK(bits(placements, kA0, {1, 2, 3}) == 0b010 && bits(placements, kA1, {1, 2, 3}) == 0b100);
  CHECK(placements.record(kA1, 0, {3}, kSecond, false));  // no guess any more
  placements.confirm(kA0, 3);
  CHECK(bits(placements, kA1, {3}) == 1);
  CHECK(adds_up(placements));
}

void test_a_life_that_ended_takes_nothing() {
  Placements placements(100);
  const uint64_t life = placements.life(kA0);
  CHECK(placements.record(kA0, life, {1, 2}, kSecond * 1000, false));
  placements.drop(kA0);
  CHECK(bits(placements, kA0, {1, 2}) == 0 && !placements.any());
  CHECK(placements.record(kA0, life, {1, 2, 3}, kSecond * 1000, false));
  CHECK(bits(placements, kA0, {1, 2, 3}) == 0 && placements.counts().fenced == 5);
  CHECK(placements.record(kA0, placements.life(kA0), {1}, kSecond * 1000, false));
  CHECK(bits(placements, kA0, {1}) == 1 && adds_up(placements));
}

void test_room_is_bounded() {
  Placements placements(4);
  CHECK(placements.record(kA0, 0, {1, 2, 3}, kSecond, false));
  CHECK(!placements.record(kB0, 0, {1, 2}, kSecond, false));
  CHECK(placements.counts().refused == 2 && placements.counts().blocks == 3);
  CHECK(placements.record(kB0, 0, {1}, kSecond, false));
  CHECK(placements.record(kA0, 0, {1, 2, 3}, kSecond, false));  // renewed: nothing new
  CHECK(placements.counts().renewed == 3 && placements.counts().blocks == 4);
  placements.advance(kSecond);
  placements.sweep(placements.now());
  CHECK(placements.record(kB0, 0, {1, 2, 3, 4}, kSecond, false) && adds_up(placements));
}

// Every answer and count is that of a map from (place, key) to its end.
void test_random_operations() {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    std::mt19937_64 random(seed);
    Placements placements(100'000);
    std::map<std::pair<Placements::Place, uint64_t>, uint64_t> model;
    uint64_t confirmed = 0, fenced = 0, recorded = 0, hours = 0;  // the machine's own clock is lost in hours
    const std::vector<Placements::Place> all{kA0, kA1, kB0};
    const uint64_t hour = 3600 * kSecond;
    for (int turn = 0; turn < 1500; ++turn) {
      const auto place = all[random() % all.size()];
      const uint64_t first = random() % 3000;
      switch (random() % 8) {
        case 0: placements.advance(hour), ++hours; break;
        case 1: placements.sweep(placements.now()); break;
        case 2: {
          if (random() % 8 != 0) break;
          placements.drop(place);
          for (auto at = model.begin(); at != model.end();) {
            if (at->first.first != place) {
              ++at;
              continue;
            }
            fenced += at->second > hours ? 1 : 0;
            at = model.erase(at);
          }
          break;
        }
        case 3:
        case 4:
          for (uint64_t key = first; key < first + 20; ++key) {
            placements.confirm(place, key);
            const auto found = model.find({place, key});
            if (found == model.end()) continue;
            confirmed += found->second > hours ? 1 : 0;
            model.erase(found);
          }
          break;
        default: {
          const uint64_t ttl = 1 + random() % 4;
          std::vector<uint64_t> keys;
          const uint64_t count = 1 + random() % 700;
          for (uint64_t key = first; key < first + count; ++key) keys.push_back(key);
          // Half an hour more, so that neither clock decides.
          CHECK(placements.record(place, placements.life(place), keys, ttl * hour - hour / 2, false));
          for (const uint64_t key : keys) {
            uint64_t& ends = model[{place, key}];
            recorded += ends <= hours ? 1 : 0;
            ends = std::max(ends, hours + ttl);
          }
        }
      }
      CHECK(adds_up(placements));
      std::vector<uint64_t> asked(Placements::kSlice);
      for (auto& key : asked) key = random() % 3000;
      const uint64_t got = bits(placements, place, asked);
      for (size_t i = 0; i < asked.size(); ++i) {
        const auto found = model.find({place, asked[i]});
        CHECK((got >> i & 1) == (found != model.end() && found->second > hours ? 1U : 0U));
      }
    }
    placements.sweep(placements.now());
    const auto counts = placements.counts();
    uint64_t live = 0;
    for (const auto& [at, ends] : model) live += ends > hours ? 1 : 0;
    CHECK(counts.blocks == live && counts.confirmed == confirmed && counts.fenced == fenced);
    CHECK(counts.recorded == recorded && counts.expired == recorded - confirmed - fenced - live);
  }
}

// A placement that comes between a stream's drop and its end does not wait for the next stream of that number.
void test_the_end_of_a_stream_takes_the_last_placement() {
  auto index = std::make_shared<Index>(4, 1337, 0, 1 << 20);
  auto stream = index->add_stream("pod", 0);
  const uint64_t key = 1;
  CHECK(index->place("pod", 0, &key, 1, 1000 * kSecond).outcome == Placed::Outcome::kRecorded);
  index->close_stream(0);  // what is left of Stream::close after its drop
  CHECK(!index->placements().any() && index->placements().counts().fenced == 1);
}

// A record and the event of the same blocks at once, in any order: none is left to expire beside the real claim.
void test_a_record_races_with_its_event() {
  auto index = std::make_shared<Index>(4, 1337, 0, 1 << 20);
  auto stream = index->add_stream("pod", 0);
  const uint32_t lane = index->open_lane(0, 0, GroupKind::kFull, 0);
  std::vector<uint64_t> keys(Placements::kSlice);
  std::vector<Node> nodes(keys.size());
  Blocks::Pen pen;
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = (i + 1) * 0x9E3779B97F4A7C15ULL;
  for (int round = 0; round < 300; ++round) {
    std::atomic<int> ready{0};
    const auto meet = [&] {
      for (++ready; ready < 2;) std::this_thread::yield();
    };
    std::thread engine([&] {
      meet();
      const auto pin = index->held().epoch().pin();
      for (size_t i = 0; i < keys.size(); ++i) {  // as Stream does
        bool is_new = false;
        index->held().hold(&keys[i], 1, 0, holder_id(lane, 0), pen, &nodes[i], &is_new);
        if (is_new && index->placements().any()) index->placements().confirm(kA0, keys[i]);
      }
    });
    std::thread router([&] {
      meet();
      if (index->place("pod", 0, keys.data(), keys.size(), 1000 * kSecond).outcome != Placed::Outcome::kRecorded)
        std::abort();
    });
    engine.join();
    router.join();
    CHECK(bits(index->placements(), kA0, keys) == 0);
    const auto pin = index->held().epoch().pin();
    for (const Node node : nodes) index->held().release(node, holder_id(lane, 0));
  }
  CHECK(!index->placements().any() && adds_up(index->placements()));
}

// Recorders, confirmations, closings and readers at once: the numbers add up, and nothing is left on a reused stream.
void test_concurrency() {
  auto index = std::make_shared<Index>(4, 1337, 0, 1 << 20);
  auto calm = index->add_stream("calm", 0);
  std::vector<uint64_t> keys(300);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = i * 0x9E3779B97F4A7C15ULL;
  CHECK(index->place("calm", 0, keys.data(), keys.size(), 1000 * kSecond).outcome == Placed::Outcome::kRecorded);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  threads.emplace_back([&] {  // the pod comes and goes, under one number or another
    std::shared_ptr<Stream> stream, other;
    while (!stop) {
      stream = index->add_stream("pod", 0);
      other = index->add_stream("other", 0);
      stream->clear();
      stream->close();
      other->close();
    }
  });
  threads.emplace_back([&] {
    while (!stop) index->placements().sweep(index->placements().now());
  });
  threads.emplace_back([&] {
    std::mt19937_64 random(1);
    while (!stop) index->placements().confirm({1, 1}, keys[random() % keys.size()]);
  });
  for (int recorder = 0; recorder < 2; ++recorder)
    threads.emplace_back([&] {
      for (int turn = 0; turn < 400; ++turn) {
        const auto done = index->place("pod", -1, keys.data(), keys.size(), 1000 * kSecond);
        if (done.outcome == Placed::Outcome::kNoRoom) std::abort();
        const auto matches = index->score(keys.data(), keys.size(), {"calm", "other"}, {1.0});
        if (matches.size() != 1 || matches[0].speculative != keys.size()) std::abort();  // never on another's pod
      }
    });
  for (size_t i = 3; i < threads.size(); ++i) threads[i].join();
  stop = true;
  for (size_t i = 0; i < 3; ++i) threads[i].join();
  CHECK(adds_up(index->placements()));
  CHECK(index->placements().counts().blocks == keys.size());
  calm->clear();
  CHECK(!index->placements().any() && index->score(keys.data(), keys.size(), {}, {1.0}).empty());
}

}  // namespace

int main() {
  test_expiry_needs_no_event();
  test_the_end_is_exact();
  test_confirmed_on_its_rank_or_where_it_was_a_guess();
  test_a_life_that_ended_takes_nothing();
  test_room_is_bounded();
  test_random_operations();
  test_the_end_of_a_stream_takes_the_last_placement();
  test_a_record_races_with_its_event();
  test_concurrency();
  std::printf("%d passed, 0 failed\n", checks);
}
