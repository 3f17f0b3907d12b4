// Where the keys of a sequence lie: runs of slots in page memory, (first, count) after (first, count).

#pragma once

#include <stdint.h>

typedef struct {
    const int64_t *run;
    int64_t at; // in this run
} Cursor;

static inline int64_t next_slot(Cursor *cursor) {
    while (cursor->at >= cursor->run[1]) cursor->at -= cursor->run[1], cursor->run += 2;
    return cursor->run[0] + cursor->at++;
}

// The slots of so many keys from here; up to `most` the last one's again, so that something may be read there.
static inline void next_slots(Cursor *cursor, int64_t count, int64_t most, int64_t *slots) {
    for (int64_t j = 0; j < count; j++) slots[j] = next_slot(cursor);
    for (int64_t j = count; j < most; j++) slots[j] = slots[count - 1];
}
