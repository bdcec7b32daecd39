#include "module_score.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bound_index.hpp"
#include "numbers.hpp"
#include "score_bytes.hpp"
#include "tally.hpp"

namespace nb = nanobind;

namespace kvindex {
namespace {

// Below this, giving the GIL away and getting it back costs more than reading the request.
constexpr size_t kLargeRequest = 32 * 1024;

struct Scorer {
  std::shared_ptr<Index> index;
  std::shared_ptr<Standings> standings;
  TierWeights weights;
  LookupTallies tallies;
};

template <auto kRead>
std::optional<ScoreRequest> read(const nb::bytes& encoded, const RequestLimits& limits) {
  const std::string_view view(encoded.c_str(), encoded.size());
  if (view.size() < kLargeRequest) return kRead(view, limits);
  nb::gil_scoped_release release;
  return kRead(view, limits);
}

nb::bytes answer(const Scorer& self, const ScoreRequest& request, const std::string& lora,
                 const std::vector<std::string>& known, const nb::callable& refresh, const nb::callable& unknown_tier,
                 const nb::object& heard, int64_t started_ns) {
  const std::shared_ptr<const Candidates> candidates =
      distinct(request.pods == nullptr ? std::make_shared<const PodList>(known) : request.pods, self.index->names());
  const Candidates& pods = *candidates;
  std::vector<std::pair<size_t, uint32_t>> outdated;
  if (!request.hits_only) outdated = self.standings->outdated(pods.numbers, now_ns());  // else nothing is said of trust
  if (!outdated.empty()) {
    nb::list asked;
    for (const auto& [pod, rank] : outdated) asked.append(nb::make_tuple(pods.names[pod], rank));
    refresh(asked);
  }
  thread_local Output output;
  output.clear();
  ScoreBytes scored;
  {
    nb::gil_scoped_release release;
    scored = score_bytes(*self.index, *self.standings, self.weights, request, lora, pods, output);
    self.tallies.looked(scored.total_blocks, scored.best_match);
    self.tallies.match_time->observe(static_cast<double>(scored.match_ns) * 1e-9);
    self.tallies.all_time->observe(static_cast<double>(now_ns() - started_ns) * 1e-9);
  }
  const nb::bytes encoded(output.view().data(), output.view().size());
  for (const std::string& tier : scored.unknown_tiers) unknown_tier(tier);
  if (!heard.is_none()) heard(scored.total_blocks, scored.best_match, static_cast<double>(scored.match_ns) * 1e-9);
  return encoded;
}

// A request that needs nothing but the index: tokens or keys, for a model in `routes`, which has for each name it may
// be asked by (scorer, lora, known, refresh, unknown_tier, heard).
nb::object answer_plain(const nb::bytes& encoded, const RequestLimits& limits, const nb::dict& routes) {
  const int64_t started = now_ns();
  const std::optional<ScoreRequest> request = read<read_score_request>(encoded, limits);
  if (!request || !request->text.empty() || !request->media_fit()) return nb::none();
  const nb::str name(request->model.data(), request->model.size());
  PyObject* const route = PyDict_GetItemWithError(routes.ptr(), name.ptr());
  if (route == nullptr) {
    if (PyErr_Occurred() != nullptr) throw nb::python_error();
    return nb::none();
  }
  const auto parts = nb::borrow<nb::tuple>(route);  // kept: another thread may change the dict
  std::vector<std::string> known;
  if (request->pods == nullptr) known = nb::cast<std::vector<std::string>>(nb::borrow<nb::callable>(parts[2])());
  return answer(nb::cast<const Scorer&>(parts[0]), *request, nb::cast<std::string>(parts[1]), known,
                nb::borrow<nb::callable>(parts[3]), nb::borrow<nb::callable>(parts[4]), nb::borrow(parts[5]), started);
}

}  // namespace

void bind_score(nb::module_& m) {
  nb::class_<RequestLimits>(m, "RequestLimits")
      .def(
          "__init__",
          [](RequestLimits* self, uint64_t max_tokens, uint64_t max_pods, uint64_t max_keys,
             uint64_t max_prompt_bytes) { new (self) RequestLimits{max_tokens, max_pods, max_keys, max_prompt_bytes}; },
          nb::arg("max_tokens"), nb::arg("max_pods"), nb::arg("max_keys"), nb::arg("max_prompt_bytes"));

  nb::class_<ScoreRequest>(m, "ScoreRequest")
      .def_ro("model", &ScoreRequest::model)
      .def_prop_ro("names_pods", [](const ScoreRequest& self) { return self.pods != nullptr; })
      .def_prop_ro("is_prompt", [](const ScoreRequest& self) { return self.input == ScoreRequest::Input::kPrompt; })
      .def_prop_ro("is_chat", [](const ScoreRequest& self) { return self.input == ScoreRequest::Input::kChat; })
      .def_ro("text", &ScoreRequest::text)
      .def_prop_ro("media_fit", &ScoreRequest::media_fit)
      .def(
          "set_keys",
          [](ScoreRequest& self, nb::bytes keys, uint64_t tokens) {
            self.keys = Numbers<uint64_t>(keys, "keys must be 8 bytes each").copy();
            self.text_tokens = tokens;
          },
          nb::arg("keys"), nb::arg("tokens"))
      .def_prop_ro("lora_name", [](const ScoreRequest& self) { return self.extras.lora_name; })
      .def_prop_ro("cache_salt", [](const ScoreRequest& self) { return self.extras.cache_salt; })
      .def_prop_ro("has_media", [](const ScoreRequest& self) { return !self.extras.mm_features.empty(); });

  m.def("read_score_request", &read<read_score_request>, nb::arg("encoded"), nb::arg("limits"), nb::rv_policy::move);
  m.def("read_pod_scores_request", &read<read_pod_scores_request>, nb::arg("encoded"), nb::arg("limits"),
        nb::rv_policy::move);

  m.def("answer_plain", &answer_plain, nb::arg("encoded"), nb::arg("limits"), nb::arg("routes"));

  nb::class_<Counter>(m, "Counter")
      .def(nb::init<>())
      .def("add", &Counter::add, nb::arg("amount"))
      .def_prop_ro("total", &Counter::total);

  nb::class_<Histogram>(m, "Histogram")
      .def(nb::init<std::vector<double>>(), nb::arg("bounds"))
      .def("observe", &Histogram::observe, nb::arg("value"))
      .def_prop_ro("counts", &Histogram::counts)
      .def_prop_ro("sum", &Histogram::sum);

  nb::class_<LookupTallies>(m, "LookupTallies")
      .def(
          "__init__",
          [](LookupTallies* self, std::shared_ptr<Counter> looked_up, std::shared_ptr<Counter> matched,
             std::shared_ptr<Histogram> best, std::shared_ptr<Histogram> ratio, std::shared_ptr<Histogram> match_time,
             std::shared_ptr<Histogram> all_time) {
            new (self) LookupTallies{std::move(looked_up), std::move(matched),    std::move(best),
                                     std::move(ratio),     std::move(match_time), std::move(all_time)};
          },
          nb::arg("looked_up"), nb::arg("matched"), nb::arg("best"), nb::arg("ratio"), nb::arg("match_time"),
          nb::arg("all_time"))
      .def("looked", &LookupTallies::looked, nb::arg("blocks"), nb::arg("best_match"));

  nb::class_<Scorer>(m, "Scorer")
      .def(
          "__init__",
          [](Scorer* self, const std::shared_ptr<Index>& index, std::unordered_map<std::string, double> weights,
             const LookupTallies& tallies) {
            // Every index that Python holds was made as a BoundIndex.
            new (self) Scorer{index, static_cast<const BoundIndex&>(*index).standings, TierWeights(std::move(weights)),
                              tallies};
          },
          nb::arg("index"), nb::arg("weights"), nb::arg("tallies"))
      .def("answer", &answer, nb::arg("request"), nb::arg("lora"), nb::arg("known"), nb::arg("refresh"),
           nb::arg("unknown_tier"), nb::arg("heard").none(), nb::arg("started_ns"))
      .def(
          "tell",
          [](const Scorer& self, const std::string& pod, uint32_t rank, int trust, std::string reason,
             double age_seconds, int64_t asked_at) {
            if (trust < 1 || trust > 4) throw nb::value_error("trust must be in 1..4");
            self.standings->tell(pod, rank, {static_cast<Trust>(trust), std::move(reason), age_seconds}, asked_at);
          },
          nb::arg("pod"), nb::arg("rank"), nb::arg("trust"), nb::arg("reason"), nb::arg("age_seconds"),
          nb::arg("asked_at"));
}

}  // namespace kvindex
