// Many short calls of a team, in which members read what others have written: run under ThreadSanitizer.
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "threads.h"

using layerskip::Team;

constexpr int kCells = 64, kSteps = 4;

int main(int count, char** arguments) {
    const int calls = count > 1 ? std::atoi(arguments[1]) : 1000;
    std::vector<int> written(kCells), read(kCells);
    int wrong = 0;
    for (int call = 0; call < calls; ++call) {
        std::lock_guard<std::mutex> lock(Team::in_use());
        Team& team = Team::of(2 + call * 2 / calls);  // teams of 2, then of 3
        team.run([&](int member, int size) {
            for (int step = 0; step < kSteps; ++step) {
                for (int i = member; i < kCells; i += size) written[i] = call + i + step;
                team.barrier();
                for (int i = member; i < kCells; i += size) read[i] = written[(i + 13) % kCells];
                team.barrier();
                for (int i = 0; member == 0 && i < kCells; ++i) wrong += read[i] != call + (i + 13) % kCells + step;
                team.barrier();
            }
        });
        if (call % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));  // members go to sleep
    }
    std::printf("%d wrong\n", wrong);
    return wrong > 0;
}
