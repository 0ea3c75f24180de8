// d2ext_C: operator schemas, and what was compiled. Kernels register themselves from cpu/ and
// cuda/; the library has no Python module of its own and is loaded with torch.ops.load_library.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

namespace d2ext {
namespace {

// "key=value" pairs separated by newlines; read by d2ext/layers/_extension.py.
std::string build_info() {
  std::string info = "torch=" TORCH_VERSION;
#ifdef D2EXT_CUDA_VERSION
  info += "\ncuda=" D2EXT_CUDA_VERSION "\ncuda_archs=" D2EXT_CUDA_ARCHS;
#endif
#if defined(__clang__)
  info += "\ncompiler=clang " __clang_version__;
#elif defined(__GNUC__)
  info += "\ncompiler=gcc " __VERSION__;
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY(d2ext, m) {
  m.def("_build_info() -> str", &build_info);
  m.def(
      "assemble_masks(Tensor prototypes, Tensor coefficients, Tensor boxes, Tensor? batch_index, "
      "float padding) -> Tensor");
  m.def(
      "assemble_masks_backward(Tensor grad, Tensor prototypes, Tensor coefficients, Tensor boxes, "
      "Tensor? batch_index, float padding) -> (Tensor, Tensor)");
  m.def(
      "assemble_binary_masks(Tensor prototypes, Tensor coefficients, Tensor boxes, "
      "Tensor? batch_index, SymInt height, SymInt width, float threshold, bool crop_after, "
      "float padding) -> Tensor");
  // axis: 2 (H) or 3 (W); reverse: the scan begins at the axis' end.
  m.def("corner_pool(Tensor x, int axis, bool reverse) -> Tensor");
  m.def("corner_pool_backward(Tensor grad, Tensor x, int axis, bool reverse) -> Tensor");
  // CUDA; forward in float32 on a CPU, too. mask: weights of the taps.
  m.def(
      "deform_conv2d(Tensor x, Tensor weight, Tensor offset, Tensor? mask, Tensor? bias, int "
      "stride, "
      "int padding, int dilation) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor offset, Tensor? mask, "
      "int stride, int padding, int dilation, bool deterministic) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // CUDA only; torchvision's and plain PyTorch elsewhere.
  m.def("nms(Tensor boxes, Tensor valid, float threshold) -> Tensor");
  m.def("overlapped(Tensor boxes, float threshold) -> Tensor");
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor? corner_scores, Tensor sizes, int method, "
      "float sigma, float iou_threshold, float score_threshold, float weight_exp) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "prune_masks(Tensor masks, Tensor boxes, Tensor classes, Tensor scores, SymInt height, "
      "SymInt width, float overlap_fraction) -> (Tensor, Tensor)");
  m.def(
      "fuse_panoptic(Tensor score, Tensor boxes, Tensor classes, Tensor masks, SymInt height, "
      "SymInt width, int num_stuff, bool unknown) -> (Tensor, Tensor)");
}

}  // namespace d2ext
