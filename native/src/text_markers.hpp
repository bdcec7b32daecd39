// Cuts before added tokens, for tokenizers of which no more is known; see kvindex_server/tokenize/markers.py.
#pragma once

#include <string>
#include <vector>

#include "text_cuts.hpp"
#include "text_trie.hpp"

namespace kvindex {

class TextMarkers : public TextCuts {
 public:
  explicit TextMarkers(const std::vector<std::string>& contents) {
    for (const std::string& each : contents)
      if (!each.empty()) trie_.add(each, 0);
  }

  size_t next_cut(std::string_view text, size_t from) const override {
    for (size_t at = from == 0 ? 1 : from; (at = trie_.candidate(text, at)) < text.size(); ++at)
      if (trie_.longest(text, at) >= 0) return at;
    return text.size();
  }

 private:
  TextTrie trie_;
};

}  // namespace kvindex
