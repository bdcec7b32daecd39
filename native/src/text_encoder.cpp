#include "text_encoder.hpp"

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <queue>
#include <stdexcept>

namespace kvindex {

namespace {

constexpr size_t kWordsAhead = 32;  // looked up together, so that their memory is fetched together
constexpr size_t kEnds = 512;       // ends of pieces found in one go
constexpr size_t kShortWord = 48;   // symbols up to which a scan beats a queue
constexpr uint32_t kSpaceSign = 0x2581;
constexpr uint64_t kNoPair = 0;

uint64_t pair_of(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }
size_t place(uint64_t pair) { return xxh3_detail::mul_fold(pair ^ 0x9E3779B97F4A7C15ULL, 0xD6E8FEB86659FD93ULL); }

}  // namespace

// One text on its way: where it is, what came out, and the words met for the first time.
struct TextEncoder::Work {
  std::string_view text;
  std::vector<uint32_t>& ids;  // longer than what is in it: ids are written without asking for room one by one
  size_t used;
  std::vector<Fresh> fresh;
  Words::Wanted wanted[kWordsAhead];
  size_t waiting = 0;

  // Where to write the next ids, at most so many.
  uint32_t* room(size_t count) {
    if (ids.size() < used + count) ids.resize(std::max(used + count, ids.size() * 2));
    return ids.data() + used;
  }
};

TextEncoder::TextEncoder(EncoderPlan plan) : plan_(std::move(plan)), words_(plan_.word_slots) {
  const size_t classes = plan_.class_count;
  if (plan_.classes.size() != 0x110000 || classes > 255 || plan_.byte_ids.size() != 256 ||
      plan_.inert.size() != classes || plan_.space.size() != classes || plan_.cuts.size() != classes * classes ||
      plan_.merges.size() % 3 != 0 || plan_.passes.empty() == plan_.char_ids.empty() ||
      plan_.char_ids.size() % 2 != 0 || plan_.joints.size() % 2 != 0)
    throw std::invalid_argument("malformed encoder plan");
  for (const char each : plan_.classes)
    if (static_cast<uint8_t>(each) >= classes) throw std::invalid_argument("a class out of range");
  classes_ = CharClasses(plan_.classes);
  for (const auto& pass : plan_.passes) passes_.emplace_back(pass, classes_, classes);
  plan_.classes = std::string();
  all_inert_ = std::find(plan_.inert.begin(), plan_.inert.end(), 0) == plan_.inert.end();
  for (size_t i = 0; i < plan_.added.size(); ++i)
    if (!plan_.added[i].content.empty())
      (plan_.added[i].normalized ? normalized_ : plain_).add(plan_.added[i].content, static_cast<int32_t>(i));
  const size_t count = plan_.merges.size() / 3;
  merge_mask_ = std::bit_ceil(std::max<size_t>(count * 2, 16)) - 1;
  merges_ = Zeroed<Merge>(merge_mask_ + 1);
  for (size_t rank = 0; rank < count; ++rank) {
    const uint64_t pair = pair_of(plan_.merges[rank * 3], plan_.merges[rank * 3 + 1]) + 1;
    size_t at = place(pair) & merge_mask_;
    while (merges_[at].pair != kNoPair && merges_[at].pair != pair) at = (at + 1) & merge_mask_;
    merges_[at] = {pair, static_cast<uint32_t>(rank), plan_.merges[rank * 3 + 2]};  // the last one of a pair holds
  }
  plan_.merges = {};
  by_character_ = passes_.empty();
  if (!by_character_) return;
  for (size_t i = 0; i < plan_.char_ids.size(); i += 2) char_ids_[plan_.char_ids[i]] = plan_.char_ids[i + 1];
  for (size_t i = 0; i < plan_.joints.size(); i += 2) joints_.insert(pair_of(plan_.joints[i], plan_.joints[i + 1]));
  for (uint32_t left = 0; left < 128; ++left)
    for (uint32_t right = 0; right < 128; ++right)
      ascii_joints_.push_back(
          joints_.contains(pair_of(left == ' ' ? kSpaceSign : left, right == ' ' ? kSpaceSign : right)));
  plan_.char_ids = plan_.joints = {};
}

inline bool TextEncoder::joined(uint32_t left, uint32_t right) const {
  if ((left | right) < 128) return ascii_joints_[left * 128 + right] != 0;
  return joints_.contains(pair_of(left == ' ' ? kSpaceSign : left, right == ' ' ? kSpaceSign : right));
}

bool TextEncoder::is_inert(std::string_view text) const {
  if (all_inert_) return true;
  size_t at = 0, size = 0;
  while (at < text.size()) {
    uint64_t eight = 0;
    if (at + 8 <= text.size()) std::memcpy(&eight, text.data() + at, 8);
    if (at + 8 <= text.size() && (eight & 0x8080808080808080ULL) == 0) {
      at += 8;
    } else {
      if (plan_.inert[classes_.at(text.data() + at, size)] == 0) return false;
      at += size;
    }
  }
  return true;
}

size_t TextEncoder::next_cut(std::string_view text, size_t from) const {
  if (from == 0 || from >= text.size()) from = std::min(std::max<size_t>(from, 1), text.size());
  if (text.empty()) return 0;
  if (refuted_) return text.size();  // what is wrong may be the very patterns that the cuts come from
  size_t at = from;
  while (at < text.size() && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) ++at;
  size_t size = 0, left = point_before(text, at);
  for (size_t next = 0; at < text.size(); left = at, at = next) {
    const uint8_t left_class = classes_.at(text.data() + left, size), right_class = classes_.at(text.data() + at, size);
    next = at + size;
    if (plan_.cuts[left_class * plan_.class_count + right_class] == 0) continue;
    if (!by_character_ || !joined(point_at(text.data() + left, size), point_at(text.data() + at, size))) return at;
  }
  return text.size();
}

bool TextEncoder::encode(std::string_view text, std::vector<uint32_t>& ids) const {
  if (text.empty()) return true;
  if (refuted_ || !is_inert(text)) return false;
  Work work{text, ids, ids.size(), {}, {}, 0};
  (void)work.room(text.size() / 3 + kWordsAhead * Words::kRoom);
  {
    const std::shared_lock lock(words_lock_);
    if (plain_.empty())
      split_added(normalized_, 0, text.size(), true, work);
    else
      split_added(plain_, 0, text.size(), false, work);
    flush(work);
  }
  ids.resize(work.used);
  if (!work.fresh.empty()) {
    const std::unique_lock lock(words_lock_);
    for (const Fresh& each : work.fresh)
      words_.insert(text.substr(each.offset, each.size), ids.data() + each.id_offset, each.id_count);
  }
  return true;
}

// Leftmost, and of those the longest; the text between goes on to the second set, or to the pre-tokenizer.
void TextEncoder::split_added(const TextTrie& trie, size_t begin, size_t end, bool last, Work& work) const {
  const auto go_on = [&](size_t from, size_t to) {
    if (from == to) return;
    if (!last && !normalized_.empty())
      split_added(normalized_, from, to, true, work);
    else if (by_character_)
      split_joints(from, to, work);
    else
      split_pass(0, from, to, work);
  };
  if (trie.empty()) return go_on(begin, end);
  const std::string_view text = work.text.substr(0, end);
  size_t start = begin;  // of the text that no token has taken yet
  for (size_t at = begin; (at = trie.candidate(text, at)) < end;) {
    const int32_t token = trie.longest(text, at);
    if (token < 0) {
      ++at;
      continue;
    }
    const AddedToken& added = plan_.added[token];
    size_t from = at, to = at + added.content.size(), size = 0;
    at = to;  // the next search starts behind the token itself
    if (added.lstrip)
      while (from > start) {
        const size_t left = point_before(text, from);
        if (plan_.space[classes_.at(text.data() + left, size)] == 0) break;
        from = left;
      }
    if (added.rstrip)
      while (to < end && plan_.space[classes_.at(text.data() + to, size)] != 0) to += size;
    from = std::max(from, start);
    go_on(start, from);
    flush(work);
    *work.room(1) = added.id;
    ++work.used;
    start = to;
  }
  go_on(start, end);
}

[[gnu::always_inline]] inline void TextEncoder::word(size_t begin, size_t end, Work& work) const {
  const std::string_view found(work.text.data() + begin, end - begin);
  words_.want(found, work.text.size() - begin, work.wanted[work.waiting++]);
  if (work.waiting == kWordsAhead) flush(work);
}

void TextEncoder::split_pass(size_t pass, size_t begin, size_t end, Work& work) const {
  const bool last = pass + 1 == passes_.size();
  size_t ends[kEnds];
  for (size_t from = begin; begin < end;) {
    const size_t count = passes_[pass].split(classes_, work.text, begin, end, ends, kEnds);
    for (size_t i = 0; i < count; from = ends[i++]) {
      if (last)
        word(from, ends[i], work);
      else
        split_pass(pass + 1, from, ends[i], work);
    }
  }
}

void TextEncoder::split_joints(size_t begin, size_t end, Work& work) const {
  const char* const text = work.text.data();
  size_t start = begin, size = 0;
  uint32_t left = point_at(text + begin, size);
  for (size_t at = begin + size; at < end; at += size) {
    const uint32_t right = point_at(text + at, size);
    if (!joined(left, right)) {
      word(start, at, work);
      start = at;
    }
    left = right;
  }
  word(start, end, work);
}

void TextEncoder::flush(Work& work) const {
  uint32_t* out = work.room(kWordsAhead * Words::kRoom);
  for (size_t i = 0; i < work.waiting; ++i) {
    const Words::Wanted& wanted = work.wanted[i];
    const size_t known = words_.find(wanted, out);
    out += known;
    if (known != 0) continue;
    const auto begin = static_cast<size_t>(out - work.ids.data());
    work.used = begin;
    merge(wanted.word, work);
    work.fresh.push_back(
        {static_cast<size_t>(wanted.word.data() - work.text.data()), wanted.word.size(), begin, work.used - begin});
    out = work.room(kWordsAhead * Words::kRoom);
  }
  work.used = static_cast<size_t>(out - work.ids.data());
  work.waiting = 0;
}

void TextEncoder::merge(std::string_view text, Work& work) const {
  if (!plan_.whole_words.empty()) {
    const auto found = plan_.whole_words.find(std::string(text));
    if (found != plan_.whole_words.end()) {
      *work.room(1) = found->second;
      ++work.used;
      return;
    }
  }
  std::vector<uint32_t> symbols;
  symbols_of(text, symbols);
  if (symbols.size() <= kShortWord)
    merge_short(symbols);
  else
    merge_long(symbols);
  std::copy(symbols.begin(), symbols.end(), work.room(symbols.size()));
  work.used += symbols.size();
}

void TextEncoder::symbols_of(std::string_view text, std::vector<uint32_t>& symbols) const {
  symbols.reserve(text.size());
  size_t size = 1;
  for (size_t at = 0; at < text.size(); at += size) {
    if (by_character_) {
      const uint32_t point = point_at(text.data() + at, size);
      const auto found = char_ids_.find(point == ' ' ? kSpaceSign : point);
      if (found != char_ids_.end()) {
        symbols.push_back(found->second);
        continue;
      }
    }
    for (size_t i = at; i < at + size; ++i) symbols.push_back(plan_.byte_ids[static_cast<uint8_t>(text[i])]);
  }
}

const TextEncoder::Merge* TextEncoder::find_merge(uint32_t left, uint32_t right) const {
  const uint64_t pair = pair_of(left, right) + 1;
  for (size_t at = place(pair) & merge_mask_; merges_[at].pair != kNoPair; at = (at + 1) & merge_mask_)
    if (merges_[at].pair == pair) return &merges_[at];
  return nullptr;
}

// The pair of lowest rank first, of equal ones the leftmost, until none is left.
void TextEncoder::merge_short(std::vector<uint32_t>& symbols) const {
  const Merge* of[kShortWord];
  size_t size = symbols.size();
  for (size_t i = 0; i + 1 < size; ++i) of[i] = find_merge(symbols[i], symbols[i + 1]);
  while (size > 1) {
    size_t best = size;
    for (size_t i = 0; i + 1 < size; ++i)
      if (of[i] != nullptr && (best == size || of[i]->rank < of[best]->rank)) best = i;
    if (best == size) break;
    symbols[best] = of[best]->product;
    for (size_t i = best + 1; i + 1 < size; ++i) {
      symbols[i] = symbols[i + 1];
      of[i] = i + 2 < size ? of[i + 1] : nullptr;
    }
    --size;
    if (best > 0) of[best - 1] = find_merge(symbols[best - 1], symbols[best]);
    if (best + 1 < size) of[best] = find_merge(symbols[best], symbols[best + 1]);
  }
  symbols.resize(size);
}

// The same with a queue: a word of thousands of letters must not cost its square.
void TextEncoder::merge_long(std::vector<uint32_t>& symbols) const {
  struct Node {
    uint32_t id;
    int32_t previous, next;
  };
  struct Entry {
    uint32_t rank;
    int32_t at;
    uint32_t left, right, product;
    bool operator<(const Entry& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  std::vector<Node> nodes;
  nodes.reserve(symbols.size());
  const auto size = static_cast<int32_t>(symbols.size());
  for (int32_t i = 0; i < size; ++i) nodes.push_back({symbols[i], i - 1, i + 1 < size ? i + 1 : -1});
  std::vector<Entry> entries;
  const auto entry_at = [&](int32_t at, auto&& take) {
    const int32_t next = nodes[at].next;
    if (next < 0) return;
    if (const Merge* found = find_merge(nodes[at].id, nodes[next].id))
      take(Entry{found->rank, at, nodes[at].id, nodes[next].id, found->product});
  };
  for (int32_t i = 0; i + 1 < size; ++i) entry_at(i, [&](const Entry& each) { entries.push_back(each); });
  std::priority_queue<Entry> queue(std::less<Entry>(), std::move(entries));
  constexpr int32_t kGone = -2;
  while (!queue.empty()) {
    const Entry top = queue.top();
    queue.pop();
    Node& left = nodes[top.at];
    if (left.previous == kGone || left.id != top.left || left.next < 0 || nodes[left.next].id != top.right) continue;
    Node& right = nodes[left.next];
    left.id = top.product;
    left.next = right.next;
    right.previous = kGone;
    if (left.next >= 0) nodes[left.next].previous = top.at;
    entry_at(top.at, [&](const Entry& each) { queue.push(each); });
    if (left.previous >= 0) entry_at(left.previous, [&](const Entry& each) { queue.push(each); });
  }
  symbols.clear();
  for (int32_t at = 0; at >= 0; at = nodes[at].next) symbols.push_back(nodes[at].id);
}

}  // namespace kvindex
