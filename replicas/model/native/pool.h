// Threads that go through a forward together, phase by phase.
//
// A forward has hundreds of phases of some ten microseconds, so threads wait for each other by spinning,
// but not for long: a partner that was preempted by another process gets the core.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace triad {

class Pool {
 public:
  explicit Pool(int num_threads) : num_threads_(num_threads), cores_(cores_for(num_threads)) {
    for (int i = 1; i < num_threads; i++) {
      workers_.emplace_back([this, i] {
        stay_on(i);
        work();
      });
    }
  }

  ~Pool() {
    stopping_ = true;
    begin();
    for (auto& worker : workers_) worker.join();
  }

  int num_threads() const { return num_threads_; }

  // Every thread calls body once; returns when all have.
  void run(const std::function<void()>& body) {
    stay_on(0);
    body_ = &body;
    begin();
    body();
    barrier();
    leave_core();
  }

  // Inside run, by every thread alike: task(0) to task(count - 1), each by whoever comes first, and
  // then a barrier. So a thread that lost its core for a while has less to do.
  template <class Task>
  void each(int64_t count, const Task& task) {
    if (num_threads_ == 1) {
      for (int64_t i = 0; i < count; i++) task(i);
      return;
    }
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    barrier();
  }

 private:
  static constexpr int SPINS = 1000;  // some 20 microseconds

  // Where the threads are as many as the cores this process may use, each gets one for itself. On a busy
  // machine the kernel else puts a woken thread where its waker runs, and both take turns on one core.
  // The caller is let go of after each forward: threads that it starts would inherit its core.
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

  void stay_on(int thread) const {
    if (!cores_.empty()) allow({cores_[thread]});
  }

  void leave_core() const {
    if (!cores_.empty()) allow(cores_);
  }

  static void allow(const std::vector<int>& cores) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int core : cores) CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
  }
#else
  static std::vector<int> cores_for(int) { return {}; }
  void stay_on(int) const {}
  void leave_core() const {}
#endif

  void begin() {
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }

  void work() {
    uint32_t seen = 0;
    while (true) {
      wait_while(round_, seen);
      seen++;
      if (stopping_) return;
      (*body_)();
      barrier();
    }
  }

  void barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
    } else {
      wait_while(phase_, phase);
    }
  }

  static void wait_while(std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < SPINS; i++) {
      if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    value.wait(old, std::memory_order_acquire);
  }

  const int num_threads_;
  const std::vector<int> cores_;
  std::vector<std::thread> workers_;
  const std::function<void()>* body_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace triad
