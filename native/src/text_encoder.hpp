// Encodes text to token ids as a BPE tokenizer does: added tokens, pre-tokens, known words, merges.
//
// Two shapes: byte-level with pre-tokens found by tables of states, and character-level without pre-tokens (spaces
// become U+2581, what has no token becomes bytes), where a text falls apart between characters that no merge joins.
#pragma once

#include <atomic>
#include <cstdint>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "text_classes.hpp"
#include "text_cuts.hpp"
#include "text_split.hpp"
#include "text_trie.hpp"
#include "text_words.hpp"

namespace kvindex {

struct AddedToken {
  std::string content;
  uint32_t id;
  bool lstrip, rstrip;  // takes the white space beside it away
  bool normalized;      // searched for only in what the others leave
};

// What a tokenizer's definition says, made by kvindex_server/tokenize/plan.py.
struct EncoderPlan {
  std::string classes;                        // class of each code point
  uint32_t class_count = 0;                   //
  std::string inert;                          // per class: the normalizer leaves its characters alone
  std::string space;                          // per class: white space
  std::string cuts;                           // per pair of classes (left * class_count + right): a safe place to cut
  std::vector<std::vector<uint16_t>> passes;  // tables of states, see pattern.py; none: character-level
  std::vector<uint32_t> char_ids;             // character-level: (character, token)
  std::vector<uint32_t> joints;               // character-level: (left, right) that a merge or an added token joins
  std::vector<AddedToken> added;
  std::vector<uint32_t> byte_ids;                         // token of each byte, 256
  std::vector<uint32_t> merges;                           // (left, right, product) in order of rank
  std::unordered_map<std::string, uint32_t> whole_words;  // words that are looked up before any merge
  size_t word_slots = 1 << 17;
};

class TextEncoder : public TextCuts {
 public:
  explicit TextEncoder(EncoderPlan plan);

  // Appends the ids of valid UTF-8. False (and nothing appended) when the normalizer could change the text, or
  // after the encoder was found wrong.
  bool encode(std::string_view text, std::vector<uint32_t>& ids) const;
  void refute() const { refuted_ = true; }
  bool refuted() const { return refuted_; }

  size_t next_cut(std::string_view text, size_t from) const override;

 private:
  struct Merge {
    uint64_t pair;  // plus one, so that 0 is none
    uint32_t rank, product;
  };
  struct Fresh {
    size_t offset, size, id_offset, id_count;
  };
  struct Work;

  bool joined(uint32_t left, uint32_t right) const;
  void split_joints(size_t begin, size_t end, Work& work) const;
  void symbols_of(std::string_view word, std::vector<uint32_t>& symbols) const;
  bool is_inert(std::string_view text) const;
  void split_added(const TextTrie& trie, size_t begin, size_t end, bool last, Work& work) const;
  void split_pass(size_t pass, size_t begin, size_t end, Work& work) const;
  void word(size_t begin, size_t end, Work& work) const;
  void flush(Work& work) const;
  void merge(std::string_view word, Work& work) const;
  void merge_short(std::vector<uint32_t>& symbols) const;
  void merge_long(std::vector<uint32_t>& symbols) const;
  const Merge* find_merge(uint32_t left, uint32_t right) const;

  EncoderPlan plan_;
  CharClasses classes_;
  std::vector<Splitter> passes_;
  bool by_character_ = false;
  std::unordered_map<uint32_t, uint32_t> char_ids_;
  std::unordered_set<uint64_t> joints_;
  std::vector<uint8_t> ascii_joints_;  // 128 * 128, the space as U+2581
  bool all_inert_;
  TextTrie plain_, normalized_;
  Zeroed<Merge> merges_;
  size_t merge_mask_ = 0;
  mutable std::atomic<bool> refuted_ = false;
  mutable std::shared_mutex words_lock_;
  mutable Words words_;
};

}  // namespace kvindex
