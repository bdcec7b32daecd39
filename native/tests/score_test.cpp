// Requests to answers without Python: hostile bytes, and standings told and read at once, for the sanitizers.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "blocks_bytes.hpp"
#include "check.hpp"
#include "event_payloads.hpp"
#include "index.hpp"
#include "protobuf.hpp"
#include "scan.hpp"
#include "score_bytes.hpp"
#include "stream.hpp"

using namespace kvindex;

namespace {

constexpr RequestLimits kLimits{64, 8, 32, 100};

std::string encoded(const std::vector<uint32_t>& tokens, const std::vector<std::string>& pods) {
  std::string packed, nested, out;
  for (const uint32_t token : tokens) protobuf::Writer{packed}.varint(token);
  protobuf::Writer{nested}.message(1, packed);
  protobuf::Writer write{out};
  write.text(1, "m");
  write.message(4, nested);
  for (const std::string& pod : pods) write.text(6, pod);
  write.text(7, "lora");
  write.number(10, 2);
  return out;
}

void test_reading() {
  const std::string named = encoded({0, 1, 300, 0xFFFFFFFF}, {"b", "a", "b"});
  const auto request = read_score_request(named, kLimits);
  CHECK(request.has_value());
  CHECK(request->model == "m" && request->extras.lora_name == "lora" && request->top_k == 2);
  CHECK((request->tokens == std::vector<uint32_t>{0, 1, 300, 0xFFFFFFFF}));
  CHECK((request->pods->names() == std::vector<std::string_view>{"b", "a", "b"}));
  CHECK(!read_score_request(encoded(std::vector<uint32_t>(65, 1), {}), kLimits));
  CHECK(!read_score_request(encoded({1}, std::vector<std::string>(9, "p")), kLimits));
  CHECK(!read_score_request(encoded({1}, {"\xc0\x80"}), kLimits));  // overlong UTF-8
  CHECK(!read_score_request("", kLimits));
}

// A GetPodsForBlocksRequest of keys (field 2) or engine hashes (field 3).
std::string encoded_blocks(uint32_t field, const std::vector<uint64_t>& values, const std::vector<std::string>& pods) {
  std::string nested, out;
  protobuf::Writer{nested}.message(
      1, std::string_view(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(uint64_t)));
  protobuf::Writer write{out};
  write.text(1, "m");
  write.message(field, nested);
  for (const std::string& pod : pods) write.text(7, pod);
  return out;
}

void test_reading_blocks() {
  const auto request = read_blocks_request(encoded_blocks(2, {7, 0, ~0ULL}, {"b", "a"}), kLimits);
  CHECK(request.has_value());
  CHECK(request->model == "m" && !request->by_hash);
  CHECK((request->blocks == std::vector<uint64_t>{7, 0, ~0ULL}));
  CHECK((request->pods == Pods{"b", "a"}));
  CHECK(read_blocks_request(encoded_blocks(3, {7}, {}), kLimits)->by_hash);
  CHECK(!read_blocks_request(encoded_blocks(2, std::vector<uint64_t>(33, 1), {}), kLimits));
  CHECK(!read_blocks_request(encoded_blocks(3, std::vector<uint64_t>(33, 1), {}), kLimits));
  CHECK(!read_blocks_request(encoded_blocks(2, {1}, std::vector<std::string>(9, "p")), kLimits));
  CHECK(!read_blocks_request(encoded_blocks(2, {}, {}), kLimits));
  CHECK(!read_blocks_request(encoded_blocks(2, {1}, {}) + encoded_blocks(3, {1}, {}), kLimits));
  CHECK(!read_blocks_request("", kLimits));
}

void test_hostile_blocks() {
  std::mt19937 dice(4);
  const auto index = std::make_shared<Index>(4, 0, 0, 0);
  std::vector<std::shared_ptr<Stream>> streams;
  Applied applied;
  for (const char* pod : {"a", "b"}) {
    streams.push_back(index->add_stream(pod, 0));
    apply(*streams.back(), stored(1, 0, 3), applied);
  }
  const std::vector<uint64_t> hashes{1ULL << 32, 1ULL << 32 | 1, 99};
  std::vector<uint64_t> keys;
  for (const auto& [key, disputed, holders] : index->holders_of_hashes(hashes, {})) keys.push_back(key);
  CHECK(keys[0] != 0 && keys[1] != 0 && keys[2] == 0);
  for (const auto& [field, values] : {std::pair{2U, keys}, std::pair{3U, hashes}}) {
    // Two blocks of two holders, and one that nobody holds.
    const std::string good = encoded_blocks(field, values, {});
    const std::string holder(
        "\x12\x08\x0a\x01"
        "a\x1a\x03gpu",
        10);
    std::string both = holder + holder;
    both[14] = 'b';
    std::string expected;
    for (const uint64_t key : {keys[0], keys[1]}) {
      std::string block;
      protobuf::Writer{block}.fixed(1, key);
      protobuf::Writer{expected}.message(1, block + both);
    }
    protobuf::Writer{expected}.message(1, "");
    protobuf::Writer{expected}.number(2, 4);
    CHECK(blocks_bytes(*index, *read_blocks_request(good, kLimits)) == expected);
    for (int round = 0; round < 20000; ++round) {
      std::string bad = good;
      for (uint32_t change = dice() % 4; change != 0 && !bad.empty(); --change) {
        const size_t at = dice() % bad.size();
        switch (dice() % 3) {
          case 0: bad[at] = static_cast<char>(dice()); break;
          case 1: bad.erase(at, dice() % 5); break;
          default: bad.insert(at, dice() % 5, static_cast<char>(dice()));
        }
      }
      // On the heap and no longer than it is, so that a reader beyond its end is found out.
      const std::vector<char> exact(bad.begin(), bad.end());
      const auto request = read_blocks_request({exact.data(), exact.size()}, kLimits);
      if (request) CHECK(!blocks_bytes(*index, *request).empty());
    }
  }
}

void test_hostile_bytes() {
  std::mt19937 dice(3);
  const std::string good = encoded({1, 2, 3, 4, 5, 6, 7, 8}, {"a", "b"});
  size_t taken = 0;
  for (int turn = 0; turn < 200'000; ++turn) {
    std::string bytes = good;
    for (unsigned change = dice() % 4 + 1; change > 0; --change) {
      const size_t at = dice() % bytes.size();
      switch (dice() % 3) {
        case 0: bytes[at] = static_cast<char>(dice()); break;
        case 1: bytes.resize(at + 1); break;
        default: bytes.insert(at, 1, static_cast<char>(dice())); break;
      }
    }
    taken += read_score_request(bytes, kLimits).has_value();
    (void)read_pod_scores_request(bytes, kLimits);
    std::vector<uint32_t> tags;
    (void)scan_tags(bytes, 0, tags);
    (void)scan_tags(bytes, 4, tags);
    CHECK(tags.size() <= kMaxTags);
  }
  CHECK(taken > 0);
}

void test_standings_of_many_ranks() {
  Standings standings;
  const auto first = standings.open("p", 0);
  auto second = standings.open("p", 1);
  const uint32_t pod = standings.names().find("p");
  CHECK(pod != PodNames::kNobody && standings.names().find("q") == PodNames::kNobody);
  const std::vector<uint32_t> pods{PodNames::kNobody, pod};
  const auto outdated = [&] { return standings.outdated(pods, now_ns()).size(); };
  CHECK((standings.outdated(pods, now_ns()) == std::vector<std::pair<size_t, uint32_t>>{{1, 0}, {1, 1}}));
  standings.tell("p", 0, {Trust::kExact, "good", 1.0}, now_ns());
  standings.tell("p", 1, {Trust::kStale, "bad", -1.0}, now_ns());
  CHECK(outdated() == 0);
  Believed believed;
  const auto of = [&](int64_t rank, int64_t now) { return Standings::Reading(standings).of(pod, rank, now, believed); };
  CHECK(!Standings::Reading(standings).of(PodNames::kNobody, -1, now_ns(), believed));
  CHECK(of(-1, now_ns()));
  CHECK(believed.trust == Trust::kStale && believed.reason == "bad" && believed.age_seconds == -1);
  CHECK(of(0, now_ns() + 1'000'000'000));
  CHECK(believed.trust == Trust::kExact && believed.age_seconds > 1.9);
  first->touch();
  CHECK(outdated() == 1);
  second.reset();  // as good as closed
  CHECK(of(-1, now_ns()));
  CHECK(believed.trust == Trust::kExact);
  first->close();
  CHECK(!of(-1, now_ns()));
}

// Numbers stay and names are found while others are added, repeated ones are dropped, none is taken for another.
void test_names() {
  const auto names = std::make_shared<PodNames>();
  std::atomic<uint32_t> added{0};
  const auto name_of = [](uint32_t number) { return std::string(number % 40, '.') + std::to_string(number); };
  std::thread adding([&] {
    for (uint32_t number = 0; number < 5000; ++number)
      if (names->add(name_of(number)) == number) added.store(number + 1, std::memory_order_release);
  });
  for (uint32_t count = 0; count < 5000;) {
    count = added.load(std::memory_order_acquire);
    if (count == 0) continue;
    const uint32_t number = 7919 % count;
    const std::string known = name_of(count - 1), other = name_of(number), unknown = known + "?";
    const std::string again = known;  // at another address
    const Candidates found =
        *distinct(std::make_shared<const PodList>(Pods{known, unknown, other, again, unknown, known}), names);
    CHECK(found.names.size() == (other == known ? 2 : 3));
    CHECK(found.names[0] == known && found.numbers[0] == count - 1 && names->name(count - 1) == known);
    CHECK(found.names[1] == unknown && found.numbers[1] == PodNames::kNobody);
    CHECK(found.names.size() == 2 || (found.names[2] == other && found.numbers[2] == number));
  }
  adding.join();
  CHECK(names->add(name_of(4999)) == 4999 && names->add("new") == 5000);
  CHECK((names->numbers({"new", "?", name_of(0)}) == std::vector<uint32_t>{5000, PodNames::kNobody, 0}));
}

// A list is known again by all of its bytes and nothing else; its numbers are looked up anew once there are new names.
void test_lists() {
  const auto names = std::make_shared<PodNames>();
  const auto read = [](const std::vector<std::string>& pods) {
    return read_score_request(encoded({1}, pods), kLimits)->pods;
  };
  const auto first = read({"a", "b"});
  CHECK(first == read({"a", "b"}));
  const std::vector<std::vector<std::string>> others{{"a"}, {"a", "b", "c"}, {"a", "c"}, {"a", "b"}, {"b", "a"}};
  for (const auto& other : others) {
    const auto again = read({"a", "b"}), list = read(other);
    CHECK((again->names() == std::vector<std::string_view>{"a", "b"}));
    CHECK((list->names() == std::vector<std::string_view>(other.begin(), other.end())));
    CHECK((list == again) == (other.size() == 2 && other[0] == "a" && other[1] == "b"));
  }
  CHECK(!read_score_request(encoded({1}, {"a", "b"}), {64, 1, 32, 100}));
  CHECK(!read_score_request(encoded({1}, {"a"}) + encoded({1}, {"a"}), kLimits));  // apart from each other
  CHECK((distinct(first, names)->numbers == std::vector<uint32_t>{PodNames::kNobody, PodNames::kNobody}));
  CHECK(distinct(first, names) == distinct(first, names));
  const uint32_t number = names->add("b");
  CHECK((distinct(first, names)->numbers == std::vector<uint32_t>{PodNames::kNobody, number}));
  CHECK((distinct(first, std::make_shared<PodNames>())->numbers[1] == PodNames::kNobody));
  CHECK((distinct(first, names)->numbers[1] == number));
}

void test_races() {
  const auto index = std::make_shared<Index>(4, 1337, 0, 1 << 20);
  Standings standings(index->names());
  const TierWeights weights({{"gpu", 1.0}});
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (uint32_t number = 0; number < 2; ++number)
    threads.emplace_back([&, number] {
      for (int turn = 0; turn < 300; ++turn) {
        const std::string pod = "pod-" + std::to_string(turn % 4);
        const auto stream = index->add_stream(pod, number);
        const auto standing = standings.open(pod, number);
        standings.tell(pod, number, {Trust::kPartial, "so", 0.5}, now_ns());
        standing->touch();
        stream->close();
        standing->close();
      }
    });
  threads.emplace_back([&] {
    const std::string asked = encoded({1, 2, 3, 4, 5}, {"pod-0", "pod-1", "pod-2", "pod-3", "other"});
    const auto request = read_score_request(asked, kLimits);
    Output answer;
    while (!stop) {
      const auto pods = distinct(request->pods, index->names());
      (void)standings.outdated(pods->numbers, now_ns());
      answer.clear();
      const ScoreBytes scored = score_bytes(*index, standings, weights, *request, "", *pods, answer);
      CHECK(scored.total_blocks == 1 && !answer.view().empty());
    }
  });
  threads[0].join();
  threads[1].join();
  stop = true;
  threads[2].join();
}

}  // namespace

int main() {
  test_reading();
  test_reading_blocks();
  test_hostile_blocks();
  test_hostile_bytes();
  test_standings_of_many_ranks();
  test_names();
  test_lists();
  test_races();
  std::printf("%d passed, 0 failed\n", checks);
}
