#include "threads.h"

#include <memory>
#include <unistd.h>

namespace layerskip {
namespace {

constexpr int kSpins = 20000;      // some hundred microseconds, then sleep
constexpr int kPolite = 2000;      // spins after which a waiting member offers its core to others

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

template <typename Condition>
void spin(Condition done) {
    for (int i = 0; !done(); ++i) {
        pause();
        if (i > kPolite) std::this_thread::yield();
    }
}

}  // namespace

std::mutex& Team::in_use() {
    static std::mutex mutex;
    return mutex;
}

Team& Team::of(int size) {
    static std::mutex mutex;
    static std::unique_ptr<Team> team;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (team && owner != getpid()) team.release();  // its threads belong to the parent; there is nothing to join
    if (!team || team->size() != size) {
        team = std::make_unique<Team>(size);
        owner = getpid();
    }
    return *team;
}

Team::Team(int size) : size_(size) {
    for (int member = 1; member < size; ++member) threads_.emplace_back([this, member] { work(member); });
}

Team::~Team() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        round_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int, int)>& body) {
    if (size_ == 1) {
        body(0, 1);
        return;
    }
    body_ = &body;
    finished_.store(0);
    round_.fetch_add(1);
    if (asleep_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    body(0, size_);
    spin([this] { return finished_.load(std::memory_order_acquire) == size_ - 1; });
}

void Team::work(int member) {
    int seen = 0;
    while (true) {
        for (int i = 0; round_.load(std::memory_order_acquire) == seen && i < kSpins; ++i) pause();
        if (round_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            asleep_.fetch_add(1);
            wake_.wait(lock, [&] { return round_.load() != seen; });
            asleep_.fetch_sub(1);
        }
        seen = round_.load();
        if (stopping_) return;
        (*body_)(member, size_);
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
    spin([&] { return phase_.load(std::memory_order_acquire) != phase; });
}

}  // namespace layerskip
