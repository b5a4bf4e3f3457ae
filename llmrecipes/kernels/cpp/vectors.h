// Sixteen numbers at a time, in fp32, read from and written to fp32 or bf16; and the products of blocks.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

namespace {

using Index = int64_t;
using Word = int32_t;

constexpr int LANES = 16;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// The first n lanes.
inline __mmask16 first(Index n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

// A type is what products are of. A word of 32 bits is one number in fp32, and in bf16 two neighbours along the summed
// axis, which one instruction multiplies and adds.
struct Float32 {
    using Number = float;
    static constexpr int PER_WORD = 1;
    static inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static inline __m512 load(const float* from, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, from); }
    static inline void store(float* to, __m512 x, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, x); }
};

#ifdef __AVX512BF16__
struct BFloat16 {
    using Number = uint16_t;
    static constexpr int PER_WORD = 2;
    static inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static inline __m512 load(const uint16_t* from, __mmask16 mask = 0xffff) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static inline void store(uint16_t* to, __m512 x, __mmask16 mask = 0xffff) {
        _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
    }
};
#endif

// 2 ** x by a Taylor polynomial on [-1/2, 1/2] (relative error 1.2e-7); 0 below 2 ** -150, infinite from 2 ** 128 on, and
// NaN of NaN: the maximum is its second operand then.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(1.5403530393e-4f);
    for (const float c : {1.3333558147e-3f, 9.6181291076e-3f, 5.5504108665e-2f, 2.4022650696e-1f, 6.9314718056e-1f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(sum, whole);
}

}  // namespace
