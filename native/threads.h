// A team of threads that runs one function on its members, with a barrier between the function's steps.
//
// A layer has several steps of some microseconds each: members wait for each other by spinning, and go to sleep only
// when no work comes for a while. Where other processes use the cores too, all members may wait milliseconds for one
// that the system isn't running: the team then works with fewer members for a while.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace layerskip {

class Team {
  public:
    // The process's team; a new one if the number of members changes, and in a forked child.
    static Team& of(int members);

    explicit Team(int members);
    ~Team();

    // Number of members of the current call.
    int size() const { return size_; }

    // Call body(member, size) on the members of this call, the caller being member 0; returns when all have returned.
    void run(const std::function<void(int, int)>& body);

    // Wait until every member of the call has come here.
    void barrier();

    // Locked by whoever uses a team: one call at a time.
    static std::mutex& in_use();

    // Call body(item) for items 0..count-1, on up to `threads` members; a single item on the caller alone.
    template <typename Body>
    static void share_out(int threads, int64_t count, const Body& body) {
        if (count == 1) return body(0);
        std::lock_guard<std::mutex> lock(in_use());
        of(threads).run([&](int member, int size) {
            for (int64_t item = member; item < count; item += size) body(item);
        });
    }

  private:
    using Clock = std::chrono::steady_clock;

    struct Member {
        std::thread thread;
        std::condition_variable wake;
        std::atomic<bool> asleep{false};
    };

    void work(int member);
    void start(int size);
    void choose_size(Clock::time_point now);
    void note_late(Clock::duration waited, Clock::time_point now);
    void note_waiting(Clock::time_point started);
    template <typename Condition>
    void wait_until(Condition done);

    const int all_;
    std::vector<std::unique_ptr<Member>> others_;  // member i + 1
    std::mutex mutex_;
    const std::function<void(int, int)>* body_ = nullptr;
    std::atomic<int64_t> call_{0};   // calls of run times kMostMembers, plus the members of the latest one
    std::atomic<int> finished_{0};   // members that have finished the current call
    std::atomic<int> arrived_{0};
    std::atomic<int> phase_{0};
    std::atomic<int64_t> waited_{0};  // nanoseconds of the current call's longest wait
    int size_;
    Clock::time_point lost_since_{};
    Clock::duration lost_{};     // time waited for late members since `lost_since_`
    Clock::duration rest_;       // how long the team stays smaller, the next time that members are late
    Clock::time_point grows_{};  // when a small team may grow by a member
};

}  // namespace layerskip
