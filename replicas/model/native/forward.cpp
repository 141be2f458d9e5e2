// The whole forward of a decoder of the Llama family over packed rows, in one call.
//
// The counterpart of replicas/model/transformer.py and attention.py, which are its reference. Residuals,
// norms, scores and sums are float32; weights, activations and K/V are float32 or bfloat16.
#include <algorithm>
#include <cfloat>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "penalties.h"
#include "pool.h"
#include "vec.h"

using namespace triad;

extern "C" {

// Replicated in model.py as ctypes structures.
struct LowRank {
  Matrix down, up;  // y += x down^T up^T
};

struct Layer {
  const float *input_norm, *post_norm, *query_norm, *key_norm, *qkv_bias;  // the last three may be null
  Matrix qkv, o, gate_up, down;  // gate and up interleaved by 16 rows
  LowRank qkv_adapter, o_adapter, gate_up_adapter, down_adapter;
  uint32_t *keys, *values;
};

struct Model {
  int64_t is_bfloat16, num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, page_size;
  float eps;
  const void* embedding;     // [vocab, hidden] elements
  const float* norm;         // [hidden]
  const float* phases;       // [positions, head_dim / 2] complex
  const float* query_scale;  // [positions], or null
  Matrix head;
  const Layer* layers;
};

// Rows of the adapter come first among the segments, and so among the wanted rows. A segment whose last tokens
// alone have it comes in two parts, which share pages and end: the first of them ends before the second starts.
struct Step {
  // numbers: those of num_segments to num_wanted_adapter, and then the arrays one after the other, as they are
  // listed but for pages (NativeModel.forward).
  Step(const int64_t* numbers, const int32_t* pages, float* logits) : pages(pages), logits(logits) {
    for (int64_t* to : {&num_segments, &num_rows, &num_wanted, &num_adapter_rows, &num_wanted_adapter}) {
      *to = *numbers++;
    }
    for (const int64_t** to : {&starts, &lengths, &ends, &num_causal, &page_offsets}) {
      *to = numbers, numbers += num_segments;
    }
    token_ids = numbers;
    wanted = token_ids + num_rows;
    places = wanted + num_wanted;
  }

  int64_t num_segments, num_rows, num_wanted, num_adapter_rows, num_wanted_adapter;
  // [num_segments]; ends: positions up to which tokens are stored, what bidirectional queries see
  const int64_t *starts, *lengths, *ends, *num_causal, *page_offsets;
  const int32_t* pages;      // segment s: from page_offsets[s]
  const int64_t* token_ids;  // [num_rows]
  const int64_t* wanted;     // [num_wanted], ascending rows
  const int64_t* places;     // [num_wanted]: each one's row of logits
  float* logits;             // [num_wanted, vocab padded to 32]
};
}

namespace {

// Zeroed memory that only grows. Padding past what is written stays zero.
class Buffer {
 public:
  template <class V>
  V* get(int64_t count) {
    const size_t bytes = (size_t)count * sizeof(V);
    if (bytes > size_) {
      size_ = bytes + bytes / 2;
      memory_.reset(static_cast<char*>(::operator new(size_, std::align_val_t(64))));
      std::memset(memory_.get(), 0, size_);
    }
    return reinterpret_cast<V*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

struct Context {
  explicit Context(int num_threads) : pool(num_threads) {}
  Pool pool;
  Buffer hidden, wanted_hidden, x, qkv, queries, attended, wanted_attended, activated, low_rank, delta;
};

template <class T>
class Forward {
  using Element = typename T::Element;

 public:
  Forward(Context& context, const Model& model, const Step& step)
      : pool_(context.pool), model_(model), step_(step),
        cache_(CacheShape::of<T>(model.page_size, model.num_kv_heads, model.head_dim)) {
    const int64_t rows = step.num_rows;
    num_rotated_ = model.num_heads + model.num_kv_heads;
    ld_hidden_ = round_up(model.hidden, BLOCK);
    ld_qkv_ = round_up((num_rotated_ + model.num_kv_heads) * model.head_dim, BLOCK);
    ld_x_ = ceil_div(model.hidden, T::PER_UNIT);
    ld_attended_ = model.num_heads * model.head_dim / T::PER_UNIT;
    ld_activated_ = round_up(model.intermediate, LANES) / T::PER_UNIT;
    hidden_ = context.hidden.get<float>(rows * ld_hidden_);
    wanted_hidden_ = context.wanted_hidden.get<float>(step.num_wanted * ld_hidden_);
    x_ = context.x.get<uint32_t>(rows * ld_x_);
    qkv_ = context.qkv.get<float>(rows * ld_qkv_);
    queries_ = context.queries.get<uint32_t>(rows * ld_attended_);
    attended_ = context.attended.get<uint32_t>(rows * ld_attended_);
    wanted_attended_ = context.wanted_attended.get<uint32_t>(step.num_wanted * ld_attended_);
    activated_ = context.activated.get<uint32_t>(rows * ld_activated_);
    int64_t rank = 0, width = 0;
    for (int64_t l = 0; l < model.num_layers; l++) {
      const Layer& layer = model.layers[l];
      for (const LowRank* a : {&layer.qkv_adapter, &layer.o_adapter, &layer.gate_up_adapter, &layer.down_adapter}) {
        rank = std::max(rank, round_up(a->down.n, BLOCK));
      }
      width = std::max({width, round_up(layer.qkv.n, BLOCK), round_up(layer.gate_up.n, BLOCK)});
    }
    ld_rank_ = rank / T::PER_UNIT;
    ld_delta_ = width;
    low_rank_ = context.low_rank.get<uint32_t>(step.num_adapter_rows * ld_rank_);
    delta_ = context.delta.get<float>(step.num_adapter_rows && rank ? rows * width : 0);
    plan();
  }

  void run() {
    pool_.run(step_.num_rows, [this] { body(); });
  }

 private:
  // Lays out each row's place in the K/V, and attention's tasks, of which long blocks of queries come first.
  void plan() {
    const int64_t per_kv = model_.num_heads / model_.num_kv_heads;
    const int64_t block_length = std::max<int64_t>(1, MAX_SCORE_ROWS / per_kv);
    row_page_.reserve(step_.num_rows);
    for (int64_t s = 0, row = 0; s < step_.num_segments; s++) {
      const int64_t start = step_.starts[s], length = step_.lengths[s], end = step_.ends[s];
      const int32_t* pages = step_.pages + step_.page_offsets[s];
      for (int64_t q = 0; q < length; q += block_length) {
        blocks_.push_back({pages, start + q, std::min(block_length, length - q), row + q, end,
                           step_.num_causal[s] - q});
      }
      for (int64_t i = 0; i < length; i++) {
        positions_.push_back(start + i);
        row_page_.push_back(pages[(start + i) / model_.page_size]);
        is_last_.push_back(start + i + 1 == end || (start + i + 1) % model_.page_size == 0);
      }
      row += length;
    }
    std::stable_sort(blocks_.begin(), blocks_.end(), [](const QueryBlock& a, const QueryBlock& b) {
      return a.num_keys * a.length > b.num_keys * b.length;
    });
  }

  void body() {
    const int64_t rows = step_.num_rows;
    pool_.each(rows, [&](int64_t row) {
      const Element* from = (const Element*)model_.embedding + step_.token_ids[row] * model_.hidden;
      for (int64_t i = 0; i < model_.hidden; i++) hidden_[row * ld_hidden_ + i] = T::read(from[i]);
    });
    for (int64_t l = 0; l < model_.num_layers; l++) {
      const Layer& layer = model_.layers[l];
      const bool is_last = l == model_.num_layers - 1;
      project_qkv(layer);
      pool_.each(rows, [&](int64_t row) { rotate_and_store(layer, row); });
      if (is_last && !step_.num_wanted) return;
      pool_.each((int64_t)blocks_.size() * model_.num_kv_heads, [&](int64_t task) {
        attend<T>(cache_, layer.keys, layer.values, blocks_[task / model_.num_kv_heads],
                  task % model_.num_kv_heads, model_.num_heads, queries_, (Element*)attended_,
                  ld_attended_ * T::PER_UNIT);
      });
      if (!is_last) {
        finish(layer, hidden_, attended_, rows, step_.num_adapter_rows);
      } else {
        pool_.each(step_.num_wanted, [&](int64_t i) {
          const int64_t row = step_.wanted[i];
          std::copy_n(hidden_ + row * ld_hidden_, ld_hidden_, wanted_hidden_ + i * ld_hidden_);
          std::copy_n(attended_ + row * ld_attended_, ld_attended_, wanted_attended_ + i * ld_attended_);
        });
        finish(layer, wanted_hidden_, wanted_attended_, step_.num_wanted, step_.num_wanted_adapter);
      }
    }
    normalise(wanted_hidden_, model_.norm, step_.num_wanted, step_.places);
    linear_to(model_.head, x_, ld_x_, step_.num_wanted, step_.logits, round_up(model_.head.n, BLOCK),
              zero);
  }

  // into x_, row i at places[i], or at i.
  void normalise(const float* hidden, const float* weight, int64_t rows, const int64_t* places = nullptr) {
    pool_.each(rows, [&, hidden, weight, places](int64_t row) {
      const int64_t to = places ? places[row] : row;
      rms_norm(hidden + row * ld_hidden_, weight, model_.hidden, (Element*)(x_ + to * ld_x_));
    });
  }

  // to may be from itself where Out is float.
  template <class Out>
  void rms_norm(const float* from, const float* weight, int64_t n, Out* to) const {
    Floats squares{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares += load<Floats>(from + i) * load<Floats>(from + i);
    float sum = sum_lanes(squares);
    for (; i < n; i++) sum += from[i] * from[i];
    const float scale = 1.0f / std::sqrt(sum / n + model_.eps);
    for (i = 0; i < n; i++) {
      if constexpr (std::is_same_v<Out, float>) {
        to[i] = from[i] * scale * weight[i];
      } else {
        to[i] = T::round(from[i] * scale * weight[i]);
      }
    }
  }

  void project_qkv(const Layer& layer) {
    normalise(hidden_, layer.input_norm, step_.num_rows);
    const auto bias = [&](int64_t, int64_t column) {
      return layer.qkv_bias ? Init{layer.qkv_bias + column, 0} : Init{};
    };
    const bool adapted = add_low_rank(layer.qkv_adapter, step_.num_rows, step_.num_adapter_rows, bias);
    linear_to(layer.qkv, x_, ld_x_, step_.num_rows, qkv_, ld_qkv_, [&](int64_t row, int64_t column) {
      return adapted ? delta(row, column) : bias(row, column);
    });
  }

  void rotate_and_store(const Layer& layer, int64_t row) {
    const int64_t position = positions_[row], dim = model_.head_dim;
    const float* phases = model_.phases + position * dim;
    float* qkv = qkv_ + row * ld_qkv_;
    const float scale = (model_.query_scale ? model_.query_scale[position] : 1.0f) / std::sqrt((float)dim);
    for (int64_t h = 0; h < num_rotated_; h++) {
      float* head = qkv + h * dim;
      const float* norm = h < model_.num_heads ? layer.query_norm : layer.key_norm;
      if (norm) rms_norm(head, norm, dim, head);
      const float by = h < model_.num_heads ? scale : 1.0f;
      for (int64_t d = 0; d < dim; d += 2) {
        const float re = head[d], im = head[d + 1];
        head[d] = (re * phases[d] - im * phases[d + 1]) * by;
        head[d + 1] = (re * phases[d + 1] + im * phases[d]) * by;
      }
    }
    Element* queries = (Element*)(queries_ + row * ld_attended_);
    for (int64_t i = 0; i < model_.num_heads * dim; i++) queries[i] = T::round(qkv[i]);
    for (int64_t h = 0; h < model_.num_kv_heads; h++) {
      store_token<T>(cache_, layer.keys, layer.values, row_page_[row], position % model_.page_size, h,
                     qkv + (model_.num_heads + h) * dim, qkv + (num_rotated_ + h) * dim, is_last_[row]);
    }
  }

  // Output projection and MLP, added to hidden in place.
  void finish(const Layer& layer, float* hidden, const uint32_t* attended, int64_t rows, int64_t adapter_rows) {
    const auto residual = [&, hidden](int64_t row, int64_t column) {
      return Init{hidden + row * ld_hidden_ + column, ld_hidden_};
    };
    add_in_place(layer.o_adapter, attended, ld_attended_, adapter_rows, hidden);
    linear_to(layer.o, attended, ld_attended_, rows, hidden, ld_hidden_, residual);
    normalise(hidden, layer.post_norm, rows);
    const bool adapted = add_low_rank(layer.gate_up_adapter, rows, adapter_rows, zero);
    linear<T>(
        pool_, layer.gate_up, rows, x_, ld_x_,
        [&](int64_t row, int64_t column) { return adapted ? delta(row, column) : Init{}; },
        [&](int64_t row, int64_t count, int64_t column, const float* sums) {
          activate(row, count, column, sums);
        });
    add_in_place(layer.down_adapter, activated_, ld_activated_, adapter_rows, hidden);
    linear_to(layer.down, activated_, ld_activated_, rows, hidden, ld_hidden_, residual);
  }

  void activate(int64_t row, int64_t count, int64_t column, const float* sums) {
    for (int64_t m = 0; m < count; m++) {
      const Floats gate = load<Floats>(sums + m * BLOCK), up = load<Floats>(sums + m * BLOCK + LANES);
      T::write((Element*)(activated_ + (row + m) * ld_activated_) + column / 2,
               gate / (exp(-gate) + 1.0f) * up);
    }
  }

  template <class InitOf>
  void linear_to(const Matrix& w, const uint32_t* x, int64_t ldx, int64_t rows, float* out, int64_t ldo,
                 const InitOf& init) {
    linear<T>(pool_, w, rows, x, ldx, init, [=](int64_t row, int64_t count, int64_t column, const float* sums) {
      for (int64_t m = 0; m < count; m++) {
        float* to = out + (row + m) * ldo + column;
        store(to, load<Floats>(sums + m * BLOCK));
        store(to + LANES, load<Floats>(sums + m * BLOCK + LANES));
      }
    });
  }

  // x down^T into low_rank_.
  void project_down(const LowRank& adapter, const uint32_t* x, int64_t ldx, int64_t rows) {
    linear<T>(pool_, adapter.down, rows, x, ldx, zero,
              [this](int64_t row, int64_t count, int64_t column, const float* sums) {
                for (int64_t m = 0; m < count; m++) {
                  Element* to = (Element*)(low_rank_ + (row + m) * ld_rank_) + column;
                  T::write(to, load<Floats>(sums + m * BLOCK));
                  T::write(to + LANES, load<Floats>(sums + m * BLOCK + LANES));
                }
              });
  }

  // init + x down^T up^T into delta_, of rows without the adapter init alone. False: there is none.
  template <class InitOf>
  bool add_low_rank(const LowRank& adapter, int64_t rows, int64_t adapter_rows, const InitOf& init) {
    if (!adapter_rows || !adapter.down.packed) return false;
    project_down(adapter, x_, ld_x_, adapter_rows);
    linear_to(adapter.up, low_rank_, ld_rank_, adapter_rows, delta_, ld_delta_, init);
    const int64_t width = round_up(adapter.up.n, BLOCK);
    pool_.each(rows - adapter_rows, [&](int64_t i) {
      float* to = delta_ + (adapter_rows + i) * ld_delta_;
      const float* from = init(0, 0).values;
      from ? (void)std::copy_n(from, width, to) : (void)std::fill_n(to, width, 0.0f);
    });
    return true;
  }

  Init delta(int64_t row, int64_t column) const { return {delta_ + row * ld_delta_ + column, ld_delta_}; }

  void add_in_place(const LowRank& adapter, const uint32_t* x, int64_t ldx, int64_t rows, float* hidden) {
    if (!rows || !adapter.down.packed) return;
    project_down(adapter, x, ldx, rows);
    linear_to(adapter.up, low_rank_, ld_rank_, rows, hidden, ld_hidden_, [&](int64_t row, int64_t column) {
      return Init{hidden + row * ld_hidden_ + column, ld_hidden_};
    });
  }

  static Init zero(int64_t, int64_t) { return {}; }

  Pool& pool_;
  const Model& model_;
  const Step& step_;
  const CacheShape cache_;
  int64_t num_rotated_, ld_hidden_, ld_qkv_, ld_x_, ld_attended_, ld_activated_, ld_rank_, ld_delta_;
  float *hidden_, *wanted_hidden_, *qkv_, *delta_;
  uint32_t *x_, *queries_, *attended_, *wanted_attended_, *activated_, *low_rank_;
  std::vector<QueryBlock> blocks_;
  std::vector<int64_t> positions_, row_page_;
  std::vector<bool> is_last_;  // of the tokens that this step stores in the row's page
};

// The most probable token of a row, its logit, and log(sum(exp(logits))).
void choose_row(float* logits, int64_t vocab, int64_t forbidden, int64_t* token, float* largest, float* normaliser) {
  if (forbidden >= 0) logits[forbidden] = -INFINITY;
  const Ints lane = lane_numbers();
  Floats best = splat(-INFINITY);
  Ints at{}, is_nan{};  // in no comparison true, and nothing to our exp
  int64_t i = 0;
  for (; i + LANES <= vocab; i += LANES) {
    const Floats v = load<Floats>(logits + i);
    const Ints better = v > best;
    is_nan = is_nan | ~((v > splat(-INFINITY)) | (v < splat(-FLT_MAX)));
    best = select(better, v, best);
    at = (better & (lane + (int32_t)i)) | (~better & at);
  }
  float top = -INFINITY;
  int64_t found = 0;
  for (int l = 0; l < LANES; l++) {
    if (best[l] > top || (best[l] == top && at[l] < found)) top = best[l], found = at[l];
  }
  for (; i < vocab; i++) {
    if (logits[i] > top) top = logits[i], found = i;
  }
  Floats sums{};
  for (i = 0; i + LANES <= vocab; i += LANES) sums += exp(load<Floats>(logits + i) - top);
  float sum = sum_lanes(sums);
  for (; i < vocab; i++) sum += std::exp(logits[i] - top);
  for (int l = 0; l < LANES; l++) {
    if (is_nan[l]) sum = NAN;
  }
  *token = found;
  *largest = top;
  *normaliser = top + std::log(sum);
}

}  // namespace

extern "C" {

void* triad_open(int64_t num_threads) { return new Context((int)num_threads); }

void triad_close(void* context) { delete static_cast<Context*>(context); }

// The threads that the next forward of so many rows will have.
int64_t triad_team_size(void* context, int64_t rows) {
  return static_cast<Context*>(context)->pool.team_of(rows).size();
}

void triad_forward(void* context, const Model* model, const int64_t* numbers, const int32_t* pages, float* logits) {
  auto& c = *static_cast<Context*>(context);
  const Step step(numbers, pages, logits);
  if (model->is_bfloat16) {
    Forward<BFloat16>(c, *model, step).run();
  } else {
    Forward<Float32>(c, *model, step).run();
  }
}

// logits: [rows, ld]; the forbidden token's, if not negative, becomes -inf. tokens, largest, normalisers: [rows]
// The normaliser of a row with a NaN or +inf, or of nothing but -inf, is not finite, and its token is some id.
void triad_choose(void* context, float* logits, int64_t rows, int64_t ld, int64_t vocab, int64_t forbidden,
                  int64_t* tokens, float* largest, float* normalisers) {
  static_cast<Context*>(context)->pool.run_each(rows, rows * vocab, [&](int64_t row) {
    choose_row(logits + row * ld, vocab, forbidden, tokens + row, largest + row, normalisers + row);
  });
}

// logits: [W, ld], W as the penalties have it
void triad_penalise(void* context, float* logits, int64_t ld, const Penalty* penalties, int64_t count) {
  penalise(static_cast<Context*>(context)->pool, logits, ld, penalties, count);
}

// Bytes of one page of one layer's keys, or of its values.
int64_t triad_page_bytes(int64_t is_bfloat16, int64_t page_size, int64_t num_kv_heads, int64_t head_dim) {
  const CacheShape shape = is_bfloat16 ? CacheShape::of<BFloat16>(page_size, num_kv_heads, head_dim)
                                       : CacheShape::of<Float32>(page_size, num_kv_heads, head_dim);
  return num_kv_heads * shape.tiles_per_page * shape.tile_units * 4;
}

// Reads so many bytes once, for measurements; returns their sum, so that it is not left out.
int64_t triad_read(void* context, const char* bytes, int64_t count) {
  auto& pool = static_cast<Context*>(context)->pool;
  constexpr int64_t PART = 128 << 10;
  std::atomic<int64_t> total{0};
  pool.run(count, [&] {
    pool.each(ceil_div(count, PART), [&](int64_t part) {
      Units sums[4] = {};
      const char* end = bytes + std::min(count, (part + 1) * PART) / 256 * 256;
      for (const char* at = bytes + part * PART; at < end; at += 256) {
        for (int i = 0; i < 4; i++) sums[i] += load<Units>(at + 64 * i);
      }
      total += (sums[0] + sums[1] + sums[2] + sums[3])[0];
    });
  });
  return total;
}

// y = x W^T alone, for measurements. x: [rows, units]; y: [rows, n padded to 32]
void triad_linear(void* context, int64_t is_bfloat16, const Matrix* w, const uint32_t* x, int64_t rows,
                  float* y) {
  auto& pool = static_cast<Context*>(context)->pool;
  const int64_t ldy = round_up(w->n, BLOCK);
  const auto zero = [](int64_t, int64_t) { return Init{}; };
  const auto finish = [&](int64_t row, int64_t count, int64_t column, const float* sums) {
    for (int64_t m = 0; m < count; m++) std::copy_n(sums + m * BLOCK, BLOCK, y + (row + m) * ldy + column);
  };
  pool.run(rows, [&] {
    if (is_bfloat16) {
      linear<BFloat16>(pool, *w, rows, x, w->k / 2, zero, finish);
    } else {
      linear<Float32>(pool, *w, rows, x, w->k, zero, finish);
    }
  });
}
}
