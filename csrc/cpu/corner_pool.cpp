// CPU kernels of corner and center pooling. Lines across the memory (columns of a contiguous map)
// are pooled a block of adjacent ones at a time, lines along it one by one, a vector in a few
// steps.
#include "../corner_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "scan_kernels.h"

namespace d2ext {
namespace {

using at::Tensor;

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 32768;

inline int64_t grain_for(int64_t elements_per_task) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_task));
}

// Calls work(first element, step to the next one in scan order, count of adjacent lines) for blocks
// of lines across the memory.
template <typename T, typename Work>
void for_column_blocks(const Lines& lines, bool reverse, const Work& work) {
  const int64_t blocks = (lines.inner + kScanColumns<T> - 1) / kScanColumns<T>;
  const int64_t grain = grain_for(lines.length * std::min(lines.inner, kScanColumns<T>));
  at::parallel_for(0, lines.outer * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % blocks * kScanColumns<T>;
      const int64_t first = task / blocks * lines.length * lines.inner + column +
                            (reverse ? (lines.length - 1) * lines.inner : 0);
      work(first, reverse ? -lines.inner : lines.inner,
           std::min(kScanColumns<T>, lines.inner - column));
    }
  });
}

// out = running maximum (+ addend, unless null; it may be out).
template <typename scalar_t>
void scan(const scalar_t* x, const scalar_t* addend, scalar_t* out, const Lines& lines,
          bool reverse) {
  const auto& kernels = scan_kernels<scalar_t>();
  const auto shifted = [&](int64_t offset) {
    return addend == nullptr ? nullptr : addend + offset;
  };
  if (lines.inner > 1) {
    using T = cpu_arithmetic_t<scalar_t>;
    for_column_blocks<T>(lines, reverse, [&](int64_t first, int64_t step, int64_t count) {
      kernels.column_scan(x + first, shifted(first), out + first, lines.length, step, count);
    });
    return;
  }
  at::parallel_for(0, lines.outer, grain_for(lines.length), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t first = line * lines.length;
      kernels.row_scan(x + first, shifted(first), out + first, lines.length, reverse);
    }
  });
}

template <typename scalar_t>
void scan_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x, const Lines& lines,
                   bool reverse) {
  using T = cpu_arithmetic_t<scalar_t>;
  using I = scans::Integer<T>;
  const auto& kernels = scan_kernels<scalar_t>();
  if (lines.inner > 1) {
    for_column_blocks<T>(lines, reverse, [&](int64_t first, int64_t step, int64_t count) {
      thread_local std::vector<I> taken;
      taken.resize(lines.length * kScanColumns<T>);
      kernels.column_scan_backward(x + first, grad + first, grad_x + first, lines.length, step,
                                   count, taken.data());
    });
    return;
  }
  at::parallel_for(0, lines.outer, grain_for(lines.length), [&](int64_t begin, int64_t end) {
    std::vector<I> taken(lines.length);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t first = line * lines.length;
      kernels.row_scan_backward(x + first, grad + first, grad_x + first, lines.length, reverse,
                                taken.data());
    }
  });
}

// ---------------------------------------------------------------- corner_pool

Tensor corner_pool_cpu(const Tensor& x, int64_t axis, bool reverse) {
  check_map("corner_pool", "input", x);
  check_axis("corner_pool", axis);
  const auto format = format_of(x);
  Tensor out = empty_map(x);
  if (x.numel() == 0) {
    return out;
  }
  const Tensor dense = x.contiguous(format);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "corner_pool_cpu", [&] {
        scan<scalar_t>(dense.const_data_ptr<scalar_t>(), nullptr, out.mutable_data_ptr<scalar_t>(),
                       lines_of(x, format, axis), reverse);
      });
  return out;
}

Tensor corner_pool_backward_cpu(const Tensor& grad, const Tensor& x, int64_t axis, bool reverse) {
  check_map("corner_pool_backward", "input", x);
  check_axis("corner_pool_backward", axis);
  check_same("corner_pool_backward", "input", x, "grad", grad);
  const auto format = format_of(x);
  Tensor grad_x = empty_map(x);
  if (x.numel() == 0) {
    return grad_x;
  }
  const Tensor dense = x.contiguous(format);
  const Tensor dense_grad = grad.contiguous(format);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "corner_pool_backward_cpu", [&] {
        scan_backward<scalar_t>(
            dense.const_data_ptr<scalar_t>(), dense_grad.const_data_ptr<scalar_t>(),
            grad_x.mutable_data_ptr<scalar_t>(), lines_of(x, format, axis), reverse);
      });
  return grad_x;
}

// ---------------------------------------------------------------- corner_pool_pair

Tensor corner_pool_pair_cpu(const Tensor& vertical, const Tensor& horizontal, bool reverse) {
  check_map("corner_pool_pair", "vertical", vertical);
  check_same("corner_pool_pair", "vertical", vertical, "horizontal", horizontal);
  const auto format = format_of(vertical);
  Tensor out = empty_map(vertical);
  if (out.numel() == 0) {
    return out;
  }
  const Tensor dense_vertical = vertical.contiguous(format);
  const Tensor dense_horizontal = horizontal.contiguous(format);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, out.scalar_type(), "corner_pool_pair_cpu", [&] {
        const scalar_t* v = dense_vertical.const_data_ptr<scalar_t>();
        const scalar_t* h = dense_horizontal.const_data_ptr<scalar_t>();
        scalar_t* target = out.mutable_data_ptr<scalar_t>();
        if (format == at::MemoryFormat::ChannelsLast) {
          scan<scalar_t>(v, nullptr, target, lines_of(out, format, 2), reverse);
          scan<scalar_t>(h, target, target, lines_of(out, format, 3), reverse);
          return;
        }
        // Plane by plane: the sum finds the columns in the cache.
        const int64_t plane = out.size(2) * out.size(3);
        at::parallel_for(
            0, out.size(0) * out.size(1), grain_for(plane), [&](int64_t begin, int64_t end) {
              for (int64_t n = begin; n < end; ++n) {
                scalar_t* own = target + n * plane;
                scan<scalar_t>(v + n * plane, nullptr, own, {1, out.size(2), out.size(3)}, reverse);
                scan<scalar_t>(h + n * plane, own, own, {out.size(2), out.size(3), 1}, reverse);
              }
            });
      });
  return out;
}

std::tuple<Tensor, Tensor> corner_pool_pair_backward_cpu(const Tensor& grad, const Tensor& vertical,
                                                         const Tensor& horizontal, bool reverse) {
  check_map("corner_pool_pair_backward", "vertical", vertical);
  check_same("corner_pool_pair_backward", "vertical", vertical, "horizontal", horizontal);
  return {corner_pool_backward_cpu(grad, vertical, 2, reverse),
          corner_pool_backward_cpu(grad, horizontal, 3, reverse)};
}

// ---------------------------------------------------------------- center_pool

// A map of another format is copied: whole planes are read.
Tensor center_pool_cpu(const Tensor& vertical, const Tensor& horizontal) {
  check_map("center_pool", "vertical", vertical);
  check_same("center_pool", "vertical", vertical, "horizontal", horizontal);
  const Tensor v = vertical.contiguous();
  const Tensor h = horizontal.contiguous();
  Tensor out = at::empty_like(v);
  const int64_t height = v.size(2);
  const int64_t width = v.size(3);
  if (out.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, v.scalar_type(), "center_pool_cpu", [&] {
          const int64_t plane = height * width;
          const scalar_t* from_vertical = v.const_data_ptr<scalar_t>();
          const scalar_t* from_horizontal = h.const_data_ptr<scalar_t>();
          scalar_t* target = out.mutable_data_ptr<scalar_t>();
          at::parallel_for(
              0, v.size(0) * v.size(1), grain_for(plane), [&](int64_t begin, int64_t end) {
                std::vector<cpu_arithmetic_t<scalar_t>> maxima(width);
                for (int64_t n = begin * plane; n < end * plane; n += plane) {
                  scan_kernels<scalar_t>().center_plane(from_vertical + n, from_horizontal + n,
                                                        target + n, height, width, maxima.data());
                }
              });
        });
  }
  return out.contiguous(format_of(vertical));
}

std::tuple<Tensor, Tensor> center_pool_backward_cpu(const Tensor& grad, const Tensor& vertical,
                                                    const Tensor& horizontal) {
  check_map("center_pool_backward", "vertical", vertical);
  check_same("center_pool_backward", "vertical", vertical, "horizontal", horizontal);
  check_same("center_pool_backward", "vertical", vertical, "grad", grad);
  const Tensor g = grad.contiguous();
  const Tensor v = vertical.contiguous();
  const Tensor h = horizontal.contiguous();
  Tensor grad_vertical = at::empty_like(v);
  Tensor grad_horizontal = at::empty_like(h);
  const int64_t height = v.size(2);
  const int64_t width = v.size(3);
  if (v.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, v.scalar_type(), "center_pool_backward_cpu", [&] {
          using T = cpu_arithmetic_t<scalar_t>;
          const int64_t plane = height * width;
          const scalar_t* from_grad = g.const_data_ptr<scalar_t>();
          const scalar_t* from_vertical = v.const_data_ptr<scalar_t>();
          const scalar_t* from_horizontal = h.const_data_ptr<scalar_t>();
          scalar_t* to_vertical = grad_vertical.mutable_data_ptr<scalar_t>();
          scalar_t* to_horizontal = grad_horizontal.mutable_data_ptr<scalar_t>();
          at::parallel_for(
              0, v.size(0) * v.size(1), grain_for(plane), [&](int64_t begin, int64_t end) {
                std::vector<T> maxima(width);
                std::vector<T> sums(width);
                std::vector<scans::Integer<T>> holders(width);
                for (int64_t n = begin * plane; n < end * plane; n += plane) {
                  scan_kernels<scalar_t>().center_plane_backward(
                      from_grad + n, from_vertical + n, from_horizontal + n, to_vertical + n,
                      to_horizontal + n, height, width, maxima.data(), sums.data(), holders.data());
                }
              });
        });
  }
  return {grad_vertical.contiguous(format_of(vertical)),
          grad_horizontal.contiguous(format_of(horizontal))};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CPU, m) {
  m.impl("corner_pool", corner_pool_cpu);
  m.impl("corner_pool_backward", corner_pool_backward_cpu);
  m.impl("corner_pool_pair", corner_pool_pair_cpu);
  m.impl("corner_pool_pair_backward", corner_pool_pair_backward_cpu);
  m.impl("center_pool", center_pool_cpu);
  m.impl("center_pool_backward", center_pool_backward_cpu);
}

}  // namespace d2ext
