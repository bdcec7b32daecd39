#include "module_dialect.hpp"

namespace nb = nanobind;

namespace kvindex {

nb::tuple told(const Dialect& dialect) {
  nb::list traits;
  for (size_t i = 0; i < kTraits; ++i)
    if (dialect.has(static_cast<Trait>(i))) traits.append(nb::str(name_of(static_cast<Trait>(i))));
  nb::object root = nb::none();
  if (const Dialect::Root& of = dialect.root(); !of.tokens.empty()) {
    nb::list tokens;
    for (const uint32_t each : of.tokens) tokens.append(each);
    const nb::object hash =
        of.is_int ? nb::object(nb::int_(of.number)) : nb::object(nb::bytes(of.bytes.data(), of.bytes.size()));
    root = nb::make_tuple(hash, tokens);
  }
  nb::list adapters;
  for (const std::string& each : dialect.adapters())
    adapters.append(nb::steal(PyUnicode_DecodeUTF8(each.data(), static_cast<Py_ssize_t>(each.size()), "replace")));
  return nb::make_tuple(dialect.looked(), traits, dialect.shortest(), dialect.longest(),
                        nb::str(dialect.odd_tag().data(), dialect.odd_tag().size()), root, adapters,
                        nb::make_tuple(dialect.beginnings(), dialect.salted()));
}

}  // namespace kvindex
