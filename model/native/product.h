// Rows times a packed weight, one tile at a time: up to 12 rows by two panels of 16 output features.
//
//     weight_OI   ->  panels of 16 rows:  panel 0 [pair 0: o0i0 o0i1 o1i0 o1i1 .. o15i1] [pair 1: ..] .. | panel 1 ..
//
// A processor's instruction multiplies pairs: 16 features x 2 inputs in one load, one pair of a row's inputs told to all
// 16. So weights are read once, in order, for every 12 rows. While a tile is multiplied, the panels of the next one are
// fetched, a part with each 12 rows: reading and multiplying overlap, whichever takes longer. Each row's sum runs over
// its inputs in order: how many rows there are, and how many threads, changes no bit of it.
//
// M: rows.  I, O: features in and out.

#pragma once

#include "simd.h"

#ifdef MIXTRAL_NATIVE

#include <string.h>

#define PANEL 16
#define TILE_ROWS 12
#define FETCHING 16  // tiles that fetch the next panels between them; faster would hold up what they read themselves
#define MANY_ROWS 320 // read a panel often enough; strips of more would be too few for threads to share evenly

typedef struct {
    const bf16 *left, *right;          // the two panels
    const bf16 *left_next, *right_next; // to be fetched meanwhile
} Panels;

INLINE Panels panels_at(const bf16 *packed, int64_t left, int64_t right, int64_t step, int64_t I) {
    const bf16 *a = packed + left * PANEL * I, *b = packed + right * PANEL * I;
    return (Panels){a, b, a + step * PANEL * I, b + step * PANEL * I};
}

INLINE __m512bh told_to_all(const bf16 *pair) {
    int32_t both;
    memcpy(&both, pair, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

// Sums of M rows and the two panels. `fetch`: bytes of the next panels to fetch with each pair of inputs.
INLINE void multiply(const int M, const bf16 *x, int64_t x_stride, int64_t I, Panels w, int64_t fetch,
                     __m512 left[TILE_ROWS], __m512 right[TILE_ROWS]) {
    const char *left_next = (const char *)w.left_next, *right_next = (const char *)w.right_next;
    __m512 a[TILE_ROWS], b[TILE_ROWS];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) a[m] = b[m] = _mm512_setzero_ps();
    for (int64_t i = 0; i < I; i += 2) {
        const __m512bh w_left = load_pairs(w.left + i * PANEL), w_right = load_pairs(w.right + i * PANEL);
        _mm_prefetch(left_next, _MM_HINT_T1);
        _mm_prefetch(right_next, _MM_HINT_T1);
        left_next += fetch;
        right_next += fetch;
        int64_t at = i;
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            const __m512bh pair = told_to_all(x + at);
            at += x_stride;
            asm("" : "+r"(at)); // one sum, not an address for each row: for 12 there are no registers
            a[m] = _mm512_dpbf16_ps(a[m], pair, w_left);
            b[m] = _mm512_dpbf16_ps(b[m], pair, w_right);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) left[m] = a[m], right[m] = b[m];
}

// What becomes of a tile's sums. y: where the first row's belong; the next row's come y_stride bytes later.
typedef void (*Finish)(int M, const __m512 left[TILE_ROWS], const __m512 right[TILE_ROWS], char *y, int64_t y_stride);

INLINE void tile(const int M, const bf16 *x, int64_t x_stride, int64_t I, Panels w, int64_t fetch, Finish finish,
                 char *y, int64_t y_stride) {
    __m512 left[TILE_ROWS], right[TILE_ROWS];
    multiply(M, x, x_stride, I, w, fetch, left, right);
    finish(M, left, right, y, y_stride);
}

// All rows of x by two panels.
INLINE void strip(int64_t M, const bf16 *x, int64_t x_stride, int64_t I, Panels w, Finish finish, void *to,
                  int64_t y_stride) {
    char *y = to;
    const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS, fetching = tiles < FETCHING ? tiles : FETCHING;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t rows = M / (tiles - t); // as even as can be
        const int64_t fetch = t < fetching ? (4 * PANEL + fetching - 1) / fetching : 0;
        switch (rows) {
#define CASE(N)                                                       \
    case N:                                                           \
        tile(N, x, x_stride, I, w, fetch, finish, y, y_stride);       \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
        M -= rows;
        x += rows * x_stride;
        y += rows * y_stride;
        w.left_next += fetch * I / 4;
        w.right_next += fetch * I / 4;
    }
}

// Rows that stay in the caches while all panels pass by: of more than these, parts as even as can be.
INLINE int64_t rows_at_once(int64_t rows, int64_t I) {
    const int64_t fitting = (2 << 20) / (I * sizeof(bf16)) + TILE_ROWS;
    const int64_t most = fitting < MANY_ROWS ? fitting : MANY_ROWS, parts = (rows + most - 1) / most;
    return parts < 2 ? rows : (rows / parts / TILE_ROWS + 1) * TILE_ROWS;
}

// What a strip costs beside others, in rows: reading its panels takes as long as multiplying so many.
INLINE int64_t cost(int64_t rows) { return rows == 0 ? 0 : rows < 16 ? 16 : rows; }

// Of all strips of an input, one for each panel or two.
INLINE int64_t total_cost(int64_t rows, int64_t I, int64_t strips) {
    if (!rows) return 0;
    const int64_t part = rows_at_once(rows, I);
    return strips * (rows / part * cost(part) + cost(rows % part));
}

#endif
