// Each structure of the core against a model from the standard library, under random and hostile operations.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "blocks.hpp"
#include "check.hpp"
#include "chunk_pool.hpp"
#include "claims.hpp"
#include "epoch.hpp"

using namespace kvindex;

namespace {

void test_claims(uint64_t stride, size_t most, int steps) {
  std::atomic<int64_t> bytes{0};
  {
    Claims claims(bytes);
    std::map<uint64_t, uint32_t> model;
    std::mt19937_64 random(stride + most);
    const auto check_all = [&] {
      CHECK(claims.size() == model.size());
      std::multiset<uint32_t> got, expected;
      claims.each([&](uint32_t ref) { got.insert(ref); });
      for (const auto& [hash, ref] : model) expected.insert(ref);
      CHECK(got == expected);
      for (const auto& [hash, ref] : model) {
        const uint32_t* found = claims.find(hash);
        if (found == nullptr || *found != ref) std::abort();
      }
    };
    bool filling = true;
    for (int i = 0; i < steps; ++i) {
      if (model.size() >= most) filling = false;
      if (model.empty()) filling = true;
      const uint64_t hash = random() % (most * 2) * stride;
      if (random() % 8 < (filling ? 6U : 2U)) {
        const auto ref = static_cast<uint32_t>(random()) | 1;
        bool is_new;
        uint32_t* place = claims.insert(hash, ref, is_new);
        CHECK(is_new == (model.count(hash) == 0));
        if (is_new) model[hash] = ref;
        CHECK(*place == model[hash]);
      } else if (model.count(hash) != 0) {
        claims.erase(hash);
        model.erase(hash);
        CHECK(claims.find(hash) == nullptr);
      }
      if (i % (steps / 8) == 0) check_all();
    }
    check_all();
    CHECK(bytes > 0);
    Claims moved(std::move(claims));
    for (const auto& [hash, ref] : model) moved.erase(hash);
    CHECK(moved.size() == 0);
  }
  CHECK(bytes == 0);
}

void test_chunk_set() {
  ChunkSet set;
  std::set<uint32_t> model;
  std::mt19937_64 random(5);
  for (int i = 0; i < 20000; ++i) {
    const auto number = static_cast<uint32_t>(random() % 9000);
    if (random() % 2) {
      CHECK(set.add(number) == model.insert(number).second);
    } else {
      CHECK(set.remove(number) == (model.erase(number) == 1));
    }
    uint32_t lowest = 0;
    CHECK(set.lowest(lowest) == !model.empty());
    if (!model.empty()) CHECK(lowest == *model.begin());
  }
}

void test_epoch() {
  int freed = 0;
  {
    Epoch epoch;
    const auto retire = [&] {
      epoch.retire([](void* owner, void*, uint64_t by) { *static_cast<int*>(owner) += static_cast<int>(by); }, &freed,
                   nullptr, 1);
    };
    retire();
    epoch.collect();
    CHECK(freed == 1);
    {
      const auto pin = epoch.pin();
      retire();
      {
        const auto later = epoch.pin();  // sees nothing of what was retired before it
        epoch.collect();
        CHECK(freed == 1);
      }
      retire();
      epoch.collect();
      CHECK(freed == 1);
    }
    epoch.collect();
    CHECK(freed == 3);
    retire();
  }
  CHECK(freed == 4);
}

std::vector<HolderId> holders_of(const Blocks& blocks, uint64_t key) {
  std::vector<HolderId> out;
  for (;;) {
    out.clear();
    const Node node = blocks.find(key);
    if (node == 0) return out;
    const Chunk* chunk = blocks.chunk_of(node);
    if (chunk == nullptr) continue;  // its slab went just now
    const uint32_t version = chunk->version.load(std::memory_order_acquire);
    if (!chunk->has(node % kSlots, key)) continue;
    chunk->each_holder([&](HolderId holder, uint64_t mask) {
      if (mask >> node % kSlots & 1) out.push_back(holder);
    });
    if (chunk->version.load(std::memory_order_acquire) == version) break;
  }
  std::sort(out.begin(), out.end());
  return out;
}

// Chains of keys that share prefixes; `narrow` keys all fall into one shard and look alike to its buckets.
std::vector<std::vector<uint64_t>> make_chains(bool narrow, std::mt19937_64& random) {
  std::vector<std::vector<uint64_t>> chains;
  uint64_t next = 1;
  for (int i = 0; i < 12; ++i) {
    std::vector<uint64_t> chain;
    if (!chains.empty()) {
      const auto& base = chains[random() % chains.size()];
      chain.assign(base.begin(), base.begin() + static_cast<long>(random() % base.size()));
    }
    for (size_t more = 1 + random() % 150; more > 0; --more, ++next)
      chain.push_back(narrow ? (7ULL << 56 | (next % 3) << 24 << 20 | next << 8 | 5) : random() | 1);
    chains.push_back(chain);
  }
  return chains;
}

void test_blocks(bool narrow, uint64_t seed) {
  std::mt19937_64 random(seed);
  Blocks blocks;
  const auto chains = make_chains(narrow, random);
  constexpr uint32_t kHolders = 9;
  std::map<std::pair<uint64_t, HolderId>, Node> model;
  std::map<uint64_t, std::set<HolderId>> of_key;
  std::vector<Blocks::Pen> pens(kHolders);
  const auto drop = [&](std::pair<uint64_t, HolderId> claim) {
    const Node node = model.at(claim);
    model.erase(claim);
    of_key[claim.first].erase(claim.second);
    if (of_key[claim.first].empty()) of_key.erase(claim.first);
    return node;
  };
  for (int i = 0; i < 1500; ++i) {
    const auto pin = blocks.epoch().pin();
    const auto who = static_cast<uint32_t>(random() % kHolders);
    const HolderId holder = holder_id(who / 2 + 1, who % 2);
    const auto& chain = chains[random() % chains.size()];
    const size_t begin = random() % chain.size(), count = 1 + random() % (chain.size() - begin);
    if (random() % 2) {
      std::vector<Node> nodes(count);
      const std::unique_ptr<bool[]> is_new(new bool[count]);
      Node before = 0;
      if (begin > 0 && model.count({chain[begin - 1], holder}) != 0) before = model.at({chain[begin - 1], holder});
      blocks.hold(chain.data() + begin, count, before, holder, pens[who], nodes.data(), is_new.get());
      for (size_t k = 0; k < count; ++k) {
        const bool added = model.try_emplace({chain[begin + k], holder}, nodes[k]).second;
        CHECK(is_new[k] == added);
        CHECK(model.at({chain[begin + k], holder}) == nodes[k] && blocks.key_of(nodes[k]) == chain[begin + k]);
        of_key[chain[begin + k]].insert(holder);
      }
    } else {
      std::vector<Node> gone;
      for (size_t k = 0; k < count; ++k)
        if (model.count({chain[begin + k], holder}) != 0) gone.push_back(drop({chain[begin + k], holder}));
      if (random() % 2) std::reverse(gone.begin(), gone.end());
      if (random() % 2) {
        blocks.release(gone, holder);
      } else {
        for (const Node node : gone) blocks.release(node, holder);
      }
    }
    if (random() % 50 == 0) blocks.lay_down(pens[who]);
    CHECK(blocks.size() == of_key.size());
    if (i % 100 != 0) continue;
    for (const auto& each : chains)
      for (const uint64_t key : each) {
        const auto found = of_key.find(key);
        const std::vector<HolderId> expected = found == of_key.end()
                                                   ? std::vector<HolderId>{}
                                                   : std::vector<HolderId>(found->second.begin(), found->second.end());
        CHECK(holders_of(blocks, key) == expected);
      }
  }
  const auto pin = blocks.epoch().pin();
  while (!model.empty()) {
    const auto claim = model.begin()->first;
    blocks.release(drop(claim), claim.second);
  }
  for (auto& pen : pens) blocks.lay_down(pen);
  CHECK(blocks.size() == 0);
}

// A reader that began before a block went out of sight does not take what came into its chunk after that for of one
// moment with it: by then the block may be held elsewhere, by the same holder.
void test_buried_is_counted() {
  Blocks blocks;
  Blocks::Pen pen;
  const uint64_t keys[] = {1ULL << 40, 2ULL << 40};
  const auto pin = blocks.epoch().pin();
  Node nodes[2];
  bool is_new[2];
  blocks.hold(keys, 2, 0, holder_id(1, 0), pen, nodes, is_new);
  auto& chunk = const_cast<Chunk&>(*blocks.chunk_of(nodes[0]));
  Epoch epoch;
  std::atomic<int64_t> bytes{0};
  CHECK(chunk.remove(holder_id(1, 0), bits_from(nodes[1] % kSlots, 1), epoch, bytes) != 0);
  const uint32_t version = chunk.version;
  CHECK(chunk.run(nodes[0] % kSlots, keys, 2) == 2);
  chunk.bury(bits_from(nodes[1] % kSlots, 1));
  chunk.add(holder_id(2, 0), bits_from(nodes[0] % kSlots, 1), epoch, bytes);
  CHECK(chunk.version != version);
  CHECK(chunk.run(nodes[0] % kSlots, keys, 2) == 1);
}

// One shard of the key table that grows large and shrinks again: whatever is moved, and wherever it had been passed on
// to, all that is held is found and nothing else.
void test_shrinking(uint64_t seed) {
  std::mt19937_64 random(seed);
  Blocks blocks;
  Blocks::Pen pen;
  const HolderId holder = holder_id(1, 0);
  std::map<uint64_t, Node> held;
  while (held.size() < 9000) {
    const auto pin = blocks.epoch().pin();
    std::vector<uint64_t> keys;
    for (size_t more = 1 + random() % 100; more > 0; --more)
      // Every other one into a sixteenth of the buckets, so that many are passed on.
      keys.push_back(uint64_t{3} << 56 | (random() >> (random() % 2 ? 8 : 12)) | 1);
    std::vector<Node> nodes(keys.size());
    const std::unique_ptr<bool[]> is_new(new bool[keys.size()]);
    blocks.hold(keys.data(), keys.size(), 0, holder, pen, nodes.data(), is_new.get());
    for (size_t i = 0; i < keys.size(); ++i) held[keys[i]] = nodes[i];
  }
  while (!held.empty()) {
    const auto pin = blocks.epoch().pin();
    std::vector<Node> gone;
    std::vector<uint64_t> gone_keys;
    auto next = held.lower_bound(uint64_t{3} << 56 | random() >> 8);
    for (size_t more = 1 + random() % 300; more > 0 && next != held.end(); --more) {
      gone.push_back(next->second);
      gone_keys.push_back(next->first);
      next = held.erase(next);
    }
    blocks.release(gone, holder);
    CHECK(blocks.size() == held.size());
    for (const uint64_t key : gone_keys) CHECK(blocks.find(key) == 0);
    if (random() % 8 == 0)
      for (const auto& [key, node] : held) CHECK(blocks.find(key) == node);
    blocks.epoch().collect();
  }
}

// Writers that hold and release, each its own keys, the common ones and those that only writers hold, in the same
// chunks. A reader never sees a holder at a key that it never held, and always sees the one that never lets go; what a
// writer holds it finds, whoever lets go of it at the same moment.
void test_blocks_at_once() {
  constexpr uint32_t kWriters = 3, kStable = 50;
  Blocks blocks;
  std::vector<uint64_t> common;
  for (uint64_t i = 0; i < 150; ++i) common.push_back(i * 0x9E3779B97F4A7C15ULL << 8 | 0xC0);
  const auto own_key = [](uint32_t writer, uint64_t i) { return i * 0xD6E8FEB86659FD93ULL << 8 | writer; };
  {
    const auto pin = blocks.epoch().pin();
    Blocks::Pen pen;
    std::vector<Node> nodes(common.size());
    const std::unique_ptr<bool[]> is_new(new bool[common.size()]);
    blocks.hold(common.data(), common.size(), 0, holder_id(kStable, 0), pen, nodes.data(), is_new.get());
  }
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (uint32_t writer = 1; writer <= kWriters; ++writer)
    threads.emplace_back([&, writer] {
      std::mt19937_64 random(writer);
      Blocks::Pen pen;
      const HolderId holder = holder_id(writer, 0);
      while (!stop) {
        std::vector<uint64_t> keys(common.begin(), common.begin() + static_cast<long>(random() % common.size()));
        for (uint64_t i = 1 + random() % 100, from = 1 + random() % 50; i > 0; --i)
          keys.push_back(own_key(writer, from++));
        const size_t contested = keys.size();
        for (uint64_t i = 1 + random() % 40; i <= 40; ++i) keys.push_back(own_key(kWriters + 1, i));
        std::vector<Node> nodes(keys.size());
        const std::unique_ptr<bool[]> is_new(new bool[keys.size()]);
        {
          const auto pin = blocks.epoch().pin();
          blocks.hold(keys.data(), keys.size(), 0, holder, pen, nodes.data(), is_new.get());
          for (size_t i = contested; i < keys.size(); ++i) {
            const auto found = holders_of(blocks, keys[i]);
            if (std::find(found.begin(), found.end(), holder) == found.end()) std::abort();
          }
          std::vector<Node> gone;
          for (size_t i = keys.size(); i-- > 0;)
            if (is_new[i]) gone.push_back(nodes[i]);
          if (random() % 2) {
            blocks.release(gone, holder);
          } else {
            for (const Node node : gone) blocks.release(node, holder);
          }
          if (random() % 16 == 0) blocks.lay_down(pen);
        }
        blocks.epoch().collect();
      }
      const auto pin = blocks.epoch().pin();
      blocks.lay_down(pen);
    });
  std::mt19937_64 random(9);
  for (int i = 0; i < 30000; ++i) {
    const auto pin = blocks.epoch().pin();
    const auto found = holders_of(blocks, common[random() % common.size()]);
    if (std::find(found.begin(), found.end(), holder_id(kStable, 0)) == found.end()) std::abort();
    const auto writer = static_cast<uint32_t>(1 + random() % kWriters);
    for (const HolderId holder : holders_of(blocks, own_key(writer, 1 + random() % 150)))
      if (holder != holder_id(writer, 0)) std::abort();
  }
  stop = true;
  for (auto& each : threads) each.join();
  CHECK(blocks.size() == common.size());
}

}  // namespace

int main() {
  test_claims(1, 3000, 60000);
  test_claims(0x9E3779B97F4A7C15ULL, 3000, 60000);
  test_claims(uint64_t{1} << 40, 200, 20000);
  test_claims(3, 90000, 400000);
  test_chunk_set();
  test_epoch();
  for (uint64_t seed = 0; seed < 6; ++seed) test_blocks(seed % 2 == 1, seed);
  for (uint64_t seed = 0; seed < 3; ++seed) test_shrinking(seed);
  test_buried_is_counted();
  test_blocks_at_once();
  std::printf("%d passed, 0 failed\n", checks);
}
