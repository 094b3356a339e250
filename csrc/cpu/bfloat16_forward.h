// The blocks of bfloat16's forward pass where the unit multiplies bfloat16: weights are rounded to it. To multiply
// another block's tiles during the softmax gains nothing on Sapphire Rapids, whose AMX unit shares a port with the
// vector units.
#pragma once

#include "bfloat16.h"
#include "softmax.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// 2^x for x <= 0 (a little above is fine) by the minimax polynomial of degree 4: relative error below 2^-18, where
// bfloat16 has 2^-9; 0 below 2^-126; NaN stays NaN.
inline __m512 exp2_for_bfloat16(__m512 x) {
    const __m512 round = _mm512_set1_ps(Exp2<float>::kRound);
    const __m512 n = _mm512_sub_ps(_mm512_add_ps(x, round), round), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.570102015e-3f);
    for (const float c : {5.591786031e-2f, 2.402474482e-1f, 6.931218147e-1f, 9.999992614e-1f}) {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    }
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ), p, n);
}

// The maxima of 16 rows of `columns` (a multiple of 32), each in its lane; a NaN may be passed over.
inline __m512 row_maxima(const float* s, int64_t stride, int64_t columns) {
    __m512 x[16], y[8];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        const float* row = s + i * stride;
        __m512 a = _mm512_load_ps(row), b = _mm512_load_ps(row + 16);
        for (int64_t c = 32; c < columns; c += 32) {
            a = _mm512_max_ps(_mm512_load_ps(row + c), a);
            b = _mm512_max_ps(_mm512_load_ps(row + c + 16), b);
        }
        x[i] = _mm512_max_ps(a, b);
    }
    // Pairs are joined four times; what joins with what decides in which lane a row ends.
    constexpr int kPlace[16] = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};
    const auto join = [](__m512 a, __m512 b) {
        return _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const auto fold = [](__m512 a, __m512 b) {
        return _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) y[i] = join(x[kPlace[i]], x[kPlace[i + 8]]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = join(y[i], y[i + 4]);
    return fold(fold(x[0], x[2]), fold(x[1], x[3]));
}

// One tile of queries of one head against its keys, block by block.
template <typename P>
class RoundedBlocks {
    using O = Operands<P>;

public:
    static constexpr int64_t kRows = round_up(P::kQueryBlock, 16), kColumns = P::kKeyTile;

    // finish(block, s): turns products into scores in place where a block is not plain. keep(block): dropout's choice,
    // kColumns to a row, or null. s and keep begin at the block's row and key.
    template <typename Finish, typename Keep>
    void run(const O& o, const std::vector<Block>& blocks, const Finish& finish, const Keep& keep) {
        float* s = s_.reserve(kRows * kColumns);
        uint16_t* weights = weights_.reserve(kRows * kColumns);
        const int64_t dim = o.v.padded_dim();
        for (const Block& b : blocks) {
            P::scores(o.q, b.row, b.rows, o.k, b.key, b.span.first, b.span.last, s, kColumns);
            if (!b.plain) finish(b, s);
            softmax(o, b, s, keep(b), weights);
            P::accumulate(o.careful, P::weights(weights, b.span.first), b.rows, b.span.last - b.span.first, o.v,
                          b.key + b.span.first, o.out + b.row * dim);
        }
    }

private:
    // From scores to weights exp(t - top), top being each row's maximum so far; scales what was summed before, the
    // output included.
    static void softmax(const O& o, const Block& b, const float* s, const uint8_t* keep, uint16_t* weights) {
        const float scale = b.plain ? o.scale : 1;
        const int64_t dim = o.v.padded_dim();
        alignas(64) float base[kRows], rescale[kRows];
        for (int64_t r = 0; r < b.rows; r += 16) {
            const __m512 none = _mm512_set1_ps(-kInfinity<float>);
            float* top = o.top + b.row + r;
            const __mmask16 there = static_cast<__mmask16>(b.rows - r < 16 ? (1 << (b.rows - r)) - 1 : 0xffff);
            const __m512 highest = row_maxima(s + r * kColumns + b.span.first, kColumns, b.span.last - b.span.first);
            const __m512 before = _mm512_maskz_loadu_ps(there, top);
            const __m512 after = _mm512_max_ps(_mm512_mul_ps(highest, _mm512_set1_ps(scale)), before);
            _mm512_mask_storeu_ps(top, there, after);
            // Nothing seen yet: 0 in place of -inf, so that -inf - top is -inf, and a NaN stays one.
            const __m512 from = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(after, none, _CMP_NEQ_UQ), after);
            _mm512_store_ps(base + r, from);
            store<float>(rescale + r, exp<float>((Vector<float>)_mm512_sub_ps(before, from)));
        }
        for (int64_t r = 0; r < b.rows; ++r) {
            Vector<float>& sum = o.sum[b.row + r];
            sum *= splat(rescale[r]);
            if (rescale[r] != 1) scale_row(o.out + (b.row + r) * dim, rescale[r], dim);
            const float* row = s + r * kColumns;
            uint16_t* to = weights + P::weights_row(r);
            const uint8_t* row_keep = keep == nullptr ? nullptr : keep + r * kColumns;
            sum += b.plain ? weigh<true>(row, b.span, scale, base[r], row_keep, to)
                           : weigh<false>(row, b.span, scale, base[r], row_keep, to);
        }
    }

    // Weights exp(scale · s - base) of a row as left-hand operand, rounded to bfloat16; returns their sum in lanes.
    // log2(e) is folded into the scale of plain rows; beside a bias of finfo.min it would overflow.
    template <bool plain>
    static Vector<float> weigh(const float* s, const Span& span, float scale, float base, const uint8_t* keep,
                               uint16_t* to) {
        const float log2e = static_cast<float>(kLog2E);
        const __m512 factor = _mm512_set1_ps(plain ? scale * log2e : log2e),
                     minus = _mm512_set1_ps(plain ? base * log2e : base);
        __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t c = span.first; c < span.last; c += 32) {
            __m512 w[2];
#pragma GCC unroll 2
            for (int u = 0; u < 2; ++u) {
                const __m512 x = _mm512_load_ps(s + c + 16 * u);
                __m512 e = exp2_for_bfloat16(plain ? _mm512_fmsub_ps(x, factor, minus)
                                                   : _mm512_mul_ps(_mm512_sub_ps(x, minus), factor));
                total[u] = _mm512_add_ps(total[u], e);
                if (keep != nullptr) e = (__m512)kept_only<float>((Vector<float>)e, keep + c + 16 * u);
                w[u] = e;
            }
            P::put_weights(to, c, w[0], w[1]);
        }
        return (Vector<float>)_mm512_add_ps(total[0], total[1]);
    }

    Buffer<float> s_;
    Buffer<uint16_t> weights_;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
