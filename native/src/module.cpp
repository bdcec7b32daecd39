// The Python binding: convert, release the GIL, call. No logic here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "bound_index.hpp"
#include "drain.hpp"
#include "index.hpp"
#include "module_blocks.hpp"
#include "module_dialect.hpp"
#include "module_removals.hpp"
#include "module_score.hpp"
#include "module_sources.hpp"
#include "module_store.hpp"
#include "module_text.hpp"
#include "numbers.hpp"
#include "order.hpp"
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

nb::bytes bytes_of(const std::vector<uint64_t>& keys) {
  return nb::bytes(reinterpret_cast<const char*>(keys.data()), keys.size() * 8);
}

// An answer names every pod that matches, so it is built without nanobind's general conversions.
PyObject* checked(PyObject* made) {
  if (made == nullptr) nb::raise_python_error();
  return made;
}

// Functions, not the macros of the same name in capitals, which the stable ABI does not have. They take `value` over.
void put(const nb::list& list, size_t at, PyObject* value) {
  if (PyList_SetItem(list.ptr(), static_cast<Py_ssize_t>(at), checked(value)) != 0) nb::raise_python_error();
}

void put(const nb::tuple& tuple, size_t at, PyObject* value) {
  if (PyTuple_SetItem(tuple.ptr(), static_cast<Py_ssize_t>(at), checked(value)) != 0) nb::raise_python_error();
}

nb::list list_of(const std::vector<Match>& matches) {
  auto out = nb::steal<nb::list>(checked(PyList_New(static_cast<Py_ssize_t>(matches.size()))));
  for (size_t i = 0; i < matches.size(); ++i) {
    const Match& each = matches[i];
    const auto entry = nb::steal<nb::tuple>(checked(PyTuple_New(6)));
    const auto tiers = nb::steal<nb::list>(checked(PyList_New(kMaxTiers)));
    for (uint32_t tier = 0; tier < kMaxTiers; ++tier) put(tiers, tier, PyLong_FromUnsignedLong(each.tier_blocks[tier]));
    put(entry, 0, PyUnicode_FromStringAndSize(each.pod.data(), static_cast<Py_ssize_t>(each.pod.size())));
    put(entry, 1, PyLong_FromUnsignedLong(each.rank));
    put(entry, 2, PyLong_FromUnsignedLong(each.blocks));
    put(entry, 3, PyFloat_FromDouble(each.score));
    put(entry, 4, tiers.inc_ref().ptr());
    put(entry, 5, PyLong_FromUnsignedLong(each.speculative));
    put(out, i, entry.inc_ref().ptr());
  }
  return out;
}

nb::list list_of(const std::vector<Holder>& holders) {
  nb::list out;
  for (const Holder& each : holders)
    out.append(nb::make_tuple(each.pod, each.rank, each.tier, each.group, each.speculative));
  return out;
}

nb::list holders_of(const Index& index, const std::vector<uint64_t>& hashes, const Pods& pods) {
  std::vector<HashHolders> found;
  {
    nb::gil_scoped_release release;
    found = index.holders_of_hashes(hashes, pods);
  }
  nb::list out;
  for (const HashHolders& each : found) {
    const nb::object key = each.disputed ? nb::object(nb::none()) : nb::object(nb::int_(each.key));
    out.append(nb::make_tuple(key, list_of(each.holders)));
  }
  return out;
}

constexpr double kMaxSeconds = 1e6;

uint64_t nanoseconds(double seconds) { return static_cast<uint64_t>(seconds * 1e9); }

const char* name_of(Placed::Outcome outcome) {
  switch (outcome) {
    case Placed::Outcome::kRecorded: return "recorded";
    case Placed::Outcome::kNoPod: return "no_pod";
    case Placed::Outcome::kNoRank: return "no_rank";
    case Placed::Outcome::kNoRoom: break;
  }
  return "no_room";
}

struct BoundStream {
  std::shared_ptr<Stream> stream;
  uint32_t rank;
  std::shared_ptr<Standing> standing;
};

}  // namespace

NB_MODULE(_core, m) {
  // Threads of gRPC may still hold objects when the process ends, after a failed start for one: to whoever reads its
  // stderr that is no news, and the reason of the failure has to be the only line there.
  nb::set_leak_warnings(false);
  m.def(
      "xxh3_64", [](nb::bytes data, uint64_t seed) { return xxh3_64(data.data(), data.size(), seed); }, nb::arg("data"),
      nb::arg("seed") = 0);

  m.def(
      "block_keys",
      [](nb::bytes tokens, uint32_t block_size, uint64_t seed, std::string lora_name, std::string cache_salt,
         const Features& mm_features) {
        if (block_size == 0) throw nb::value_error("block_size must not be 0");
        const Numbers<uint32_t> ids(tokens, "tokens must be 4 bytes each");
        const QueryExtras extras = extras_of(std::move(lora_name), std::move(cache_salt), mm_features);
        std::vector<uint64_t> keys;
        {
          nb::gil_scoped_release release;
          keys.resize(ids.size() / block_size);
          block_keys(ids.data(), 0, keys.size(), block_size, 0, seed, extras, keys.data());
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

  nb::enum_<Outcome>(m, "Outcome")
      .value("FIRST", Outcome::kFirst)
      .value("NEXT", Outcome::kNext)
      .value("DUPLICATE", Outcome::kDuplicate)
      .value("GAP", Outcome::kGap)
      .value("RESTART", Outcome::kRestart);

  nb::class_<Order>(m, "Order")
      .def(nb::init<>())
      .def_ro_static("REMEMBERED", &Order::kRemembered)
      .def_prop_ro(
          "last",
          [](const Order& self) -> nb::object { return self.last() ? nb::object(nb::int_(*self.last())) : nb::none(); })
      .def_prop_ro("last_digest", &Order::last_digest)
      .def("judge", &Order::judge, nb::arg("sequence"), nb::arg("digest"))
      .def("remembers", &Order::remembers, nb::arg("sequence"))
      .def("applied", &Order::applied, nb::arg("sequence"), nb::arg("digest"))
      .def("restarted", &Order::restarted);

  bind_sources(m);

  nb::class_<Drained>(m, "Drained")
      .def_ro("applied", &Drained::applied)
      .def_ro("messages", &Drained::messages)
      .def_ro("first", &Drained::first)
      .def_ro("empty", &Drained::empty)
      .def_ro("others", &Drained::others)
      .def_ro("lags", &Drained::lags)
      .def_ro("withheld", &Drained::withheld)
      .def_prop_ro("marks",
                   [](const Drained& drained) {
                     nb::list marks;
                     for (const Mark& each : drained.marks)
                       marks.append(nb::make_tuple(each.sequence, each.digest, each.held, each.claims));
                     return marks;
                   })
      .def_prop_ro("odd", [](const Drained& drained) {
        nb::list frames;
        for (const std::string& each : drained.odd) frames.append(nb::bytes(each.data(), each.size()));
        return frames;
      });

  bind_left(m);
  nb::class_<BoundStream>(m, "Stream")
      .def(
          "apply",
          [](BoundStream& self, const std::vector<nb::bytes>& payloads, const nb::object& first_sequence) {
            uint64_t sequence = first_sequence.is_none() ? Removals::kNoSequence : nb::cast<uint64_t>(first_sequence);
            std::vector<std::pair<const uint8_t*, size_t>> views;
            views.reserve(payloads.size());
            for (const nb::bytes& each : payloads)
              views.emplace_back(reinterpret_cast<const uint8_t*>(each.c_str()), each.size());
            Applied applied;
            nb::gil_scoped_release release;
            for (const auto& [data, size] : views) {
              self.stream->apply(data, size, self.rank, applied, sequence);
              if (sequence != Removals::kNoSequence) ++sequence;
            }
            self.standing->touch();
            return applied;
          },
          nb::arg("payloads"), nb::arg("first_sequence") = nb::none())
      .def("snapshot",
           [](const BoundStream& self) {
             std::string out;
             {
               nb::gil_scoped_release release;
               self.stream->snapshot(out);
             }
             return nb::bytes(out.data(), out.size());
           })
      .def(
          "restore",
          [](BoundStream& self, nb::bytes snapshot) {
            const std::string_view bytes(snapshot.c_str(), snapshot.size());
            nb::gil_scoped_release release;
            const bool restored = self.stream->restore(bytes);
            self.standing->touch();
            return restored;
          },
          nb::arg("snapshot"))
      .def(
          "drain",
          [](BoundStream& self, MessageSource& source, Order& order, uint64_t limit, uint64_t max_payload,
             uint64_t mark_every, const ZeroMq& zmq, const std::vector<uintptr_t>& sockets,
             const std::vector<int>& descriptors, uint32_t idle_ms, uint32_t further_ms) {
            Waiting waiting{{}, std::chrono::milliseconds(idle_ms), std::chrono::milliseconds(further_ms)};
            for (const uintptr_t each : sockets)
              waiting.others.push_back({reinterpret_cast<void*>(each), 0, POLLIN, 0});
            for (const int each : descriptors) waiting.others.push_back({nullptr, each, POLLIN, 0});
            return drain(source, *self.stream, self.rank, order, limit, max_payload, mark_every, zmq, waiting,
                         [&] { self.standing->touch(); });
          },
          nb::arg("source"), nb::arg("order"), nb::arg("limit"), nb::arg("max_payload"), nb::arg("mark_every"),
          nb::arg("zmq"), nb::arg("sockets"), nb::arg("descriptors"), nb::arg("idle_ms"), nb::arg("further_ms"),
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "clear",
          [](BoundStream& self, Left left) {
            const uint64_t claims = self.stream->clear(left);
            self.standing->touch();
            return claims;
          },
          nb::arg("left") = Left::kRequested, nb::call_guard<nb::gil_scoped_release>())
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
      .def_prop_ro("digest",
                   [](const BoundStream& self) {
                     nb::gil_scoped_release release;
                     return self.stream->digest();
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
      .def_prop_ro("dialect",
                   [](const BoundStream& self) {
                     Dialect dialect;
                     {
                       nb::gil_scoped_release release;
                       dialect = self.stream->dialect();
                     }
                     return told(dialect);
                   })
      .def(
          "follow_changes", [](BoundStream& self, uint64_t limit) { self.stream->follow_changes(limit); },
          nb::arg("limit"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "take_changes",
          [](BoundStream& self, uint32_t partitions) {
            if (partitions == 0) throw nb::value_error("partitions must not be 0");
            Changes::Taken taken;
            std::string groups;
            {
              nb::gil_scoped_release release;
              taken = self.stream->take_changes(partitions, groups);
            }
            nb::list rows;
            for (const std::string& each : taken.rows) rows.append(nb::bytes(each.data(), each.size()));
            return nb::make_tuple(taken.dropped, taken.lost, rows, nb::bytes(groups.data(), groups.size()));
          },
          nb::arg("partitions"))
      .def("touch", [](BoundStream& self) { self.standing->touch(); })
      .def_prop_ro("closed", [](const BoundStream& self) {
        nb::gil_scoped_release release;
        return self.stream->closed();
      });

  nb::class_<Index> index(m, "Index");
  index
      .def(nb::new_([](uint32_t block_size, uint64_t seed, uint64_t max_claims, uint64_t max_placements,
                       uint64_t max_bytes, uint64_t max_removals, uint64_t max_claims_per_stream) {
             return std::shared_ptr<Index>(std::make_shared<BoundIndex>(
                 block_size, seed, max_claims, max_placements, max_bytes, max_removals, max_claims_per_stream));
           }),
           nb::arg("block_size") = 0, nb::arg("seed") = 1337, nb::arg("max_claims") = 0,
           nb::arg("max_placements") = uint64_t{1} << 20, nb::arg("max_bytes") = 0,
           nb::arg("max_removals") = Index::kRemovals, nb::arg("max_claims_per_stream") = 0)
      .def_prop_ro("block_size", &Index::block_size)
      .def_prop_ro("seed", &Index::seed)
      .def_prop_ro("blocks", &Index::blocks)
      .def_prop_ro("claims", &Index::claims)
      .def_prop_ro("bytes", &Index::bytes)
      .def_prop_ro("tiers", &Index::tiers)
      .def_prop_ro("is_block_size_open", &Index::is_block_size_open)
      .def("learn_block_size", &Index::learn_block_size, nb::arg("size"))
      .def("set_block_size", &Index::set_block_size, nb::arg("size"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "tier_of", [](Index& self, const std::string& name) { return self.tier_of(name); }, nb::arg("name"))
      .def(
          "add_stream",
          [](Index& self, const std::string& pod, uint32_t rank) {
            nb::gil_scoped_release release;
            auto standing = static_cast<BoundIndex&>(self).standings->open(pod, rank);
            return BoundStream{self.add_stream(pod, rank), rank, std::move(standing)};
          },
          nb::arg("pod"), nb::arg("rank"))
      .def(
          "place",
          [](Index& self, const std::string& pod, int64_t rank, nb::bytes keys, double seconds) {
            if (!(seconds > 0 && seconds <= kMaxSeconds)) throw nb::value_error("seconds out of range");
            const Numbers<uint64_t> values(keys, "keys must be 8 bytes each");
            Placed placed;
            {
              nb::gil_scoped_release release;
              placed = self.place(pod, rank, values.data(), values.size(), nanoseconds(seconds));
            }
            return nb::make_tuple(name_of(placed.outcome), placed.rank, placed.held);
          },
          nb::arg("pod"), nb::arg("rank"), nb::arg("keys"), nb::arg("seconds"))
      .def(
          "sweep_placements", [](Index& self) { self.placements().sweep(self.placements().now()); },
          nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("placements",
                   [](const Index& self) {
                     const Placements::Counts counts = self.placements().counts();
                     nb::dict out;
                     out["blocks"] = counts.blocks;
                     out["recorded"] = counts.recorded;
                     out["renewed"] = counts.renewed;
                     out["confirmed"] = counts.confirmed;
                     out["expired"] = counts.expired;
                     out["fenced"] = counts.fenced;
                     out["refused"] = counts.refused;
                     return out;
                   })
      .def(
          "advance_clock",
          [](Index& self, double seconds) {
            if (!(seconds >= 0 && seconds <= kMaxSeconds)) throw nb::value_error("seconds out of range");
            self.placements().advance(nanoseconds(seconds));
          },
          nb::arg("seconds"))
      .def(
          "score",
          [](const Index& self, nb::bytes keys, const Pods& pods, const std::vector<double>& weights) {
            const Numbers<uint64_t> values(keys, "keys must be 8 bytes each");
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
            const Numbers<uint32_t> ids(tokens, "tokens must be 4 bytes each");
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
            const Numbers<uint64_t> values(keys, "keys must be 8 bytes each");
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
            const Numbers<uint64_t> values(hashes, "hashes must be 8 bytes each");
            return holders_of(self, {values.data(), values.data() + values.size()}, pods);
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

  bind_removals(index);
  bind_score(m);
  bind_blocks(m);
  bind_store(m);
  bind_text(m);
}
