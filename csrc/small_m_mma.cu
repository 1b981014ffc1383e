// Small-M product on tensor cores (mma.m16n8k16): W is the operand of 16 rows, eight tokens are the other.
//
// w = rn16(level·absmax), the number that dequantize writes: the result is that of a product with the dequantized weight,
// and absmax may change within a span. A warp holds 32 rows and 128 elements of k; which k a lane holds is chosen so that
// its codes are neighbours in memory (maps.cuh), for x as for W, so neither passes through shared memory.
//
// Cost an element of W on an H100: shift, shuffle, product and half a conversion, 3.5 lane instructions; at M = 8 the reads
// of x add a half of the shuffles' time on the same pipe, which leaves about 21 elements a cycle and SM (2.4 TB/s).

#include "small_m.cuh"

namespace gk {
namespace {

constexpr int kSlots = kMmaRows / 8;  // rows of a lane

// One warp's codes of 32 rows and 128 elements of k, as they are read ahead.
struct MmaTile {
    uint2 codes[2][kSlots];
    RawAbsmax absmax[2][kSlots];
};

__device__ __forceinline__ void fetch(const SmallM& call, int row0, int step, int lane, MmaTile& tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int k = mma_k(step, half, lane);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
            const int row = row0 + mma_row(lane, slot);
            // K is a multiple of 32, so sixteen neighbours are all inside or all outside, and lie in one block.
            if (row < call.n && k < call.k) {
                const int64_t first = static_cast<int64_t>(row) * call.k + k;
                tile.codes[half][slot] = load_codes8(call.codes.packed + first / 2);
                tile.absmax[half][slot].load(call.codes, first >> call.codes.log2_block);
            } else {
                tile.codes[half][slot] = make_uint2(0, 0);
                tile.absmax[half][slot].clear();
            }
        }
    }
}

template <class T, int TILES>
__device__ __forceinline__ void multiply(const SmallM& call, const ShuffleLevels& levels, float offset, int step, int lane,
                                         const MmaTile& tile, float (&acc)[2][TILES][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int k = mma_k(step, half, lane);
        float absmax[kSlots];
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) absmax[slot] = tile.absmax[half][slot].resolve(call.codes, offset);
#pragma unroll 1
        for (int word = 0; word < 2; ++word) {
            uint32_t pairs[kSlots][4];  // the eight weights of a word, two to a register
#pragma unroll
            for (int slot = 0; slot < kSlots; ++slot) {
                const uint32_t codes = word == 0 ? tile.codes[half][slot].x : tile.codes[half][slot].y;
#pragma unroll
                for (int p = 0; p < 4; ++p)
                    pairs[slot][p] = pack2(mul_rn(levels(codes >> nibble_shift(2 * p)), absmax[slot]),
                                           mul_rn(levels(codes >> nibble_shift(2 * p + 1)), absmax[slot]), T{});
            }
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int token = mma_token(lane, t);
                uint4 x = make_uint4(0, 0, 0, 0);
                if (token < call.m && k < call.k)
                    x = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(call.x) + token * call.stride_x + k + 8 * word));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    uint32_t first[4], second[4];
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        first[r] = pairs[mma_slot(i, r)][mma_pair(0, r)];
                        second[r] = pairs[mma_slot(i, r)][mma_pair(1, r)];
                    }
                    mma(acc[i][t], first, x.x, x.y, T{});
                    mma(acc[i][t], second, x.z, x.w, T{});
                }
            }
        }
    }
}

template <class T, int TILES>
__global__ void __launch_bounds__(kThreads, TILES <= 2 ? 2 : 1) small_m_mma_kernel(const __grid_constant__ SmallM call) {
    constexpr int tokens = 8 * TILES;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int warp_k = warp % call.warps_k, warp_n = warp / call.warps_k;
    const int rows = kWarps / call.warps_k * kMmaRows;
    const int tiles = (call.n + rows - 1) / rows, steps = (call.k + kMmaSpan - 1) / kMmaSpan;
    Shared<T> shared;
    shared.partial = dynamic_shared();
    shared.low_rank = shared.partial + partial_floats(tokens, kMmaPitch);
    shared.up = shared.low_rank + low_rank_floats(call.m, call.columns());
    shared.x = nullptr;

    // The first codes are on their way while the low-rank path is computed.
    MmaTile next;
    fetch(call, blockIdx.x * rows + warp_n * kMmaRows, warp_k, lane, next);
    if (call.columns()) low_rank_items<T>(call, shared.partial);

    const ShuffleLevels levels(call.codes.is_fp4);
    const float offset = offset_of(call.codes);
    bool waited = call.columns() == 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float acc[2][TILES][4] = {};
        for (int step = warp_k; step < steps; step += call.warps_k) {
            const MmaTile here = next;
            const bool last = step + call.warps_k >= steps;
            const int next_tile = last ? tile + gridDim.x : tile;
            fetch(call, next_tile * rows + warp_n * kMmaRows, last ? warp_k : step + call.warps_k, lane, next);
            multiply<T, TILES>(call, levels, offset, step, lane, here, acc);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int token = mma_acc_token(lane, t, j), row = 16 * i + mma_acc_row(lane, j);
                    shared.partial[(warp * tokens + token) * kMmaPitch + row] = acc[i][t][j];
                }
        if (!waited) low_rank_total<T>(call, shared.low_rank);
        waited = true;
        if (call.rank) load_up(call, tile * rows, rows, shared.up);
        __syncthreads();
        epilogue<T>(call, shared, tile * rows, kMmaRows, tokens, kMmaPitch);
        __syncthreads();
    }
    if (!waited) low_rank_total<T>(call, shared.low_rank);  // a block without rows is counted too
}

template <class T>
cudaError_t launch_for(const SmallM& call, cudaStream_t stream) {
    if (call.m <= 8) return launch_resident(small_m_mma_kernel<T, 1>, call, stream);
    if (call.m <= 16) return launch_resident(small_m_mma_kernel<T, 2>, call, stream);
    if (call.m <= 32) return launch_resident(small_m_mma_kernel<T, 4>, call, stream);
    return launch_resident(small_m_mma_kernel<T, 8>, call, stream);
}

}  // namespace

cudaError_t small_m_mma(const SmallM& call, cudaStream_t stream) {
    if (call.m < 1 || call.m > 64) return cudaErrorInvalidValue;
    if (call.x_dtype == kFloat16) return launch_for<Half>(call, stream);
    if (call.x_dtype == kBFloat16) return launch_for<BFloat16>(call, stream);
    return cudaErrorInvalidValue;
}

}  // namespace gk
