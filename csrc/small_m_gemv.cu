// Small-M product for one to four tokens: codes times x in fp32, no tensor cores.
//
// A warp holds four rows of W and 1024 elements of k, 16 bytes of codes a lane. A lane's 32 elements lie in one block
// (blocks of 32 and more start at multiples of 32 of a row, as K is a multiple of the block), so that the levels are
// multiplied by x first and by absmax once: exact products of fp32 levels, nothing is rounded to 16 bits on the way.
//
// Cost at M = 1 on an H100: 3.0 TB/s of codes are 26 elements a cycle and SM (132 SMs, 1.75 GHz). The shuffle that looks
// a level up runs at 32 a cycle: 81%; shift, shuffle and multiply-add and a fourth of the conversion of x are 3.3 lane
// instructions an element, 86 of the 128 an SM issues. x comes from shared memory at a ninth of the shuffles.

#include "small_m.cuh"

namespace gk {
namespace {

// One warp's codes of four rows and 1024 elements of k, as they are read ahead.
struct GemvTile {
    uint4 codes[kGemvRows];
    RawAbsmax absmax[kGemvRows];
};

__device__ __forceinline__ void fetch(const SmallM& call, int row0, int step, int lane, GemvTile& tile) {
    const int k = gemv_k(step, lane);
#pragma unroll
    for (int r = 0; r < kGemvRows; ++r) {
        if (row0 + r < call.n && k < call.k) {
            const int64_t first = static_cast<int64_t>(row0 + r) * call.k + k;
            tile.codes[r] = load_codes16(call.codes.packed + first / 2);
            tile.absmax[r].load(call.codes, first >> call.codes.log2_block);
        } else {
            tile.codes[r] = make_uint4(0, 0, 0, 0);
            tile.absmax[r].clear();
        }
    }
}

template <class T>
__device__ __forceinline__ uint4 load_x(const SmallM& call, const T* staged, int token, int k) {
    if (token >= call.m || k >= call.k) return make_uint4(0, 0, 0, 0);
    if (call.x_staged) return reinterpret_cast<const uint4*>(staged + static_cast<int64_t>(token) * call.k)[gemv_chunk(k / 8)];
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(call.x) + token * call.stride_x + k));
}

template <class T, int M>
__device__ __forceinline__ void multiply(const SmallM& call, const Shared<T>& shared, const ShuffleLevels& levels, float offset,
                                         int k, const GemvTile& tile, float (&acc)[kGemvRows][M]) {
    float sum[kGemvRows][M] = {};
#pragma unroll 1
    for (int word = 0; word < 4; ++word) {
        float level[kGemvRows][8];
#pragma unroll
        for (int r = 0; r < kGemvRows; ++r) {
            const uint4& v = tile.codes[r];
            const uint32_t codes = word == 0 ? v.x : word == 1 ? v.y : word == 2 ? v.z : v.w;
#pragma unroll
            for (int e = 0; e < 8; ++e) level[r][e] = levels(codes >> nibble_shift(e));
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const uint4 pairs = load_x<T>(call, shared.x, m, k + 8 * word);
            const uint32_t halves[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 x = unpack2(halves[e], T{});
#pragma unroll
                for (int r = 0; r < kGemvRows; ++r) {
                    sum[r][m] = fmaf(level[r][2 * e], x.x, sum[r][m]);
                    sum[r][m] = fmaf(level[r][2 * e + 1], x.y, sum[r][m]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kGemvRows; ++r) {
        const float absmax = tile.absmax[r].resolve(call.codes, offset);
#pragma unroll
        for (int m = 0; m < M; ++m) acc[r][m] = fmaf(absmax, sum[r][m], acc[r][m]);
    }
}

template <class T, int M>
__global__ void __launch_bounds__(kThreads, M <= 2 ? 2 : 1) small_m_gemv_kernel(const __grid_constant__ SmallM call) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int warp_k = warp % call.warps_k, warp_n = warp / call.warps_k;
    const int rows = kWarps / call.warps_k * kGemvRows;
    const int tiles = (call.n + rows - 1) / rows, steps = (call.k + kGemvSpan - 1) / kGemvSpan;
    Shared<T> shared;
    shared.partial = dynamic_shared();
    shared.low_rank = shared.partial + partial_floats(M, kGemvRows);
    shared.up = shared.low_rank + low_rank_floats(call.m, call.columns());
    shared.x = reinterpret_cast<T*>(shared.up + up_floats(rows, call.rank));

    // The first codes are on their way while the low-rank path is computed.
    GemvTile next;
    fetch(call, blockIdx.x * rows + warp_n * kGemvRows, warp_k, lane, next);
    if (call.x_staged) {
        const int chunks = call.k / 8;
        for (int i = threadIdx.x; i < call.m * chunks; i += kThreads) {
            const int token = i / chunks, c = i % chunks;
            reinterpret_cast<uint4*>(shared.x)[token * chunks + gemv_chunk(c)] =
                __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(call.x) + token * call.stride_x) + c);
        }
    }
    if (call.columns()) low_rank_items<T>(call, shared.partial);
    __syncthreads();

    const ShuffleLevels levels(call.codes.is_fp4);
    const float offset = offset_of(call.codes);
    bool waited = call.columns() == 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float acc[kGemvRows][M] = {};
        for (int step = warp_k; step < steps; step += call.warps_k) {
            const GemvTile here = next;
            const bool last = step + call.warps_k >= steps;
            const int next_tile = last ? tile + gridDim.x : tile;
            fetch(call, next_tile * rows + warp_n * kGemvRows, last ? warp_k : step + call.warps_k, lane, next);
            multiply<T, M>(call, shared, levels, offset, gemv_k(step, lane), here, acc);
        }
#pragma unroll
        for (int r = 0; r < kGemvRows; ++r)
#pragma unroll
            for (int m = 0; m < M; ++m) {
                float sum = acc[r][m];
#pragma unroll
                for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
                if (lane == 0) shared.partial[(warp * M + m) * kGemvRows + r] = sum;
            }
        if (!waited) low_rank_total<T>(call, shared.low_rank);
        waited = true;
        if (call.rank) load_up(call, tile * rows, rows, shared.up);
        __syncthreads();
        epilogue<T>(call, shared, tile * rows, kGemvRows, M, kGemvRows);
        __syncthreads();
    }
    if (!waited) low_rank_total<T>(call, shared.low_rank);  // a block without rows is counted too
}

template <class T>
cudaError_t launch_for(const SmallM& call, cudaStream_t stream) {
    if (call.m <= 1) return launch_resident(small_m_gemv_kernel<T, 1>, call, stream);
    if (call.m <= 2) return launch_resident(small_m_gemv_kernel<T, 2>, call, stream);
    return launch_resident(small_m_gemv_kernel<T, 4>, call, stream);
}

}  // namespace

cudaError_t small_m_gemv(const SmallM& call, cudaStream_t stream) {
    if (call.m < 1 || call.m > 4) return cudaErrorInvalidValue;
    if (call.x_dtype == kFloat16) return launch_for<Half>(call, stream);
    if (call.x_dtype == kBFloat16) return launch_for<BFloat16>(call, stream);
    return cudaErrorInvalidValue;
}

}  // namespace gk
