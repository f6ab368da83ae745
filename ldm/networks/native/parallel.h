// Threads that share the work of one operator, and their scratch memory.
#pragma once
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

inline void wait_a_little() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// As many threads as `wanted` says when the first operator runs. Within a task, and while another
// operator has the threads, work is done where it is asked for. Results do not depend on the number: what a
// task adds up does not.
class Threads {
 public:
  static Threads &all() {
    static Threads *threads = new Threads;  // never destroyed: they may still wait when the process ends
    return *threads;
  }
  static int &wanted() {
    static int number = 1;
    return number;
  }
  int count() const { return count_; }

  template <class F> void for_each(int64_t tasks, F work) {
    if (tasks <= 1 || count_ == 1 || is_inside() || !turn_.try_lock()) {
      for (int64_t i = 0; i < tasks; ++i) work(i);
      return;
    }
    std::function<void(int64_t)> job = work;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job, tasks_ = tasks, next_ = 0;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    is_inside() = true;
    take_part(job, tasks);
    is_inside() = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // who wakes up now is too late
    }
    while (busy_.load(std::memory_order_acquire)) wait_a_little();
    turn_.unlock();
  }

 private:
  Threads() {
    cpu_set_t cores;  // the program's
    bool knows = !sched_getaffinity(getpid(), sizeof cores, &cores);
    count_ = std::max(1, wanted());
    for (int i = 1; i < count_; ++i) {
      std::thread([=] {
        if (knows) sched_setaffinity(0, sizeof cores, &cores);
        serve();
      }).detach();
    }
  }
  static bool &is_inside() {
    static thread_local bool inside = false;
    return inside;
  }
  void take_part(const std::function<void(int64_t)> &job, int64_t tasks) {
    for (int64_t i; (i = next_.fetch_add(1)) < tasks;) job(i);
  }
  void serve() {
    is_inside() = true;
    for (uint64_t seen = 0;;) {
      for (int turn = 0; turn < 10000 && round_.load(std::memory_order_acquire) == seen; ++turn) wait_a_little();
      std::function<void(int64_t)> *job;
      int64_t tasks;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load() != seen; });
        seen = round_.load();
        job = job_, tasks = tasks_;
        if (!job) continue;
        busy_.fetch_add(1);
      }
      take_part(*job, tasks);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  int count_;
  std::mutex mutex_, turn_;
  std::condition_variable wake_;
  std::function<void(int64_t)> *job_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<uint64_t> round_{0};
};

struct Free {
  void operator()(float *p) const { free(p); }
};
using Array = std::unique_ptr<float, Free>;

inline Array new_array(int64_t size) {
  return Array(static_cast<float *>(aligned_alloc(64, (size * sizeof(float) + 127) / 64 * 64)));
}

// At least `size` floats that belong to this thread until it asks for the same slot again.
template <int SLOT> float *scratch(int64_t size) {
  static thread_local Array array;
  static thread_local int64_t has = 0;
  if (has < size) array = new_array(size), has = size;
  return array.get();
}
