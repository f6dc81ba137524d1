// Causal attention of packed samples in bf16 and its gradients, for CPUs with AVX512-BF16.
//
// FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691): instead of the weights, only each
// query's log-sum-exp is saved for the backward pass. A task is one sample under one key head, with all
// query heads that share it. Nothing else writes what it writes, so results do not depend on which
// thread does what.
//
// Shape legend:
//     T  tokens, H query heads, K key heads, D width of a head, a multiple of 16
//     q, out and their gradients [T, H, D], k, v and theirs [T, K, D], log-sum-exps [T, H]
//
// A row of attention is a prompt and an answer. The answers to one prompt are rows next to each
// other, of which the first computes the prompt's queries and lies behind the prompt, so that the
// queries of each row are next to each other; see AttentionPlan in data/batch.py.
//
// Every matmul is made of one tile: a pair of bf16 numbers, 32 bits, of the left matrix
// against sixteen pairs next to each other of the right one, summed up in fp32.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

using Half = uint16_t;  // bf16
using Pair = uint32_t;  // two of them

constexpr long STRIP = 6;   // rows of a tile: 6 x 4 of the 32 registers hold its sums
constexpr long BLOCK = 60;  // queries whose share of the keys' gradients is added at a time
constexpr float LOG2E = 1.44269504f;

// ---- numbers

__m512 load(const float* from) { return _mm512_loadu_ps(from); }

void store(Half* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }

__m512i widened(__m256i x) { return _mm512_cvtepu16_epi32(x); }

__m512i load_bits(const Half* from) { return widened(_mm256_loadu_si256((const __m256i*)from)); }

void store_pairs(Pair* to, __m512i low, __m512i high) {
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

void store_pairs(Pair* to, __m512 low, __m512 high) {
    store_pairs(to, widened((__m256i)_mm512_cvtneps_pbh(low)),
                widened((__m256i)_mm512_cvtneps_pbh(high)));
}

// Two rows as pairs of their numbers; the second may be missing.
void interleave(const Half* low, const Half* high, Pair* to, long width) {
    for (long d = 0; d < width; d += 16)
        store_pairs(to + d, load_bits(low + d), high ? load_bits(high + d) : _mm512_setzero_si512());
}

// 2^x: a polynomial for the fraction (Taylor, relative error below 3e-6), its exponent for the rest.
__m512 exp2(__m512 x) {
    __m512 integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, integer), y = _mm512_set1_ps(1.33335581e-3f);
    for (float c : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, integer);
}

// The first `count` of sixteen numbers.
__mmask16 first(long count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1);
}

long sixteens(long n) { return (n + 15) / 16 * 16; }

// ---- matmuls

template <int M, int N>
void tile(const Pair* a, long a_row, long a_step, const Pair* b, long b_step, float* c, long c_row,
          long depth, bool add) {
    __m512 sums[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n)
            sums[m][n] = add ? load(c + m * c_row + 16 * n) : _mm512_setzero_ps();
    for (long k = 0; k < depth; ++k) {
        __m512bh right[N];
        for (int n = 0; n < N; ++n)
            right[n] = (__m512bh)_mm512_loadu_si512(b + k * b_step + 16 * n);
        for (int m = 0; m < M; ++m) {
            __m512bh left = (__m512bh)_mm512_set1_epi32(int(a[m * a_row + k * a_step]));
            for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], left, right[n]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + m * c_row + 16 * n, sums[m][n]);
}

template <int M>
void strip(const Pair* a, long a_row, long a_step, const Pair* b, long b_step, float* c, long c_row,
           long columns, long depth, bool add) {
    long n = 0;
    for (; n + 64 <= columns; n += 64)
        tile<M, 4>(a, a_row, a_step, b + n, b_step, c + n, c_row, depth, add);
    auto rest = columns - n == 48 ? tile<M, 3> : columns - n == 32 ? tile<M, 2> : tile<M, 1>;
    if (n < columns) rest(a, a_row, a_step, b + n, b_step, c + n, c_row, depth, add);
}

// c [rows, columns] (+)= a [rows, 2 depth] b [2 depth, columns]: at most STRIP rows, and columns in
// sixteens. A step goes from one pair of the depth to the next.
void matmul(long rows, const Pair* a, long a_row, long a_step, const Pair* b, long b_step, float* c,
            long c_row, long columns, long depth, bool add = false) {
    static constexpr decltype(&strip<1>) strips[] = {strip<1>, strip<2>, strip<3>,
                                                     strip<4>, strip<5>, strip<6>};
    strips[rows - 1](a, a_row, a_step, b, b_step, c, c_row, columns, depth, add);
}

// ---- layout

struct Heads {  // a tensor [T, heads, D] and its strides
    Half* data;
    long token, head;
    Half* at(long t, long h) const { return data + t * token + h * head; }
    const Pair* pairs(long t, long h) const { return (const Pair*)at(t, h); }
};

struct Row {  // where its prompt and its answer begin in the batch, and their lengths
    int32_t prompt, prompt_length, answer, answer_length;
    bool shares_prompt(const Row& other) const { return prompt_length && prompt == other.prompt; }
};

// What forward and backward get.
struct Call {
    Heads q, k, v;
    float* lse;
    const Row* rows;
    long count, heads, key_heads, width;
    float scale;
    int threads;
};

// The rows of one sample.
struct Sample { long begin, end, cost; };

std::vector<Sample> samples(const Call& call) {
    std::vector<Sample> all;
    for (long r = 0; r < call.count; ++r) {
        const Row& row = call.rows[r];
        long length = row.prompt_length + row.answer_length;
        if (!r || !row.shares_prompt(call.rows[r - 1])) all.push_back({r, r, 0});
        all.back().end = r + 1;
        all.back().cost += length * length;
    }
    // Long ones first, so that no thread begins one when the others are done.
    std::stable_sort(all.begin(), all.end(), [](auto& a, auto& b) { return a.cost > b.cost; });
    return all;
}

// Where a row's tokens are in the batch.
std::vector<int32_t> tokens(const Row& row) {
    std::vector<int32_t> at(row.prompt_length + row.answer_length);
    std::iota(at.begin(), at.begin() + row.prompt_length, row.prompt);
    std::iota(at.begin() + row.prompt_length, at.end(), row.answer);
    return at;
}

// As the right side of matmuls along the width: [D / 2, columns], columns being the row's tokens.
void across(const Heads& x, long h, const std::vector<int32_t>& at, long width,
            std::vector<Pair>& to) {
    const long size = at.size(), columns = sixteens(size);
    to.resize(width / 2 * columns);
    for (long n = 0; n < size; n += 16) {
        // Past the row's end it is the first token's pairs, of which masks keep the results out.
        const __m512i token = _mm512_maskz_loadu_epi32(first(size - n), &at[n]);
        const __m512i from = _mm512_mullo_epi32(token, _mm512_set1_epi32(int(x.token / 2)));
        for (long d = 0; d < width / 2; ++d) {
            const Pair* ahead = x.pairs(at[std::min(n + 32 + d % 16, size - 1)], h);
            _mm_prefetch(ahead + d / 16 * 16, _MM_HINT_T0);  // each of its lines once
            _mm512_storeu_si512(&to[d * columns + n],
                                _mm512_i32gather_epi32(from, x.pairs(0, h) + d, 4));
        }
    }
}

// As the right side of matmuls along the tokens: [tokens / 2, D].
void along(const Heads& x, long h, const std::vector<int32_t>& at, long width,
           std::vector<Pair>& to) {
    to.resize((at.size() + 1) / 2 * width);
    for (size_t n = 0; n < at.size(); n += 2)
        interleave(x.at(at[n], h), n + 1 < at.size() ? x.at(at[n + 1], h) : nullptr,
                   to.data() + n / 2 * width, width);
}

// What a thread works with; each grows to the longest row it meets.
struct Scratch {
    std::vector<Pair> keys, keys_along, values, queries, grads, weights, grad_scores;
    std::vector<float> scores, grad_weights, sums, grad_keys, grad_values;
    std::vector<Half> left;  // of a matmul
};

// ---- forward

// Weights [columns] of a query that sees so many keys, and their sum; not yet divided by it.
float softmax(const float* scores, Half* weights, long seen, long columns, float scale, float* lse) {
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long c = 0; c < seen; c += 16)
        top = _mm512_mask_max_ps(top, first(seen - c), top, load(scores + c));
    const float highest = _mm512_reduce_max_ps(top) * scale;
    const __m512 by = _mm512_set1_ps(scale), shift = _mm512_set1_ps(highest);
    for (long c = 0; c < columns; c += 16) {
        __m512 w = exp2(_mm512_fmsub_ps(load(scores + c), by, shift));
        w = _mm512_maskz_mov_ps(first(seen - c), w);
        sum = _mm512_add_ps(sum, w);
        store(weights + c, w);
    }
    float total = _mm512_reduce_add_ps(sum);
    *lse = highest + std::log2(total);
    return total;
}

void attend(const Call& call, const Heads& out, const Row& row, long begin, long key_head,
            Scratch& scratch) {
    const std::vector<int32_t> at = tokens(row);
    const long columns = sixteens(at.size()), width = call.width;
    const long group = call.heads / call.key_heads;
    across(call.k, key_head, at, width, scratch.keys);
    along(call.v, key_head, at, width, scratch.values);
    scratch.scores.resize(STRIP * columns);
    scratch.left.resize(STRIP * columns);
    scratch.sums.resize(STRIP * width);
    for (long h = key_head * group; h < (key_head + 1) * group; ++h)
        for (long start = begin, end; start < long(at.size()); start = end) {
            end = std::min(start + STRIP, long(at.size()));
            long rows = end - start, seen = sixteens(end);
            float totals[STRIP];
            matmul(rows, call.q.pairs(at[start], h), call.q.token / 2, 1, scratch.keys.data(), columns,
                   scratch.scores.data(), columns, seen, width / 2);
            for (long r = 0; r < rows; ++r)
                totals[r] =
                    softmax(&scratch.scores[r * columns], &scratch.left[r * columns], start + r + 1, seen,
                            call.scale * LOG2E, call.lse + at[start + r] * call.heads + h);
            matmul(rows, (const Pair*)scratch.left.data(), columns / 2, 1, scratch.values.data(), width,
                   scratch.sums.data(), width, width, (end + 1) / 2);
            for (long r = 0; r < rows; ++r)
                for (long d = 0; d < width; d += 16)
                    store(out.at(at[start + r], h) + d,
                          _mm512_div_ps(load(&scratch.sums[r * width + d]), _mm512_set1_ps(totals[r])));
        }
}

// ---- backward

// Put a query's weights in place of its scores, and return the sum of weights times their gradients,
// which the softmax subtracts from each gradient. FlashAttention-2 takes it from the output, whose
// rounding to bf16 is as large as the gradient itself where one weight is nearly 1.
float weights_of_scores(float* scores, const float* grad_weights, float lse, float scale, long seen) {
    const __m512 by = _mm512_set1_ps(scale * LOG2E), shift = _mm512_set1_ps(lse);
    __m512 sum = _mm512_setzero_ps();
    for (long c = 0; c < seen; c += 16) {
        const __mmask16 visible = first(seen - c);
        __m512 w = _mm512_maskz_mov_ps(visible, exp2(_mm512_fmsub_ps(load(scores + c), by, shift)));
        sum = _mm512_mask3_fmadd_ps(w, load(grad_weights + c), sum, visible);
        _mm512_storeu_ps(scores + c, w);
    }
    return _mm512_reduce_add_ps(sum);
}

// The gradients of a row's queries; those of its keys and values are added to scratch.grad_keys and
// scratch.grad_values [tokens, D].
void attend_backward(const Call& call, const Heads& grad, const Heads& grad_q, const Row& row,
                     long begin, long key_head, Scratch& scratch) {
    const std::vector<int32_t> at = tokens(row);
    const long columns = sixteens(at.size()), width = call.width;
    const long group = call.heads / call.key_heads;
    const __m512 scale = _mm512_set1_ps(call.scale);
    across(call.k, key_head, at, width, scratch.keys);
    along(call.k, key_head, at, width, scratch.keys_along);
    across(call.v, key_head, at, width, scratch.values);
    for (auto* x : {&scratch.grad_keys, &scratch.grad_values}) {
        x->resize(at.size() * width);
        std::fill(x->begin() + begin * width, x->end(), 0.f);  // the prompt's are those so far
    }
    for (auto* x : {&scratch.scores, &scratch.grad_weights}) x->resize(STRIP * columns);
    for (auto* x : {&scratch.weights, &scratch.grad_scores}) x->resize(BLOCK / 2 * columns);
    for (auto* x : {&scratch.queries, &scratch.grads}) x->resize(BLOCK / 2 * width);
    scratch.left.resize(STRIP * columns);
    scratch.sums.resize(STRIP * width);
    for (long h = key_head * group; h < (key_head + 1) * group; ++h)
        for (long start = begin, end; start < long(at.size()); start = end) {
            end = std::min(start + BLOCK, long(at.size()));
            for (long i = start; i < end; i += STRIP) {
                const long rows = std::min(STRIP, end - i), seen = sixteens(i + rows);
                matmul(rows, call.q.pairs(at[i], h), call.q.token / 2, 1, scratch.keys.data(), columns,
                       scratch.scores.data(), columns, seen, width / 2);
                matmul(rows, grad.pairs(at[i], h), grad.token / 2, 1, scratch.values.data(), columns,
                       scratch.grad_weights.data(), columns, seen, width / 2);
                float lost[STRIP];
                for (long r = 0; r < rows; ++r)
                    lost[r] = weights_of_scores(
                        &scratch.scores[r * columns], &scratch.grad_weights[r * columns],
                        call.lse[at[i + r] * call.heads + h], call.scale, i + r + 1);
                for (long r = 0; r < rows; r += 2) {
                    const bool two = r + 1 < rows;  // else the second is the first and sees nothing
                    const long a = at[i + r], b = at[i + r + two], pair = (i - start + r) / 2;
                    const long low = r * columns, high = (r + two) * columns;
                    Pair* w = &scratch.weights[pair * columns];
                    Pair* s = &scratch.grad_scores[pair * columns];
                    const auto score_gradient = [&](long c, long row, float lost, long seen, __m512* w) {
                        *w = _mm512_maskz_loadu_ps(first(seen - c), &scratch.scores[row + c]);
                        __m512 y = load(&scratch.grad_weights[row + c]);
                        y = _mm512_sub_ps(y, _mm512_set1_ps(lost));
                        return _mm512_maskz_mul_ps(first(seen - c), *w, _mm512_mul_ps(scale, y));
                    };
                    for (long c = 0; c < seen; c += 16) {
                        __m512 w0, w1;
                        __m512 s0 = score_gradient(c, low, lost[r], i + r + 1, &w0);
                        __m512 s1 = score_gradient(c, high, lost[r + two], two ? i + r + 2 : 0, &w1);
                        store_pairs(w + c, w0, w1);
                        store_pairs(s + c, s0, s1);
                        store(&scratch.left[low + c], s0);
                        if (two) store(&scratch.left[high + c], s1);
                    }
                    std::fill(w + seen, w + sixteens(end), 0);
                    std::fill(s + seen, s + sixteens(end), 0);
                    interleave(call.q.at(a, h), two ? call.q.at(b, h) : nullptr,
                               &scratch.queries[pair * width], width);
                    interleave(grad.at(a, h), two ? grad.at(b, h) : nullptr,
                               &scratch.grads[pair * width], width);
                }
                matmul(rows, (const Pair*)scratch.left.data(), columns / 2, 1, scratch.keys_along.data(),
                       width, scratch.sums.data(), width, width, (i + rows + 1) / 2);
                for (long r = 0; r < rows; ++r)
                    for (long d = 0; d < width; d += 16)
                        store(grad_q.at(at[i + r], h) + d, load(&scratch.sums[r * width + d]));
            }
            for (long n = 0; n < end; n += STRIP) {
                const long rows = std::min(STRIP, end - n);
                const long past = std::max(0L, (n - start) / 2);  // pairs of queries before the keys
                const long depth = (end - start + 1) / 2 - past;
                matmul(rows, &scratch.weights[past * columns + n], 1, columns,
                       &scratch.grads[past * width], width, &scratch.grad_values[n * width], width,
                       width, depth, true);
                matmul(rows, &scratch.grad_scores[past * columns + n], 1, columns,
                       &scratch.queries[past * width], width, &scratch.grad_keys[n * width], width,
                       width, depth, true);
            }
        }
}

void write(const Heads& to, long h, const std::vector<float>& from, const Row& row, long begin,
           long width) {
    const std::vector<int32_t> at = tokens(row);
    for (long i = begin; i < long(at.size()); ++i)
        for (long d = 0; d < width; d += 16) store(to.at(at[i], h) + d, load(&from[i * width + d]));
}

template <class Work> void for_each_row(const Call& call, Work work) {
    const std::vector<Sample> all = samples(call);
#pragma omp parallel num_threads(call.threads)
    {
        Scratch scratch;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < long(all.size()) * call.key_heads; ++task) {
            const Sample& sample = all[task / call.key_heads];
            for (long r = sample.begin; r < sample.end; ++r) {
                const Row& row = call.rows[r];
                work(row, r > sample.begin ? row.prompt_length : 0, r + 1 == sample.end,
                     task % call.key_heads, scratch);
            }
        }
    }
}

}  // namespace

extern "C" void forward(const Call* call, const Heads* out) {
    for_each_row(*call, [&](const Row& row, long begin, bool, long key_head, Scratch& scratch) {
        attend(*call, *out, row, begin, key_head, scratch);
    });
}

extern "C" void backward(const Call* call, const Heads* grad, const Heads* grad_q,
                         const Heads* grad_k, const Heads* grad_v) {
    for_each_row(*call, [&](const Row& row, long begin, bool last, long key_head, Scratch& scratch) {
        attend_backward(*call, *grad, *grad_q, row, begin, key_head, scratch);
        const long from = last ? 0 : row.prompt_length;  // a prompt's, once all answers gave theirs
        write(*grad_k, key_head, scratch.grad_keys, row, from, call->width);
        write(*grad_v, key_head, scratch.grad_values, row, from, call->width);
    });
}
