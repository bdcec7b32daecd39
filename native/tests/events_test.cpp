// Events in rows: whatever stands before an event in its batch, it reads as it does alone.
#include "events.hpp"

#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "event_payloads.hpp"

using namespace kvindex;

namespace {

using Random = std::mt19937_64;

// An event as it was read, or why it was not.
struct Outcome {
  Batch::Next next = Batch::Next::kEnd;
  Reason reason = Reason::kCount;
  Tag tag = Tag::kCleared;
  std::vector<uint64_t> hashes;
  std::vector<uint32_t> tokens;
  std::string medium;
  uint64_t group = 0;
  bool operator==(const Outcome&) const = default;
};

Outcome next_of(Batch& batch, Event& event) {
  Outcome outcome;
  outcome.next = batch.next(event, outcome.reason);
  if (outcome.next != Batch::Next::kEvent) return outcome;
  outcome.reason = Reason::kCount;
  outcome.tag = event.tag;
  outcome.hashes = event.hashes;
  outcome.tokens = event.tokens;
  outcome.medium = event.medium;
  outcome.group = event.group;
  return outcome;
}

std::string batch_of(const std::vector<std::string>& events) {
  std::string bytes = Pack().array(2).u64(1).many(events.size()).bytes;
  for (const std::string& each : events) bytes += each;
  return bytes;
}

std::vector<Outcome> outcomes_of(const std::string& payload) {
  std::vector<Outcome> all;
  Batch batch;
  CHECK(batch.open(reinterpret_cast<const uint8_t*>(payload.data()), payload.size()));
  Event event;
  while (all.empty() || all.back().next != Batch::Next::kEnd) all.push_back(next_of(batch, event));
  return all;
}

// An integer in one of the widths that hold it, or bytes, or text.
std::string hash_of(Random& random) {
  switch (random() % 6) {
    case 0: return std::string(1, static_cast<char>(random() % 0x80));
    case 1: return std::string("\xcd") + static_cast<char>(random()) + static_cast<char>(random());
    case 2: return std::string("\xc4\x04") + Pack().u64(random()).bytes.substr(1, 4);
    case 3: return Pack().text(std::string(1 + random() % 3, static_cast<char>('a' + random() % 20))).bytes;
    default: return Pack().u64(random()).bytes;
  }
}

std::string hashes_of(size_t count, Random& random) {
  std::string bytes = count < 16 ? Pack().array(static_cast<uint8_t>(count)).bytes : Pack().many(count).bytes;
  for (; count > 0; --count) bytes += hash_of(random);
  return bytes;
}

std::string removal(uint64_t form, Random& random) {
  const auto medium = [&] { return random() % 4 ? Pack().text("GPU").bytes : Pack().text("CPU").bytes; };
  Pack pack;
  switch (form) {
    case 0:
      pack.array(4).text("BlockRemoved");
      return pack.bytes + hashes_of(1, random) + medium() + std::string(1, static_cast<char>(random() % 2));
    case 1:
      pack.bytes = "\x83";
      pack.text("type").text("BlockRemoved").text("block_hashes");
      return pack.bytes + hashes_of(1, random) + Pack().text("medium").bytes + medium();
    case 2:  // two names of the hashes: the first list that has any counts for one of them
      pack.bytes = "\x83";
      pack.text("event_type").text("removed").text("seq_hashes");
      return pack.bytes + hashes_of(random() % 2, random) + Pack().text("block_hashes").bytes + hashes_of(1, random);
    case 3: pack.array(2).text("BlockRemoved"); return pack.bytes + hashes_of(random() % 40, random);
    default:  // what is no removal of any block
      if (random() % 2) return Pack().array(1).text("AllBlocksCleared").bytes;
      return Pack().array(2).text("BlockRemoved").text("GPU").bytes;
  }
}

void test_rows(uint64_t seed) {
  Random random(seed);
  std::vector<std::string> events;
  std::vector<Outcome> expected;
  uint64_t form = random() % 5;
  for (size_t more = 1 + random() % 60; more > 0; --more) {
    if (random() % 5 == 0) form = random() % 5;
    events.push_back(removal(form, random));
    // Now and then one that is another but for a single byte.
    if (random() % 8 == 0 && events.size() > 1) {
      events.back() = events[events.size() - 2];
      std::string& bytes = events.back();
      std::string changed = bytes;
      changed[random() % changed.size()] = static_cast<char>(random());
      Batch batch;
      Event event;
      const std::string alone = batch_of({changed, removal(4, random)});
      // Only where it still is one value: what follows would be read from another place.
      if (batch.open(reinterpret_cast<const uint8_t*>(alone.data()), alone.size())) {
        Cursor in(reinterpret_cast<const uint8_t*>(changed.data()), changed.size());
        if (in.skip() && in.at_end()) bytes = changed;
      }
    }
    expected.push_back(outcomes_of(batch_of({events.back()})).front());
  }
  expected.emplace_back();
  CHECK(outcomes_of(batch_of(events)) == expected);

  // Cut anywhere, what is whole is read, and nothing behind it.
  const std::string payload = batch_of(events);
  const auto cut = outcomes_of(payload.substr(0, payload.size() - 1 - random() % events.back().size()));
  CHECK(cut.size() == expected.size());
  CHECK(std::equal(cut.begin(), cut.end() - 2, expected.begin()));
  CHECK(cut[cut.size() - 2].next == Batch::Next::kSkipped && cut[cut.size() - 2].reason == Reason::kTruncated);
}

// Integers of all widths in turns, in lists longer than what is read at once.
void test_widths(uint64_t seed) {
  Random random(seed);
  const size_t count = 1 + random() % 3000;
  std::string hashes = Pack().many(count).bytes, tokens = hashes;
  std::vector<uint64_t> expected_hashes;
  std::vector<uint32_t> expected_tokens;
  const uint64_t wide_in = 1 + random() % 600;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t hash = random() % wide_in == 0 ? random() % 0x80 : random();
    expected_hashes.push_back(hash);
    hashes += hash < 0x80 ? std::string(1, static_cast<char>(hash)) : Pack().u64(hash).bytes;
    const auto token = static_cast<uint32_t>(random() % wide_in == 0 ? random() : random() % 0x80);
    expected_tokens.push_back(token);
    tokens += token < 0x80 ? std::string(1, static_cast<char>(token)) : Pack().u64(token).bytes;
  }
  const std::string event =
      Pack().array(5).text("BlockStored").bytes + hashes + Pack().nil().bytes + tokens + std::string(1, '\1');
  const auto outcomes = outcomes_of(batch_of({event, event}));
  CHECK(outcomes.size() == 3);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(outcomes[i].hashes == expected_hashes);
    CHECK(outcomes[i].tokens == expected_tokens);
  }
}

}  // namespace

int main() {
  for (uint64_t seed = 0; seed < 2000; ++seed) test_rows(seed);
  for (uint64_t seed = 0; seed < 100; ++seed) test_widths(seed);
  std::printf("%d passed, 0 failed\n", checks);
}
