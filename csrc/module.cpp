// sslr1._C: the compiled part. Functions take addresses, sizes and strides, no torch types, and let the GIL go.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "render.h"
#ifdef SSLR1_CUDA
#include "cuda/row_logprobs.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of sslr1; see sslr1.ops for what they compute";
  m.def("paint", &sslr1::paint, py::arg("sources"), py::arg("canvases"), py::arg("tiles_int"), py::arg("tiles_float"),
        py::arg("tile_count"), py::arg("fill"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("blur", &sslr1::blur, py::arg("source"), py::arg("target"), py::arg("taps"), py::arg("radius"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("patchify", &sslr1::patchify, py::arg("canvases"), py::arg("table"), py::arg("out"), py::arg("element_size"),
        py::arg("patch"), py::arg("merge"), py::arg("temporal"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
#ifdef SSLR1_CUDA
  m.attr("has_cuda") = true;
  m.def("row_logprobs", &sslr1::row_logprobs, py::arg("logits"), py::arg("tokens"), py::arg("logprobs"),
        py::arg("entropy"), py::arg("rows"), py::arg("vocabulary"), py::arg("stride"), py::arg("inverse_temperature"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#else
  m.attr("has_cuda") = false;
#endif
}
