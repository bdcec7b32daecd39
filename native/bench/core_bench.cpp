// The core's own speed, without Python and sockets: payloads as vLLM sends them, made outside the clock.
// Usage: core_bench [claims]. Prints one table row per measure.
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "index.hpp"
#include "stream.hpp"

using namespace kvindex;

namespace {

constexpr size_t kBlock = 16, kChain = 2048;
constexpr uint32_t kPods = 64;

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Without what the heap keeps of payloads made and given back, which is no part of the index.
double resident_bytes() {
  malloc_trim(0);
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  long size = 0, resident = 0;
  if (file == nullptr || std::fscanf(file, "%ld %ld", &size, &resident) != 2) std::abort();
  std::fclose(file);
  return static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE));
}

// The part of msgpack that map events need.
struct Pack {
  std::string bytes;
  void byte(uint64_t b) { bytes.push_back(static_cast<char>(b)); }
  void big(uint64_t value, int width) {
    for (int shift = (width - 1) * 8; shift >= 0; shift -= 8) byte(value >> shift & 0xff);
  }
  void text(std::string_view s) {
    byte(0xa0 | s.size());
    bytes += s;
  }
  void number(uint64_t v) {
    if (v < 128) return byte(v);
    if (v < 256) return byte(0xcc), big(v, 1);
    if (v < 65536) return byte(0xcd), big(v, 2);
    if (v <= UINT32_MAX) return byte(0xce), big(v, 4);
    byte(0xcf);
    big(v, 8);
  }
  void array(size_t n) {
    if (n < 16) return byte(0x90 | n);
    byte(0xdc);
    big(n, 2);
  }
};

// One chain: its tokens and engine hashes follow from its number alone.
struct Chain {
  explicit Chain(uint64_t number, size_t blocks = kChain) {
    std::mt19937_64 random(number + 1);
    for (size_t i = 0; i < blocks * kBlock; ++i) tokens.push_back(static_cast<uint32_t>(random() % 128000));
    for (size_t i = 0; i < blocks; ++i) hashes.push_back(random());
  }
  std::vector<uint32_t> tokens;
  std::vector<uint64_t> hashes;

  std::string stored(size_t begin, size_t end) const {
    Pack out;
    out.array(3);
    out.number(1);
    out.array(1);
    out.byte(0x80 | 10);
    out.text("type");
    out.text("BlockStored");
    out.text("block_hashes");
    out.array(end - begin);
    for (size_t i = begin; i < end; ++i) out.number(hashes[i]);
    out.text("parent_block_hash");
    if (begin == 0) {
      out.byte(0xc0);
    } else {
      out.number(hashes[begin - 1]);
    }
    out.text("token_ids");
    out.array((end - begin) * kBlock);
    for (size_t i = begin * kBlock; i < end * kBlock; ++i) out.number(tokens[i]);
    out.text("block_size");
    out.number(kBlock);
    out.text("lora_id");
    out.byte(0xc0);
    out.text("medium");
    out.text("GPU");
    out.text("lora_name");
    out.byte(0xc0);
    out.text("group_idx");
    out.number(0);
    out.text("kv_cache_spec_kind");
    out.text("full_attention");
    out.number(0);
    return out.bytes;
  }
  std::vector<std::string> messages(size_t per_event) const {
    std::vector<std::string> all;
    for (size_t i = 0; i < hashes.size(); i += per_event)
      all.push_back(stored(i, std::min(hashes.size(), i + per_event)));
    return all;
  }
  // One hash per event, 16 events a message, last block first.
  std::vector<std::string> removals() const {
    std::vector<std::string> all;
    for (size_t end = hashes.size(); end > 0;) {
      const size_t count = std::min<size_t>(16, end);
      Pack out;
      out.array(3);
      out.number(1);
      out.array(count);
      for (size_t i = 0; i < count; ++i) {
        out.byte(0x84);
        out.text("type");
        out.text("BlockRemoved");
        out.text("block_hashes");
        out.array(1);
        out.number(hashes[--end]);
        out.text("medium");
        out.text("GPU");
        out.text("group_idx");
        out.number(0);
      }
      out.number(0);
      all.push_back(out.bytes);
    }
    return all;
  }
};

// CPU seconds that the messages take.
double feed(Stream& stream, const std::vector<std::string>& messages) {
  Applied applied;
  const double begin = cpu_seconds();
  for (const std::string& each : messages)
    stream.apply(reinterpret_cast<const uint8_t*>(each.data()), each.size(), 0, applied);
  return cpu_seconds() - begin;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Quantiles {
  double p50, p99;
};

Quantiles timed(size_t times, const std::function<void(size_t)>& prepare, const std::function<void()>& call) {
  std::vector<double> samples;
  for (size_t i = 0; i < times; ++i) {
    prepare(i);
    const double begin = wall_seconds();
    call();
    samples.push_back((wall_seconds() - begin) * 1e6);
  }
  std::sort(samples.begin(), samples.end());
  return {samples[times / 2], samples[times * 99 / 100]};
}

std::vector<uint64_t> keys_of(const Chain& chain) {
  std::vector<uint64_t> keys(chain.hashes.size());
  block_keys(chain.tokens.data(), 0, keys.size(), kBlock, 0, 1337, {}, keys.data());
  return keys;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t claims = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10'000'000;
  const uint64_t chains = std::max<uint64_t>(kPods * 2, claims / kChain);
  const double before = resident_bytes();
  auto index = std::make_shared<Index>(0, 1337, 0, 1 << 20);
  std::vector<std::shared_ptr<Stream>> pods;
  for (uint32_t i = 0; i < kPods; ++i) pods.push_back(index->add_stream("10.0.0." + std::to_string(i) + ":8000", 0));

  std::printf("| measure (%.1f M claims, %u pods) | result |\n|---|---|\n", static_cast<double>(chains * kChain) / 1e6,
              kPods);
  std::vector<double> rates;
  double cpu = 0;
  for (uint64_t i = 0; i < chains; ++i) {
    cpu += feed(*pods[i % kPods], Chain(i).messages(128));
    if ((i + 1) % (chains / 5) != 0) continue;
    rates.push_back(static_cast<double>(chains / 5 * kChain) / cpu);
    cpu = 0;
  }
  std::printf("| store, 128 blocks per event, fresh index (median fifth, last fifth) | %.2f, %.2f M blocks/CPU-s |\n",
              median(rates) / 1e6, rates.back() / 1e6);
  const auto held = static_cast<double>(index->claims());
  const double grown = resident_bytes() - before;
  std::printf("| memory | %.1f bytes per claim by RSS, %.1f by the index |\n", grown / held,
              static_cast<double>(index->bytes()) / held);
  std::fflush(stdout);

  std::vector<double> removed, stored;
  for (uint64_t i = 0; i < 100; ++i) {
    const Chain chain(i);
    removed.push_back(kChain / feed(*pods[i % kPods], chain.removals()));
    stored.push_back(kChain / feed(*pods[i % kPods], chain.messages(128)));
  }
  std::printf("| store, 128 blocks per event, full index | %.2f M blocks/CPU-s |\n", median(stored) / 1e6);
  std::printf("| remove, 1 hash per event, 16 events a message | %.2f M/CPU-s |\n", median(removed) / 1e6);
  stored.clear();
  for (uint64_t i = 0; i < 100; ++i) {
    const Chain chain(i);
    feed(*pods[i % kPods], chain.removals());
    stored.push_back(kChain / feed(*pods[i % kPods], chain.messages(1)));
  }
  std::printf("| store, 1 block per event and message | %.2f M events/CPU-s |\n", median(stored) / 1e6);

  const Chain shared(1ULL << 40, 8192);
  for (uint32_t i = 0; i < kPods; ++i) {
    auto messages = shared.messages(128);
    if (i > 0) messages.resize(8);  // the first 1024 blocks are everyone's
    feed(*pods[i], messages);
  }
  const std::vector<double> weights{1.0, 0.8, 0.5};
  std::mt19937_64 random(3);
  std::vector<uint64_t> keys;
  uint64_t blocks = 0;
  const auto a_chain = [&](size_t) {
    keys = keys_of(Chain(random() % chains));
    keys.resize(512);
  };
  const auto match = [&] { blocks += index->score(keys.data(), keys.size(), {}, weights).size(); };
  Quantiles found = timed(1000, a_chain, match);
  std::printf("| match 512 blocks, one holder, chain chosen at random | p50 %.2f, p99 %.2f µs |\n", found.p50,
              found.p99);
  const auto shared_keys = keys_of(shared);
  keys.assign(shared_keys.begin(), shared_keys.begin() + 512);
  found = timed(3000, [](size_t) {}, match);
  std::printf("| match 512 blocks, 64 holders | p50 %.2f, p99 %.2f µs |\n", found.p50, found.p99);
  found = timed(
      300, [](size_t) {},
      [&] { blocks += index->score_tokens(shared.tokens.data(), shared.tokens.size(), {}, weights, {}).size(); });
  std::printf("| hash + match 131,072 tokens | p50 %.1f, p99 %.1f µs |\n", found.p50, found.p99);
  std::vector<Chain> some;
  for (int i = 0; i < 100; ++i) some.emplace_back(random() % chains);
  std::vector<uint32_t> diverging(kBlock * 512, 7);
  const auto diverge = [&](size_t i) {
    std::copy_n(some[i % 100].tokens.begin(), kBlock, diverging.begin());
    keys = keys_of(some[i % 100]);
    keys.resize(512);
    std::fill(keys.begin() + 1, keys.end(), 1);
  };
  std::vector<std::vector<uint64_t>> asked;
  for (size_t i = 0; i < some.size(); ++i) {
    diverge(i);
    asked.push_back(keys);
  }
  found = timed(3000, [&](size_t i) { keys = asked[i % asked.size()]; }, match);
  std::printf("| keys that diverge after 1 of 512 blocks, 100 chains in turn | p50 %.0f, p99 %.0f ns |\n",
              found.p50 * 1e3, found.p99 * 1e3);
  found = timed(3000, diverge, match);
  std::printf("| the same, a chain's 32,768 tokens hashed before each | p50 %.0f, p99 %.0f ns |\n", found.p50 * 1e3,
              found.p99 * 1e3);
  found = timed(3000, diverge,
                [&] { blocks += index->score_tokens(diverging.data(), diverging.size(), {}, weights, {}).size(); });
  std::printf("| tokens that diverge after 1 of 512 blocks | p50 %.0f, p99 %.0f ns |\n", found.p50 * 1e3,
              found.p99 * 1e3);
  std::fflush(stdout);

  // A writer on the other core, flat out; payloads made before.
  {
    std::vector<std::vector<std::string>> work;
    for (uint64_t i = 0; i < 50; ++i) work.push_back(Chain(chains + i).messages(128));
    std::atomic<bool> stop{false};
    std::atomic<uint64_t> written{0};
    auto busy = index->add_stream("busy", 0);
    std::thread writer([&] {
      while (!stop) {
        for (const auto& each : work) {
          feed(*busy, each);
          written += kChain;
          if (stop) break;
        }
        busy->clear();
      }
    });
    const double begin = wall_seconds();
    keys.assign(shared_keys.begin(), shared_keys.begin() + 512);
    found = timed(20000, [](size_t) {}, match);
    const double seconds = wall_seconds() - begin;
    stop = true;
    writer.join();
    std::printf("| the same with 64 holders while another core stores %.1f M blocks/s | p50 %.2f, p99 %.2f µs |\n",
                static_cast<double>(written) / seconds / 1e6, found.p50, found.p99);
    busy->close();
  }
  // A fence of a pod with 200 k blocks while this thread asks.
  {
    auto fenced = index->add_stream("fenced", 0);
    for (uint64_t i = 0; i < 100; ++i) feed(*fenced, Chain(chains + 1000 + i).messages(128));
    std::atomic<bool> done{false};
    double took = 0, worked = 0;
    std::vector<double> samples;
    std::thread fence([&] {
      const double begin = wall_seconds(), cpu_begin = cpu_seconds();
      fenced->clear();
      took = wall_seconds() - begin;
      worked = cpu_seconds() - cpu_begin;
      done = true;
    });
    while (!done) {
      const double begin = wall_seconds();
      match();
      samples.push_back((wall_seconds() - begin) * 1e6);
    }
    fence.join();
    std::sort(samples.begin(), samples.end());
    std::printf("| fence of 204,800 blocks | %.1f ms (%.1f ms of CPU); match meanwhile p50 %.2f, p99 %.2f µs (%zu) |\n",
                took * 1e3, worked * 1e3, samples[samples.size() / 2], samples[samples.size() * 99 / 100],
                samples.size());
    fenced->close();
  }
  // Rounds of churn at constant size: a twentieth of all chains goes tail first, others come.
  const double settled = resident_bytes(), settled_own = static_cast<double>(index->bytes());
  uint64_t oldest = 0, newest = 0;
  for (int round = 0; round < 20; ++round)
    for (uint64_t i = 0; i < chains / 20; ++i, ++oldest, ++newest) {
      feed(*pods[oldest % kPods], Chain(oldest).removals());
      feed(*pods[newest % kPods], Chain(chains + 5000 + newest).messages(128));
    }
  std::printf("| RSS after 20 rounds that replace every chain once | %+.1f %% (own account %+.1f %%) |\n",
              (resident_bytes() / settled - 1) * 100, (static_cast<double>(index->bytes()) / settled_own - 1) * 100);
  const double full = resident_bytes();
  for (auto& each : pods) each->close();
  std::printf("| after all pods left: RSS above an empty process, own account | %.1f, %.1f MB of %.0f |\n",
              (resident_bytes() - before) / 1e6, static_cast<double>(index->bytes()) / 1e6, (full - before) / 1e6);
  return blocks > 0 ? 0 : 1;
}
