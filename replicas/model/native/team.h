// How many of a pool's threads take part in its runs.
//
// A thread must be woken, and the others wait for it at each barrier: for a small forward that may take longer than
// it helps. And where another process has the core of one, all wait until it is given back, several times as long
// as a forward takes. So each team's pace is measured, wall time by work, and now and then one of a thread more or
// less is tried for some 30 ms. Work is what the leading thread would take for all tasks by its CPU time for those
// it did, so that paces of unlike runs can be compared.
#pragma once

#include <algorithm>
#include <cstdint>
#if defined(__linux__)
#include <time.h>
#endif

namespace triad {

// CPU seconds of the calling thread; 0 where they are not known.
inline double thread_cpu_s() {
#if defined(__linux__)
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
#else
  return 0;
#endif
}

class Team {
 public:
  explicit Team(int num_threads) : num_threads_(num_threads), size_(num_threads), settled_(num_threads) {}

  // Of the next run.
  int size() const { return size_; }

  // After each run, by the leading thread: its wall time, its CPU time, how much of that it waited for others,
  // and how many of the tasks were its own. Without CPU times the team stays whole.
  void note(double wall_s, double cpu_s, double waited_s, int64_t num_own, int64_t num_tasks) {
    if (num_own == 0 || cpu_s <= 0) return;
    wall_s_ += wall_s;
    work_s_ += std::max(0.0, cpu_s - waited_s) * num_tasks / num_own;
    if (wall_s_ < WINDOW_S) return;
    const double pace = wall_s_ / std::max(work_s_, 1e-9);
    rested_s_ += wall_s_;
    wall_s_ = work_s_ = 0;
    if (size_ != settled_) {
      tried_ = size_;
      tried_pace_ = pace;
      size_ = settled_;
    } else if (tried_) {
      end_trial(pace);
    } else {
      look(pace);
    }
  }

 private:
  static constexpr double WINDOW_S = 0.03;
  static constexpr double MIN_REST_S = 0.05, MAX_REST_S = 1;  // between trials: twice as long after each in vain
  static constexpr double CLEARLY = 0.9;                     // better, as a share of the larger team's pace
  static constexpr double DISTURBED = 1.3;                   // times the pace at the last trial

  void look(double pace) {
    pace_ = pace;
    const bool is_disturbed = size_ > 1 && pace > DISTURBED * usual_pace_;
    if (rested_s_ < (is_disturbed ? MIN_REST_S : rest_s_)) return;
    if (is_disturbed || size_ == num_threads_) direction_ = -1;
    if (size_ == 1) direction_ = 1;
    size_ += direction_;
  }

  // A trial has a window of the settled size before it and one behind: something that passed by is in one alone.
  void end_trial(double pace) {
    if (tried_pace_ < (tried_ < settled_ ? CLEARLY : 1) * std::min(pace_, pace)) {
      size_ = settled_ = tried_;
      usual_pace_ = tried_pace_;
      rest_s_ = MIN_REST_S;
    } else {
      usual_pace_ = std::min(pace_, pace);
      rest_s_ = std::min(2 * rest_s_, MAX_REST_S);
      direction_ = -direction_;
    }
    tried_ = 0;
    rested_s_ = 0;
  }

  const int num_threads_;
  int size_, settled_;  // different while another size is tried
  int direction_ = -1;  // of the next trial
  int tried_ = 0;       // the size of a trial that is to be judged
  double tried_pace_ = 0, pace_ = 0;  // the trial's, and the settled size's in its last window before one
  double usual_pace_ = 0;             // of the settled size, at the last trial
  double rest_s_ = MIN_REST_S, rested_s_ = 0;  // by the runs' own time
  double wall_s_ = 0, work_s_ = 0;             // of the window under way
};

}  // namespace triad
