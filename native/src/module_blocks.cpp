#include "module_blocks.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "blocks_bytes.hpp"

namespace nb = nanobind;

namespace kvindex {

void bind_blocks(nb::module_& m) {
  nb::class_<BlocksRequest>(m, "BlocksRequest")
      .def_ro("model", &BlocksRequest::model)
      .def(
          "answer",
          [](const BlocksRequest& self, const Index& index) {
            std::string encoded;
            {
              nb::gil_scoped_release release;
              encoded = blocks_bytes(index, self);
            }
            return nb::bytes(encoded.data(), encoded.size());
          },
          nb::arg("index"));

  m.def(
      "read_blocks_request",
      [](const nb::bytes& encoded, const RequestLimits& limits) {
        const std::string_view view(encoded.c_str(), encoded.size());
        nb::gil_scoped_release release;  // its answer takes so much longer that this costs nothing
        return read_blocks_request(view, limits);
      },
      nb::arg("encoded"), nb::arg("limits"), nb::rv_policy::move);
}

}  // namespace kvindex
