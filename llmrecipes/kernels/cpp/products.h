// Products of small blocks, in words (vectors.h): C[m][n] += sum over w of A[m][w] * B[w][n].
#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int TILE = 4 * LANES;  // columns of C that are summed up in registers

struct Operand {
    const Word* at;
    Index stride;  // words from row to row
};

template <class Type, int M, int N>
inline void product_tile(Operand a, Operand b, float* c, Index c_stride, Index words, bool add) {
    __m512 sum[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n)
            sum[m][n] = add ? _mm512_loadu_ps(c + m * c_stride + n * LANES) : _mm512_setzero_ps();
    for (Index w = 0; w < words; ++w) {
        __m512i column[N];
        for (int n = 0; n < N; ++n) column[n] = _mm512_loadu_si512(b.at + w * b.stride + n * LANES);
        for (int m = 0; m < M; ++m) {
            const __m512i row = _mm512_set1_epi32(a.at[m * a.stride + w]);
            for (int n = 0; n < N; ++n) sum[m][n] = Type::multiply_add(sum[m][n], row, column[n]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + m * c_stride + n * LANES, sum[m][n]);
}

template <class Type, int N>
inline void product_rows(int rows, Operand a, Operand b, float* c, Index c_stride, Index words, bool add) {
    switch (rows) {
        case 1: return product_tile<Type, 1, N>(a, b, c, c_stride, words, add);
        case 2: return product_tile<Type, 2, N>(a, b, c, c_stride, words, add);
        case 3: return product_tile<Type, 3, N>(a, b, c, c_stride, words, add);
        default: return product_tile<Type, 4, N>(a, b, c, c_stride, words, add);
    }
}

// C [rows][columns] (+)= A [rows][words] B [words][columns]; columns in multiples of LANES.
template <class Type>
void product(Index rows, Index columns, Index words, Operand a, Operand b, float* c, Index c_stride, bool add) {
    for (Index n = 0; n < columns; n += TILE) {
        const Operand part{b.at + n, b.stride};
        const Index vectors = std::min<Index>(TILE, columns - n) / LANES;
        for (Index m = 0; m < rows; m += 4) {
            const Operand some{a.at + m * a.stride, a.stride};
            const int count = (int)std::min<Index>(4, rows - m);
            float* to = c + m * c_stride + n;
            switch (vectors) {
                case 1: product_rows<Type, 1>(count, some, part, to, c_stride, words, add); break;
                case 2: product_rows<Type, 2>(count, some, part, to, c_stride, words, add); break;
                case 3: product_rows<Type, 3>(count, some, part, to, c_stride, words, add); break;
                default: product_rows<Type, 4>(count, some, part, to, c_stride, words, add); break;
            }
        }
    }
}

}  // namespace
