#include "threads.h"

#include <algorithm>
#include <unistd.h>

namespace layerskip {
namespace {

using namespace std::chrono_literals;

constexpr int64_t kMostMembers = 1 << 12;
constexpr int kSpins = 20000;  // a few hundred microseconds, after which a member without work goes to sleep
constexpr int kPolite = 2000;  // spins after which a waiting member yields its core to other threads
// Waiting this long, and for half of the call, means that a member wasn't running.
constexpr auto kLate = 500us;
constexpr int kLateShare = 2;
// The team gets smaller when it has lost this much time within a window.
constexpr auto kMostLost = 6ms, kWindow = 100ms;
constexpr auto kShortestRest = 10ms, kLongestRest = 640ms;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

}  // namespace

std::mutex& Team::in_use() {
    static std::mutex mutex;
    return mutex;
}

Team& Team::of(int members) {
    static std::mutex mutex;
    static std::unique_ptr<Team> team;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (team && owner != getpid()) team.release();  // its threads are the parent's; there is nothing to join
    if (!team || team->all_ != members) {
        team = std::make_unique<Team>(members);
        owner = getpid();
    }
    return *team;
}

Team::Team(int members) : all_(members), size_(members), rest_(kShortestRest) {
    for (int member = 1; member < members; ++member) others_.push_back(std::make_unique<Member>());
    // Threads read others_, which is complete before the first of them starts.
    for (int member = 1; member < members; ++member)
        others_[member - 1]->thread = std::thread([this, member] { work(member); });
}

Team::~Team() {
    body_ = nullptr;
    start(all_);
    for (auto& other : others_) other->thread.join();
}

void Team::run(const std::function<void(int, int)>& body) {
    if (all_ == 1) return body(0, 1);
    const auto started = Clock::now();
    choose_size(started);
    if (size_ == 1) return body(0, 1);
    body_ = &body;
    finished_.store(0);
    waited_.store(0);
    start(size_);
    body(0, size_);
    wait_until([this] { return finished_.load(std::memory_order_acquire) == size_ - 1; });
    const std::chrono::nanoseconds waited(waited_.load());
    if (waited == 0ns) return;
    const auto now = Clock::now();
    if (waited >= kLate && waited * kLateShare >= now - started) note_late(waited, now);
}

// A single late member is noise. If it persists, shrink the team, for longer each time.
void Team::note_late(Clock::duration waited, Clock::time_point now) {
    if (now - lost_since_ > kWindow) {
        lost_since_ = now;
        lost_ = {};
    }
    lost_ += waited;
    if (lost_ < kMostLost) return;
    lost_ = {};
    --size_;
    grows_ = now + rest_;
    rest_ = std::min<Clock::duration>(2 * rest_, kLongestRest);
}

// A small team grows again after its rest. Rests get shorter with each window in which the whole team wasn't late.
void Team::choose_size(Clock::time_point now) {
    if (now < grows_) return;
    if (size_ < all_) {
        ++size_;
        grows_ = now + (size_ < all_ ? rest_ : kWindow);
    } else if (rest_ > kShortestRest) {
        rest_ = std::max<Clock::duration>(rest_ / 2, kShortestRest);
        grows_ = now + kWindow;
    }
}

void Team::start(int size) {
    const int64_t calls = call_.load() / kMostMembers + 1;
    call_.store(calls * kMostMembers + size);
    for (int member = 1; member < size; ++member) {
        Member& other = *others_[member - 1];
        if (!other.asleep.load()) continue;
        std::lock_guard<std::mutex> lock(mutex_);
        other.wake.notify_one();
    }
}

void Team::work(int member) {
    Member& self = *others_[member - 1];
    int64_t seen = 0;
    const auto called = [&] {  // number and size are read together, so that they belong to the same call
        const int64_t call = call_.load();
        if (call == seen || call % kMostMembers <= member) return false;
        seen = call;
        return true;
    };
    while (true) {
        bool has_work = false;
        for (int i = 0; i < kSpins && !(has_work = called()); ++i) pause();
        if (!has_work) {
            std::unique_lock<std::mutex> lock(mutex_);
            self.asleep.store(true);
            self.wake.wait(lock, called);
            self.asleep.store(false);
        }
        if (body_ == nullptr) return;
        (*body_)(member, static_cast<int>(seen % kMostMembers));
        finished_.fetch_add(1, std::memory_order_release);
    }
}

void Team::barrier() {
    if (size_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    wait_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
}

template <typename Condition>
void Team::wait_until(Condition done) {
    for (int i = 0; i < kPolite; ++i) {
        if (done()) return;
        pause();
    }
    const auto started = Clock::now();
    while (!done()) {
        pause();
        std::this_thread::yield();
    }
    note_waiting(started);
}

void Team::note_waiting(Clock::time_point started) {
    const int64_t waited = std::chrono::nanoseconds(Clock::now() - started).count();
    int64_t longest = waited_.load();
    while (waited > longest && !waited_.compare_exchange_weak(longest, waited)) {
    }
}

}  // namespace layerskip
