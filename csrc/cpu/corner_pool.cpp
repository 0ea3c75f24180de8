// CPU kernels of corner pooling. Lines across the memory (columns of a contiguous map) are pooled a
// tile of adjacent ones at a time, lines along it one by one, by windows of kWindow elements.
#include "../corner_pool.h"

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "vectorize.h"

namespace d2ext {
namespace {

using at::Tensor;

// Adjacent lines of a tile.
constexpr int64_t kTile = 64;
// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 32768;

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

// The running maximum m after x: NaN is the greatest, and of equal ones the first stays.
template <typename T>
inline T raised(T m, T x) {
  return (x > m) | (x != x) ? x : m;
}

template <typename T>
inline bool takes_over(T x, T m) {
  return (m == m) & ((x > m) | (x != x));
}

template <typename In, typename Out>
inline void convert(const In* from, Out* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<Out>(from[i]);
  }
}

// kTile elements, of which the first `count` are those of `from`: itself, or converted to `buffer`.
template <typename T, typename scalar_t>
inline const T* in_arithmetic(const scalar_t* from, T* buffer, int64_t count) {
  if constexpr (std::is_same_v<T, scalar_t>) {
    if (count == kTile) {
      return from;
    }
  }
  convert(from, buffer, count);
  return buffer;
}

// Lines of `length` elements, `step` apart in scan order, `count` <= kTile of them adjacent.
// out = running maximum; it may be x.
template <typename T, typename scalar_t>
inline void scan_tile(const scalar_t* x, scalar_t* out, int64_t length, int64_t step,
                      int64_t count) {
  T running[kTile];
  T values[kTile] = {};
  std::fill_n(running, kTile, kLowest<T>);
  for (int64_t l = 0; l < length; ++l) {
    const T* row = in_arithmetic(x + l * step, values, count);
    for (int64_t c = 0; c < kTile; ++c) {
      running[c] = raised(running[c], row[c]);
    }
    convert(running, out + l * step, count);
  }
}

// In scan order a run begins with each element that takes over; the sum of the run's gradients goes
// to it. before: room for length * kTile. grad_x may be grad.
template <typename T, typename scalar_t>
inline void scan_tile_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                               int64_t length, int64_t step, int64_t count, T* before) {
  T running[kTile];
  T values[kTile] = {};
  T grads[kTile] = {};
  T sums[kTile] = {};
  T results[kTile];
  std::fill_n(running, kTile, kLowest<T>);
  for (int64_t l = 0; l < length; ++l) {
    const T* row = in_arithmetic(x + l * step, values, count);
    T* own = before + l * kTile;
    for (int64_t c = 0; c < kTile; ++c) {
      own[c] = running[c];
      running[c] = raised(running[c], row[c]);
    }
  }
  for (int64_t l = length - 1; l >= 0; --l) {
    const T* row = in_arithmetic(x + l * step, values, count);
    const T* row_grads = in_arithmetic(grad + l * step, grads, count);
    const T* own = before + l * kTile;
    for (int64_t c = 0; c < kTile; ++c) {
      const bool taken = (l == 0) | takes_over(row[c], own[c]);
      const T sum = sums[c] + row_grads[c];
      results[c] = taken ? sum : T(0);
      sums[c] = taken ? T(0) : sum;
    }
    convert(results, grad_x + l * step, count);
  }
}

typedef float Four __attribute__((vector_size(16)));
#if defined(__clang__)
#define D2EXT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourIndices __attribute__((vector_size(16)));
#define D2EXT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FourIndices){__VA_ARGS__})
#endif

// to[j][i] = from[i][j] of 4 x 4.
inline void transpose_four(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  Four rows[4];
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&rows[i], from + i * from_pitch, sizeof(Four));
  }
  const Four low01 = D2EXT_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5);
  const Four low23 = D2EXT_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
  const Four high01 = D2EXT_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
  const Four high23 = D2EXT_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
  const Four columns[4] = {
      D2EXT_SHUFFLE(low01, low23, 0, 1, 4, 5), D2EXT_SHUFFLE(low01, low23, 2, 3, 6, 7),
      D2EXT_SHUFFLE(high01, high23, 0, 1, 4, 5), D2EXT_SHUFFLE(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) {
    std::memcpy(to + i * to_pitch, &columns[i], sizeof(Four));
  }
}

// to[j][i] = from[i][j] for i < rows, j < columns.
template <typename In, typename Out>
inline void transpose(const In* from, int64_t from_pitch, Out* to, int64_t to_pitch, int64_t rows,
                      int64_t columns) {
  int64_t done_rows = 0;
  int64_t done_columns = 0;
  if constexpr (std::is_same_v<In, float> && std::is_same_v<Out, float>) {
    done_rows = rows / 4 * 4;
    done_columns = columns / 4 * 4;
    for (int64_t j = 0; j < done_columns; j += 4) {
      for (int64_t i = 0; i < done_rows; i += 4) {
        transpose_four(from + i * from_pitch + j, from_pitch, to + j * to_pitch + i, to_pitch);
      }
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < done_columns ? done_rows : 0; i < rows; ++i) {
      to[j * to_pitch + i] = static_cast<Out>(from[i * from_pitch + j]);
    }
  }
}

inline int64_t grain_for(int64_t elements_per_task) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_task));
}

// The tiles of a task: kTile adjacent lines each.
struct Tiles {
  const Lines& lines;
  int64_t begin;
  int64_t end;
  bool along;     // lines lie along the memory, and are transposed into a buffer
  int64_t step;   // from one element of a line to the next in scan order, in the map or the buffer
  int64_t first;  // the line's first element in scan order

  // Calls work(position of the tile in the map, its number of lines); across the memory the
  // position is that of the elements which the scan meets first.
  template <typename Work>
  inline void each(const Work& work) const {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (along) {
        work(tile * kTile * lines.length, std::min(kTile, lines.outer - tile * kTile));
      } else {
        const int64_t in_row = (lines.inner + kTile - 1) / kTile;
        const int64_t column = tile % in_row * kTile;
        work(tile / in_row * lines.length * lines.inner + column + first,
             std::min(kTile, lines.inner - column));
      }
    }
  }
};

// Calls work(tiles) for the map's tiles, in parallel.
template <typename Work>
void for_tiles(const Lines& lines, bool reverse, const Work& work) {
  const bool along = lines.inner == 1;
  const int64_t count =
      along ? (lines.outer + kTile - 1) / kTile : lines.outer * ((lines.inner + kTile - 1) / kTile);
  const int64_t step = along ? kTile : lines.inner;
  at::parallel_for(0, count, grain_for(lines.length * kTile), [&](int64_t begin, int64_t end) {
    const Tiles tiles = {
        lines, begin, end, along, reverse ? -step : step, reverse ? (lines.length - 1) * step : 0};
    vectorized([&] { work(tiles); });
  });
}

struct Cpu {
  template <typename scalar_t>
  static void scan(const scalar_t* x, scalar_t* out, const Lines& lines, bool reverse) {
    using T = at::opmath_type<scalar_t>;
    const int64_t length = lines.length;
    for_tiles(lines, reverse, [&](const Tiles& tiles) {
      std::vector<T> buffer(tiles.along ? length * kTile : 0);
      T* cells = buffer.data() + (tiles.along ? tiles.first : 0);
      tiles.each([&](int64_t first, int64_t count) {
        if (tiles.along) {
          transpose(x + first, length, buffer.data(), kTile, count, length);
          scan_tile<T, T>(cells, cells, length, tiles.step, count);
          transpose(buffer.data(), kTile, out + first, length, length, count);
        } else {
          scan_tile<T>(x + first, out + first, length, tiles.step, count);
        }
      });
    });
  }

  template <typename scalar_t>
  static void scan_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                            const Lines& lines, bool reverse) {
    using T = at::opmath_type<scalar_t>;
    const int64_t length = lines.length;
    for_tiles(lines, reverse, [&](const Tiles& tiles) {
      std::vector<T> before(length * kTile);
      std::vector<T> values(tiles.along ? length * kTile : 0);
      std::vector<T> grads(values.size());
      tiles.each([&](int64_t first, int64_t count) {
        if (tiles.along) {
          transpose(x + first, length, values.data(), kTile, count, length);
          transpose(grad + first, length, grads.data(), kTile, count, length);
          T* own = grads.data() + tiles.first;
          scan_tile_backward<T, T>(values.data() + tiles.first, own, own, length, tiles.step, count,
                                   before.data());
          transpose(grads.data(), kTile, grad_x + first, length, length, count);
        } else {
          scan_tile_backward<T>(x + first, grad + first, grad_x + first, length, tiles.step, count,
                                before.data());
        }
      });
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CPU, m) {
  m.impl("corner_pool", corner_pool<Cpu>);
  m.impl("corner_pool_backward", corner_pool_backward<Cpu>);
}

}  // namespace d2ext
