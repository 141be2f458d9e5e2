// Penalties of repetition, presence and frequency: the counterpart of replicas/model/penalties.py.
//
// Reading, changing and writing a logit in one pass is what takes least: the logits are many, and far apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pool.h"

extern "C" {

// Replicated in structures.py; Penalty of penalties.py has the fields' meaning.
struct Penalty {
  int64_t first_row, num_rows, num_shared;
  const int64_t* shared_ids;
  const int32_t* shared_times;
  const int64_t* own_starts;
  const int64_t* own_ids;
  const int32_t* own_times;
  const float* taken_off;
  float scale;
  float* shared_was;  // what is overwritten, [num_rows, num_shared]
  float* own_was;     // and one for each of the own ids
};
}

namespace triad {

// The lower of quotient and product where the scale is 1 or more, else the higher.
template <bool SHRINKS>
inline float penalised(float logit, float scale, float taken_off) {
  const float divided = logit / scale, multiplied = logit * scale;
  return (SHRINKS ? std::min(divided, multiplied) : std::max(divided, multiplied)) - taken_off;
}

template <bool SHRINKS>
void penalise_row(float* logits, const Penalty& p, int64_t row) {
  const int64_t* own_ids = p.own_ids;
  for (int64_t i = p.own_starts[row]; i < p.own_starts[row + 1]; i++) p.own_was[i] = logits[own_ids[i]];
  float* was = p.shared_was + row * p.num_shared;
  for (int64_t i = 0; i < p.num_shared; i++) {
    float& logit = logits[p.shared_ids[i]];
    was[i] = logit;
    logit = penalised<SHRINKS>(logit, p.scale, p.taken_off[p.shared_times[i]]);
  }
  for (int64_t i = p.own_starts[row]; i < p.own_starts[row + 1]; i++) {
    logits[own_ids[i]] = penalised<SHRINKS>(p.own_was[i], p.scale, p.taken_off[p.own_times[i]]);
  }
}

// logits: [W, ld]; no two of the penalties are of the same rows
inline void penalise(Pool& pool, float* logits, int64_t ld, const Penalty* penalties, int64_t count) {
  std::vector<const Penalty*> of_row;
  int64_t numbers = 0;
  for (int64_t i = 0; i < count; i++) {
    of_row.insert(of_row.end(), penalties[i].num_rows, penalties + i);
    numbers += penalties[i].num_rows * penalties[i].num_shared;
  }
  std::vector<int64_t> firsts;  // of each row's penalty, as an index of of_row
  for (int64_t i = 0; i < count; i++) firsts.insert(firsts.end(), penalties[i].num_rows, (int64_t)firsts.size());
  pool.run_each((int64_t)of_row.size(), numbers, [&](int64_t i) {
    const Penalty& p = *of_row[i];
    const int64_t row = i - firsts[i];
    float* line = logits + (p.first_row + row) * ld;
    p.scale >= 1 ? penalise_row<true>(line, p, row) : penalise_row<false>(line, p, row);
  });
}

}  // namespace triad
