// The Python binding of how an engine writes its events.
#pragma once

#include <nanobind/nanobind.h>

#include "dialect.hpp"

namespace kvindex {

// (messages looked at, names of what was seen, shortest and longest BlockStored array, odd tag, root block or None).
nanobind::tuple told(const Dialect& dialect);

}  // namespace kvindex
