// CUDA kernels of corner_pool.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "line_gradients.cuh"

namespace d2ext {
namespace {

struct Cuda {
  template <typename scalar_t>
  static void scan(const scalar_t* x, scalar_t* out, const Lines& lines, bool reverse) {
    launch_scan(x, out, lines, reverse);
  }

  template <typename scalar_t>
  static void scan_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                            const Lines& lines, bool reverse) {
    launch_scan_backward(x, grad, grad_x, lines, reverse);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("corner_pool", corner_pool<Cuda>);
  m.impl("corner_pool_backward", corner_pool_backward<Cuda>);
}

}  // namespace d2ext
