// The kernels of csrc on the host: the same grid, warps and lanes, the same index functions (csrc/maps.cuh), the matrix
// instruction by its definition. Sums in float64, so that only a wrong index shows. test_emulate.py compiles and calls it.

#include <cstdint>
#include <vector>

#include "maps.cuh"

using namespace gk;

namespace {

Codes codes_of(const uint8_t* packed, const float* absmax, int log2_block, int is_fp4) {
    return {packed, absmax, nullptr, nullptr, nullptr, nullptr, log2_block, 0, is_fp4, kFloat32};
}

// D += A·B by the fragment layout of mma.m16n8k16 (PTX ISA): registers of two numbers, lower half first.
struct Fragment {
    double a[32][4][2], b[32][2][2], d[32][4];
};

void mma_by_definition(Fragment& f) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half) {
            const int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; ++r) a[g + 8 * (r & 1)][2 * t + half + 8 * (r >> 1)] = f.a[lane][r][half];
            for (int r = 0; r < 2; ++r) b[2 * t + half + 8 * r][g] = f.b[lane][r][half];
        }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i >> 1), col = 2 * (lane % 4) + (i & 1);
            for (int k = 0; k < 16; ++k) f.d[lane][i] += a[row][k] * b[k][col];
        }
}

struct Shape {
    int m, n, k;
};

}  // namespace

extern "C" {

// The codec itself; nested where absmax2 is given.
void decode(const uint8_t* packed, const void* absmax, const float* absmax2, const float* code2, const float* offset,
            int log2_block, int log2_block2, int is_fp4, int64_t total, int dtype, void* out) {
    const bool nested = absmax2 != nullptr;
    const Codes codes = {packed, nested ? nullptr : static_cast<const float*>(absmax),
                         nested ? static_cast<const uint8_t*>(absmax) : nullptr, absmax2, code2, offset,
                         log2_block, log2_block2, is_fp4, kFloat32};
    for (int64_t i = 0; i < total; ++i) {
        const float w = gk::decode(codes, i);
        if (dtype == kFloat32) static_cast<float*>(out)[i] = w;
        if (dtype == kFloat16) static_cast<uint16_t*>(out)[i] = fp16_bits(w);
        if (dtype == kBFloat16) static_cast<uint16_t*>(out)[i] = bf16_bits(w);
    }
}

void encode(const float* values, int64_t total, int log2_block, int is_fp4, uint8_t* packed, float* absmax) {
    gk::encode(values, total, log2_block, is_fp4, packed, absmax);
}

// fp32 to 16 bits and back: to nearest, or with the dither of a (rows, cols) matrix.
void round16(const float* values, int64_t rows, int64_t cols, int dtype, int dither, uint16_t* out, float* back) {
    for (int64_t i = 0; i < rows * cols; ++i) {
        const float value = dither ? dithered(values[i], i / cols, i % cols, dtype == kFloat16 ? 13 : 16) : values[i];
        out[i] = dtype == kFloat16 ? fp16_bits(value) : bf16_bits(value);
        back[i] = load_as_float(out, i, dtype);
    }
}

// dequantize_kernel in fp32; `written` counts the stores of each element.
void dequantize(const uint8_t* packed, const float* absmax, int log2_block, int is_fp4, int64_t total, int vectorized,
                float* out, int* written) {
    const Codes codes = codes_of(packed, absmax, log2_block, is_fp4);
    const int64_t blocks = ((total + 7) / 8 + kWordsPerBlock - 1) / kWordsPerBlock;
    for (int64_t block = 0; block < blocks; ++block)
        for (int thread = 0; thread < kThreads; ++thread)
            for (int i = 0; i < kWordsPerThread; ++i) {
                const int64_t first = dequantize_word(block, thread, i) * 8;
                if (first >= total) continue;
                const uint32_t word = load_word(packed, first, total, vectorized);
                const float a = absmax_of(codes, first >> log2_block);
                for (int e = 0; e < 8 && first + e < total; ++e) {
                    out[first + e] = mul_rn(level_of(word >> nibble_shift(e) & 15, is_fp4), a);
                    ++written[first + e];
                }
            }
}

// dequantize_adapted_kernel: w + w·(up·down), the factors through its places in shared memory; bf16 with dither.
void dequantize_adapted(const uint8_t* packed, const float* absmax, int log2_block, int is_fp4, int n, int k,
                        int vectorized, const float* up, const float* down, int rank, uint16_t* out, int* written) {
    const Codes codes = codes_of(packed, absmax, log2_block, is_fp4);
    const int tiles_k = (k + kTileCols - 1) / kTileCols, tiles = (n + kTileRows - 1) / kTileRows * tiles_k;
    std::vector<float> up_s(kRankChunk * kTileRows), down_s(kRankChunk * kTileCols);
    std::vector<double> acc(kThreads * kRowsPerThread * 8);
    for (int tile = 0; tile < tiles; ++tile) {
        const int row0 = tile / tiles_k * kTileRows, col0 = tile % tiles_k * kTileCols;
        acc.assign(acc.size(), 0.0);
        for (int r0 = 0; r0 < rank; r0 += kRankChunk) {
            const int chunk = rank - r0 < kRankChunk ? rank - r0 : kRankChunk;
            for (int i = 0; i < kRankChunk * kTileRows; ++i) {
                const int r = i % kRankChunk, row = i / kRankChunk;
                up_s[r * kTileRows + row] = r < chunk && row0 + row < n ? up[(row0 + row) * rank + r0 + r] : 0.0f;
            }
            for (int i = 0; i < kRankChunk * kTileCols; ++i) {
                const int r = i / kTileCols, col = i % kTileCols;
                down_s[r * kTileCols + down_slot(col)] = r < chunk && col0 + col < k ? down[(r0 + r) * k + col0 + col] : 0.0f;
            }
            for (int thread = 0; thread < kThreads; ++thread)
                for (int r = 0; r < chunk; ++r)
                    for (int i = 0; i < kRowsPerThread; ++i)
                        for (int j = 0; j < 8; ++j) {
                            const int slot = down_slot(tile_col(thread)) + (j & 3) + (j >> 2) * (kTileCols / 2);
                            acc[(thread * kRowsPerThread + i) * 8 + j] +=
                                static_cast<double>(up_s[r * kTileRows + tile_row(thread, 0) + i]) * down_s[r * kTileCols + slot];
                        }
        }
        for (int thread = 0; thread < kThreads; ++thread)
            for (int i = 0; i < kRowsPerThread; ++i) {
                const int64_t row = row0 + tile_row(thread, i), col = col0 + tile_col(thread), first = row * k + col;
                const int count = row < n && col < k ? static_cast<int>(k - col < 8 ? k - col : 8) : 0;
                const uint32_t word = load_row(packed, first, count, vectorized);
                const int split = split_of(first, log2_block);
                for (int j = 0; j < count; ++j) {
                    const float a = absmax_of(codes, (first >> log2_block) + (j < split ? 0 : 1));
                    const double w = mul_rn(level_of(word >> nibble_shift(j) & 15, is_fp4), a);
                    BFloat16 rounded;
                    round_dithered(static_cast<float>(w + w * acc[(thread * kRowsPerThread + i) * 8 + j]), row, col + j, rounded);
                    out[first + j] = rounded.bits;
                    ++written[first + j];
                }
            }
    }
}

// The main loop of small_m_mma_kernel, W rounded to bf16: y (M, N) = x·Wᵀ.
void mma_product(const uint8_t* packed, const float* absmax, int log2_block, int is_fp4, int m, int n, int k, int warps_k,
                 int tiles_m, const double* x, double* y) {
    const Codes codes = codes_of(packed, absmax, log2_block, is_fp4);
    const int rows = kWarps / warps_k * kMmaRows, tokens = 8 * tiles_m, steps = (k + kMmaSpan - 1) / kMmaSpan;
    std::vector<double> partial(kWarps * tokens * kMmaPitch);
    for (int first_row = 0; first_row < n; first_row += rows) {
        partial.assign(partial.size(), -1e30);
        for (int warp = 0; warp < kWarps; ++warp) {
            const int row0 = first_row + warp / warps_k * kMmaRows;
            std::vector<Fragment> acc(2 * tiles_m, Fragment{});
            for (int step = warp % warps_k; step < steps; step += warps_k)
                for (int half = 0; half < 2; ++half)
                    for (int word = 0; word < 2; ++word)
                        for (int s = 0; s < 2; ++s)
                            for (int i = 0; i < 2; ++i)
                                for (int t = 0; t < tiles_m; ++t) {
                                    Fragment& f = acc[i * tiles_m + t];
                                    for (int lane = 0; lane < 32; ++lane) {
                                        const int at = mma_k(step, half, lane);
                                        for (int r = 0; r < 4; ++r)
                                            for (int p = 0; p < 2; ++p) {
                                                const int row = row0 + mma_row(lane, mma_slot(i, r));
                                                const int e = 2 * mma_pair(s, r) + p;
                                                const bool inside = row < n && at < k;
                                                const int64_t first = static_cast<int64_t>(row) * k + at;
                                                const uint32_t codes8 = inside ? load_u32(packed + first / 2 + 4 * word) : 0;
                                                const float level = level_of(codes8 >> nibble_shift(e) & 15, is_fp4);
                                                const float a = inside ? absmax_of(codes, first >> log2_block) : 0.0f;
                                                f.a[lane][r][p] = from_bf16(bf16_bits(mul_rn(level, a)));
                                            }
                                        const int token = mma_token(lane, t);
                                        for (int r = 0; r < 2; ++r)
                                            for (int p = 0; p < 2; ++p) {
                                                const int e = 8 * word + 4 * s + 2 * r + p;
                                                f.b[lane][r][p] = token < m && at < k ? x[token * k + at + e] : 0.0;
                                            }
                                    }
                                    mma_by_definition(f);
                                }
            for (int i = 0; i < 2; ++i)
                for (int t = 0; t < tiles_m; ++t)
                    for (int lane = 0; lane < 32; ++lane)
                        for (int j = 0; j < 4; ++j) {
                            const int token = mma_acc_token(lane, t, j), row = 16 * i + mma_acc_row(lane, j);
                            partial[(warp * tokens + token) * kMmaPitch + row] = acc[i * tiles_m + t].d[lane][j];
                        }
        }
        for (int i = 0; i < rows * m; ++i) {
            const int row = i % rows, token = i / rows;
            if (first_row + row >= n) continue;
            double sum = 0.0;
            for (int w = 0; w < warps_k; ++w)
                sum += partial[((row / kMmaRows * warps_k + w) * tokens + token) * kMmaPitch + row % kMmaRows];
            y[token * n + first_row + row] = sum;
        }
    }
}

// The main loop of small_m_gemv_kernel with x at its places in shared memory: y (M, N) = x·Wᵀ.
void gemv_product(const uint8_t* packed, const float* absmax, int log2_block, int is_fp4, int m, int n, int k, int warps_k,
                  const double* x, double* y) {
    const Codes codes = codes_of(packed, absmax, log2_block, is_fp4);
    const int rows = kWarps / warps_k * kGemvRows, steps = (k + kGemvSpan - 1) / kGemvSpan;
    std::vector<double> staged(m * k, -1e30), partial(kWarps * m * kGemvRows);
    for (int token = 0; token < m; ++token)
        for (int c = 0; c < k / 8; ++c)
            for (int e = 0; e < 8; ++e) staged[token * k + gemv_chunk(c) * 8 + e] = x[token * k + 8 * c + e];
    for (int first_row = 0; first_row < n; first_row += rows) {
        partial.assign(partial.size(), 0.0);
        for (int warp = 0; warp < kWarps; ++warp)
            for (int step = warp % warps_k; step < steps; step += warps_k)
                for (int lane = 0; lane < 32; ++lane)
                    for (int r = 0; r < kGemvRows; ++r) {
                        const int row = first_row + warp / warps_k * kGemvRows + r, at = gemv_k(step, lane);
                        if (row >= n || at >= k) continue;
                        const int64_t first = static_cast<int64_t>(row) * k + at;
                        for (int token = 0; token < m; ++token) {
                            double sum = 0.0;
                            for (int word = 0; word < 4; ++word) {
                                const uint32_t codes8 = load_u32(packed + first / 2 + 4 * word);
                                for (int e = 0; e < 8; ++e)
                                    sum += level_of(codes8 >> nibble_shift(e) & 15, is_fp4) *
                                           staged[token * k + gemv_chunk((at + 8 * word) / 8) * 8 + e];
                            }
                            partial[(warp * m + token) * kGemvRows + r] += absmax_of(codes, first >> log2_block) * sum;
                        }
                    }
        for (int i = 0; i < rows * m; ++i) {
            const int row = i % rows, token = i / rows;
            if (first_row + row >= n) continue;
            double sum = 0.0;
            for (int w = 0; w < warps_k; ++w)
                sum += partial[((row / kGemvRows * warps_k + w) * m + token) * kGemvRows + row % kGemvRows];
            y[token * n + first_row + row] = sum;
        }
    }
}

// The low-rank path: items by their fragments into the scratch, slices added up. out (M, pitch) = x·[B_down; 1]ᵀ.
void low_rank(int m, int k, int rank, int has_sigma, int slices, const double* x, const double* down, double* out,
              int* items) {
    const int cols = rank + has_sigma, pitch = low_rank_pitch(cols);
    std::vector<double> scratch(slices * m * pitch, -1e30);
    *items = items_of(m, cols, slices);
    for (int index = 0; index < *items; ++index) {
        const Item item = item_of(index, m, cols, slices, k);
        double sums[kItemTokens][kItemCols] = {};
        for (int warp = 0; warp < kWarps; ++warp)
            for (int tile = 0; tile < 2; ++tile) {
                Fragment f = {};
                for (int step = item.first_step + warp; step < item.last_step; step += kWarps) {
                    for (int lane = 0; lane < 32; ++lane) {
                        const int g = lane >> 2, at = step * 16 + 2 * (lane & 3), col = item.col + 8 * tile + g;
                        for (int p = 0; p < 2; ++p) {
                            for (int r = 0; r < 4; ++r) {
                                const int token = item.token + g + 8 * (r & 1);
                                f.a[lane][r][p] = token < m ? x[token * k + at + 8 * (r >> 1) + p] : 0.0;
                            }
                            for (int r = 0; r < 2; ++r)
                                f.b[lane][r][p] = col < rank ? down[col * k + at + 8 * r + p] : col < cols ? 1.0 : 0.0;
                        }
                    }
                    mma_by_definition(f);
                }
                for (int lane = 0; lane < 32; ++lane)
                    for (int i = 0; i < 4; ++i) sums[mma_acc_row(lane, i)][mma_acc_token(lane, tile, i)] += f.d[lane][i];
            }
        for (int thread = 0; thread < kThreads; ++thread) {
            const int token = item.token + thread / kItemCols, col = item.col + thread % kItemCols;
            if (token < m && col < pitch)
                scratch[(item.slice * m + token) * pitch + col] = sums[thread / kItemCols][thread % kItemCols];
        }
    }
    for (int i = 0; i < m * pitch; ++i) {
        out[i] = 0.0;
        for (int slice = 0; slice < slices; ++slice) out[i] += scratch[slice * m * pitch + i];
    }
}

// Bytes of shared memory without a staged x, as the kernels lay it out.
int shared_bytes(int gemv, int tokens, int m, int rows, int rank, int has_sigma) {
    return 4 * (partial_floats(tokens, gemv ? kGemvRows : kMmaPitch) + low_rank_floats(m, rank + has_sigma) + up_floats(rows, rank));
}
}
