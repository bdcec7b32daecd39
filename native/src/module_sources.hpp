// The Python binding of what published messages are taken from.
#pragma once

#include <nanobind/nanobind.h>

namespace kvindex {

void bind_sources(nanobind::module_& m);

}  // namespace kvindex
