// The text encoder and its cache without Python: behaviour and races, for the sanitizers.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "text_cache.hpp"
#include "text_encoder.hpp"

using namespace kvindex;

namespace {

int checks = 0;

#define CHECK(condition)                                                   \
  do {                                                                     \
    ++checks;                                                              \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

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
  const std::string text = " abc abc abc abc abc abc abc abc abc abc abc abc abc abc abc";
  CHECK(cache.ids(request_of(encoder, text)).ids == reference(text));
}

}  // namespace

int main() {
  test_encoding();
  test_malformed_plans();
  test_concurrency();
  test_a_wrong_encoder_is_refuted();
  std::printf("%d passed, 0 failed\n", checks);
}
