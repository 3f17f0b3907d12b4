// Rows into a panel: 16 of them side by side, pair of inputs after pair (product.h has the picture).

#pragma once

#include "product.h"

#ifdef MIXTRAL_NATIVE

// 16 rows of 16 numbers become 16 columns.
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // Each lane is right now; lane l of r[4 i + j] holds rows 4 i .. 4 i + 3 of column 4 l + j.
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

static inline void pack_panel(const bf16 *const rows[PANEL], int64_t I, bf16 *panel) {
    int64_t i = 0;
    for (; i + 32 <= I; i += 32) {
        __m512i pairs[16];
        for (int j = 0; j < 16; j++) pairs[j] = _mm512_loadu_si512(rows[j] + i);
        transpose(pairs);
        for (int pair = 0; pair < 16; pair++) _mm512_storeu_si512(panel + (i + 2 * pair) * PANEL, pairs[pair]);
    }
    for (; i < I; i += 2)
        for (int j = 0; j < PANEL; j++) memcpy(panel + i * PANEL + 2 * j, rows[j] + i, 2 * sizeof(bf16));
}

#endif
