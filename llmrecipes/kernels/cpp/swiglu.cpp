// silu(gate) * up (2002.05202) and its gradient, each in one pass over its operands, in fp32 within.

#include "vectors.h"

extern "C" {

// gate_up [rows][2 * width], gate first; the others [rows][width]; all without gaps.
struct SwiGLU {
    const void* gate_up;
    void* hidden;            // may be null in the backward pass
    const void* grad;        // of hidden; backward only
    void* grad_gate_up;
    float* products;         // sum of hidden * grad for each row; may be null
    int64_t rows, width;
    int threads;
};
}

namespace {

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp2(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2E)))));
}

template <class Type>
void forward(const SwiGLU& work) {
    using Number = typename Type::Number;
#pragma omp parallel for num_threads(work.threads) schedule(static)
    for (Index r = 0; r < work.rows; ++r) {
        const Number* gates = (const Number*)work.gate_up + r * 2 * work.width;
        Number* to = (Number*)work.hidden + r * work.width;
        for (Index i = 0; i < work.width; i += LANES) {
            const __mmask16 mask = first(work.width - i);
            const __m512 gate = Type::load(gates + i, mask), up = Type::load(gates + work.width + i, mask);
            Type::store(to + i, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up), mask);
        }
    }
}

template <class Type>
void backward(const SwiGLU& work) {
    using Number = typename Type::Number;
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for num_threads(work.threads) schedule(static)
    for (Index r = 0; r < work.rows; ++r) {
        const Number* gates = (const Number*)work.gate_up + r * 2 * work.width;
        const Number* grads = (const Number*)work.grad + r * work.width;
        Number* to = (Number*)work.grad_gate_up + r * 2 * work.width;
        __m512 sum = _mm512_setzero_ps();
        for (Index i = 0; i < work.width; i += LANES) {
            const __mmask16 mask = first(work.width - i);
            const __m512 gate = Type::load(gates + i, mask), up = Type::load(gates + work.width + i, mask);
            const __m512 grad = Type::load(grads + i, mask), share = sigmoid(gate), silu = _mm512_mul_ps(gate, share);
            // d silu = share * (1 + gate * (1 - share)) = share + silu * (1 - share)
            const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, share), share);
            const __m512 hidden = _mm512_mul_ps(silu, up);
            Type::store(to + i, _mm512_mul_ps(_mm512_mul_ps(grad, up), slope), mask);
            Type::store(to + work.width + i, _mm512_mul_ps(grad, silu), mask);
            if (work.hidden != nullptr) Type::store((Number*)work.hidden + r * work.width + i, hidden, mask);
            sum = _mm512_mask3_fmadd_ps(hidden, grad, sum, mask);
        }
        if (work.products != nullptr) work.products[r] = _mm512_reduce_add_ps(sum);
    }
}

}  // namespace

extern "C" {

void swiglu_forward_fp32(const SwiGLU* work) { forward<Float32>(*work); }
void swiglu_backward_fp32(const SwiGLU* work) { backward<Float32>(*work); }

#ifdef __AVX512BF16__
void swiglu_forward_bf16(const SwiGLU* work) { forward<BFloat16>(*work); }
void swiglu_backward_bf16(const SwiGLU* work) { backward<BFloat16>(*work); }
#endif
}
