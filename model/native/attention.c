// Positions and pages: heads are turned and stored, then single rows attend to what lies in their pages.
//
// T: rows.  H, G: query and key-value heads, Q = H / G.  C: head_dim, a multiple of 32.  B: rows that attend.  M: keys.
// Page memory of a layer is (slots, G, C); a row's keys are runs of slots, (first, count) after (first, count).

#include "simd.h"

#ifdef MIXTRAL_NATIVE

#include <math.h>
#include <string.h>

#include "pages.h"
#include "share.h"

#define KEYS 16
#define TOGETHER 4 // queries, and sixteens of a head's dimensions, whose sums a core keeps in its registers

// The first half of a head's dimensions turns with the second.
INLINE void turn(bf16 *head, const bf16 *cos, const bf16 *sin, int64_t C) {
    for (int64_t c = 0; c < C / 2; c += 16) {
        const __m512 first = load_bf16(head + c), second = load_bf16(head + C / 2 + c);
        const __m512 cosine = load_bf16(cos + c), sine = load_bf16(sin + c);
        store_bf16(head + c, _mm512_fmsub_ps(first, cosine, _mm512_mul_ps(second, sine)));
        store_bf16(head + C / 2 + c, _mm512_fmadd_ps(second, cosine, _mm512_mul_ps(first, sine)));
    }
}

// Turn query and key heads, (T, H + 2G, C), where they lie; copy keys and values to their slots. cos, sin: (T, C).
void turn_and_store(bf16 *heads, int64_t T, int64_t H, int64_t G, int64_t C, const bf16 *cos, const bf16 *sin,
                    const int64_t *slot, bf16 *keys, bf16 *values, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1 && T >= 16)
    for (int64_t t = 0; t < T; t++) {
        bf16 *const row = heads + t * (H + 2 * G) * C;
        for (int64_t head = 0; head < H + G; head++) turn(row + head * C, cos + t * C, sin + t * C, C);
        memcpy(keys + slot[t] * G * C, row + H * C, G * C * sizeof(bf16));
        memcpy(values + slot[t] * G * C, row + (H + G) * C, G * C * sizeof(bf16));
    }
}

// Two vectors become one: the sums of each one's halves, which lie two lanes apart, or side by side.
INLINE __m512 fold_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

INLINE __m512 fold_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

INLINE __m512 fold_within(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

// The sum of each of 16 vectors, in their order.
INLINE __m512 sums_of(const __m512 v[KEYS]) {
    __m512 one[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
        one[j] = fold_lanes(fold_halves(v[j], v[j + 4]), fold_halves(v[j + 8], v[j + 12])); // lanes j j+4 j+8 j+12
    return fold_within(fold_within(one[0], one[2]), fold_within(one[1], one[3]));
}

// Scores of one query and 16 keys.
INLINE __m512 scores_of(const bf16 *query, const bf16 *keys, const int64_t slots[KEYS], int64_t stride, int64_t C) {
    __m512 products[KEYS];
#pragma GCC unroll 16
    for (int j = 0; j < KEYS; j++) products[j] = _mm512_setzero_ps();
    for (int64_t c = 0; c < C; c += 32) {
        const __m512bh pairs = load_pairs(query + c);
#pragma GCC unroll 16
        for (int j = 0; j < KEYS; j++)
            products[j] = _mm512_dpbf16_ps(products[j], pairs, load_pairs(keys + slots[j] * stride + c));
    }
    return sums_of(products);
}

// Scores, M and so many more that 16 divides them, become weights; their sum.
INLINE float softmax(float *scores, int64_t M, float scale) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t m = 0; m < M; m += KEYS) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + m));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t m = 0; m < M; m += KEYS) {
        const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + m), largest);
        const __mmask16 there = M - m < KEYS ? (1 << (M - m)) - 1 : 0xffff;
        const __m512 weights = _mm512_maskz_mov_ps(there, exp16(_mm512_mul_ps(below, _mm512_set1_ps(scale))));
        _mm512_storeu_ps(scores + m, weights);
        sum = _mm512_add_ps(sum, weights);
    }
    return _mm512_reduce_add_ps(sum);
}

// The weighted sum of values, for Q queries and N sixteens of dimensions.
INLINE void weigh(const int Q, const int N, const float *weights, int64_t weights_stride, const float *sums,
                  const bf16 *values, Cursor cursor, int64_t M, int64_t stride, bf16 *out, int64_t C) {
    __m512 total[TOGETHER][TOGETHER];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) total[q][n] = _mm512_setzero_ps();
    for (int64_t m = 0; m < M; m++) {
        const bf16 *const value = values + next_slot(&cursor) * stride;
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const __m512 part = load_bf16(value + n * 16);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++)
                total[q][n] = _mm512_fmadd_ps(part, _mm512_set1_ps(weights[q * weights_stride + m]), total[q][n]);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
            store_bf16(out + q * C + n * 16, _mm512_div_ps(total[q][n], _mm512_set1_ps(sums[q])));
}

// As many queries as share a key-value head, by four; their dimensions by four sixteens, or two.
INLINE void weigh_all(const int Q, const float *weights, int64_t weights_stride, const float *sums, const bf16 *values,
                      Cursor cursor, int64_t M, int64_t stride, bf16 *out, int64_t C) {
    int64_t c = 0;
    for (; c + 64 <= C; c += 64) weigh(Q, 4, weights, weights_stride, sums, values + c, cursor, M, stride, out + c, C);
    if (c < C) weigh(Q, 2, weights, weights_stride, sums, values + c, cursor, M, stride, out + c, C);
}

// One row and one key-value head. scores: room for Q times M, each M rounded up to 16.
static void attend_head(const bf16 *query, int64_t Q, int64_t C, const bf16 *keys, const bf16 *values, int64_t stride,
                        Cursor cursor, int64_t M, float scale, float *scores, bf16 *out) {
    const int64_t padded = (M + KEYS - 1) / KEYS * KEYS;
    Cursor reading = cursor;
    for (int64_t m = 0; m < M; m += KEYS) {
        int64_t slots[KEYS];
        next_slots(&reading, M - m < KEYS ? M - m : KEYS, KEYS, slots);
        for (int64_t q = 0; q < Q; q++)
            _mm512_storeu_ps(scores + q * padded + m, scores_of(query + q * C, keys, slots, stride, C));
    }
    for (int64_t first = 0; first < Q; first += TOGETHER) {
        float *const weights = scores + first * padded, sums[TOGETHER];
        const int64_t count = Q - first < TOGETHER ? Q - first : TOGETHER;
        for (int64_t q = 0; q < count; q++) sums[q] = softmax(weights + q * padded, M, scale);
        bf16 *const to = out + first * C;
        switch (count) {
        case 1: weigh_all(1, weights, padded, sums, values, cursor, M, stride, to, C); break;
        case 2: weigh_all(2, weights, padded, sums, values, cursor, M, stride, to, C); break;
        case 3: weigh_all(3, weights, padded, sums, values, cursor, M, stride, to, C); break;
        case 4: weigh_all(4, weights, padded, sums, values, cursor, M, stride, to, C); break;
        }
    }
}

// Rows row[b] of queries and out attend to keys_of[b] keys, whose runs begin at runs + 2 * first_run[b].
// scores: room for Q times most_keys, rounded up to 16, for each thread.
void attend(const bf16 *queries, int64_t query_stride, const int64_t *row, int64_t B, int64_t H, int64_t G, int64_t C,
            const bf16 *keys, const bf16 *values, const int64_t *runs, const int64_t *first_run, const int64_t *keys_of,
            float scale, float *scores, int64_t most_keys, bf16 *out, int64_t threads) {
    const int64_t Q = H / G, room = (most_keys + KEYS - 1) / KEYS * KEYS * Q;
    int64_t total = 0, given = 0;
    for (int64_t b = 0; b < B; b++) total += keys_of[b] * G;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        Share share = share_of(total, &given);
        for (int64_t b = 0; b < B; b++)
            for (int64_t g = 0; g < G; g++)
                if (mine(&share, keys_of[b]))
                    attend_head(queries + row[b] * query_stride + g * Q * C, Q, C, keys + g * C, values + g * C, G * C,
                                (Cursor){runs + 2 * first_run[b], 0}, keys_of[b], scale,
                                scores + omp_get_thread_num() * room, out + row[b] * H * C + g * Q * C);
    }
}

#endif
