// The text encoder and its cache without Python: behaviour and races, for the sanitizers.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "text_cache.hpp"
#include "text_encoder.hpp"
#include "text_markers.hpp"
#include "text_split.hpp"

using namespace kvindex;

namespace {

constexpr uint16_t kMatch = 0x8000;

// Letters with a space before them, and everything else alone; `#` is left to the reference.
EncoderPlan small_plan() {
  enum : uint8_t { kOther, kLetter, kSpace, kForeign };
  EncoderPlan plan;
  plan.classes.assign(0x110000, kOther);
  for (char each = 'a'; each <= 'z'; ++each) plan.classes[static_cast<uint8_t>(each)] = kLetter;
  plan.classes[' '] = kSpace;
  plan.classes['#'] = kForeign;
  plan.class_count = 4;
  plan.inert = std::string("\1\1\1\0", 4);
  plan.space = std::string("\0\0\1\0", 4);
  plan.cuts.assign(16, 0);
  plan.cuts[kLetter * 4 + kSpace] = 1;
  const uint16_t end = kMatch, letters = 2, space = 3, other = 4;
  plan.passes.push_back({
      0,     0,
      0,     0,
      0,  // dead
      other, letters,
      space, other,
      0,  // start
      end,   static_cast<uint16_t>(letters | kMatch),
      end,   end,
      end,  // letters
      end,   static_cast<uint16_t>(letters | kMatch),
      end,   end,
      end,  // a space
      end,   end,
      end,   end,
      end,  // anything else
  });
  for (uint32_t byte = 0; byte < 256; ++byte) plan.byte_ids.push_back(byte);
  plan.merges = {'a', 'b', 300, 300, 'c', 301, ' ', 301, 302, 'b', 'c', 303};
  plan.added.push_back({"<x>", 400, false, false, false});
  plan.added.push_back({"<x>y", 401, true, false, false});
  plan.word_slots = 64;
  return plan;
}

std::vector<uint32_t> reference(std::string_view text) { return {text.begin(), text.end()}; }

std::string random_text(std::mt19937_64& random, size_t parts) {
  static const char* const kParts[] = {
      "abc", " abc", "a",   "b",    "c",
      " ",   "  ",   "<x>", "<x>y", "<x",
      "é",   "中",   "\n",  "zzz",  " abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc"};
  std::string text;
  for (size_t i = 0; i < parts; ++i) text += kParts[random() % std::size(kParts)];
  return text;
}

TextRequest request_of(const TextEncoder& encoder, std::string_view text) {
  TextRequest request;
  request.text = text;
  request.encoder = &encoder;
  request.cuts = &encoder;
  request.root = 1;
  request.reference = [](std::string_view chunk, double) { return reference(chunk); };
  return request;
}

void test_encoding() {
  const TextEncoder encoder(small_plan());
  const auto ids = [&](std::string_view text) {
    std::vector<uint32_t> out;
    CHECK(encoder.encode(text, out));
    return out;
  };
  using Ids = std::vector<uint32_t>;
  for (int round = 0; round < 2; ++round) {
    CHECK(ids("").empty());
    CHECK(ids("abc") == Ids{301});
    CHECK(ids(" abc abc") == (Ids{302, 302}));
    CHECK(ids("bc") == Ids{303});
    CHECK(ids("<x>abc") == (Ids{400, 301}));
    CHECK(ids("a <x>y a") == (Ids{'a', 401, ' ', 'a'}));
    CHECK(ids("<x") == (Ids{'<', 'x'}));
    CHECK(ids("\xc3\xa9") == (Ids{0xc3, 0xa9}));
  }
  Ids out;
  CHECK(!encoder.encode("a#", out) && out.empty());
  CHECK(encoder.next_cut("abc abc", 1) == 3);
  CHECK(encoder.next_cut("abc abc", 4) == 7);
  CHECK(encoder.next_cut("", 0) == 0);
  // The queue and the scan merge alike.
  std::string word;
  Ids expected;
  for (int i = 0; i < 100; ++i) word += "abc", expected.push_back(301);
  CHECK(ids(word) == expected);
}

// Match by match, as the table says it: what the leaps must come to.
std::vector<size_t> plain_ends(const std::vector<uint16_t>& table, const CharClasses& classes, size_t class_count,
                               std::string_view text) {
  std::vector<size_t> ends;
  const size_t columns = class_count + 1;
  size_t start = 0;
  for (size_t at = 0, size = 0; at < text.size();) {
    size_t matched = at, next = at, first = 0, state = 1;
    while (state != 0) {
      const uint16_t entry = next < text.size() ? table[state * columns + classes.at(text.data() + next, size)]
                                                : table[state * columns + class_count] & kMatch;
      if (next == at) first = size;
      if ((entry & kMatch) != 0) matched = next;
      state = entry & static_cast<uint16_t>(~kMatch);
      next += size;
    }
    if (matched == at) {
      at += first;
      continue;
    }
    if (start < at) ends.push_back(at);
    ends.push_back(matched);
    start = at = matched;
  }
  if (start < text.size()) ends.push_back(text.size());
  return ends;
}

void test_splitting() {
  static const char* const kChars[] = {"a", "b", " ", "\n", "é", "中", "😀"};
  std::mt19937_64 random(5);
  for (int round = 0; round < 300; ++round) {
    const size_t class_count = 1 + random() % 5, states = 2 + random() % 6;
    std::string class_of(0x110000, 0);
    for (const uint32_t point : {0x61U, 0x62U, 0x20U, 0x0AU, 0xE9U, 0x4E2DU, 0x1F600U})
      class_of[point] = static_cast<char>(random() % class_count);
    const CharClasses classes(class_of);
    std::vector<uint16_t> table((class_count + 1) * states);
    for (size_t i = class_count + 1; i < table.size(); ++i) {
      if (random() % 3 != 0 && i % (class_count + 1) != class_count)
        table[i] = static_cast<uint16_t>(random() % states);
      if (i >= 2 * (class_count + 1) && random() % 2 == 0) table[i] |= kMatch;
    }
    // Never back to the start, which would be a match of nothing.
    for (uint16_t& entry : table)
      if ((entry & static_cast<uint16_t>(~kMatch)) == 1) entry &= kMatch;
    for (size_t of = 0; of < class_count; ++of) table[class_count + 1 + of] &= static_cast<uint16_t>(~kMatch);
    table[2 * class_count + 1] = 0;
    const Splitter splitter(table, classes, class_count);
    for (int number = 0; number < 20; ++number) {
      std::string text;
      for (size_t i = random() % 60; i > 0; --i) text += kChars[random() % (number % 2 == 0 ? 4 : std::size(kChars))];
      const std::vector<size_t> expected = plain_ends(table, classes, class_count, text);
      for (const size_t room : {Splitter::kLeastRoom, size_t{64}}) {
        std::vector<size_t> ends, some(room);
        for (size_t begin = 0; begin < text.size();) {
          const size_t count = splitter.split(classes, text, begin, text.size(), some.data(), room);
          CHECK(count > 0 && count <= room && begin == some[count - 1]);
          ends.insert(ends.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(count));
        }
        CHECK(ends == expected);
      }
    }
  }
}

void test_markers() {
  const TextMarkers markers({"<|a|>", "[b]"});
  const std::string_view text = "<|a|>x[b][b] <|a|";
  CHECK(markers.next_cut(text, 0) == 6);
  CHECK(markers.next_cut(text, 6) == 6);
  CHECK(markers.next_cut(text, 7) == 9);
  CHECK(markers.next_cut(text, 10) == text.size());
  CHECK(TextMarkers({}).next_cut(text, 1) == text.size());
}

void test_malformed_plans() {
  const auto refused = [](auto&& spoil) {
    EncoderPlan plan = small_plan();
    spoil(plan);
    try {
      const TextEncoder encoder(std::move(plan));
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(refused([](EncoderPlan& plan) { plan.classes[5] = 9; }));
  CHECK(refused([](EncoderPlan& plan) { plan.passes[0][7] = 99; }));
  CHECK(refused([](EncoderPlan& plan) { plan.passes[0].pop_back(); }));
  CHECK(refused([](EncoderPlan& plan) { plan.passes[0][5] |= kMatch; }));
  CHECK(refused([](EncoderPlan& plan) { plan.passes.clear(); }));
  CHECK(refused([](EncoderPlan& plan) { plan.byte_ids.pop_back(); }));
}

// Threads that grow texts over one small cache get the ids of an uncached encoding, and the keys of those ids.
void test_concurrency() {
  const TextEncoder encoder(small_plan());
  TextCache cache(60'000, 0, 32);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (uint64_t seed = 0; seed < 4; ++seed)
    threads.emplace_back([&, seed] {
      std::mt19937_64 random(seed % 2);
      std::string text;
      for (int turn = 0; turn < 400; ++turn) {
        text = turn % 10 == 0 ? random_text(random, 5) : text + random_text(random, 10);
        const TextRequest request = request_of(encoder, text);
        std::vector<uint32_t> expected;
        if (!encoder.encode(text, expected)) ++wrong;
        const KeyContext context{4, 1337, turn % 3 == 0 ? "lora" : "", ""};
        QueryExtras extras;
        extras.lora_name = context.lora_name;
        std::vector<uint64_t> keys(expected.size() / 4);
        block_keys(expected.data(), 0, expected.size() / 4, 4, 0, 1337, extras, keys.data());
        if (cache.ids(request).ids != expected || cache.keys(request, context).keys != keys) ++wrong;
        if (cache.stats().bytes > 60'000) ++wrong;
      }
    });
  for (auto& each : threads) each.join();
  CHECK(wrong == 0);
  CHECK(!encoder.refuted());
  CHECK(cache.stats().evictions > 0 && cache.stats().chunk_hits > 0);
}

// Comparisons find it while others use it; from then on only the reference is asked.
void test_a_wrong_encoder_is_refuted() {
  const TextEncoder encoder(small_plan());
  TextCache cache(60'000, 7, 32);
  std::vector<std::thread> threads;
  for (uint64_t seed = 0; seed < 4; ++seed)
    threads.emplace_back([&, seed] {
      std::mt19937_64 random(seed);
      for (int turn = 0; turn < 100; ++turn) {
        const std::string text = random_text(random, 30);
        (void)cache.ids(request_of(encoder, text));
      }
    });
  for (auto& each : threads) each.join();
  CHECK(encoder.refuted());
  CHECK(encoder.next_cut("abc abc", 1) == 7);  // its cuts are no better than its ids
  const std::string text = " abc abc abc abc abc abc abc abc abc abc abc abc abc abc abc";
  CHECK(cache.ids(request_of(encoder, text)).ids == reference(text));
}

// What the encoder gave for the same text before it was refuted is not answered either.
void test_the_text_that_refutes_is_answered_by_the_reference_alone() {
  const TextEncoder encoder(small_plan());
  TextCache cache(60'000, 3, 8);
  const std::string text = " abc abc abc abc abc abc abc abc abc abc abc abc abc abc abc";
  CHECK(cache.ids(request_of(encoder, text)).ids == reference(text));
  CHECK(encoder.refuted());
}

}  // namespace

int main() {
  test_encoding();
  test_splitting();
  test_markers();
  test_malformed_plans();
  test_concurrency();
  test_a_wrong_encoder_is_refuted();
  test_the_text_that_refutes_is_answered_by_the_reference_alone();
  std::printf("%d passed, 0 failed\n", checks);
}
