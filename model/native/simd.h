// Sixteen floats at a time: what the kernels of this folder share. bfloat16 is the upper half of a float.
//
// Compiled for AVX-512 with BF16 whatever the compiler is told about the machine; library.py asks the processor first.

#pragma once

#define VERSION 1 // of the functions' arguments; library.py has the same

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 11 // clang wants the target at each function
#define MIXTRAL_NATIVE 1
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 widen(__m256i half) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); }

INLINE __m512 load_bf16(const bf16 *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }

// To the nearest, ties to even, as torch does.
INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

INLINE void store_bf16(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, narrow(x)); }

INLINE __m512 rounded(__m512 x) { return widen(narrow(x)); }

INLINE __m512bh load_pairs(const bf16 *from) { return (__m512bh)_mm512_loadu_si512(from); }

// e to the x, a number, to 18 bits, which is more than bfloat16 keeps: 2 to the whole part by exponent, the rest by a
// polynomial. 0 gives 1; what is too large or too small for a float becomes infinite or nothing.
INLINE __m512 exp16(__m512 x) {
    const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), whole = _mm512_roundscale_ps(power, 0);
    const __m512 rest = _mm512_sub_ps(power, whole);
    __m512 y = _mm512_set1_ps(0.00958285f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.05590643f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24024099f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.69312418f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

#endif
