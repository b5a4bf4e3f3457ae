// Causal attention inside packed documents for x86 processors with AVX-512: flash attention (2205.14135), forward and
// backward, in fp32 and, with AVX512-BF16, in bf16 with fp32 sums.
//
// Scores are held transposed, S^T [key][query]: whatever softmax does runs across the lanes of a vector, without a
// horizontal sum, and the probabilities are in the layout that the next product wants.
//
// Every product is C[m][n] += sum over w of A[m][w] * B[w][n] in words (products.h): that is all that differs between the
// two types, besides packing.
//
// A key/value head of a document is a unit of work, of one thread: results do not depend on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "packing.h"

namespace {

constexpr int BLOCK = 64;  // queries and keys of a block of scores
constexpr float UNSEEN = -1e30f;

inline Index rounded(Index n, Index to) { return (n + to - 1) / to * to; }

struct Shape {
    Index tokens, width, window;  // window: keys that a query sees, itself included
    float scale;
    Index words(int per_word) const { return width / per_word; }
    Index padded() const { return rounded(tokens, BLOCK); }
    // Blocks of queries that see something of the block of keys from `key` on end before this one.
    Index last_query(Index key) const { return window >= tokens ? tokens : std::min(tokens, key + BLOCK - 1 + window); }
    Index first_key(Index query) const { return std::max<Index>(0, query - window + 1) / BLOCK * BLOCK; }
    bool all_seen(Index query, Index key) const {
        return query >= key + BLOCK - 1 && query + BLOCK - 1 - key < window;
    }
    // Which of the queries from `query` on see `key`.
    __mmask16 seen(Index query, Index key) const {
        const Index behind = key - query, within = behind + window;  // lanes [behind, within)
        return (__mmask16)(first(within) & ~first(behind));
    }
};

// Memory of one thread, cut into aligned pieces; without any, what is asked for is only added up.
class Workspace {
  public:
    explicit Workspace(Index bytes = 0) : base_(bytes ? (char*)std::aligned_alloc(64, bytes) : nullptr) {}
    ~Workspace() { std::free(base_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    template <class Number>
    Number* take(Index count) {
        char* piece = base_ ? base_ + taken_ : nullptr;
        taken_ += rounded(count * (Index)sizeof(Number), 64);
        return (Number*)piece;
    }
    void rewind() { taken_ = 0; }
    Index taken() const { return taken_; }
    bool ok() const { return base_ != nullptr; }

  private:
    char* base_;
    Index taken_ = 0;
};

template <class Type>
struct Forward {
    using Number = typename Type::Number;
    static constexpr int PER = Type::PER_WORD;

    Shape shape;
    Index turned_stride;
    Word *values_turned, *between;  // A [width][tokens / PER]; what turning them goes by
    Word *queries, *probabilities;  // B [width / PER][BLOCK]; B [BLOCK keys / PER][BLOCK queries]
    float *scores, *sums;           // [BLOCK keys][BLOCK queries]; [width][BLOCK queries]
    float *top, *total, *factor;    // of each query of the block

    Forward(Workspace& space, Shape of) : shape(of), turned_stride(of.padded() / PER) {
        values_turned = space.take<Word>(turned_stride * shape.width);
        between = space.take<Word>(turned_stride * shape.width);
        queries = space.take<Word>(BLOCK * shape.words(PER)), probabilities = space.take<Word>(BLOCK * BLOCK);
        scores = space.take<float>(BLOCK * BLOCK), sums = space.take<float>(BLOCK * shape.width);
        top = space.take<float>(BLOCK), total = space.take<float>(BLOCK), factor = space.take<float>(BLOCK);
    }

    // Before the query heads of these values.
    void begin(Head<Type> value) {
        pack_transposed(value, shape.tokens, shape.width, values_turned, turned_stride, between);
    }

    void run(Head<Type> query, Head<Type> key, Head<Type> out, float* logsumexp) {
        for (Index q = 0; q < shape.tokens; q += BLOCK) block(q, query, key, out, logsumexp);
    }

    void block(Index q, Head<Type> query, Head<Type> key, Head<Type> out, float* logsumexp) {
        const Index count = std::min<Index>(BLOCK, shape.tokens - q), columns = rounded(count, LANES);
        transpose_words(query.words(q), count, shape.words(PER), queries, BLOCK);
        std::fill(top, top + BLOCK, UNSEEN);
        std::fill(total, total + BLOCK, 0.0f);
        bool add = false;
        for (Index k = shape.first_key(q); k < q + count; k += BLOCK, add = true) {
            const Index keys = std::min<Index>(BLOCK, q + count - k);
            product<Type>(keys, columns, shape.words(PER), key.words(k), {queries, BLOCK}, scores, BLOCK, false);
            softmax(q, k, keys, columns, add);
            product<Type>(shape.width, columns, (keys + PER - 1) / PER, {values_turned + k / PER, turned_stride},
                          {probabilities, BLOCK}, sums, BLOCK, add);
        }
        for (Index i = 0; i < BLOCK; ++i) {
            factor[i] = 1.0f / total[i];
            if (i < count) logsumexp[q + i] = (top[i] + std::log2(total[i])) * LN2;
        }
        const Head<Type> to{out.row(q), out.stride};
        store_transposed<Type>(sums, BLOCK, count, shape.width, factor, to);
    }

    // Scores to probabilities below the largest score so far; sums so far are brought to the new largest.
    void softmax(Index q, Index k, Index keys, Index columns, bool add) {
        const bool all = shape.all_seen(q, k);
        const __m512 scale = _mm512_set1_ps(shape.scale * LOG2E);
        for (Index n = 0; n < columns; n += LANES) {
            const __m512 before = _mm512_loadu_ps(top + n);
            __m512 largest = before;
            for (Index i = 0; i < keys; ++i) {
                const __mmask16 seen = all ? 0xffff : shape.seen(q + n, k + i);
                const __m512 score = _mm512_mul_ps(scale, _mm512_loadu_ps(scores + i * BLOCK + n));
                largest = _mm512_mask_max_ps(largest, seen, largest, score);
            }
            const __m512 shrink = exp2(_mm512_sub_ps(before, largest));
            __m512 sum = _mm512_mul_ps(shrink, _mm512_loadu_ps(total + n));
            for (Index i = 0; i < keys; i += 2) {
                __m512 p[2];
                for (int j = 0; j < 2; ++j) {
                    const __mmask16 seen = i + j >= keys ? 0 : all ? 0xffff : shape.seen(q + n, k + i + j);
                    const __m512 score = _mm512_loadu_ps(scores + (i + j) * BLOCK + n);
                    p[j] = _mm512_maskz_mov_ps(seen, exp2(_mm512_fmsub_ps(score, scale, largest)));
                    sum = _mm512_add_ps(sum, p[j]);
                }
                store_words(Type(), probabilities + i / PER * BLOCK + n, BLOCK, p[0], p[1]);
            }
            _mm512_storeu_ps(top + n, largest);
            _mm512_storeu_ps(total + n, sum);
            if (add)
                for (Index d = 0; d < shape.width; ++d) {
                    float* at = sums + d * BLOCK + n;
                    _mm512_storeu_ps(at, _mm512_mul_ps(shrink, _mm512_loadu_ps(at)));
                }
        }
    }
};

template <class Type>
struct Backward {
    using Number = typename Type::Number;
    static constexpr int PER = Type::PER_WORD;

    Shape shape;
    Index padded;
    Word* keys_turned;                      // A [width][tokens / PER]
    Word *queries_turned, *grads_turned;    // B [width / PER][padded]
    Word *queries, *grads;                  // B [padded / PER][width]
    float *d_query, *d_key, *d_value;       // [blocks][width][BLOCK]; [padded][width] each
    float *logsumexp, *delta;               // in powers of two; sum of out * its gradient; [padded]
    float *scores, *d_scores, *factor;      // [BLOCK keys][BLOCK queries]
    Number *p_rows, *ds_rows;               // A [BLOCK keys][BLOCK queries]
    Word* ds_words;                         // B [BLOCK keys / PER][BLOCK queries]

    Backward(Workspace& space, Shape of) : shape(of), padded(of.padded()) {
        const Index words = padded * shape.width / PER, numbers = padded * shape.width;
        keys_turned = space.take<Word>(words);
        queries_turned = space.take<Word>(words), grads_turned = space.take<Word>(words);
        queries = space.take<Word>(words), grads = space.take<Word>(words);
        d_query = space.take<float>(numbers), d_key = space.take<float>(numbers), d_value = space.take<float>(numbers);
        logsumexp = space.take<float>(padded), delta = space.take<float>(padded), factor = space.take<float>(BLOCK);
        scores = space.take<float>(BLOCK * BLOCK), d_scores = space.take<float>(BLOCK * BLOCK);
        p_rows = space.take<Number>(BLOCK * BLOCK), ds_rows = space.take<Number>(BLOCK * BLOCK);
        ds_words = space.take<Word>(BLOCK * BLOCK);
    }

    // Before the query heads of these keys.
    void begin(Head<Type> key) {
        pack_transposed(key, shape.tokens, shape.width, keys_turned, padded / PER, queries);
        std::fill(d_key, d_key + padded * shape.width, 0.0f);
        std::fill(d_value, d_value + padded * shape.width, 0.0f);
        std::fill(factor, factor + BLOCK, shape.scale);
    }

    // Adds to the gradients of keys and values, and writes that of one query head.
    void run(Head<Type> query, Head<Type> key, Head<Type> value, Head<Type> out, Head<Type> grad, const float* lse,
             Head<Type> to) {
        pack(query, out, grad, lse);
        std::fill(d_query, d_query + padded * shape.width, 0.0f);
        for (Index k = 0; k < shape.tokens; k += BLOCK)
            for (Index q = k; q < shape.last_query(k); q += BLOCK) block(q, k, key, value);
        for (Index q = 0; q < shape.tokens; q += BLOCK) {
            const Head<Type> rows{to.row(q), to.stride};
            const Index count = std::min<Index>(BLOCK, shape.tokens - q);
            store_transposed<Type>(d_query + q * shape.width, BLOCK, count, shape.width, factor, rows);
        }
    }

    void pack(Head<Type> query, Head<Type> out, Head<Type> grad, const float* lse) {
        transpose_words(query.words(0), shape.tokens, shape.words(PER), queries_turned, padded);
        transpose_words(grad.words(0), shape.tokens, shape.words(PER), grads_turned, padded);
        const Index end = rounded(shape.tokens, LANES);  // products read up to here
        std::fill(queries + shape.tokens / PER * shape.width, queries + end / PER * shape.width, 0);
        std::fill(grads + shape.tokens / PER * shape.width, grads + end / PER * shape.width, 0);
        pack_tokens(query, shape.tokens, shape.width, queries);
        pack_tokens(grad, shape.tokens, shape.width, grads);
        for (Index t = 0; t < padded; ++t) {
            __m512 sum = _mm512_setzero_ps();
            if (t < shape.tokens)
                for (Index i = 0; i < shape.width; i += LANES)
                    sum = _mm512_fmadd_ps(Type::load(out.row(t) + i), Type::load(grad.row(t) + i), sum);
            delta[t] = _mm512_reduce_add_ps(sum);
            logsumexp[t] = t < shape.tokens ? lse[t] * LOG2E : -UNSEEN;  // no query there: probabilities of 0
        }
    }

    void block(Index q, Index k, Head<Type> key, Head<Type> value) {
        const Index keys = std::min<Index>(BLOCK, shape.tokens - k);
        const Index columns = std::min<Index>(BLOCK, rounded(shape.tokens - q, LANES));
        const Index words = shape.words(PER), width = shape.width;
        product<Type>(keys, columns, words, key.words(k), {queries_turned + q, padded}, scores, BLOCK, false);
        product<Type>(keys, columns, words, value.words(k), {grads_turned + q, padded}, d_scores, BLOCK, false);
        gradients(q, k, keys, columns);
        const Operand p{(const Word*)p_rows, BLOCK / PER}, ds{(const Word*)ds_rows, BLOCK / PER};
        product<Type>(keys, width, columns / PER, p, {grads + q / PER * width, width}, d_value + k * width, width, true);
        product<Type>(keys, width, columns / PER, ds, {queries + q / PER * width, width}, d_key + k * width, width, true);
        product<Type>(width, columns, (keys + PER - 1) / PER, {keys_turned + k / PER, padded / PER}, {ds_words, BLOCK},
                      d_query + q * width, BLOCK, true);
    }

    // Probabilities, and the gradient of the scores but for their scale.
    void gradients(Index q, Index k, Index keys, Index columns) {
        const bool all = shape.all_seen(q, k);
        const __m512 scale = _mm512_set1_ps(shape.scale * LOG2E);
        for (Index n = 0; n < columns; n += LANES) {
            const __m512 lse = _mm512_loadu_ps(logsumexp + q + n), mean = _mm512_loadu_ps(delta + q + n);
            for (Index i = 0; i < keys; i += 2) {
                __m512 p[2], ds[2];
                for (int j = 0; j < 2; ++j) {
                    const Index at = (i + j) * BLOCK + n;
                    const __mmask16 seen = i + j >= keys ? 0 : all ? 0xffff : shape.seen(q + n, k + i + j);
                    p[j] = _mm512_maskz_mov_ps(seen, exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + at), scale, lse)));
                    ds[j] = _mm512_maskz_mul_ps(seen, p[j], _mm512_sub_ps(_mm512_loadu_ps(d_scores + at), mean));
                }
                store_rows(p_rows + i * BLOCK + n, BLOCK, p[0], p[1]);
                store_rows(ds_rows + i * BLOCK + n, BLOCK, ds[0], ds[1]);
                store_words(Type(), ds_words + i / PER * BLOCK + n, BLOCK, ds[0], ds[1]);
            }
        }
    }

    void store(Head<Type> to_key, Head<Type> to_value) const {
        for (Index t = 0; t < shape.tokens; ++t)
            for (Index i = 0; i < shape.width; i += LANES) {
                const Index at = t * shape.width + i;
                const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(shape.scale), _mm512_loadu_ps(d_key + at));
                Type::store(to_key.row(t) + i, scaled);
                Type::store(to_value.row(t) + i, _mm512_loadu_ps(d_value + at));
            }
    }
};

}  // namespace

// ---- all documents --------------------------------------------------------------------------------------------------

extern "C" {

// A tensor [tokens][heads][width], numbers of one head side by side.
struct Tensor {
    void* at;
    int64_t token_stride, head_stride;
};

struct Work {
    const int64_t* borders;  // [documents + 1]
    int64_t documents, tokens, heads, kv_heads, width, window;
    float scale;
    int threads;
};
}

namespace {

template <class Type>
Head<Type> head_of(const Tensor& x, Index token, Index head) {
    return {(typename Type::Number*)x.at + token * x.token_stride + head * x.head_stride, x.token_stride};
}

// Calls `run(pass, first token, key/value head)` for each unit of work; 1 where memory is missing.
template <class Pass, class Run>
int for_each_unit(const Work& work, Run run) {
    const auto shape_of = [&](Index tokens) { return Shape{tokens, work.width, work.window, work.scale}; };
    Index longest = 0;
    for (Index d = 0; d < work.documents; ++d) longest = std::max(longest, work.borders[d + 1] - work.borders[d]);
    Workspace ruler;
    Pass(ruler, shape_of(longest));
    int failed = 0;
#pragma omp parallel num_threads(work.threads) reduction(| : failed)
    {
        Workspace space(ruler.taken());
        if (!space.ok()) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (Index unit = 0; unit < work.documents * work.kv_heads; ++unit) {
            const Index document = unit / work.kv_heads, start = work.borders[document];
            const Index tokens = work.borders[document + 1] - start;
            if (!space.ok() || tokens == 0) continue;
            space.rewind();
            Pass pass(space, shape_of(tokens));
            run(pass, start, unit % work.kv_heads);
        }
    }
    return failed;
}

template <class Type>
int forward(const Work& work, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, float* lse) {
    const Index group = work.heads / work.kv_heads;
    return for_each_unit<Forward<Type>>(work, [&](Forward<Type>& pass, Index start, Index kv) {
        pass.begin(head_of<Type>(v, start, kv));
        for (Index h = kv * group; h < (kv + 1) * group; ++h)
            pass.run(head_of<Type>(q, start, h), head_of<Type>(k, start, kv), head_of<Type>(out, start, h),
                     lse + h * work.tokens + start);
    });
}

template <class Type>
int backward(const Work& work, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const float* lse,
             const Tensor& grad, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
    const Index group = work.heads / work.kv_heads;
    return for_each_unit<Backward<Type>>(work, [&](Backward<Type>& pass, Index start, Index kv) {
        const Head<Type> key = head_of<Type>(k, start, kv), value = head_of<Type>(v, start, kv);
        pass.begin(key);
        for (Index h = kv * group; h < (kv + 1) * group; ++h)
            pass.run(head_of<Type>(q, start, h), key, value, head_of<Type>(out, start, h),
                     head_of<Type>(grad, start, h), lse + h * work.tokens + start, head_of<Type>(dq, start, h));
        pass.store(head_of<Type>(dk, start, kv), head_of<Type>(dv, start, kv));
    });
}

}  // namespace

extern "C" {

int attention_forward_fp32(const Work* work, const Tensor* x, float* lse) {
    return forward<Float32>(*work, x[0], x[1], x[2], x[3], lse);
}

int attention_backward_fp32(const Work* work, const Tensor* x, const float* lse) {
    return backward<Float32>(*work, x[0], x[1], x[2], x[3], lse, x[4], x[5], x[6], x[7]);
}

#ifdef __AVX512BF16__
int attention_forward_bf16(const Work* work, const Tensor* x, float* lse) {
    return forward<BFloat16>(*work, x[0], x[1], x[2], x[3], lse);
}

int attention_backward_bf16(const Work* work, const Tensor* x, const float* lse) {
    return backward<BFloat16>(*work, x[0], x[1], x[2], x[3], lse, x[4], x[5], x[6], x[7]);
}
#endif
}
