// What only a GPU has: instructions without a name in C++, shared memory, launches. The kernels use nothing else beside
// CUDA's own names, so that a test can put its own version of this file in its place and run them on a host
// (tests/csrc/host_cuda.h, which defines GK_PRIMITIVES).
#ifndef GK_PRIMITIVES
#define GK_PRIMITIVES

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "api.h"

namespace gk {

// The 16 levels live in the lanes: one shuffle an element. A shuffle of width 16 reads the low four bits of its index
// only, so a code needs one shift and no mask. Every lane of the warp has to take part.
struct ShuffleLevels {
    float level;

    __device__ __forceinline__ explicit ShuffleLevels(int is_fp4) : level(level_of(threadIdx.x & 15, is_fp4)) {}
    __device__ __forceinline__ float operator()(uint32_t shifted) const {
        return __shfl_sync(0xFFFFFFFFu, level, static_cast<int>(shifted), 16);
    }
};

// The codes are read once: they stay out of the L1, which x lives in.
__device__ __forceinline__ uint4 load_codes16(const uint8_t* ptr) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(ptr));
    return v;
}

__device__ __forceinline__ uint2 load_codes8(const uint8_t* ptr) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(ptr));
    return v;
}

// The value other threads of the device have released.
__device__ __forceinline__ unsigned int load_acquire(const unsigned int* ptr) {
    unsigned int value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(ptr) : "memory");
    return value;
}

__device__ __forceinline__ float* dynamic_shared() {
    extern __shared__ __align__(16) float memory[];
    return memory;
}

// Two fp32 to two neighbouring 16-bit numbers, the first in the low half.
__device__ __forceinline__ uint32_t pack2(float first, float second, Half) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack2(float first, float second, BFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float2 unpack2(uint32_t pair, Half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
__device__ __forceinline__ float2 unpack2(uint32_t pair, BFloat16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// D += A·B of an m16n8k16 tile.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// How many blocks of a kernel the device runs at the same time. Asked once for each kernel, device and size; the kernel
// may then have all shared memory of the card, a limit that no later launch lowers again.
template <class Call>
cudaError_t resident_blocks(void (*kernel)(Call), int shared_bytes, int* blocks) {
    static std::mutex mutex;
    static std::map<std::tuple<const void*, int, int>, int> known;
    int device, sms, per_sm, most;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> guard(mutex);
    const auto key = std::make_tuple(reinterpret_cast<const void*>(kernel), device, shared_bytes);
    if (const auto found = known.find(key); found != known.end()) {
        *blocks = found->second;
        return cudaSuccess;
    }
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, shared_bytes);
    if (error == cudaSuccess) known[key] = *blocks = sms * per_sm;
    return error;
}

// Cooperative: all blocks run at the same time, or the launch is an error.
template <class Call>
cudaError_t launch(void (*kernel)(Call), const Call& call, int64_t blocks, int shared_bytes, bool cooperative,
                   cudaStream_t stream) {
    Call copy = call;
    void* args[] = {&copy};
    const void* entry = reinterpret_cast<const void*>(kernel);
    const dim3 grid(static_cast<unsigned int>(blocks)), block(kThreads);
    if (cooperative) return cudaLaunchCooperativeKernel(entry, grid, block, args, shared_bytes, stream);
    return cudaLaunchKernel(entry, grid, block, args, shared_bytes, stream);
}

}  // namespace gk

#endif  // GK_PRIMITIVES
