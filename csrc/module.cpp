// sslr1._C: the compiled part. Functions take addresses, sizes and strides, no torch types. Those that take longer than
// handing the GIL to another thread and back let it go.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "look.h"
#include "memory.h"
#include "points.h"
#include "render.h"
#include "row_loss.h"
#ifdef SSLR1_CUDA
#include "cuda/row_loss.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of sslr1; see sslr1.ops for what they compute";
  py::class_<sslr1::Block>(m, "Block", py::buffer_protocol())
      .def(py::init<std::int64_t>(), py::arg("bytes"))
      .def_buffer([](sslr1::Block& b) { return py::buffer_info(b.data(), b.bytes()); });
  m.def("render", &sslr1::render, py::arg("images"), py::arg("sources_int"), py::arg("sources_float"),
        py::arg("canvases"), py::arg("tiles_int"), py::arg("tiles_float"), py::arg("out"), py::arg("values"),
        py::arg("element_size"), py::arg("patch"), py::arg("merge"), py::arg("temporal"), py::arg("fill"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("sample", &sslr1::sample, py::arg("pixels"), py::arg("height"), py::arg("width"), py::arg("samples"),
        py::arg("out"), py::call_guard<py::gil_scoped_release>());
  m.def("contrast", &sslr1::contrast, py::arg("sample"), py::arg("samples"), py::arg("y"), py::arg("x"),
        py::arg("colour"));
  m.def("cell_means", &sslr1::cell_means, py::arg("sample"), py::arg("samples"), py::arg("height"), py::arg("width"),
        py::arg("top"), py::arg("left"), py::arg("extent_y"), py::arg("extent_x"), py::arg("rows"), py::arg("columns"),
        py::arg("means"));
  m.def("reduced_grey", &sslr1::reduced_grey, py::arg("pixels"), py::arg("height"), py::arg("width"), py::arg("step"),
        py::arg("grey"), py::call_guard<py::gil_scoped_release>());
  m.def("corners", &sslr1::corners, py::arg("grey"), py::arg("height"), py::arg("width"), py::arg("grain"),
        py::arg("share"), py::arg("most"), py::arg("out"), py::call_guard<py::gil_scoped_release>());
  m.def("distinct", &sslr1::distinct, py::arg("grey"), py::arg("height"), py::arg("width"), py::arg("spots"),
        py::arg("places"), py::arg("order"), py::arg("n"), py::arg("count"), py::arg("radius"), py::arg("apart"),
        py::arg("alike"));
  m.def("balanced", &sslr1::balanced, py::arg("refs"), py::arg("places"), py::arg("count"), py::arg("n"),
        py::arg("ranks"), py::arg("weights"));
  m.def("row_loss", &sslr1::row_loss, py::arg("mode"), py::arg("logits"), py::arg("tokens"), py::arg("logprobs"),
        py::arg("entropy"), py::arg("advantage"), py::arg("policy"), py::arg("kl"), py::arg("bonus"), py::arg("old"),
        py::arg("ref"), py::arg("g"), py::arg("rows"), py::arg("vocabulary"), py::arg("stride"),
        py::arg("inverse_temperature"), py::arg("clip_low"), py::arg("clip_high"), py::arg("cispo"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
#ifdef SSLR1_CUDA
  m.attr("has_cuda") = true;
  m.def("row_loss_cuda", &sslr1::row_loss_cuda, py::arg("mode"), py::arg("logits"), py::arg("tokens"), py::arg("logprobs"),
        py::arg("entropy"), py::arg("advantage"), py::arg("policy"), py::arg("kl"), py::arg("bonus"), py::arg("old"),
        py::arg("ref"), py::arg("g"), py::arg("rows"), py::arg("vocabulary"), py::arg("stride"),
        py::arg("inverse_temperature"), py::arg("clip_low"), py::arg("clip_high"), py::arg("cispo"), py::arg("out"),
        py::arg("out_stride"), py::arg("out_bfloat16"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#else
  m.attr("has_cuda") = false;
#endif
}
