// Who of several threads does what, fixed before they begin: shares of tasks that follow one another, by their cost.

#pragma once

#include <omp.h>
#include <stdint.h>

typedef struct {
    int64_t first, last, at;
} Share;

static inline Share share_of(int64_t total) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return (Share){total * thread / threads, total * (thread + 1) / threads, 0};
}

// Whether the next task, of this cost, begins in the share. One that costs nothing is nobody's.
static inline int mine(Share *share, int64_t task_cost) {
    const int64_t at = share->at;
    share->at += task_cost;
    return task_cost && at >= share->first && at < share->last;
}
