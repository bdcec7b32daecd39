// The Python binding of what a stream remembers of blocks that left it.
#pragma once

#include <nanobind/nanobind.h>

#include "index.hpp"

namespace kvindex {

// `Left`, which `Stream.clear` takes; before the class that has it.
void bind_left(nanobind::module_& m);
void bind_removals(nanobind::class_<Index>& index);

}  // namespace kvindex
