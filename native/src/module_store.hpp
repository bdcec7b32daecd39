// The Python binding of what a shared store needs.
#pragma once

#include <nanobind/nanobind.h>

namespace kvindex {

void bind_store(nanobind::module_& m);

}  // namespace kvindex
