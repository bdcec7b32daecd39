// The Python binding of text: tokenizers and what is remembered of texts.
#pragma once

#include <nanobind/nanobind.h>

namespace kvindex {

void bind_text(nanobind::module_& m);

}  // namespace kvindex
