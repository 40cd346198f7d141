// sslr1._C: the compiled part. Functions take addresses, sizes and strides, no torch types; their headers say which. Those
// that take longer than handing the GIL to another thread and back let it go.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention.h"
#include "causal_conv.h"
#include "delta_rule.h"
#include "draw.h"
#include "elementwise.h"
#include "look.h"
#include "memory.h"
#include "points.h"
#include "render.h"
#include "row_loss.h"
#include "step.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  m.doc() = "C++ and CUDA kernels of sslr1; see sslr1.ops for what they compute";
  py::class_<sslr1::Block>(m, "Block", py::buffer_protocol())
      .def(py::init<std::int64_t>())
      .def_buffer([](sslr1::Block& b) { return py::buffer_info(b.data(), b.bytes()); });
  m.def("render", &sslr1::render, Released());
  m.def("sample", &sslr1::sample, Released());
  m.def("contrast", &sslr1::contrast);
  m.def("cell_means", &sslr1::cell_means);
  m.def("reduced_grey", &sslr1::reduced_grey, Released());
  m.def("corners", &sslr1::corners, Released());
  m.def("surroundings", &sslr1::surroundings);
  m.def("distinct", &sslr1::distinct);
  m.def("balanced", &sslr1::balanced);
  m.def("row_loss", &sslr1::row_loss, Released());
  py::class_<sslr1::Attention>(m, "Attention").def(py::init([](std::array<std::uintptr_t, 8> p, std::array<std::int64_t, 12> n,
                                                               double scale, bool causal) {
    return sslr1::Attention{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8],
                            n[9], n[10], n[11], scale, causal};
  }));
  m.def("attention", &sslr1::attention, Released());
  m.def("attention_backward", &sslr1::attention_backward, Released());
  using sslr1::DeltaRule;
  py::class_<DeltaRule>(m, "DeltaRule").def(py::init([](std::array<std::uintptr_t, 5> inputs, std::array<std::int64_t, 3> strides,
                                                        std::array<std::uintptr_t, 3> tables, std::array<std::int64_t, 5> sizes,
                                                        double scale, bool l2norm) {
    const auto [q, k, v, g, beta] = inputs;
    const auto [spans, firsts, states] = tables;
    const auto [sequences, key_heads, heads, d_k, d_v] = sizes;
    return DeltaRule{q, k, v, g, beta, strides[0], strides[1], strides[2], spans, firsts, states, sequences, key_heads, heads,
                     d_k, d_v, scale, l2norm};
  }));
  m.def("delta_rule", &sslr1::delta_rule, Released());
  m.def("delta_rule_backward", &sslr1::delta_rule_backward, Released());
  m.def("delta_step", &sslr1::delta_step, Released());
  m.def("rms_norm", &sslr1::rms_norm, Released());
  m.def("rms_norm_backward", &sslr1::rms_norm_backward, Released());
  m.def("swiglu", &sslr1::swiglu, Released());
  m.def("swiglu_backward", &sslr1::swiglu_backward, Released());
  m.def("causal_conv", &sslr1::causal_conv, Released());
  m.def("causal_conv_step", &sslr1::causal_conv_step, Released());
  m.def("causal_conv_backward", &sslr1::causal_conv_backward, Released());
  m.def("draw", &sslr1::draw, Released());
  m.def("step_norm", &sslr1::step_norm, Released());
  m.def("step_swiglu", &sslr1::step_swiglu, Released());
  m.def("step_attention", [](std::array<std::uintptr_t, 13> p, std::array<std::int64_t, 9> n, double scale, double eps,
                             bool zero_centred, bool gated, int threads) {
    const sslr1::StepAttention a{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], n[0], n[1],
                                 n[2], n[3], n[4], n[5], n[6], n[7], n[8], scale, eps, zero_centred, gated};
    const py::gil_scoped_release released;
    sslr1::step_attention(a, threads);
  });
  m.def("step_delta", [](std::array<std::uintptr_t, 9> p, std::array<std::int64_t, 6> n, double eps, int threads) {
    const sslr1::StepDelta a{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], n[0], n[1], n[2], n[3], n[4], n[5], eps};
    const py::gil_scoped_release released;
    sslr1::step_delta(a, threads);
  });
#ifdef SSLR1_CUDA
  m.attr("has_cuda") = true;
  m.def("row_loss_cuda", &sslr1::row_loss_cuda, Released());
#else
  m.attr("has_cuda") = false;
#endif
}
