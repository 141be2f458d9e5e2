// Threads that go through a forward together, phase by phase.
//
// A forward has hundreds of phases of some ten microseconds, so threads wait for each other by spinning,
// but not for long: a partner that was preempted by another process gets the core. No more threads take part than
// are faster together (team.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "team.h"

namespace triad {

class Pool {
  using Clock = std::chrono::steady_clock;

 public:
  explicit Pool(int num_threads)
      : num_threads_(num_threads), cores_(cores_for(num_threads)), teams_(NUM_TEAMS, Team(num_threads)) {
    for (int i = 1; i < num_threads; i++) {
      calls_.push_back(std::make_unique<Call>());
      workers_.emplace_back([this, i] { work(i, calls_[i - 1]->number); });
    }
  }

  ~Pool() {
    stopping_ = true;
    call(num_threads_);
    for (auto& worker : workers_) worker.join();
  }

  int num_threads() const { return num_threads_; }

  // The team of runs of so many rows, within a factor of two.
  Team& team_of(int64_t rows) { return teams_[std::min<int64_t>(std::bit_width((uint64_t)rows), NUM_TEAMS - 1)]; }

  // Every thread of the team of so many rows calls body once; returns when all have.
  void run(int64_t rows, const std::function<void()>& body) {
    if (num_threads_ == 1) return body();
    Team& team = team_of(rows);
    size_ = team.size();
    num_own_ = num_tasks_ = 0;
    waited_ = {};
    const Clock::time_point began = Clock::now();
    const double cpu_began_s = thread_cpu_s();
    lead_core_ = this_core();
    if (core_of(0) != ANY) stay_on(core_of(0));
    body_ = &body;
    call(size_);
    body();
    barrier();
    if (core_of(0) != ANY) stay_on(ANY);
    const double cpu_s = thread_cpu_s() - cpu_began_s;
    team.note(seconds(Clock::now() - began), cpu_s, seconds(waited_), num_own_, num_tasks_);
  }

  // task(0) to task(count - 1), which take some nanoseconds for each of so many numbers: by the caller alone where
  // that is soon done, and where waking others would take longer.
  template <class Task>
  void run_each(int64_t count, int64_t numbers, const Task& task) {
    if (numbers >= WORTH_WAKING) return run(count, [&] { each(count, task); });
    for (int64_t i = 0; i < count; i++) task(i);
  }

  // Inside run, by every thread alike: task(0) to task(count - 1), each by whoever comes first, and
  // then a barrier. So a thread that lost its core for a while has less to do.
  template <class Task>
  void each(int64_t count, const Task& task) {
    if (size_ == 1) {
      for (int64_t i = 0; i < count; i++) task(i);
      num_own_ += count, num_tasks_ += count;
      return;
    }
    int64_t num_done = 0;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count; num_done++) task(i);
    if (leads()) num_own_ += num_done, num_tasks_ += count;
    barrier();
  }

 private:
  static constexpr int SPINS = 1000;  // some 20 microseconds
  static constexpr int64_t WORTH_WAKING = 1 << 17;  // numbers: some 0.1 ms
  static constexpr int NUM_TEAMS = 12;
  static constexpr int ANY = -1;

  struct alignas(64) Call {
    std::atomic<uint32_t> number{0};  // of the runs that a worker has been called to
  };

  // Where the threads are as many as the cores this process may use, each gets one for itself, the caller the
  // one it is on. On a busy machine the kernel else puts a woken thread where its waker runs, and both take turns
  // on one core. The caller is let go of after each run: threads that it starts would inherit its core. A smaller
  // team is left to the kernel, which knows what cores are free.
  int core_of(int thread) const {
    if (cores_.empty() || size_ != num_threads_) return ANY;
    if (thread == 0) return lead_core_;
    const int core = cores_[thread - 1];
    return core < lead_core_ ? core : cores_[thread];
  }

#if defined(__linux__)
  static std::vector<int> cores_for(int num_threads) {
    std::vector<int> cores;
    cpu_set_t allowed;
    if (num_threads > 1 && sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
      for (int core = 0; core < CPU_SETSIZE; core++) {
        if (CPU_ISSET(core, &allowed)) cores.push_back(core);
      }
    }
    if ((int)cores.size() != num_threads) cores.clear();
    return cores;
  }

  static int this_core() { return sched_getcpu(); }

  void stay_on(int core) const {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int each : cores_) {
      if (core == ANY || core == each) CPU_SET(each, &set);
    }
    sched_setaffinity(0, sizeof set, &set);
  }
#else
  static std::vector<int> cores_for(int) { return {}; }
  static int this_core() { return ANY; }
  void stay_on(int) const {}
#endif

  static double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

  static bool& leads() {
    static thread_local bool does = true;
    return does;
  }

  // The first so many threads, of which the caller is one.
  void call(int size) {
    for (int i = 1; i < size; i++) {
      calls_[i - 1]->number.fetch_add(1, std::memory_order_release);
      calls_[i - 1]->number.notify_one();
    }
  }

  void work(int thread, std::atomic<uint32_t>& called) {
    leads() = false;
    int at = ANY;
    for (uint32_t seen = 0;; seen++) {
      wait_while(called, seen);
      if (stopping_) return;
      if (at != core_of(thread)) stay_on(at = core_of(thread));
      (*body_)();
      barrier();
    }
  }

  void barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    const int size = size_;  // read before the others can go on to another run
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
    } else if (leads()) {
      const Clock::time_point began = Clock::now();
      const bool is_over = spin_while(phase_, phase);
      waited_ += Clock::now() - began;
      if (!is_over) phase_.wait(phase, std::memory_order_acquire);
    } else {
      wait_while(phase_, phase);
    }
  }

  static void wait_while(std::atomic<uint32_t>& value, uint32_t old) {
    if (!spin_while(value, old)) value.wait(old, std::memory_order_acquire);
  }

  // True once the value is another; false if that takes long.
  static bool spin_while(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < SPINS; i++) {
      if (value.load(std::memory_order_acquire) != old) return true;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    return false;
  }

  const int num_threads_;
  const std::vector<int> cores_;
  std::vector<Team> teams_;  // by the size of a run
  std::vector<std::unique_ptr<Call>> calls_;
  std::vector<std::thread> workers_;
  // Of the run under way, written by its leading thread before the others are called.
  const std::function<void()>* body_ = nullptr;
  int size_ = 1, lead_core_ = ANY;
  int64_t num_own_ = 0, num_tasks_ = 0;
  Clock::duration waited_{};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace triad
