#include "module_removals.hpp"

#include <nanobind/stl/string.h>

#include "numbers.hpp"

namespace nb = nanobind;

namespace kvindex {
namespace {

nb::object sequence_of(const Removals::Moment& at) {
  return at.sequence == Removals::kNoSequence ? nb::object(nb::none()) : nb::object(nb::int_(at.sequence));
}

const char* name_of(Removals::Reach reach) {
  switch (reach) {
    case Removals::Reach::kOff: return "off";
    case Removals::Reach::kStart: return "start";
    case Removals::Reach::kRestored: return "restored";
    case Removals::Reach::kFull: return "full";
    case Removals::Reach::kNothing: break;
  }
  return "nothing";
}

}  // namespace

void bind_left(nb::module_& m) {
  nb::enum_<Left>(m, "Left")
      .value("REMOVED", Left::kRemoved)
      .value("CLEARED", Left::kCleared)
      .value("RESTARTED", Left::kRestarted)
      .value("REQUESTED", Left::kRequested)
      .value("REBUILT", Left::kRebuilt)
      .value("DOUBTED", Left::kDoubted);
}

void bind_removals(nb::class_<Index>& index) {
  index.def(
      "removals",
      [](const Index& self, const std::string& pod, nb::bytes keys) {
        const Numbers<uint64_t> values(keys, "keys must be 8 bytes each");
        std::vector<Remembered> remembered;
        {
          nb::gil_scoped_release release;
          remembered = self.removals(pod, values.data(), values.size());
        }
        nb::list out;
        for (const Remembered& each : remembered) {
          nb::list found;
          for (const auto& of_key : each.found) {
            nb::list left;
            for (const Removals::Found& one : of_key)
              left.append(nb::make_tuple(one.group, one.tier, one.left, sequence_of(one.at), one.at.time, one.earlier));
            found.append(left);
          }
          const Removals::Memory& memory = each.memory;
          const nb::object cleared =
              memory.cleared ? nb::object(nb::make_tuple(sequence_of(memory.cleared_at), memory.cleared_at.time))
                             : nb::object(nb::none());
          out.append(nb::make_tuple(each.rank, name_of(memory.reach), sequence_of(memory.from), memory.from.time,
                                    cleared, memory.unnamed, found));
        }
        return out;
      },
      nb::arg("pod"), nb::arg("keys"));
}

}  // namespace kvindex
