// The Python binding of GetPodsForBlocks on encoded requests.
#pragma once

#include <nanobind/nanobind.h>

namespace kvindex {

// After `bind_score`, whose RequestLimits it takes.
void bind_blocks(nanobind::module_& m);

}  // namespace kvindex
