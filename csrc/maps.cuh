// Who reads and writes what: the index arithmetic of the kernels, free of any device code, so that a plain C++ program
// can walk the same grid on the host (tests/csrc/emulate.cpp).
#pragma once

#include "codec.cuh"

namespace gk {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// ---------------------------------------------------------------------------------------------- dequantize, no adapters

constexpr int kWordsPerThread = 4;
constexpr int kWordsPerBlock = kThreads * kWordsPerThread;

// The i-th word (eight codes, flat elements 8w to 8w+7) of a thread: neighbouring threads hold neighbouring words, so
// that a warp reads 128 bytes and writes 512 in a row.
GK_HD int64_t dequantize_word(int64_t block, int thread, int i) {
    return block * kWordsPerBlock + i * kThreads + thread;
}

// Eight codes from flat element `first`, a multiple of 8; zeros beyond `total`.
GK_HD uint32_t load_word(const uint8_t* packed, int64_t first, int64_t total, bool vectorized) {
    if (first + 8 <= total && vectorized) return load_u32(packed + first / 2);
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i)
        if (first + 2 * i < total) word |= static_cast<uint32_t>(packed[first / 2 + i]) << (8 * i);
    return word;
}

// -------------------------------------------------------------------------------------------- dequantize with adapters

constexpr int kTileRows = 32;
constexpr int kTileCols = 256;
constexpr int kRowsPerThread = 4;
constexpr int kRankChunk = 16;

// A warp holds four rows of 256 columns; a lane eight neighbouring columns of each.
GK_HD int tile_row(int thread, int i) { return (thread >> 5) * kRowsPerThread + i; }
GK_HD int tile_col(int thread) { return (thread & 31) * 8; }
// How many of eight elements from flat element `first` lie in the block of the first: rows of any length start anywhere.
GK_HD int split_of(int64_t first, int log2_block) {
    const int64_t left = (static_cast<int64_t>(1) << log2_block) - (first & ((static_cast<int64_t>(1) << log2_block) - 1));
    return left < 8 ? static_cast<int>(left) : 8;
}
// `count` (0 to 8) codes from any flat element, each where the decode expects it.
GK_HD uint32_t load_row(const uint8_t* packed, int64_t first, int count, bool vectorized) {
    if (count == 8 && vectorized) return load_u32(packed + first / 2);
    uint32_t word = 0;
#pragma unroll 1
    for (int e = 0; e < count; ++e) word |= static_cast<uint32_t>(nibble_at(packed, first + e)) << nibble_shift(e);
    return word;
}
// Where the down factor of a column lies in shared memory: the halves of eight columns apart, which leaves 16-byte reads
// of a warp without bank conflicts.
GK_HD int down_slot(int col) { return ((col >> 2) & 1) * (kTileCols / 2) + (col >> 3) * 4 + (col & 3); }

// ----------------------------------------------------------------------------------------------- small M, M <= 4: GEMV

constexpr int kGemvRows = 4;     // rows of W that a warp holds at a time: each x value is used four times
constexpr int kGemvSpan = 1024;  // elements of k that a warp takes at a time: 32 (16 bytes) a lane

GK_HD int gemv_k(int step, int lane) { return step * kGemvSpan + lane * 32; }
// Where the c-th 16 bytes of a row of x lie in shared memory: a quarter of a warp reads 16 bytes at a distance of 64,
// which the exclusive-or spreads over all banks.
GK_HD int gemv_chunk(int c) { return c ^ ((c >> 3) & 3); }

// ---------------------------------------------------------------------------------------- small M on tensor cores (mma)

constexpr int kMmaRows = 32;   // rows of W a warp: two m16 tiles
constexpr int kMmaSpan = 128;  // elements of k that a warp takes at a time: two halves of 64
constexpr int kMmaPitch = kMmaRows + 4;  // of the partial sums in shared memory: no bank conflicts

// mma.m16n8k16 numbers k by lane; any order serves if both operands use the same. A lane (group g = lane / 4, t = lane % 4)
// holds sixteen neighbouring k (8 bytes of codes) of rows g, g + 8, g + 16, g + 24 in each half of a span:
GK_HD int mma_row(int lane, int slot) { return (lane >> 2) + 8 * slot; }
GK_HD int mma_k(int step, int half, int lane) { return step * kMmaSpan + 64 * half + 16 * (lane & 3); }
// and hands four of them to each of four products: elements 4s + {0, 1} as the registers for k = 2t + {0, 1} of the
// instruction, 4s + {2, 3} as those for 2t + {8, 9}. The x operand (k, n8) reads the same four of token lane / 4. So register
// r (0 to 3) of the W operand of m16 tile i is, of a word of eight codes and its product s (0 or 1), this pair of this row:
GK_HD constexpr int mma_slot(int i, int r) { return 2 * i + (r & 1); }
GK_HD constexpr int mma_pair(int s, int r) { return 2 * s + (r >> 1); }
GK_HD int mma_token(int lane, int tile) { return tile * 8 + (lane >> 2); }
// Accumulator i (0 to 3) of an m16n8 tile: its row of W and its token.
GK_HD int mma_acc_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
GK_HD int mma_acc_token(int lane, int tile, int i) { return tile * 8 + 2 * (lane & 3) + (i & 1); }

// ------------------------------------------------------------------------- small M: the low-rank path and the epilogue

constexpr int kItemTokens = 16, kItemCols = 16;

// The work before the barrier: (16 tokens) x (16 columns of [B_down; 1]) x (a slice of k), one partial sum each.
struct Item {
    int token, col, slice, first_step, last_step;  // steps of sixteen k
};

GK_HD Item item_of(int index, int tokens, int cols, int slices, int k) {
    const int tiles_t = (tokens + kItemTokens - 1) / kItemTokens, tiles_c = (cols + kItemCols - 1) / kItemCols;
    const int slice = index / (tiles_t * tiles_c), rest = index % (tiles_t * tiles_c);
    const int64_t steps = k / 16;
    return {rest / tiles_c * kItemTokens, rest % tiles_c * kItemCols, slice, static_cast<int>(steps * slice / slices),
            static_cast<int>(steps * (slice + 1) / slices)};
}

GK_HD int items_of(int tokens, int cols, int slices) {
    return ((tokens + kItemTokens - 1) / kItemTokens) * ((cols + kItemCols - 1) / kItemCols) * slices;
}

// Rows of [h, σ] are read 16 bytes at a time.
GK_HD int low_rank_pitch(int cols) { return (cols + 3) / 4 * 4; }

// The regions of shared memory in floats, each a multiple of 4: the partial sums of the warps, [h, σ], B_up of some rows.
constexpr int kItemFloats = kWarps * kItemTokens * kItemCols;
GK_HD int partial_floats(int tokens, int pitch) {
    const int floats = kWarps * tokens * pitch;
    return floats > kItemFloats ? floats : kItemFloats;
}
GK_HD int low_rank_floats(int tokens, int cols) { return tokens * low_rank_pitch(cols); }
GK_HD int up_floats(int rows, int rank) { return rank ? (rows * (rank | 1) + 3) / 4 * 4 : 0; }

}  // namespace gk
