#include "module_text.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <string>

#include "numbers.hpp"
#include "score_request.hpp"
#include "text_cache.hpp"
#include "text_encoder.hpp"
#include "text_markers.hpp"

namespace nb = nanobind;

namespace kvindex {
namespace {

EncoderPlan plan_of(nb::dict fields) {
  EncoderPlan plan;
  const auto text = [&](const char* name) {
    const auto bytes = nb::cast<nb::bytes>(fields[name]);
    return std::string(bytes.c_str(), bytes.size());
  };
  plan.classes = text("classes");
  plan.inert = text("inert");
  plan.space = text("space");
  plan.cuts = text("cuts");
  plan.class_count = static_cast<uint32_t>(plan.inert.size());
  for (nb::handle pass : nb::cast<nb::list>(fields["passes"]))
    plan.passes.push_back(Numbers<uint16_t>(nb::cast<nb::bytes>(pass), "passes").copy());
  for (nb::handle each : nb::cast<nb::list>(fields["added"])) {
    const auto [content, id, lstrip, rstrip, normalized] =
        nb::cast<std::tuple<std::string, uint32_t, bool, bool, bool>>(each);
    plan.added.push_back({content, id, lstrip, rstrip, normalized});
  }
  plan.byte_ids = Numbers<uint32_t>(nb::cast<nb::bytes>(fields["byte_ids"]), "byte_ids").copy();
  plan.char_ids = Numbers<uint32_t>(nb::cast<nb::bytes>(fields["char_ids"]), "char_ids").copy();
  plan.joints = Numbers<uint32_t>(nb::cast<nb::bytes>(fields["joints"]), "joints").copy();
  plan.merges = Numbers<uint32_t>(nb::cast<nb::bytes>(fields["merges"]), "merges").copy();
  for (auto [word, id] : nb::cast<nb::dict>(fields["whole_words"])) {
    const auto bytes = nb::cast<nb::bytes>(word);
    plan.whole_words.emplace(std::string(bytes.c_str(), bytes.size()), nb::cast<uint32_t>(id));
  }
  plan.word_slots = nb::cast<size_t>(fields["word_slots"]);
  return plan;
}

// A tokenizer as the cache asks for it; `reference` is called with the GIL held.
struct BoundText {
  std::shared_ptr<TextCache> cache;
  std::shared_ptr<const TextEncoder> encoder;
  std::shared_ptr<const TextMarkers> markers;
  uint64_t root;
  std::vector<uint32_t> prefix, suffix;
  nb::callable reference;
  size_t max_reference_bytes;

  TextRequest request(std::string_view text, size_t max_tokens, double seconds) const {
    TextRequest out;
    out.text = text;
    out.encoder = encoder.get();
    out.cuts = encoder ? static_cast<const TextCuts*>(encoder.get()) : markers.get();
    out.root = root;
    out.prefix = prefix;
    out.suffix = suffix;
    out.max_tokens = max_tokens;
    out.max_reference_bytes = max_reference_bytes;
    if (seconds < 1e6) {
      const std::chrono::duration<double> left(seconds);
      out.deadline = std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::nanoseconds>(left);
    }
    out.reference = [this](std::string_view chunk, double left) {
      nb::gil_scoped_acquire gil;
      const auto ids = nb::cast<nb::bytes>(reference(nb::str(chunk.data(), chunk.size()), left));
      return Numbers<uint32_t>(ids, "ids must be 4 bytes each").copy();
    };
    return out;
  }
};

nb::object result_of(const TextAnswer& answer, nb::bytes&& data) {
  switch (answer.outcome) {
    case TextOutcome::kDone: return nb::make_tuple(data, answer.tokens);
    case TextOutcome::kTooManyTokens: return nb::str("too_many_tokens");
    case TextOutcome::kTooLong: return nb::str("too_long");
    case TextOutcome::kTooLate: break;
  }
  return nb::str("too_late");
}

std::string_view text_of(std::string_view text) { return text; }
std::string_view text_of(const ScoreRequest& request) { return request.text; }

// A request's text is not copied into a Python string, which for all but ASCII costs more than the rest.
template <typename From>
nb::object keys_of(const BoundText& self, From from, uint32_t block_size, uint64_t seed, std::string lora_name,
                   std::string cache_salt, size_t max_tokens, double seconds) {
  if (block_size == 0) throw nb::value_error("block_size must not be 0");
  const KeyContext context{block_size, seed, std::move(lora_name), std::move(cache_salt)};
  TextAnswer answer;
  {
    nb::gil_scoped_release release;
    answer = self.cache->keys(self.request(text_of(from), max_tokens, seconds), context);
  }
  return result_of(answer, nb::bytes(reinterpret_cast<const char*>(answer.keys.data()), answer.keys.size() * 8));
}

}  // namespace

void bind_text(nb::module_& m) {
  nb::class_<TextEncoder>(m, "TextEncoder")
      .def(nb::new_([](nb::dict plan) { return std::make_shared<TextEncoder>(plan_of(plan)); }), nb::arg("plan"))
      .def(
          "encode",
          [](const TextEncoder& self, std::string_view text) -> nb::object {
            std::vector<uint32_t> ids;
            bool done = false;
            {
              nb::gil_scoped_release release;
              done = self.encode(text, ids);
            }
            if (!done) return nb::none();
            return nb::bytes(reinterpret_cast<const char*>(ids.data()), ids.size() * 4);
          },
          nb::arg("text"))
      .def_prop_ro("refuted", &TextEncoder::refuted)
      .def("next_cut", &TextEncoder::next_cut, nb::arg("text"), nb::arg("start"));

  nb::class_<TextMarkers>(m, "TextMarkers")
      .def(nb::new_([](const std::vector<std::string>& contents) { return std::make_shared<TextMarkers>(contents); }),
           nb::arg("contents"))
      .def("next_cut", &TextMarkers::next_cut, nb::arg("text"), nb::arg("start"));

  nb::class_<TextCache>(m, "TextCache")
      .def(nb::new_([](size_t max_bytes, uint64_t verify_every, size_t chunk_bytes) {
             return std::make_shared<TextCache>(max_bytes, verify_every, chunk_bytes);
           }),
           nb::arg("max_bytes"), nb::arg("verify_every") = 0, nb::arg("chunk_bytes") = 4096)
      .def("stats", [](const TextCache& self) {
        const TextCacheStats stats = self.stats();
        nb::dict out;
        out["chunk_hits"] = stats.chunk_hits;
        out["chunk_misses"] = stats.chunk_misses;
        out["waits"] = stats.waits;
        out["evictions"] = stats.evictions;
        out["tokens_saved"] = stats.tokens_saved;
        out["tokens_encoded"] = stats.tokens_encoded;
        out["reference_chunks"] = stats.reference_chunks;
        out["verified_chunks"] = stats.verified_chunks;
        out["bytes"] = stats.bytes;
        out["chunks"] = stats.chunks;
        return out;
      });

  nb::class_<BoundText>(m, "Text")
      .def(
          "__init__",
          [](BoundText* self, std::shared_ptr<TextCache> cache, std::shared_ptr<TextEncoder> encoder, uint64_t root,
             std::vector<uint32_t> prefix, std::vector<uint32_t> suffix, nb::callable reference,
             size_t max_reference_bytes, std::shared_ptr<TextMarkers> markers) {
            new (self) BoundText{std::move(cache),  std::move(encoder), std::move(markers),   root,
                                 std::move(prefix), std::move(suffix),  std::move(reference), max_reference_bytes};
          },
          nb::arg("cache"), nb::arg("encoder").none(), nb::arg("root"), nb::arg("prefix"), nb::arg("suffix"),
          nb::arg("reference"), nb::arg("max_reference_bytes") = SIZE_MAX, nb::arg("markers").none() = nb::none())
      .def(
          "ids",
          [](const BoundText& self, std::string_view text, size_t max_tokens, double seconds) {
            TextAnswer answer;
            {
              nb::gil_scoped_release release;
              answer = self.cache->ids(self.request(text, max_tokens, seconds));
            }
            return result_of(answer,
                             nb::bytes(reinterpret_cast<const char*>(answer.ids.data()), answer.ids.size() * 4));
          },
          nb::arg("text"), nb::arg("max_tokens"), nb::arg("seconds"))
      .def("keys", &keys_of<std::string_view>, nb::arg("text"), nb::arg("block_size"), nb::arg("seed"),
           nb::arg("lora_name"), nb::arg("cache_salt"), nb::arg("max_tokens"), nb::arg("seconds"))
      .def("keys", &keys_of<const ScoreRequest&>, nb::arg("text"), nb::arg("block_size"), nb::arg("seed"),
           nb::arg("lora_name"), nb::arg("cache_salt"), nb::arg("max_tokens"), nb::arg("seconds"));
}

}  // namespace kvindex
