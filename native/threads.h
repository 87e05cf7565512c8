// A team of threads that runs one function on all of its members, with a barrier between its steps.
//
// A forward pass has several steps a layer, of microseconds each: members wait for each other by spinning, and go to
// sleep only when no work comes for a while.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace layerskip {

class Team {
  public:
    // The process's team; grown to `size` members where it has fewer, and made anew in a forked child.
    static Team& of(int size);

    explicit Team(int size);
    ~Team();

    int size() const { return size_; }

    // Call body(member, size) on every member, the caller being member 0; returns when all have.
    void run(const std::function<void(int, int)>& body);

    // Wait until every member is here.
    void barrier();

    // Held by whoever uses a team: one call at a time.
    static std::mutex& in_use();

    // Call body(row) for every row, on `threads` members; a single row on the caller alone.
    template <typename Body>
    static void share_rows(int threads, int64_t rows, const Body& body) {
        if (rows == 1) return body(0);
        std::lock_guard<std::mutex> lock(in_use());
        of(threads).run([&](int member, int size) {
            for (int64_t row = member; row < rows; row += size) body(row);
        });
    }

  private:
    void work(int member);

    const int size_;
    std::vector<std::thread> threads_;
    const std::function<void(int, int)>* body_ = nullptr;
    std::atomic<int> round_{0};     // counts calls of run
    std::atomic<int> finished_{0};  // members that have finished the current one
    std::atomic<int> arrived_{0};
    std::atomic<int> phase_{0};
    std::atomic<bool> stopping_{false};
    std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace layerskip
