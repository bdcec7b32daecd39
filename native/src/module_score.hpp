// The Python binding of the read path that answers encoded requests.
#pragma once

#include <nanobind/nanobind.h>

namespace kvindex {

void bind_score(nanobind::module_& m);

}  // namespace kvindex
