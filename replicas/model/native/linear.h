// y = x W^T over packed rows of W.
//
// Packed: [N / 32][units of K][32 units], N padded to 32 and K to a unit with zeros, so 32 outputs read
// one contiguous block once, and their sums stay in registers over all of K. Every output is summed in
// the order of K whatever the number of rows: a row's result does not depend on the rows beside it.
// Where W is int8 codes, each becomes an element as it is read, and a sum is scaled at its end.
#pragma once

#include <array>
#include <utility>

#include "pool.h"
#include "vec.h"

namespace triad {

constexpr int BLOCK = 32;

// So many rows, and of each so many times 16 outputs, have their sums in registers at once: 24 of 32 with
// AVX-512, 12 of 16 of half that width elsewhere.
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;
template <int M>
constexpr int COLUMNS = 2;
#else
constexpr int MAX_ROWS = 6;
template <int M>
constexpr int COLUMNS = M <= 3 ? 2 : 1;
#endif

// A packed matrix of n rows and k columns, unpadded; packed is null where there is no such matrix.
// packed holds units where scales is null, else int8 codes in the units' order: row n is scales[n] times its
// codes (N padded to 32).
struct Matrix {
  const void* packed;
  const float* scales;
  int64_t n, k;
};

// The values that the sums begin with, rows ld apart (0: one row for all); null for zeros.
struct Init {
  const float* values = nullptr;
  int64_t ld = 0;
};

template <class T, bool CODES, int M>
void sum_block(const Matrix& w, int64_t block, const uint32_t* x, int64_t ldx, Init init, float* out) {
  constexpr int64_t STEP = LANES * (CODES ? T::PER_UNIT : 4);
  constexpr int N = COLUMNS<M>;
  const int64_t num_units = ceil_div(w.k, T::PER_UNIT);
  const auto units = [](const char* at) { return CODES ? T::units((const int8_t*)at) : load<Units>(at); };
  for (int first = 0; first < 2; first += N) {
    const char* packed = (const char*)w.packed + block * num_units * 2 * STEP + first * STEP;
    Floats acc[M][N];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
      for (int v = 0; v < N; v++) {
        acc[m][v] = init.values ? load<Floats>(init.values + m * init.ld + (first + v) * LANES) : Floats{};
      }
    }
    for (int64_t k = 0; k < num_units; k++, packed += 2 * STEP) {
      Units weights[N];
#pragma GCC unroll 2
      for (int v = 0; v < N; v++) {
        weights[v] = units(packed + v * STEP);
        if constexpr (M <= 4 || CODES) __builtin_prefetch(packed + 4096 + v * STEP);
      }
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) {
        const uint32_t unit = x[m * ldx + k];
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) acc[m][v] = T::mac(acc[m][v], weights[v], unit);
      }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
      for (int v = 0; v < N; v++) store(out + m * BLOCK + (first + v) * LANES, acc[m][v]);
    }
  }
}

using SumBlock = void (*)(const Matrix&, int64_t, const uint32_t*, int64_t, Init, float*);

template <class T, bool CODES>
constexpr auto SUM_BLOCK = []<size_t... M>(std::index_sequence<M...>) {
  return std::array<SumBlock, MAX_ROWS + 1>{nullptr, sum_block<T, CODES, M + 1>...};
}(std::make_index_sequence<MAX_ROWS>{});

// sums [rows][32]: each times its scale, plus init. Compiled once, so that it is rounded alike for any rows.
__attribute__((noinline)) inline void scale_sums(const float* scales, int64_t rows, Init init, float* sums) {
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t v = 0; v < BLOCK; v += LANES) {
      const Floats first = init.values ? load<Floats>(init.values + m * init.ld + v) : Floats{};
      float* sum = sums + m * BLOCK + v;
      store(sum, first + load<Floats>(scales + v) * load<Floats>(sum));
    }
  }
}

// All threads together. x: [rows, units of k], rows ldx units apart. init(row) gives an Init for rows
// row and following, up to the next multiple of nothing: it must be valid for `count` rows.
// finish(row, count, first column, sums [count][32]) takes the results.
template <class T, class InitOf, class Finish>
void linear(Pool& pool, const Matrix& w, int64_t rows, const uint32_t* x, int64_t ldx, const InitOf& init_of,
            const Finish& finish) {
  const auto& sum_block_of = w.scales ? SUM_BLOCK<T, true> : SUM_BLOCK<T, false>;
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
        const Init init = init_of(row, block * BLOCK);
        sum_block_of[count](w, block, x + row * ldx, ldx, w.scales ? Init{} : init, sums);
        if (w.scales) scale_sums(w.scales + block * BLOCK, count, init, sums);
        finish(row, count, block * BLOCK, sums);
      }
    }
  });
}

}  // namespace triad
