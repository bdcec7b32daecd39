// The Python binding: convert, release the GIL, call. No logic here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "bound_index.hpp"
#include "index.hpp"
#include "module_score.hpp"
#include "scan.hpp"
#include "stream.hpp"
#include "xxh3.hpp"

namespace nb = nanobind;
using namespace kvindex;

namespace {

using Features = std::vector<std::tuple<std::string, uint64_t, uint64_t>>;

QueryExtras extras_of(std::string lora_name, std::string cache_salt, const Features& features) {
  QueryExtras extras{std::move(lora_name), std::move(cache_salt), {}};
  for (const auto& [hash, offset, length] : features) extras.mm_features.push_back({hash, offset, length});
  std::stable_sort(extras.mm_features.begin(), extras.mm_features.end(),
                   [](const MmFeature& a, const MmFeature& b) { return a.offset < b.offset; });
  return extras;
}

// The bytes as whole numbers; a copy only where they are not aligned for them.
template <typename T>
std::vector<T> numbers(const nb::bytes& bytes, const char* name) {
  if (bytes.size() % sizeof(T) != 0) throw nb::value_error(name);
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

nb::bytes bytes_of(const std::vector<uint64_t>& keys) {
  return nb::bytes(reinterpret_cast<const char*>(keys.data()), keys.size() * 8);
}

nb::list list_of(const std::vector<Match>& matches) {
  nb::list out;
  for (const Match& each : matches) {
    nb::list tiers;
    for (const uint32_t blocks : each.tier_blocks) tiers.append(blocks);
    out.append(nb::make_tuple(each.pod, each.rank, each.blocks, each.score, tiers));
  }
  return out;
}

nb::list list_of(const std::vector<Holder>& holders) {
  nb::list out;
  for (const Holder& each : holders) out.append(nb::make_tuple(each.pod, each.rank, each.tier, each.group));
  return out;
}

nb::list holders_of(const Index& index, const std::vector<uint64_t>& hashes, const Pods& pods) {
  std::vector<std::pair<uint64_t, std::vector<Holder>>> found;
  {
    nb::gil_scoped_release release;
    found = index.holders_of_hashes(hashes, pods);
  }
  nb::list out;
  for (const auto& [key, holders] : found) out.append(nb::make_tuple(key, list_of(holders)));
  return out;
}

struct BoundStream {
  std::shared_ptr<Stream> stream;
  uint32_t rank;
  std::shared_ptr<Standing> standing;
};

}  // namespace

NB_MODULE(_core, m) {
  m.def(
      "xxh3_64", [](nb::bytes data, uint64_t seed) { return xxh3_64(data.data(), data.size(), seed); }, nb::arg("data"),
      nb::arg("seed") = 0);

  m.def(
      "block_keys",
      [](nb::bytes tokens, uint32_t block_size, uint64_t seed, std::string lora_name, std::string cache_salt,
         const Features& mm_features) {
        if (block_size == 0) throw nb::value_error("block_size must not be 0");
        const auto ids = numbers<uint32_t>(tokens, "tokens must be 4 bytes each");
        const QueryExtras extras = extras_of(std::move(lora_name), std::move(cache_salt), mm_features);
        std::vector<uint64_t> keys;
        {
          nb::gil_scoped_release release;
          keys.reserve(ids.size() / block_size);
          block_keys(ids.data(), 0, ids.size() / block_size, block_size, 0, seed, extras, keys);
        }
        return bytes_of(keys);
      },
      nb::arg("tokens"), nb::arg("block_size"), nb::arg("seed") = 1337, nb::arg("lora_name") = "",
      nb::arg("cache_salt") = "", nb::arg("mm_features") = Features{});

  m.def(
      "scan_packed",
      [](nb::bytes message, uint32_t outer_field, uint32_t inner_field, int width) -> nb::object {
        if (width != 4 && width != 8) throw nb::value_error("width must be 4 or 8");
        std::string out;
        Scan result;
        const std::string_view view(message.c_str(), message.size());
        {
          nb::gil_scoped_release release;
          result = scan_packed(view, outer_field, inner_field, width, out);
        }
        switch (result) {
          case Scan::kFound: return nb::bytes(out.data(), out.size());
          case Scan::kAbsent: return nb::none();
          case Scan::kOutOfRange: throw nb::value_error("a value is above 4294967295");
          case Scan::kMalformed: break;
        }
        throw nb::value_error("malformed message");
      },
      nb::arg("message"), nb::arg("outer_field"), nb::arg("inner_field"), nb::arg("width"));

  m.def(
      "scan_tags",
      [](nb::bytes message, uint32_t outer_field) {
        std::vector<uint32_t> tags;
        bool well_formed;
        const std::string_view view(message.c_str(), message.size());
        {
          nb::gil_scoped_release release;
          well_formed = scan_tags(view, outer_field, tags);
        }
        if (!well_formed) throw nb::value_error("malformed message");
        return tags;
      },
      nb::arg("message"), nb::arg("outer_field") = 0);

  nb::class_<Applied>(m, "Applied")
      .def_ro("messages", &Applied::messages)
      .def_ro("events", &Applied::events)
      .def_ro("blocks_stored", &Applied::blocks_stored)
      .def_ro("blocks_removed", &Applied::blocks_removed)
      .def_ro("clears", &Applied::clears)
      .def_ro("timestamp", &Applied::timestamp)
      .def_prop_ro("reasons", [](const Applied& applied) {
        nb::dict reasons;
        for (size_t i = 0; i < kReasons; ++i)
          if (applied.reasons[i] != 0) reasons[name_of(static_cast<Reason>(i))] = applied.reasons[i];
        return reasons;
      });

  nb::class_<BoundStream>(m, "Stream")
      .def(
          "apply",
          [](BoundStream& self, const std::vector<nb::bytes>& payloads) {
            std::vector<std::pair<const uint8_t*, size_t>> views;
            views.reserve(payloads.size());
            for (const nb::bytes& each : payloads)
              views.emplace_back(reinterpret_cast<const uint8_t*>(each.c_str()), each.size());
            Applied applied;
            nb::gil_scoped_release release;
            for (const auto& [data, size] : views) self.stream->apply(data, size, self.rank, applied);
            self.standing->touch();
            return applied;
          },
          nb::arg("payloads"))
      .def(
          "clear",
          [](BoundStream& self) {
            const uint64_t claims = self.stream->clear();
            self.standing->touch();
            return claims;
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "close",
          [](BoundStream& self) {
            self.standing->close();
            return self.stream->close();
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("claims",
                   [](const BoundStream& self) {
                     nb::gil_scoped_release release;
                     return self.stream->claims();
                   })
      .def_prop_ro("claims_by_tier",
                   [](const BoundStream& self) {
                     nb::gil_scoped_release release;
                     return self.stream->claims_by_tier();
                   })
      .def_prop_ro("orphans",
                   [](const BoundStream& self) {
                     nb::gil_scoped_release release;
                     return self.stream->orphans();
                   })
      .def_prop_ro("unresolved",
                   [](const BoundStream& self) {
                     nb::gil_scoped_release release;
                     return self.stream->unresolved();
                   })
      .def_prop_ro("closed", [](const BoundStream& self) {
        nb::gil_scoped_release release;
        return self.stream->closed();
      });

  nb::class_<Index>(m, "Index")
      .def(nb::new_([](uint32_t block_size, uint64_t seed, uint64_t max_claims) {
             return std::shared_ptr<Index>(std::make_shared<BoundIndex>(block_size, seed, max_claims));
           }),
           nb::arg("block_size") = 0, nb::arg("seed") = 1337, nb::arg("max_claims") = 0)
      .def_prop_ro("block_size", &Index::block_size)
      .def_prop_ro("seed", &Index::seed)
      .def_prop_ro("blocks", &Index::blocks)
      .def_prop_ro("claims", &Index::claims)
      .def_prop_ro("bytes", &Index::bytes)
      .def_prop_ro("tiers", &Index::tiers)
      .def("learn_block_size", &Index::learn_block_size, nb::arg("size"))
      .def(
          "add_stream",
          [](Index& self, const std::string& pod, uint32_t rank) {
            nb::gil_scoped_release release;
            auto standing = static_cast<BoundIndex&>(self).standings->open(pod, rank);
            return BoundStream{self.add_stream(pod, rank), rank, std::move(standing)};
          },
          nb::arg("pod"), nb::arg("rank"))
      .def(
          "score",
          [](const Index& self, nb::bytes keys, const Pods& pods, const std::vector<double>& weights) {
            const auto values = numbers<uint64_t>(keys, "keys must be 8 bytes each");
            std::vector<Match> matches;
            {
              nb::gil_scoped_release release;
              matches = self.score(values.data(), values.size(), pods, weights);
            }
            return list_of(matches);
          },
          nb::arg("keys"), nb::arg("pods"), nb::arg("weights"))
      .def(
          "score_tokens",
          [](const Index& self, nb::bytes tokens, const Pods& pods, const std::vector<double>& weights,
             std::string lora_name, std::string cache_salt, const Features& mm_features) {
            const auto ids = numbers<uint32_t>(tokens, "tokens must be 4 bytes each");
            const QueryExtras extras = extras_of(std::move(lora_name), std::move(cache_salt), mm_features);
            std::vector<Match> matches;
            {
              nb::gil_scoped_release release;
              matches = self.score_tokens(ids.data(), ids.size(), pods, weights, extras);
            }
            return list_of(matches);
          },
          nb::arg("tokens"), nb::arg("pods"), nb::arg("weights"), nb::arg("lora_name") = "", nb::arg("cache_salt") = "",
          nb::arg("mm_features") = Features{})
      .def(
          "holders",
          [](const Index& self, nb::bytes keys, const Pods& pods) {
            const auto values = numbers<uint64_t>(keys, "keys must be 8 bytes each");
            std::vector<std::vector<Holder>> found;
            {
              nb::gil_scoped_release release;
              found = self.holders(values.data(), values.size(), pods);
            }
            nb::list out;
            for (const auto& each : found) out.append(list_of(each));
            return out;
          },
          nb::arg("keys"), nb::arg("pods"))
      .def(
          "holders_of_ints",
          [](const Index& self, nb::bytes hashes, const Pods& pods) {
            return holders_of(self, numbers<uint64_t>(hashes, "hashes must be 8 bytes each"), pods);
          },
          nb::arg("hashes"), nb::arg("pods"))
      .def(
          "holders_of_bytes",
          [](const Index& self, const std::vector<nb::bytes>& hashes, const Pods& pods) {
            std::vector<uint64_t> values;
            for (const nb::bytes& each : hashes) values.push_back(hash_of_bytes({each.c_str(), each.size()}));
            return holders_of(self, values, pods);
          },
          nb::arg("hashes"), nb::arg("pods"));

  bind_score(m);
}
