// CUDA's names on a host, for the sources of csrc: a block is 256 threads with a barrier, a warp 32 of them with another;
// blocks run one after the other, or all at once where the launch is cooperative. It takes the place of the toolkit's
// header, and defines what csrc/primitives.cuh names (GK_PRIMITIVES).
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // of a kernel whose blocks do not run at the same time
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorUnknown = 999 };
using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "error"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the host's CUDA"; }

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint32_t __float_as_uint(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
using std::min;

extern "C" inline int host_overrun = 0;  // floats written past a block's shared memory, so far

namespace host {

constexpr int kBlock = 256;

struct Warp {
    std::barrier<> sync{32};
    float floats[32];
    uint32_t a[32][4], b[32][2];
};

struct Block {
    std::barrier<> sync{kBlock};
    Warp warps[kBlock / 32];
    std::vector<float> shared;
};

struct Index { unsigned int x; };
struct Context { Index thread, block, grid; Block* state; };
inline thread_local Context here;
inline Warp& warp() { return here.state->warps[here.thread.x / 32]; }

inline int resident = 3;  // blocks at a time
constexpr int kGuard = 64;
constexpr float kMark = 1234.5f;

template <class Call>
void run(void (*kernel)(Call), const Call& call, int64_t blocks, int shared_bytes, int64_t at_once) {
    for (int64_t first = 0; first < blocks; first += at_once) {
        std::vector<std::unique_ptr<Block>> states;
        std::vector<std::thread> threads;
        for (int64_t index = first; index < std::min(blocks, first + at_once); ++index) {
            states.push_back(std::make_unique<Block>());
            Block* state = states.back().get();
            state->shared.assign(shared_bytes / 4, NAN);
            state->shared.resize(shared_bytes / 4 + kGuard, kMark);
            for (unsigned int t = 0; t < kBlock; ++t)
                threads.emplace_back([=] {
                    here = {{t}, {static_cast<unsigned int>(index)}, {static_cast<unsigned int>(blocks)}, state};
                    kernel(call);
                });
        }
        for (std::thread& thread : threads) thread.join();
        for (const auto& state : states)
            host_overrun += static_cast<int>(std::count_if(state->shared.end() - kGuard, state->shared.end(), [](float f) { return f != kMark; }));
    }
}

}  // namespace host

#define threadIdx host::here.thread
#define blockIdx host::here.block
#define gridDim host::here.grid

inline void __syncthreads() { host::here.state->sync.arrive_and_wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __nanosleep(unsigned int) { std::this_thread::yield(); }
inline unsigned int atomicAdd(unsigned int* at, unsigned int value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
inline unsigned int atomicExch(unsigned int* at, unsigned int value) { return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST); }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
inline float __shfl_xor_sync(unsigned int, float value, int other) {
    host::Warp& warp = host::warp();
    warp.floats[threadIdx.x % 32] = value;
    warp.sync.arrive_and_wait();
    const float found = warp.floats[(threadIdx.x % 32) ^ other];
    warp.sync.arrive_and_wait();
    return found;
}

#define GK_PRIMITIVES
#include "api.h"

namespace gk {

struct ShuffleLevels {
    int is_fp4;
    explicit ShuffleLevels(int fp4) : is_fp4(fp4) {}
    float operator()(uint32_t shifted) const { return level_of(shifted & 15, is_fp4); }
};

inline uint4 load_codes16(const uint8_t* at) { return *reinterpret_cast<const uint4*>(at); }
inline uint2 load_codes8(const uint8_t* at) { return *reinterpret_cast<const uint2*>(at); }
inline unsigned int load_acquire(const unsigned int* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
inline float* dynamic_shared() { return host::here.state->shared.data(); }

inline uint32_t pack2(float first, float second, Half) { return fp16_bits(first) | static_cast<uint32_t>(fp16_bits(second)) << 16; }
inline uint32_t pack2(float first, float second, BFloat16) { return bf16_bits(first) | static_cast<uint32_t>(bf16_bits(second)) << 16; }
inline float2 unpack2(uint32_t pair, Half) { return {from_fp16(pair & 0xFFFF), from_fp16(pair >> 16)}; }
inline float2 unpack2(uint32_t pair, BFloat16) { return {from_bf16(pair & 0xFFFF), from_bf16(pair >> 16)}; }

// mma.m16n8k16 by the fragment layout of the PTX ISA.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
    host::Warp& warp = host::warp();
    const int lane = threadIdx.x % 32;
    std::copy(a, a + 4, warp.a[lane]);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    warp.sync.arrive_and_wait();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i >> 1), col = 2 * (lane % 4) + (i & 1);
        for (int k = 0; k < 16; k += 2) {
            const int t = k % 8 / 2, r = k / 8;
            const float2 w = unpack2(warp.a[4 * (row % 8) + t][2 * r + row / 8], T{}), x = unpack2(warp.b[4 * col + t][r], T{});
            d[i] += w.x * x.x + w.y * x.y;
        }
    }
    warp.sync.arrive_and_wait();
}

template <class Call>
cudaError_t resident_blocks(void (*)(Call), int, int* blocks) {
    *blocks = host::resident;
    return cudaSuccess;
}

template <class Call>
cudaError_t launch(void (*kernel)(Call), const Call& call, int64_t blocks, int shared_bytes, bool cooperative, cudaStream_t) {
    if (cooperative && blocks > host::resident) return cudaErrorUnknown;
    host::run(kernel, call, blocks, shared_bytes, cooperative ? blocks : 1);
    return cudaSuccess;
}

}  // namespace gk
