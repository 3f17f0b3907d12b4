// What is done to each row alone: the residual sum, its norm, the router; and rows on their way to experts and back.
//
// S: rows.  D: model width, a multiple of 32.  E: experts.  K: experts per token.  N: rows of all experts, S * K.

#include "simd.h"

#ifdef MIXTRAL_NATIVE

#include <math.h>
#include <string.h>

#include "share.h"

#define ENOUGH (1 << 15) // elements below which a second thread costs more than it saves

#define PARALLEL_ROWS _Pragma("omp parallel for num_threads((int)threads) if (threads > 1 && S * D > ENOUGH)")

// Scaled to unit root mean square, rounded, then times the weight, as transformers rounds.
INLINE void norm_row(const bf16 *x, const bf16 *weight, float epsilon, int64_t D, bf16 *out) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += 16) {
        const __m512 part = load_bf16(x + d);
        sum = _mm512_fmadd_ps(part, part, sum);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / D + epsilon));
    for (int64_t d = 0; d < D; d += 16)
        store_bf16(out + d, _mm512_mul_ps(rounded(_mm512_mul_ps(load_bf16(x + d), scale)), load_bf16(weight + d)));
}

void norm(const bf16 *x, int64_t S, int64_t D, const bf16 *weight, float epsilon, bf16 *out, int64_t threads) {
    PARALLEL_ROWS
    for (int64_t s = 0; s < S; s++) norm_row(x + s * D, weight, epsilon, D, out + s * D);
}

// sum = x + delta, and its norm.
void add_norm(const bf16 *x, const bf16 *delta, int64_t S, int64_t D, const bf16 *weight, float epsilon, bf16 *sum,
              bf16 *out, int64_t threads) {
    PARALLEL_ROWS
    for (int64_t s = 0; s < S; s++) {
        for (int64_t d = s * D; d < (s + 1) * D; d += 16)
            store_bf16(sum + d, _mm512_add_ps(load_bf16(x + d), load_bf16(delta + d)));
        norm_row(sum + s * D, weight, epsilon, D, out + s * D);
    }
}

INLINE float dot(const bf16 *a, const bf16 *b, int64_t D) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += 32) sum = _mm512_dpbf16_ps(sum, load_pairs(a + d), load_pairs(b + d));
    return _mm512_reduce_add_ps(sum);
}

// The best expert that is not among those chosen already; of equals the first.
INLINE int64_t best(const float *logits, int64_t E, const int64_t *chosen, int64_t count) {
    int64_t found = -1;
    for (int64_t e = 0; e < E; e++) {
        int taken = 0;
        for (int64_t k = 0; k < count; k++) taken |= chosen[k] == e;
        if (!taken && (found < 0 || logits[e] > logits[found])) found = e;
    }
    return found;
}

// Scores of all experts, rounded to bfloat16 as the router's product is; the K best; the softmax over those.
void route(const bf16 *x, int64_t S, int64_t D, const bf16 *router, int64_t E, int64_t K, float *logits,
           int64_t *expert, float *weight, int64_t threads) {
    PARALLEL_ROWS
    for (int64_t s = 0; s < S; s++) {
        float *const scores = logits + s * E, *const shares = weight + s * K, sum = 0;
        for (int64_t e = 0; e < E; e++)
            scores[e] = _mm512_cvtss_f32(rounded(_mm512_set1_ps(dot(x + s * D, router + e * D, D))));
        for (int64_t k = 0; k < K; k++) {
            expert[s * K + k] = best(scores, E, expert + s * K, k);
            shares[k] = expf(scores[expert[s * K + k]] - scores[expert[s * K]]);
            sum += shares[k];
        }
        for (int64_t k = 0; k < K; k++) shares[k] /= sum;
    }
}

// Rows of x once for each of their experts, expert after expert, in order. Told: how many rows each expert has, the
// first of them, and where each of the S * K pairs went.
void dispatch(const bf16 *x, const int64_t *expert, int64_t S, int64_t K, int64_t D, int64_t E, int64_t *rows,
              int64_t *first_row, int64_t *place, bf16 *x_ND, int64_t threads) {
    memset(rows, 0, E * sizeof(int64_t));
    for (int64_t pair = 0; pair < S * K; pair++) place[pair] = rows[expert[pair]]++;
    for (int64_t e = 0, first = 0; e < E; first += rows[e++]) first_row[e] = first;
    for (int64_t pair = 0; pair < S * K; pair++) place[pair] += first_row[expert[pair]];
    PARALLEL_ROWS
    for (int64_t pair = 0; pair < S * K; pair++) memcpy(x_ND + place[pair] * D, x + pair / K * D, D * sizeof(bf16));
}

// Each row's K results, weighted and added in routing order.
void combine(const bf16 *y, const int64_t *place, const float *weight, int64_t S, int64_t K, int64_t D, bf16 *out,
             int64_t threads) {
    PARALLEL_ROWS
    for (int64_t s = 0; s < S; s++)
        for (int64_t d = 0; d < D; d += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t pair = s * K; pair < (s + 1) * K; pair++)
                sum = _mm512_fmadd_ps(load_bf16(y + place[pair] * D + d), _mm512_set1_ps(weight[pair]), sum);
            store_bf16(out + s * D + d, sum);
        }
}

#endif
