// Several rows of one sequence attend at once: parts of prompts.
//
// Queries by the block, keys by the block. A block of keys and values is packed as weights are (product.h), so that
// scores and sums are products of rows and panels. What earlier blocks gave is scaled when a larger score appears.
//
//     for each block of queries:  for each block of keys it sees:
//         scores = queries x keys;  weights = exp(scores - largest so far);  out += weights x values
//     out / sum of weights
//
// L: rows of the sequence.  H, G: query and key-value heads, Q = H / G.  C: head_dim, a multiple of 32.  M: keys.
// R: rows of a block, each a token and one of its Q queries.

#include "product.h"

#ifdef MIXTRAL_NATIVE

#include "pack.h"
#include "pages.h"
#include "share.h"

#define BLOCK_KEYS 128
#define NONE -1e30f  // in place of a score that a row does not see: weighs nothing beside
#define LEAST -1e29f // the largest score as long as none is seen

// One thread's room for a block of R rows.
typedef struct {
    bf16 *query;   // (R, C)
    bf16 *keys;    // packed, inputs are dimensions
    bf16 *values;  // packed, inputs are keys
    float *scores; // (R, BLOCK_KEYS)
    bf16 *weights; // (R, BLOCK_KEYS)
    float *out;    // (R, C)
    float *largest, *sum; // (R)
} Room;

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t bytes_of_room(int64_t R, int64_t C) {
    return aligned(R * C * 2) + 2 * aligned(BLOCK_KEYS * C * 2) + aligned(R * BLOCK_KEYS * 4) +
           aligned(R * BLOCK_KEYS * 2) + aligned(R * C * 4) + 2 * aligned(R * 4);
}

static void *taken(char **from, int64_t bytes) {
    void *const part = *from;
    *from += aligned(bytes);
    return part;
}

static Room room_in(char *memory, int64_t R, int64_t C) {
    Room room;
    room.query = taken(&memory, R * C * 2);
    room.keys = taken(&memory, BLOCK_KEYS * C * 2);
    room.values = taken(&memory, BLOCK_KEYS * C * 2);
    room.scores = taken(&memory, R * BLOCK_KEYS * 4);
    room.weights = taken(&memory, R * BLOCK_KEYS * 2);
    room.out = taken(&memory, R * C * 4);
    room.largest = taken(&memory, R * 4);
    room.sum = taken(&memory, R * 4);
    return room;
}

// Dimensions are output features, keys inputs: one pair of keys after another.
static void pack_values(const bf16 *values, const int64_t *slots, int64_t M, int64_t stride, int64_t C, bf16 *packed) {
    for (int64_t m = 0; m < M; m += 2) {
        const bf16 *const even = values + slots[m] * stride, *const odd = values + slots[m + 1] * stride;
        for (int64_t c = 0; c < C; c += PANEL) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(even + c)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(odd + c)));
            _mm512_storeu_si512(packed + c * M + m * PANEL, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

INLINE void keep_scores(int M, const __m512 left[TILE_ROWS], const __m512 right[TILE_ROWS], char *y, int64_t y_stride) {
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        float *const row = (float *)(y + m * y_stride);
        _mm512_storeu_ps(row, left[m]);
        _mm512_storeu_ps(row + PANEL, right[m]);
    }
}

INLINE void add(int M, const __m512 left[TILE_ROWS], const __m512 right[TILE_ROWS], char *y, int64_t y_stride) {
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
        float *const row = (float *)(y + m * y_stride);
        _mm512_storeu_ps(row, _mm512_add_ps(_mm512_loadu_ps(row), left[m]));
        _mm512_storeu_ps(row + PANEL, _mm512_add_ps(_mm512_loadu_ps(row + PANEL), right[m]));
    }
}

INLINE __mmask16 between(int64_t from, int64_t to, int64_t at) { // of 16 keys, the first of which is `at`
    const int64_t low = from - at < 0 ? 0 : from - at, high = to - at > 16 ? 16 : to - at;
    return low >= high ? 0 : (__mmask16)((1u << high) - (1u << low));
}

// A row's scores of M keys become weights; those outside [from, to) weigh nothing. What was before is scaled to match.
INLINE void weigh_row(float *scores, int64_t M, int64_t from, int64_t to, float scale, float *largest, float *sum,
                      float *out, int64_t C, bf16 *weights) {
    const __m512 none = _mm512_set1_ps(NONE), by = _mm512_set1_ps(scale);
    __m512 most = _mm512_set1_ps(*largest);
    for (int64_t m = 0; m < M; m += 16) {
        const __m512 seen = _mm512_mask_loadu_ps(none, between(from, to, m), scores + m);
        _mm512_storeu_ps(scores + m, seen);
        most = _mm512_max_ps(most, seen);
    }
    const float before = *largest, now = *largest = _mm512_reduce_max_ps(most);
    const __m512 peak = _mm512_set1_ps(now);
    __m512 total = _mm512_setzero_ps();
    for (int64_t m = 0; m < M; m += 16) {
        const __m512 weight = exp16(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + m), peak), by));
        total = _mm512_add_ps(total, weight);
        store_bf16(weights + m, weight);
    }
    if (now > before && before > LEAST) {
        const __m512 less = exp16(_mm512_mul_ps(_mm512_set1_ps(before - now), by));
        *sum *= _mm512_cvtss_f32(less);
        for (int64_t c = 0; c < C; c += 16) _mm512_storeu_ps(out + c, _mm512_mul_ps(_mm512_loadu_ps(out + c), less));
    }
    *sum += _mm512_reduce_add_ps(total);
}

// What a chunk is: L rows from `row`, the last of which sees all of `keys`; each sees `window` at most.
typedef struct {
    int64_t row, L, keys, window;
    const int64_t *runs;
} Chunk;

typedef struct {
    int64_t H, G, C;
    const bf16 *heads; // (T, H + 2G, C), turned
    const bf16 *keys, *values;
    bf16 *out; // (T, H, C)
    float scale;
} Layer;

// The keys that the chunk's row t sees.
INLINE int64_t end_of(const Chunk *chunk, int64_t t) { return chunk->keys - chunk->L + t + 1; }
INLINE int64_t begin_of(const Chunk *chunk, int64_t t) {
    const int64_t end = end_of(chunk, t);
    return chunk->window && end > chunk->window ? end - chunk->window : 0;
}

// Tokens t .. t + count - 1 of the chunk, and the Q queries of each that share one key-value head.
static void attend_block(const Layer *layer, const Chunk *chunk, int64_t g, int64_t t, int64_t count, Room room) {
    const int64_t C = layer->C, Q = layer->H / layer->G, R = count * Q, stride = layer->G * C;
    const int64_t row_stride = (layer->H + 2 * layer->G) * C, first = begin_of(chunk, t), last = end_of(chunk, t + count - 1);
    for (int64_t i = 0; i < count; i++)
        memcpy(room.query + i * Q * C, layer->heads + (chunk->row + t + i) * row_stride + g * Q * C, Q * C * 2);
    memset(room.out, 0, R * C * 4);
    for (int64_t r = 0; r < R; r++) room.largest[r] = LEAST, room.sum[r] = 0;
    Cursor cursor = {chunk->runs, first};
    for (int64_t at = first; at < last; at += BLOCK_KEYS) {
        const int64_t there = last - at < BLOCK_KEYS ? last - at : BLOCK_KEYS, M = (there + 31) / 32 * 32;
        int64_t slots[BLOCK_KEYS];
        next_slots(&cursor, there, M, slots);
        for (int64_t panel = 0; panel < M / PANEL; panel++) {
            const bf16 *rows[PANEL];
            for (int j = 0; j < PANEL; j++) rows[j] = layer->keys + slots[panel * PANEL + j] * stride + g * C;
            pack_panel(rows, C, room.keys + panel * PANEL * C);
        }
        pack_values(layer->values + g * C, slots, M, stride, C, room.values);
        for (int64_t panel = 0; panel < M / PANEL; panel += 2)
            strip(R, room.query, C, C, panels_at(room.keys, panel, panel + 1, 0, C), keep_scores,
                  room.scores + panel * PANEL, BLOCK_KEYS * 4);
        for (int64_t r = 0; r < R; r++)
            weigh_row(room.scores + r * BLOCK_KEYS, M, begin_of(chunk, t + r / Q) - at, end_of(chunk, t + r / Q) - at,
                      layer->scale, room.largest + r, room.sum + r, room.out + r * C, C, room.weights + r * BLOCK_KEYS);
        for (int64_t panel = 0; panel < C / PANEL; panel += 2)
            strip(R, room.weights, BLOCK_KEYS, M, panels_at(room.values, panel, panel + 1, 0, M), add,
                  room.out + panel * PANEL, C * 4);
    }
    for (int64_t r = 0; r < R; r++) {
        bf16 *const to = layer->out + ((chunk->row + t + r / Q) * layer->H + g * Q + r % Q) * C;
        const __m512 sum = _mm512_set1_ps(room.sum[r]);
        for (int64_t c = 0; c < C; c += 16) store_bf16(to + c, _mm512_div_ps(_mm512_loadu_ps(room.out + r * C + c), sum));
    }
}

// chunk: (B, 4) of row, rows, keys and the first of its runs. `tokens` of a chunk make a block; memory is `threads`
// times bytes_of_room(tokens * Q, C).
void attend_chunks(const bf16 *heads, const int64_t *chunk, int64_t B, int64_t window, int64_t H, int64_t G, int64_t C,
                   const bf16 *keys, const bf16 *values, const int64_t *runs, float scale, int64_t tokens, char *memory,
                   bf16 *out, int64_t threads) {
    const Layer layer = {H, G, C, heads, keys, values, out, scale};
    const int64_t R = tokens * (H / G);
    int64_t given = 0;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        const Room room = room_in(memory + omp_get_thread_num() * bytes_of_room(R, C), R, C);
        Share share = {.first = INT64_MAX, .last = INT64_MAX}; // of no task
        for (int counted = 0; counted < 2; counted++) { // first what it all costs, then one's share of it
            if (counted) share = share_of(share.at, &given);
            for (int64_t b = 0; b < B; b++) {
                const Chunk one = {chunk[4 * b], chunk[4 * b + 1], chunk[4 * b + 2], window, runs + 2 * chunk[4 * b + 3]};
                for (int64_t t = 0; t < one.L; t += tokens) {
                    const int64_t count = one.L - t < tokens ? one.L - t : tokens;
                    for (int64_t g = 0; g < G; g++)
                        if (mine(&share, count * (end_of(&one, t + count - 1) - begin_of(&one, t))))
                            attend_block(&layer, &one, g, t, count, room);
                }
            }
        }
    }
}

#endif
