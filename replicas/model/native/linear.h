// y = x W^T over packed rows of W.
//
// Packed: [N / 32][units of K][32 units], N padded to 32 and K to a unit with zeros, so 32 outputs read
// one contiguous block once, and their sums stay in registers over all of K. Every output is summed in
// the order of K whatever the number of rows: a row's result does not depend on the rows beside it.
#pragma once

#include "pool.h"
#include "vec.h"

namespace triad {

constexpr int BLOCK = 32;
constexpr int MAX_ROWS = 12;  // 24 of the 32 registers hold sums

// n, k: unpadded. Null: no such matrix.
struct Matrix {
  const uint32_t* packed;
  int64_t n, k;
};

// init: what the sums begin with, rows ld_init apart (0: one row for all); null for zeros.
struct Init {
  const float* values = nullptr;
  int64_t ld = 0;
};

template <class T, int M>
void sum_block(const uint32_t* w, int64_t num_units, const uint32_t* x, int64_t ldx, Init init, float* out) {
  Floats acc[M][2];
  for (int m = 0; m < M; m++) {
    for (int v = 0; v < 2; v++) {
      acc[m][v] = init.values ? load<Floats>(init.values + m * init.ld + v * LANES) : Floats{};
    }
  }
  for (int64_t k = 0; k < num_units; k++) {
    const Units w0 = load<Units>(w + k * BLOCK), w1 = load<Units>(w + k * BLOCK + LANES);
    if constexpr (M <= 4) __builtin_prefetch(w + k * BLOCK + 4096 / 4);
    if constexpr (M <= 4) __builtin_prefetch(w + k * BLOCK + 4096 / 4 + LANES);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const uint32_t unit = x[m * ldx + k];
      acc[m][0] = T::mac(acc[m][0], w0, unit);
      acc[m][1] = T::mac(acc[m][1], w1, unit);
    }
  }
  for (int m = 0; m < M; m++) {
    store(out + m * BLOCK, acc[m][0]);
    store(out + m * BLOCK + LANES, acc[m][1]);
  }
}

template <class T>
using SumBlock = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, Init, float*);

template <class T>
constexpr SumBlock<T> SUM_BLOCK[MAX_ROWS + 1] = {
    nullptr,          sum_block<T, 1>,  sum_block<T, 2>,  sum_block<T, 3>, sum_block<T, 4>,
    sum_block<T, 5>,  sum_block<T, 6>,  sum_block<T, 7>,  sum_block<T, 8>, sum_block<T, 9>,
    sum_block<T, 10>, sum_block<T, 11>, sum_block<T, 12>,
};

// All threads together. x: [rows, units of k], rows ldx units apart. init(row) gives an Init for rows
// row and following, up to the next multiple of nothing: it must be valid for `count` rows.
// finish(row, count, first column, sums [count][32]) takes the results.
template <class T, class InitOf, class Finish>
void linear(Pool& pool, const Matrix& w, int64_t rows, const uint32_t* x, int64_t ldx, const InitOf& init_of,
            const Finish& finish) {
  const int64_t num_units = ceil_div(w.k, T::PER_UNIT), num_blocks = ceil_div(w.n, BLOCK);
  const int64_t num_slices = ceil_div(rows, 96);  // so that a prefill's activations stay in cache
  const int64_t group = std::max<int64_t>(
      1, std::min<int64_t>((128 << 10) / (num_units * BLOCK * 4), num_blocks / (4 * pool.num_threads())));
  const int64_t num_groups = ceil_div(num_blocks, group);
  pool.each(num_groups * num_slices, [&](int64_t task) {
    const int64_t first_block = task % num_groups * group;
    const int64_t last_block = std::min(num_blocks, first_block + group);
    const int64_t slice = task / num_groups;
    const int64_t first = rows * slice / num_slices, last = rows * (slice + 1) / num_slices;
    const int64_t num_tiles = ceil_div(last - first, MAX_ROWS);
    float sums[MAX_ROWS * BLOCK];
    for (int64_t block = first_block; block < last_block; block++) {
      for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int64_t row = first + (last - first) * tile / num_tiles;
        const int64_t count = first + (last - first) * (tile + 1) / num_tiles - row;
        SUM_BLOCK<T>[count](w.packed + block * num_units * BLOCK, num_units, x + row * ldx, ldx,
                            init_of(row, block * BLOCK), sums);
        finish(row, count, block * BLOCK, sums);
      }
    }
  });
}

}  // namespace triad
