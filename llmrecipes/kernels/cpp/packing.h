// Operands of products (products.h) out of tensors [tokens][heads][width], and back.
#pragma once

#include <algorithm>
#include <cstring>

#include "products.h"

namespace {

// One head of a tensor [tokens][heads][width].
template <class Type>
struct Head {
    typename Type::Number* at;
    Index stride;  // numbers from token to token
    typename Type::Number* row(Index token) const { return at + token * stride; }
    Operand words(Index token) const { return {(const Word*)row(token), stride / Type::PER_WORD}; }
};

inline void transpose_16x16(__m512i (&x)[LANES]) {
    __m512i y[LANES];
    for (int i = 0; i < LANES; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; ++j) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), high = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
        y[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
        y[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        y[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
        y[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    std::copy(y, y + LANES, x);
}

// Words [columns][rows] of `rows` rows of `columns` words; rows behind the last are zeros, up to a multiple of LANES.
inline void transpose_words(Operand from, Index rows, Index columns, Word* to, Index to_stride) {
    for (Index r = 0; r < rows; r += LANES)
        for (Index c = 0; c < columns; c += LANES) {
            __m512i x[LANES];
            const __mmask16 mask = first(columns - c);
            for (int i = 0; i < LANES; ++i)
                x[i] = r + i < rows ? _mm512_maskz_loadu_epi32(mask, from.at + (r + i) * from.stride + c)
                                    : _mm512_setzero_si512();
            transpose_16x16(x);
            for (int i = 0; i < LANES && c + i < columns; ++i) _mm512_storeu_si512(to + (c + i) * to_stride + r, x[i]);
        }
}

// B [tokens / PER_WORD][width] of a head: the summed axis is that of the tokens. Tokens behind the last are zeros.
inline void pack_tokens(Head<Float32> from, Index tokens, Index width, Word* to) {
    for (Index t = 0; t < tokens; ++t) std::memcpy(to + t * width, from.row(t), width * sizeof(Word));
}

// A [width][tokens / PER_WORD] of a head, rows of `to_stride` words.
inline void pack_transposed(Head<Float32> from, Index tokens, Index width, Word* to, Index to_stride, Word*) {
    transpose_words(from.words(0), tokens, width, to, to_stride);
}

// Two rows of LANES sums as A.
inline void store_rows(float* rows, Index stride, __m512 one, __m512 other) {
    _mm512_storeu_ps(rows, one);
    _mm512_storeu_ps(rows + stride, other);
}

// The same as B, whose summed axis is that of the rows.
inline void store_words(Float32, Word* words, Index stride, __m512 one, __m512 other) {
    store_rows((float*)words, stride, one, other);
}

#ifdef __AVX512BF16__
inline __m512i interleaved(__m512i halves) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}

inline void pack_tokens(Head<BFloat16> from, Index tokens, Index width, Word* to) {
    for (Index t = 0; t < tokens; t += 2)
        for (Index i = 0; i < width; i += LANES) {
            const __m256i one = _mm256_loadu_si256((const __m256i*)(from.row(t) + i));
            const __m256i other =
                t + 1 < tokens ? _mm256_loadu_si256((const __m256i*)(from.row(t + 1) + i)) : _mm256_setzero_si256();
            _mm512_storeu_si512(to + t / 2 * width + i, interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1)));
        }
}

// By way of pairs of tokens [tokens / 2][width] in `between`, turned.
inline void pack_transposed(Head<BFloat16> from, Index tokens, Index width, Word* to, Index to_stride, Word* between) {
    pack_tokens(from, tokens, width, between);
    transpose_words({between, width}, (tokens + 1) / 2, width, to, to_stride);
}

inline void store_rows(uint16_t* rows, Index stride, __m512 one, __m512 other) {
    BFloat16::store(rows, one);
    BFloat16::store(rows + stride, other);
}

inline void store_words(BFloat16, Word* words, Index, __m512 one, __m512 other) {
    _mm512_storeu_si512(words, interleaved((__m512i)_mm512_cvtne2ps_pbh(other, one)));
}
#endif

// Numbers [rows][columns] = factor * from [columns][rows]^T, rows up to `rows`.
template <class Type>
void store_transposed(const float* from, Index from_stride, Index rows, Index columns, const float* factor, Head<Type> to) {
    for (Index r = 0; r < rows; r += LANES) {
        const __m512 by = _mm512_loadu_ps(factor + r);
        for (Index c = 0; c < columns; c += LANES) {
            __m512i x[LANES];
            for (int i = 0; i < LANES; ++i)
                x[i] = _mm512_castps_si512(_mm512_mul_ps(by, _mm512_loadu_ps(from + (c + i) * from_stride + r)));
            transpose_16x16(x);
            for (int i = 0; i < LANES && r + i < rows; ++i)
                Type::store(to.row(r + i) + c, _mm512_castsi512_ps(x[i]));
        }
    }
}

}  // namespace
