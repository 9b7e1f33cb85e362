// Exercises the thread pool under ThreadSanitizer; csrc/sanitize.sh builds and runs it.
#include "thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

using llama_fast::parallel_for;

namespace {

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "thread_pool_test: %s\n", what);
    std::exit(1);
}

// Every task runs once, and what it wrote is seen when the call returns: plain memory, so a missing order is a race.
void every_task_once(int64_t tasks, int threads) {
    std::vector<int> runs(tasks);
    parallel_for(tasks, threads, [&](int64_t task) { ++runs[task]; });
    for (const int count : runs) check(count == 1, "a task ran twice or never");
}

void errors_reach_the_caller(int threads) {
    bool caught = false;
    try {
        parallel_for(100, threads, [](int64_t task) {
            if (task == 57) throw std::runtime_error("57");
        });
    } catch (const std::runtime_error&) {
        caught = true;
    }
    check(caught, "an error was lost");
}

}  // namespace

int main() {
    for (int round = 0; round < 2000; ++round) {
        for (const int threads : {1, 2, 3, 8}) {
            for (const int64_t tasks : {0, 1, 2, 7, 64}) every_task_once(tasks, threads);
        }
        if (round % 100 == 0) {
            errors_reach_the_caller(4);
            // Long enough for the threads to fall asleep.
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
    }
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) {
        callers.emplace_back([] {
            for (int round = 0; round < 2000; ++round) every_task_once(16, 3);
        });
    }
    for (std::thread& caller : callers) caller.join();
    const pid_t child = fork();
    if (child == 0) {
        every_task_once(64, 4);
        _exit(0);
    }
    int status = -1;
    check(waitpid(child, &status, 0) == child && status == 0, "the pool does not survive a fork");
    every_task_once(64, 4);
    std::puts("thread_pool_test: passed");
}
