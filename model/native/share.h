// Who of several threads does which of many tasks. Most are shared out by their cost before anyone begins: what follows
// in memory follows in a thread. The last go piece by piece to whoever is free, for a thread may have been held up.
//
//     cost  0 [ thread 0's       | thread 1's       | piece | piece | .. ] total

#pragma once

#include <omp.h>
#include <stdint.h>

#define FREE 8   // one part in so many is cut into pieces,
#define PIECES 8 // so many for each thread,
#define SMALL 64 // unless they cost less than this: then what is read in one go counts for more

typedef struct {
    int64_t first, last; // mine are the tasks that begin between these
    int64_t at;          // where the next task begins
    int64_t free, piece; // where the pieces begin, and their size
    int64_t *given;      // of the pieces, to all threads
} Share;

// `given` is 0 before the first thread asks, and the same for all.
static inline Share share_of(int64_t total, int64_t *given) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t piece = total / FREE / PIECES / threads, free = piece < SMALL ? total : total - total / FREE;
    return (Share){free * thread / threads, free * (thread + 1) / threads, 0, free, piece, given};
}

// Whether the next task, of this cost, is mine. One that costs nothing is nobody's.
static inline int mine(Share *share, int64_t task_cost) {
    const int64_t at = share->at;
    share->at += task_cost;
    while (task_cost && at >= share->last) {
        share->first = share->free + __atomic_fetch_add(share->given, share->piece, __ATOMIC_RELAXED);
        share->last = share->first + share->piece;
    }
    return task_cost && at >= share->first;
}
