// A small pool of threads that share the tasks of one job at a time.
#pragma once

#include <cstdint>

namespace llama_fast {

using Task = void (*)(void* context, int64_t index);

// Calls task(context, i) for every i below num_tasks, on the calling thread and at most num_threads - 1 others, and
// returns when all are done. Which thread runs which task is left open: a task's result may depend on its index alone.
// May be called from several threads (their jobs run one after the other) and after a fork; not from a task.
void run_tasks(int64_t num_tasks, int num_threads, Task task, void* context);

template <class Function>
void parallel_for(int64_t num_tasks, int num_threads, Function function) {
    run_tasks(
        num_tasks, num_threads, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); },
        &function);
}

}  // namespace llama_fast
