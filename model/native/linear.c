// y = x W^T for a packed weight, and a block's experts: what weights are read for.
//
// T: rows.  I, O: features in and out.  E: experts.  N: rows of all experts, slot after slot.  D: model width.
// F: ffn width.

#include "product.h"

#ifdef MIXTRAL_NATIVE

#include "pack.h"
#include "share.h"

void pack(const bf16 *weight, int64_t O, int64_t I, bf16 *packed, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t first = 0; first < O; first += PANEL) {
        const bf16 *rows[PANEL];
        for (int j = 0; j < PANEL; j++) rows[j] = weight + (first + j) * I;
        pack_panel(rows, I, packed + first * I);
    }
}

INLINE void keep(int M, const __m512 left[TILE_ROWS], const __m512 right[TILE_ROWS], char *y, int64_t y_stride) {
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        bf16 *const row = (bf16 *)(y + m * y_stride);
        store_bf16(row, left[m]);
        store_bf16(row + PANEL, right[m]);
    }
}

// silu(gate) * up, before anything is rounded.
INLINE void swiglu(int M, const __m512 gate[TILE_ROWS], const __m512 up[TILE_ROWS], char *y, int64_t y_stride) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        const __m512 less = exp16(_mm512_sub_ps(_mm512_setzero_ps(), gate[m]));
        const __m512 silu = _mm512_div_ps(gate[m], _mm512_add_ps(one, less));
        store_bf16((bf16 *)(y + m * y_stride), _mm512_mul_ps(silu, up[m]));
    }
}

static void linear_strips(Share *share, const bf16 *x, int64_t x_stride, int64_t T, int64_t I, const bf16 *packed,
                          int64_t O, bf16 *y) {
    const int64_t part = rows_at_once(T, I);
    for (int64_t first = 0; first < T; first += part) {
        const int64_t rows = T - first < part ? T - first : part;
        for (int64_t panel = 0; panel < O / PANEL; panel += 2)
            if (mine(share, cost(rows)))
                strip(rows, x + first * x_stride, x_stride, I, panels_at(packed, panel, panel + 1, 2, I), keep,
                      y + first * O + panel * PANEL, O * sizeof(bf16));
    }
}

static void gate_up_strips(Share *share, const bf16 *x, int64_t T, int64_t D, const bf16 *packed, int64_t F,
                           bf16 *hidden) {
    const int64_t part = rows_at_once(T, D);
    for (int64_t first = 0; first < T; first += part) {
        const int64_t rows = T - first < part ? T - first : part;
        for (int64_t panel = 0; panel < F / PANEL; panel++)
            if (mine(share, cost(rows)))
                strip(rows, x + first * D, D, D, panels_at(packed, panel, F / PANEL + panel, 1, D), swiglu,
                      hidden + first * F + panel * PANEL, F * sizeof(bf16));
    }
}

void linear(const bf16 *x, int64_t x_stride, int64_t T, const bf16 *packed, int64_t O, int64_t I, bf16 *y,
            int64_t threads) {
    int64_t given = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        Share share = share_of(total_cost(T, I, O / PANEL / 2), &given);
        linear_strips(&share, x, x_stride, T, I, packed, O, y);
    }
}

// hidden has room for (N, F). gate_up and down: one address per expert.
void experts(const bf16 *x, const int64_t *rows, int64_t E, const bf16 *const *gate_up, const bf16 *const *down,
             int64_t D, int64_t F, bf16 *hidden, bf16 *y, int64_t threads) {
    int64_t up_total = 0, down_total = 0, up_given = 0, down_given = 0;
    for (int64_t e = 0; e < E; e++) {
        up_total += total_cost(rows[e], D, F / PANEL);
        down_total += total_cost(rows[e], F, D / PANEL / 2);
    }
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        Share share = share_of(up_total, &up_given);
        for (int64_t e = 0, first = 0; e < E; first += rows[e++])
            gate_up_strips(&share, x + first * D, rows[e], D, gate_up[e], F, hidden + first * F);
#pragma omp barrier
        share = share_of(down_total, &down_given);
        for (int64_t e = 0, first = 0; e < E; first += rows[e++])
            linear_strips(&share, hidden + first * F, F, rows[e], F, down[e], D, y + first * D);
    }
}

#endif
