#include "module_store.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "numbers.hpp"
#include "store_view.hpp"

namespace nb = nanobind;

namespace kvindex {
namespace {

using Streams = std::vector<std::tuple<std::string, uint32_t, uint64_t, nb::bytes, std::vector<uint32_t>>>;

void open(StoreView* self, const Streams& streams) {
  std::vector<StoredStream> stored;
  for (const auto& [pod, rank, life, groups, tiers] : streams) {
    StoredStream& each = stored.emplace_back();
    each.pod = pod;
    each.rank = rank;
    each.life = life;
    each.groups.assign(groups.c_str(), groups.size());
    each.tiers.fill(kMaxTiers);
    for (size_t i = 0; i < tiers.size() && i < kMaxTiers; ++i)
      each.tiers[i] = static_cast<uint8_t>(tiers[i] < kMaxTiers ? tiers[i] : kMaxTiers);
  }
  new (self) StoreView(stored);
}

std::vector<Reading> readings_of(const std::vector<nb::bytes>& blobs) {
  if (blobs.empty()) throw nb::value_error("there must be a reading per partition");
  std::vector<Reading> readings;
  for (const nb::bytes& each : blobs) readings.emplace_back(each.c_str(), each.size());
  return readings;
}

nb::list score(StoreView& self, nb::bytes keys, const std::vector<nb::bytes>& blobs, uint32_t block_size,
               const Pods& pods, const std::vector<double>& weights) {
  const Numbers<uint64_t> values(keys, "keys must be 8 bytes each");
  const auto readings = readings_of(blobs);
  std::vector<Match> matches;
  bool well_formed;
  {
    nb::gil_scoped_release release;
    well_formed = self.score(values.data(), values.size(), readings, block_size, pods, weights, matches);
  }
  if (!well_formed) throw nb::value_error("malformed reading");
  nb::list out;
  for (const Match& each : matches) {
    nb::list tiers;
    for (const uint32_t blocks : each.tier_blocks) tiers.append(blocks);
    out.append(nb::make_tuple(std::string(each.pod), each.rank, each.blocks, each.score, tiers, each.speculative));
  }
  return out;
}

nb::list holders(const StoreView& self, nb::bytes keys, const std::vector<nb::bytes>& blobs, const Pods& pods) {
  const Numbers<uint64_t> values(keys, "keys must be 8 bytes each");
  const auto readings = readings_of(blobs);
  std::vector<std::vector<Holder>> found;
  bool well_formed;
  {
    nb::gil_scoped_release release;
    well_formed = self.holders(values.data(), values.size(), readings, pods, found);
  }
  if (!well_formed) throw nb::value_error("malformed reading");
  nb::list out;
  for (const auto& of_key : found) {
    nb::list entry;
    for (const Holder& each : of_key)
      entry.append(nb::make_tuple(std::string(each.pod), each.rank, each.tier, each.group, each.speculative));
    out.append(entry);
  }
  return out;
}

}  // namespace

void bind_store(nb::module_& m) {
  nb::class_<StoreView>(m, "StoreView")
      .def("__init__", &open, nb::arg("streams"))
      .def_prop_ro("prefix_only", &StoreView::prefix_only)
      .def("score", &score, nb::arg("keys"), nb::arg("readings"), nb::arg("block_size"), nb::arg("pods"),
           nb::arg("weights"))
      .def("holders", &holders, nb::arg("keys"), nb::arg("readings"), nb::arg("pods"));
  m.def(
      "split_keys",
      [](nb::bytes keys, uint32_t partitions) {
        if (partitions == 0) throw nb::value_error("partitions must not be 0");
        const Numbers<uint64_t> values(keys, "keys must be 8 bytes each");
        std::vector<nb::bytes> out;
        for (const std::string& each : split_keys(values.data(), values.size(), partitions))
          out.emplace_back(each.data(), each.size());
        return out;
      },
      nb::arg("keys"), nb::arg("partitions"));
}

}  // namespace kvindex
