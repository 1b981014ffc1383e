// What both small-M kernels do around their product: the low-rank path before it, the epilogue after it.
//
//     y = Z∘(1 + a) + scale·(x·B_downᵀ)·B_upᵀ + σ·bᵀ + bias∘(1 + d) + e + wc,    Z = x·Wᵀ
//
// One launch. [h, σ] = x·[B_down; 1]ᵀ needs all of x and is needed by every block, so it is computed once, by all blocks:
//   1. each block takes items (16 tokens, 16 columns, a slice of k) and writes their partial sums to the scratch;
//   2. it counts them in `arrived` (release) and streams its first rows of W, the long work, without waiting;
//   3. before its first epilogue it waits for the count (acquire) and adds the slices in a fixed order.
// A block waits for others only after its own items are counted, and the launch is cooperative, so that all blocks run at
// the same time: there is no order in which they could wait for each other. The last block that has waited sets the
// counters to zero for the next launch on the stream, or for the next replay of a graph that has counters of its own.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace gk {

template <class T>
struct Shared {
    float* partial;  // (8 warps, tokens, pitch) sums of each warp, and before the barrier those of its items
    float* low_rank;  // (M, pitch) [scale·h, σ]
    float* up;        // (rows, rank | 1) B_up of the rows at hand; an odd pitch, which has no bank conflicts
    T* x;             // (M, K), where it is staged
};

// fp32 to the type of x, of B_down: its products are taken on tensor cores.
template <class T>
__device__ __forceinline__ uint32_t down_pair(const SmallM& call, int col, int k) {
    if (col < call.rank) return pack2(load_matrix(call.b_down, col, k), load_matrix(call.b_down, col, k + 1), T{});
    return col < call.columns() ? pack2(1.0f, 1.0f, T{}) : 0u;
}

template <class T>
__device__ __forceinline__ uint32_t x_pair(const SmallM& call, int token, int k) {
    if (token >= call.m) return 0u;
    return __ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(call.x) + token * call.stride_x + k));
}

// Step 1 and the count of step 2. Ends with a barrier of the block: `partial` is free again.
template <class T>
__device__ __forceinline__ void low_rank_items(const SmallM& call, float* partial) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int items = items_of(call.m, call.columns(), call.slices);
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
        const Item item = item_of(index, call.m, call.columns(), call.slices, call.k);
        float d[2][4] = {};
#pragma unroll 2
        for (int step = item.first_step + warp; step < item.last_step; step += kWarps) {
            const int k = step * 16 + 2 * t;
            const uint32_t a[4] = {x_pair<T>(call, item.token + g, k), x_pair<T>(call, item.token + g + 8, k),
                                   x_pair<T>(call, item.token + g, k + 8), x_pair<T>(call, item.token + g + 8, k + 8)};
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                const int col = item.col + 8 * tile + g;
                mma(d[tile], a, down_pair<T>(call, col, k), down_pair<T>(call, col, k + 8), T{});
            }
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                partial[(warp * kItemTokens + mma_acc_row(lane, i)) * kItemCols + mma_acc_token(lane, tile, i)] = d[tile][i];
        __syncthreads();
        const int token = item.token + threadIdx.x / kItemCols, col = item.col + threadIdx.x % kItemCols;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += partial[w * kItemTokens * kItemCols + threadIdx.x];
        if (token < call.m && col < call.pitch())
            call.scratch[(static_cast<int64_t>(item.slice) * call.m + token) * call.pitch() + col] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();  // with the barrier above: every thread's sums are visible before the count
            atomicAdd(&call.barrier->arrived, 1u);
        }
    }
}

// Step 3: waits for every item; then `out` (M, pitch) holds [scale·h, σ] after the block's next barrier. Once a block.
template <class T>
__device__ __forceinline__ void low_rank_total(const SmallM& call, float* out) {
    if (threadIdx.x == 0) {
        const unsigned int items = items_of(call.m, call.columns(), call.slices);
        unsigned int seen;
        do {
            seen = load_acquire(&call.barrier->arrived);
            if (seen < items) __nanosleep(64);
        } while (seen < items);
        __threadfence();
    }
    __syncthreads();
    // Four columns of a token a thread; few of them are shared by eight lanes, which take every eighth slice each.
    const int quads = call.m * call.pitch() / 4, group = quads <= 128 ? 8 : 1;
    const int lane = threadIdx.x % group;
    for (int base = 0; base < quads; base += kThreads / group) {  // the same number of rounds for every thread
        const int quad = base + threadIdx.x / group;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (quad < quads) {
#pragma unroll 4
            for (int slice = lane; slice < call.slices; slice += group) {
                // Past the L1, which other blocks' stores do not update.
                const float4 part = __ldcg(reinterpret_cast<const float4*>(call.scratch) + static_cast<int64_t>(slice) * quads + quad);
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
        }
        for (int other = group / 2; other; other /= 2) {
            sum.x += __shfl_xor_sync(0xFFFFFFFFu, sum.x, other);
            sum.y += __shfl_xor_sync(0xFFFFFFFFu, sum.y, other);
            sum.z += __shfl_xor_sync(0xFFFFFFFFu, sum.z, other);
            sum.w += __shfl_xor_sync(0xFFFFFFFFu, sum.w, other);
        }
        if (quad < quads && lane == 0) {
            const int token = quad * 4 / call.pitch(), col = quad * 4 % call.pitch();
            const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool is_h = col + i < call.rank;
                const float value = is_h ? call.scale * values[i] : values[i];
                out[quad * 4 + i] = value;
                if (blockIdx.x != 0) continue;
                if (is_h && call.h)
                    convert(value, static_cast<T*>(call.h)[static_cast<int64_t>(token) * call.rank + col + i]);
                if (col + i == call.rank && call.has_sigma && call.sigma) call.sigma[token] = value;
            }
        }
    }
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(&call.barrier->left, 1u) == gridDim.x - 1) {
            // Every block has arrived and seen that all have: nobody reads the counters before the next launch.
            atomicExch(&call.barrier->arrived, 0u);
            atomicExch(&call.barrier->left, 0u);
        }
    }
}

// B_up of the rows at hand to shared memory, in fp32.
__device__ __forceinline__ void load_up(const SmallM& call, int first_row, int rows, float* up) {
    const int pitch = call.rank | 1;
    for (int i = threadIdx.x; i < rows * call.rank; i += kThreads) {
        const int row = i / call.rank, r = i % call.rank;
        up[row * pitch + r] = first_row + row < call.n ? load_matrix(call.b_up, first_row + row, r) : 0.0f;
    }
}

// The sums of the warps along k, the terms of the row, one rounding, y. Partial sums lie as [warp][token][pitch], the warps
// of one set of rows in a row.
template <class T>
__device__ __forceinline__ void epilogue(const SmallM& call, const Shared<T>& shared, int first_row, int rows_per_warp,
                                         int tokens, int pitch) {
    const int rows = kWarps / call.warps_k * rows_per_warp;
    for (int i = threadIdx.x; i < rows * call.m; i += kThreads) {
        const int row = i % rows, token = i / rows, n = first_row + row;
        if (n >= call.n) continue;
        const float* part = shared.partial + (row / rows_per_warp * call.warps_k * tokens + token) * pitch + row % rows_per_warp;
        float y = 0.0f;
        for (int w = 0; w < call.warps_k; ++w) y += part[w * tokens * pitch];
        if (call.a.ptr) y = fmaf(y, load_vector(call.a, n), y);
        const float* low_rank = shared.low_rank + token * call.pitch();
        const float* up = shared.up + row * (call.rank | 1);
        for (int r = 0; r < call.rank; ++r) y = fmaf(low_rank[r], up[r], y);
        if (call.b.ptr) y = fmaf(low_rank[call.rank], load_vector(call.b, n), y);
        float shift = 0.0f;
        if (call.bias.ptr) {
            shift = load_vector(call.bias, n);
            if (call.d.ptr) shift = fmaf(shift, load_vector(call.d, n), shift);
        }
        if (call.e.ptr) shift += load_vector(call.e, n);
        if (call.wc.ptr) shift += load_vector(call.wc, n);
        convert(y + shift, static_cast<T*>(call.y)[token * call.stride_y + n * call.stride_y_col]);
    }
}

// A kernel on as many blocks as run at the same time, at most `call.blocks`; each block takes its share of the rows.
inline cudaError_t launch_resident(void (*kernel)(SmallM), const SmallM& call, cudaStream_t stream) {
    int resident;
    const cudaError_t error = resident_blocks(kernel, call.shared_bytes, &resident);
    if (error != cudaSuccess) return error;
    if (resident == 0) return cudaErrorInvalidConfiguration;
    const bool blocks_wait = call.columns() != 0;  // for each other
    return launch(kernel, call, std::min(call.blocks, resident), call.shared_bytes, blocks_wait, stream);
}

}  // namespace gk
