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
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace triad {

class Pool {
 public:
  explicit Pool(int num_threads) : num_threads_(num_threads) {
    for (int i = 1; i < num_threads; i++) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    stopping_ = true;
    begin();
    for (auto& worker : workers_) worker.join();
  }

  int num_threads() const { return num_threads_; }

  // Every thread calls body once; returns when all have.
  void run(const std::function<void()>& body) {
    body_ = &body;
    begin();
    body();
    barrier();
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
  static constexpr int SPINS = 4000;

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
  std::vector<std::thread> workers_;
  const std::function<void()>* body_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace triad
