// Attention of ragged segments over paged keys and values, read where they are.
//
// A page is cut into tiles of 16 tokens. Of each head a tile holds
//   keys    [units of head_dim][16 tokens]     scores of 16 tokens at once, no sums across lanes
//   values  [units of 16 tokens][head_dim]     head_dim padded to 16
// Softmax runs online over chunks of tiles that begin at the same tokens for every query, so a query's
// result does not depend on what else is in the batch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pool.h"
#include "vec.h"

namespace triad {

// The layout of one layer's keys or values, in units; both have tiles of tile_units.
struct CacheShape {
  int64_t page_size, num_kv_heads, head_dim, padded_dim, tiles_per_page, key_units, tile_units;

  template <class T>
  static CacheShape of(int64_t page_size, int64_t num_kv_heads, int64_t head_dim) {
    const int64_t padded = round_up(head_dim, LANES);
    return {page_size, num_kv_heads, head_dim, padded, ceil_div(page_size, LANES), head_dim / T::PER_UNIT,
            padded / T::PER_UNIT * LANES};
  }

  int64_t tile(int64_t page, int64_t head, int64_t part) const {
    return ((page * num_kv_heads + head) * tiles_per_page + part) * tile_units;
  }
};

// One token's key and value of one head into the cache. key, value: [head_dim]. is_last: of what is stored in
// this page; the token that would follow it in a unit of values is then made 0, since attention multiplies
// whole units, and what another sequence left there need not be finite.
template <class T>
void store_token(const CacheShape& shape, uint32_t* keys, uint32_t* values, int64_t page, int64_t offset,
                 int64_t head, const float* key, const float* value, bool is_last) {
  using Element = typename T::Element;
  const int64_t tile = shape.tile(page, head, offset / LANES), lane = offset % LANES;
  auto* k = reinterpret_cast<Element*>(keys + tile);
  auto* v = reinterpret_cast<Element*>(values + tile);
  for (int64_t d = 0; d < shape.head_dim; d++) {
    k[(d / T::PER_UNIT * LANES + lane) * T::PER_UNIT + d % T::PER_UNIT] = T::round(key[d]);
    v[(lane / T::PER_UNIT * shape.padded_dim + d) * T::PER_UNIT + lane % T::PER_UNIT] = T::round(value[d]);
  }
  for (int64_t next = lane + 1; is_last && next % T::PER_UNIT != 0; next++) {
    for (int64_t d = 0; d < shape.head_dim; d++) {
      v[(next / T::PER_UNIT * shape.padded_dim + d) * T::PER_UNIT + next % T::PER_UNIT] = Element{};
    }
  }
}

// Consecutive queries of one segment: `length` of them, the first at position `start`. Those before
// num_causal, which may be negative or past the last, are causal; the others see all of the segment.
struct QueryBlock {
  const int32_t* pages;
  int64_t start, length, first_row, num_keys, num_causal;

  int64_t visible(int64_t query) const { return query < num_causal ? start + query + 1 : num_keys; }
};

constexpr int MAX_SCORE_ROWS = 32;  // (query, query head) pairs of one task
constexpr int CHUNK_TILES = 4;
constexpr int MAX_HEAD_DIM = 256;

// For R rows, how many tiles are scored, and how many times 16 of a value's dimensions summed, at once, so
// that the sums stay in registers.
#if defined(__AVX512F__)
constexpr int MAX_SCORED = 8;
template <int R>
constexpr int SCORE_TILES = R <= 4 ? 4 : 1;
template <int R>
constexpr int VALUE_COLUMNS = 4;
#else
constexpr int MAX_SCORED = 4;
template <int R>
constexpr int SCORE_TILES = R == 1 ? 4 : R <= 3 ? 2 : 1;
template <int R>
constexpr int VALUE_COLUMNS = R == 1 ? 4 : R <= 3 ? 2 : 1;
#endif

// Scores of R rows against N tiles: out[r][16 a tile]. Few rows take several tiles at once, since one sum
// after the other would wait for its own latency.
template <class T, int R, int N>
inline void score_tiles(const uint32_t* const* tiles, int64_t num_units, const uint32_t* const* rows,
                        float* out, int64_t ldo) {
  Floats acc[R][N] = {};
  for (int64_t d = 0; d < num_units; d++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Units k = load<Units>(tiles[n] + d * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][n] = T::mac(acc[r][n], k, rows[r][d]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(out + r * ldo + n * LANES, acc[r][n]);
  }
}

template <class T, int R>
inline void score_chunk(const uint32_t* const* tiles, int64_t count, int64_t num_units,
                        const uint32_t* const* rows, float* out, int64_t ldo) {
  constexpr int N = SCORE_TILES<R>;
  int64_t t = 0;
  for (; t + N <= count; t += N) score_tiles<T, R, N>(tiles + t, num_units, rows, out + t * LANES, ldo);
  for (; t < count; t++) score_tiles<T, R, 1>(tiles + t, num_units, rows, out + t * LANES, ldo);
}

// out[r][16 * V of head_dim] += probabilities [R][units] x values, over all tiles of a chunk.
template <class T, int R, int V>
inline void add_values(const uint32_t* const* tiles, const int64_t* filled, int64_t count, int64_t ldv,
                       const uint32_t* probs, int64_t ldp, float* out) {
  Floats acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = load<Floats>(out + r * MAX_HEAD_DIM + v * LANES);
  }
  for (int64_t t = 0; t < count; t++) {
    const uint32_t* values = tiles[t];
    const uint32_t* p = probs + t * LANES / T::PER_UNIT;
    for (int64_t u = 0; u < ceil_div(filled[t], T::PER_UNIT); u++) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const Units value = load<Units>(values + u * ldv + v * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[r][v] = T::mac(acc[r][v], value, p[r * ldp + u]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(out + r * MAX_HEAD_DIM + v * LANES, acc[r][v]);
  }
}

template <class T, int R>
inline void add_values_of(const uint32_t* const* tiles, const int64_t* filled, int64_t count,
                          int64_t padded_dim, const uint32_t* probs, int64_t ldp, float* out) {
  const uint32_t* at[CHUNK_TILES];
  for (int64_t d = 0; d < padded_dim;) {
    for (int64_t t = 0; t < count; t++) at[t] = tiles[t] + d;
    if (VALUE_COLUMNS<R> == 4 && d + 64 <= padded_dim) {
      add_values<T, R, 4>(at, filled, count, padded_dim, probs, ldp, out + d);
      d += 64;
    } else if (VALUE_COLUMNS<R> >= 2 && d + 32 <= padded_dim) {
      add_values<T, R, 2>(at, filled, count, padded_dim, probs, ldp, out + d);
      d += 32;
    } else {
      add_values<T, R, 1>(at, filled, count, padded_dim, probs, ldp, out + d);
      d += LANES;
    }
  }
}

// One kv head, one block of queries. queries: [T, heads, key_units], already scaled; heads are ordered
// (query of a kv head, kv head). out: [T, heads * head_dim] elements, rows ldo elements apart.
template <class T>
void attend(const CacheShape& shape, const uint32_t* keys, const uint32_t* values, const QueryBlock& block,
            int64_t head, int64_t num_heads, const uint32_t* queries, typename T::Element* out, int64_t ldo) {
  constexpr int64_t CHUNK = CHUNK_TILES * LANES;
  const int64_t per_kv = num_heads / shape.num_kv_heads, num_rows = block.length * per_kv;
  alignas(64) float scores[MAX_SCORE_ROWS][CHUNK];
  alignas(64) typename T::Element probs[MAX_SCORE_ROWS][CHUNK];
  alignas(64) float sums[MAX_SCORE_ROWS][MAX_HEAD_DIM];
  Floats normaliser[MAX_SCORE_ROWS];
  float highest[MAX_SCORE_ROWS];
  const uint32_t* rows[MAX_SCORE_ROWS];
  int64_t visible[MAX_SCORE_ROWS];
  for (int64_t r = 0; r < num_rows; r++) {
    const int64_t query = r / per_kv, query_head = r % per_kv * shape.num_kv_heads + head;
    rows[r] = queries + ((block.first_row + query) * num_heads + query_head) * shape.key_units;
    visible[r] = block.visible(query);
    highest[r] = -INFINITY;
    normaliser[r] = Floats{};
    std::fill(sums[r], sums[r] + shape.padded_dim, 0.0f);
  }
  const int64_t last = visible[num_rows - 1], first_limit = visible[0];
  const int64_t num_tiles =
      last / shape.page_size * shape.tiles_per_page + ceil_div(last % shape.page_size, LANES);
  const Ints lane = lane_numbers();

  for (int64_t first = 0; first < num_tiles; first += CHUNK_TILES) {
    const int64_t count = std::min<int64_t>(CHUNK_TILES, num_tiles - first);
    const uint32_t *k[CHUNK_TILES], *v[CHUNK_TILES];
    for (int64_t t = 0; t < count; t++) {
      const int64_t page = (first + t) / shape.tiles_per_page, part = (first + t) % shape.tiles_per_page;
      const int64_t at = shape.tile(block.pages[page], head, part);
      k[t] = keys + at;
      v[t] = values + at;
    }
    int64_t r = 0;
    const auto score = [&]<int R>(std::integral_constant<int, R>) {
      for (; r + R <= num_rows; r += R) {
        score_chunk<T, R>(k, count, shape.key_units, rows + r, scores[r], CHUNK);
      }
    };
    if constexpr (MAX_SCORED == 8) score(std::integral_constant<int, 8>{});
    score(std::integral_constant<int, 4>{});
    score(std::integral_constant<int, 3>{});
    score(std::integral_constant<int, 2>{});
    score(std::integral_constant<int, 1>{});
    int64_t filled[CHUNK_TILES];
    for (int64_t t = 0; t < count; t++) {
      const int64_t page = (first + t) / shape.tiles_per_page, part = (first + t) % shape.tiles_per_page;
      const int64_t base = page * shape.page_size + part * LANES;
      filled[t] = std::min<int64_t>(LANES, shape.page_size - part * LANES);
      if (base + filled[t] <= first_limit && filled[t] == LANES) continue;
      float* to = &scores[0][t * LANES];
      for (r = 0; r < num_rows; r++) {
        const int limit = (int)std::clamp<int64_t>(visible[r] - base, 0, filled[t]);
        store(to + r * CHUNK, select(lane < Ints{} + limit, load<Floats>(to + r * CHUNK), splat(-INFINITY)));
      }
      filled[t] = std::min(filled[t], last - base);
    }
    for (r = 0; r < num_rows; r++) {
      Floats top = load<Floats>(scores[r]);
      for (int64_t t = 1; t < count; t++) top = max(top, load<Floats>(scores[r] + t * LANES));
      const float before = highest[r];
      highest[r] = std::max(before, max_lane(top));
      const Floats shrink = splat(exp(splat(before - highest[r]))[0]);
      normaliser[r] *= shrink;
      for (int64_t t = 0; t < count; t++) {
        const Floats p = exp(load<Floats>(scores[r] + t * LANES) - highest[r]);
        normaliser[r] += p;
        T::write(probs[r] + t * LANES, p);
      }
      if (before != highest[r]) {
        for (int64_t d = 0; d < shape.padded_dim; d += LANES) {
          store(sums[r] + d, load<Floats>(sums[r] + d) * shrink);
        }
      }
    }
    const auto* p = reinterpret_cast<const uint32_t*>(&probs[0][0]);
    constexpr int64_t ldp = CHUNK / T::PER_UNIT;
    const auto add = [&]<int R>(std::integral_constant<int, R>) {
      for (; r + R <= num_rows; r += R) {
        add_values_of<T, R>(v, filled, count, shape.padded_dim, p + r * ldp, ldp, sums[r]);
      }
    };
    r = 0;
    add(std::integral_constant<int, 4>{});
    add(std::integral_constant<int, 3>{});
    add(std::integral_constant<int, 2>{});
    add(std::integral_constant<int, 1>{});
  }
  for (int64_t r = 0; r < num_rows; r++) {
    const int64_t query = r / per_kv, query_head = r % per_kv * shape.num_kv_heads + head;
    typename T::Element* to = out + (block.first_row + query) * ldo + query_head * shape.head_dim;
    const float scale = 1.0f / sum_lanes(normaliser[r]);
    for (int64_t d = 0; d < shape.head_dim; d++) to[d] = T::round(sums[r][d] * scale);
  }
}

}  // namespace triad
