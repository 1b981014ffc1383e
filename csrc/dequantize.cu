// out (N, K) = w, or w + w∘a + b with a, b from vectors, constants or factors.
//
// Cost on an H100 (132 SMs, 1.75 GHz, 3.0 TB/s): 2.5 bytes an element and its absmax leave 5.2 elements a cycle and SM,
// that is 24 lane instructions of the 128 an SM issues, and 32 / 5.2 = 6 shuffles. The plain kernel takes, an element,
// one shuffle, one shift, one product and half a conversion, and a seventh of the loads, stores and addresses: about 5.
// Factors cost R multiply-adds an element and term besides, so they stay in the shadow of memory up to a rank of about 16.

#include "device.cuh"

namespace gk {
namespace {

template <class Out>
__device__ __forceinline__ void store_each(Out* out, int64_t first, int64_t total, const float (&v)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e)
        if (first + e < total) convert(v[e], out[first + e]);
}

template <class Out>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Dequantize call) {
    const Codes& codes = call.codes;
    Out* out = static_cast<Out*>(call.out);
    const int64_t total = call.n * call.k;
    const bool vectorized = call.vectorized;
    const ShuffleLevels levels(codes.is_fp4);
    const float offset = offset_of(codes);
    uint32_t words[kWordsPerThread];
    RawAbsmax absmax[kWordsPerThread];
    // All loads before the first use: four words a thread are in flight.
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
        const int64_t first = dequantize_word(blockIdx.x, threadIdx.x, i) * 8;
        words[i] = load_word(codes.packed, first, total, vectorized);
        // A word starts at a multiple of 8 of the flat tensor and blocks at one of 32: it lies in one block.
        if (first < total)
            absmax[i].load(codes, first >> codes.log2_block);
        else
            absmax[i].clear();
    }
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
        const int64_t first = dequantize_word(blockIdx.x, threadIdx.x, i) * 8;
        const float a = absmax[i].resolve(codes, offset);
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = mul_rn(levels(words[i] >> nibble_shift(e)), a);
        if (codes.stored != kFloat32) {
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] = rounded_to(v[e], codes.stored);
        }
        if (first + 8 <= total && vectorized)
            store8(out + first, v);
        else
            store_each(out, first, total, v);
    }
}

// acc[i][j] += Σ_r scale·up[row i, r]·down[r, col j] of the thread's 4x8 outputs, the factors through shared memory in chunks.
__device__ __forceinline__ void add_low_rank(const Term& term, float scale, int64_t row0, int64_t col0, int64_t n, int64_t k,
                                             float (&up)[kRankChunk][kTileRows], float (&down)[kRankChunk][kTileCols],
                                             float (&acc)[kRowsPerThread][8]) {
    for (int r0 = 0; r0 < term.rank; r0 += kRankChunk) {
        const int chunk = min(kRankChunk, term.rank - r0);
        __syncthreads();  // the previous chunk has been read
        for (int i = threadIdx.x; i < kRankChunk * kTileRows; i += kThreads) {
            const int r = i % kRankChunk, row = i / kRankChunk;
            const bool inside = r < chunk && row0 + row < n;
            up[r][row] = inside ? scale * load_matrix(term.up, row0 + row, r0 + r) : 0.0f;
        }
        for (int i = threadIdx.x; i < kRankChunk * kTileCols; i += kThreads) {
            const int r = i / kTileCols, col = i % kTileCols;
            const bool inside = r < chunk && col0 + col < k;
            down[r][down_slot(col)] = inside ? load_matrix(term.down, r0 + r, col0 + col) : 0.0f;
        }
        __syncthreads();
        const int slot = down_slot(tile_col(threadIdx.x));
#pragma unroll 2
        for (int r = 0; r < chunk; ++r) {
            const float4 u = *reinterpret_cast<const float4*>(&up[r][tile_row(threadIdx.x, 0)]);
            const float4 low = *reinterpret_cast<const float4*>(&down[r][slot]);
            const float4 high = *reinterpret_cast<const float4*>(&down[r][slot + kTileCols / 2]);
            const float us[4] = {u.x, u.y, u.z, u.w};
            const float ds[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < kRowsPerThread; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(us[i], ds[j], acc[i][j]);
        }
    }
}

// Stored: w is rounded to `codes.stored` first, which takes registers that two blocks a multiprocessor have not got.
template <class Out, bool Stored>
__global__ void __launch_bounds__(kThreads, Stored ? 1 : 2) dequantize_adapted_kernel(const __grid_constant__ Dequantize call) {
    __shared__ __align__(16) float up[kRankChunk][kTileRows];
    __shared__ __align__(16) float down[kRankChunk][kTileCols];
    const Codes& codes = call.codes;
    const int64_t n = call.n, k = call.k, tiles_k = (k + kTileCols - 1) / kTileCols;
    const int64_t row0 = blockIdx.x / tiles_k * kTileRows, col0 = blockIdx.x % tiles_k * kTileCols;
    const int64_t col = col0 + tile_col(threadIdx.x);
    Out* out = static_cast<Out*>(call.out);
    const ShuffleLevels levels(codes.is_fp4);

    const float offset = offset_of(codes);
    uint32_t words[kRowsPerThread];
    RawAbsmax absmax[kRowsPerThread], next[kRowsPerThread];
    int split[kRowsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        const int64_t row = row0 + tile_row(threadIdx.x, i), first = row * k + col;
        const int count = row < n && col < k ? static_cast<int>(min(k - col, static_cast<int64_t>(8))) : 0;
        words[i] = load_row(codes.packed, first, count, call.vectorized);
        split[i] = split_of(first, codes.log2_block);
        absmax[i].clear();
        next[i].clear();
        if (count > 0) absmax[i].load(codes, first >> codes.log2_block);
        if (count > split[i]) next[i].load(codes, (first >> codes.log2_block) + 1);
    }
    // First a, then w, then b on top: one set of 32 accumulators a thread.
    float v[kRowsPerThread][8];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        const int64_t row = row0 + tile_row(threadIdx.x, i);
        const float a = call.a.vector.ptr && row < n ? load_vector(call.a.vector, row) : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][j] = a;
    }
    if (call.a.rank) add_low_rank(call.a, 1.0f, row0, col0, n, k, up, down, v);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        const int64_t row = row0 + tile_row(threadIdx.x, i);
        const float b = call.b.vector.ptr && row < n ? load_vector(call.b.vector, row) : 0.0f;
        const float here = absmax[i].resolve(codes, offset), there = next[i].resolve(codes, offset);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float exact = mul_rn(levels(words[i] >> nibble_shift(j)), j < split[i] ? here : there);
            // As it is without a and b, so that adapters of zero change nothing.
            Out plain;
            convert(Stored ? rounded_to(exact, codes.stored) : exact, plain);
            const float w = to_float(plain);
            v[i][j] = fmaf(w, v[i][j], w) + b;
        }
    }
    if (call.b.rank) add_low_rank(call.b, call.scale, row0, col0, n, k, up, down, v);

#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        const int64_t row = row0 + tile_row(threadIdx.x, i);
        if (row >= n || col >= k) continue;
        Out rounded[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) round_dithered(v[i][j], row, col + j, rounded[j]);
        float values[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = to_float(rounded[j]);  // exact, and packed again exactly
        if (call.vectorized)
            store8(out + row * k + col, values);
        else
            store_each(out + row * k, col, k, values);
    }
}

template <class Out>
cudaError_t launch_for(const Dequantize& call, cudaStream_t stream) {
    if (call.a.rank || call.a.vector.ptr || call.b.rank || call.b.vector.ptr) {
        const int64_t tiles = ((call.n + kTileRows - 1) / kTileRows) * ((call.k + kTileCols - 1) / kTileCols);
        const auto kernel = call.codes.stored == kFloat32 ? dequantize_adapted_kernel<Out, false> : dequantize_adapted_kernel<Out, true>;
        return launch(kernel, call, tiles, 0, false, stream);
    }
    const int64_t words = (call.n * call.k + 7) / 8, blocks = (words + kWordsPerBlock - 1) / kWordsPerBlock;
    return launch(dequantize_kernel<Out>, call, blocks, 0, false, stream);
}

}  // namespace

cudaError_t dequantize(const Dequantize& call, cudaStream_t stream) {
    switch (call.out_dtype) {
        case kFloat32: return launch_for<float>(call, stream);
        case kFloat16: return launch_for<Half>(call, stream);
        case kBFloat16: return launch_for<BFloat16>(call, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace gk
