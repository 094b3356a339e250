// The forward pass of bfloat16 on AMX. The tile unit works beside the vector units, so three blocks are in hand at
// once: while vector code takes the softmax of one, tiles multiply the last one's weights and the next one's scores.
#pragma once

#include "amx.h"
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

// 32 rows of a product of tiles, 32 columns after 32, made step by step: one call of step() multiplies 32 deep.
class AmxStepwise {
public:
    AmxStepwise() = default;
    // right: of the first 32 columns; those of the next lie `right_next` elements further.
    AmxStepwise(const uint16_t* left, int64_t left_block, const uint16_t* right, int64_t right_block,
                int64_t right_next, int64_t depth, int64_t rows, int64_t columns, float* c, int64_t c_stride, bool add)
        : left_(left),
          right_(right),
          left_block_(left_block),
          right_block_(right_block),
          right_next_(right_next),
          steps_(depth / 32),
          columns_(columns),
          c_(c),
          c_stride_(c_stride),
          two_rows_(rows > 16),
          add_(add) {}

    int64_t count() const { return steps_ * ((columns_ + 31) / 32); }

    __attribute__((always_inline)) void step() {
        const bool two_columns = columns_ > 16;
        const int64_t bytes = c_stride_ * 4;
        float* below = c_ + 16 * c_stride_;
        if (at_ == 0) {
            if (add_) {
                _tile_loadd(0, c_, bytes);
                if (two_columns) _tile_loadd(1, c_ + 16, bytes);
                if (two_rows_) _tile_loadd(2, below, bytes);
                if (two_rows_ && two_columns) _tile_loadd(3, below + 16, bytes);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
        }
        const uint16_t *left = left_ + at_ * AmxMatrix::kTile, *right = right_ + at_ * AmxMatrix::kTile;
        _tile_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) {
            _tile_loadd(7, right + right_block_, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows_) {
            _tile_loadd(5, left + left_block_, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (two_columns) _tile_dpbf16ps(3, 5, 7);
        }
        if (++at_ < steps_) return;
        _tile_stored(0, c_, bytes);
        if (two_columns) _tile_stored(1, c_ + 16, bytes);
        if (two_rows_) _tile_stored(2, below, bytes);
        if (two_rows_ && two_columns) _tile_stored(3, below + 16, bytes);
        at_ = 0, c_ += 32, columns_ -= 32, right_ += right_next_;
    }

private:
    const uint16_t *left_ = nullptr, *right_ = nullptr;
    int64_t left_block_ = 0, right_block_ = 0, right_next_ = 0, steps_ = 0, columns_ = 0, at_ = 0;
    float* c_ = nullptr;
    int64_t c_stride_ = 0;
    bool two_rows_ = false, add_ = false;
};

// One tile of queries of one head against its keys, block by block.
class AmxBlocks {
    using O = Operands<AmxProducts>;

public:
    static constexpr int64_t kRows = AmxProducts::kRowBlock, kColumns = AmxProducts::kKeyTile;

    // finish(block, s): turns products into scores in place where a block is not plain. keep(block): dropout's choice,
    // kColumns to a row, or null. s and keep begin at the block's row and key.
    template <typename Finish, typename Keep>
    void run(const O& o, const std::vector<Block>& blocks, const Finish& finish, const Keep& keep) {
        const int64_t count = static_cast<int64_t>(blocks.size());
        s_.reserve(2 * kRows * kColumns);
        weights_.reserve(2 * kRows * kColumns);
        for (int64_t t = -1; t <= count; ++t) {
            const auto block = [&](int64_t i) -> const Block& { return blocks[static_cast<size_t>(i)]; };
            values_ = t > 0 ? values_of(o, block(t - 1), t - 1) : AmxStepwise();
            products_ = t + 1 < count ? products_of(o, block(t + 1), t + 1) : AmxStepwise();
            values_left_ = values_.count(), products_left_ = products_.count(), credit_ = 0;
            if (t >= 0 && t < count) {
                const Block& now = block(t);
                // Keeping step with the rows: the maxima of 16 count as 4.
                pace_ = values_left_ + products_left_, slots_ = now.rows + 4 * count_of(now.rows, 16);
                if (!now.plain) finish(now, scores(t));
                softmax(o, now, t, keep(now));
            }
            while (values_left_ + products_left_ > 0) step();
        }
    }

private:
    float* scores(int64_t t) const { return s_.get() + (t & 1) * kRows * kColumns; }
    uint16_t* weights(int64_t t) const { return weights_.get() + (t & 1) * kRows * kColumns; }

    AmxStepwise products_of(const O& o, const Block& b, int64_t t) const {
        const int64_t depth = o.q.depth();
        return {o.q.rows.get() + b.row * depth,
                16 * depth,
                o.k.columns.get() + (b.key + b.span.first) * depth,
                16 * depth,
                32 * depth,
                depth,
                b.rows,
                b.span.last - b.span.first,
                scores(t) + b.span.first,
                kColumns,
                false};
    }
    AmxStepwise values_of(const O& o, const Block& b, int64_t t) const {
        const int64_t dim = o.v.padded_dim(), panel = 16 * o.v.padded_seq();
        float* out = o.out + b.row * dim;
        const float* factor = rescale_[t & 1];
        for (int64_t r = 0; r < b.rows; ++r) {
            if (factor[r] != 1) scale_row(out + r * dim, factor[r], dim);
        }
        if (o.careful) {
            AmxProducts::accumulate_carefully({weights(t) + b.span.first * 16, AmxMatrix::kTile, 16 * kColumns}, b.rows,
                                              b.span.last - b.span.first, o.v, b.key + b.span.first, out);
            return {};
        }
        return {weights(t) + b.span.first * 16,
                16 * kColumns,
                o.v.panels.get() + (b.key + b.span.first) * 16,
                panel,
                2 * panel,
                b.span.last - b.span.first,
                b.rows,
                dim,
                out,
                dim,
                true};
    }

    // One step of the tiles' work; `slots` of the vector units' work have been done.
    __attribute__((always_inline)) void step() {
        if (values_left_ > 0) {
            values_.step(), --values_left_;
        } else {
            products_.step(), --products_left_;
        }
    }
    __attribute__((always_inline)) void keep_pace(int64_t slots) {
        for (credit_ += slots * pace_; credit_ >= slots_; credit_ -= slots_) step();
    }

    void softmax(const O& o, const Block& b, int64_t t, const uint8_t* keep) {
        const float *s = scores(t), scale = b.plain ? o.scale : 1;
        alignas(64) float base[kRows];
        for (int64_t r = 0; r < b.rows; r += 16) {
            const __m512 none = _mm512_set1_ps(-kInfinity<float>);
            float* top = o.top + b.row + r;
            const __m512 highest = row_maxima(s + r * kColumns + b.span.first, kColumns, b.span.last - b.span.first);
            const __m512 before = _mm512_loadu_ps(top);
            const __m512 after = _mm512_max_ps(_mm512_mul_ps(highest, _mm512_set1_ps(scale)), before);
            _mm512_storeu_ps(top, after);
            // Nothing seen yet: 0 in place of -inf, so that -inf - top is -inf, and a NaN stays one.
            const __m512 from =
                _mm512_mask_mov_ps(after, _mm512_cmp_ps_mask(after, none, _CMP_EQ_OQ), _mm512_setzero_ps());
            _mm512_store_ps(base + r, from);
            store<float>(rescale_[t & 1] + r, exp<float>((Vector<float>)_mm512_sub_ps(before, from)));
            keep_pace(4);
        }
        const float* factor = rescale_[t & 1];
        for (int64_t r = 0; r < b.rows; ++r) {
            float* row_sum = reinterpret_cast<float*>(o.sum + b.row + r);
            const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(row_sum), _mm512_set1_ps(factor[r]));
            const float* row = s + r * kColumns;
            uint16_t* to = weights(t) + AmxProducts::at(r, 0, kColumns);
            const uint8_t* row_keep = keep == nullptr ? nullptr : keep + r * kColumns;
            const __m512 sum = b.plain ? weigh<true>(row, b.span, scale, base[r], row_keep, to)
                                       : weigh<false>(row, b.span, scale, base[r], row_keep, to);
            _mm512_storeu_ps(row_sum, _mm512_add_ps(before, sum));
            keep_pace(1);
        }
    }

    // Weights exp(scale · s - base) of a row as left-hand tiles of bfloat16, rounded to nearest; returns their sum in
    // lanes. log2(e) is folded into the scale of plain rows; beside a bias of finfo.min it would overflow.
    template <bool plain>
    static __m512 weigh(const float* s, const Span& span, float scale, float base, const uint8_t* keep, uint16_t* to) {
        const float log2e = static_cast<float>(kLog2E);
        const __m512 factor = _mm512_set1_ps(plain ? scale * log2e : log2e),
                     minus = _mm512_set1_ps(plain ? base * log2e : base);
        const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t c = span.first; c < span.last; c += 32) {
            __m512i w[2];
#pragma GCC unroll 2
            for (int u = 0; u < 2; ++u) {
                const __m512 x = _mm512_load_ps(s + c + 16 * u);
                __m512 e = exp2_for_bfloat16(plain ? _mm512_fmsub_ps(x, factor, minus)
                                                   : _mm512_mul_ps(_mm512_sub_ps(x, minus), factor));
                total[u] = _mm512_add_ps(total[u], e);
                if (keep != nullptr) e = (__m512)kept_only<float>((Vector<float>)e, keep + c + 16 * u);
                w[u] = _mm512_add_epi32(_mm512_castps_si512(e), half);
            }
            const __m512i pair = _mm512_ternarylogic_epi32(_mm512_srli_epi32(w[0], 16), w[1], upper, 0xf8);
            _mm512_store_si512(to + c / 32 * AmxMatrix::kTile, pair);
        }
        return _mm512_add_ps(total[0], total[1]);
    }

    Buffer<float> s_;
    Buffer<uint16_t> weights_;
    alignas(64) float rescale_[2][kRows];
    AmxStepwise values_, products_;
    int64_t values_left_ = 0, products_left_ = 0, pace_ = 0, slots_ = 1, credit_ = 0;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
