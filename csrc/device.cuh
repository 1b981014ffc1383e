// What the kernels share on the device: look-ups by shuffle, loads past the L1, packed conversions.
#pragma once

#include "api.h"
#include "maps.cuh"

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

// absmax in two steps, so that a prefetch need not wait: what is read, and what comes of it.
struct RawAbsmax {
    uint32_t first;  // the fp32 number, or the 8-bit code
    float second;    // absmax2

    __device__ __forceinline__ void load(const Codes& codes, int64_t block) {
        if (codes.absmax8 == nullptr) {
            first = __float_as_uint(__ldg(codes.absmax + block));
            second = 0.0f;
        } else {
            first = __ldg(codes.absmax8 + block);
            second = __ldg(codes.absmax2 + (block >> codes.log2_block2));
        }
    }
    __device__ __forceinline__ void clear() {
        first = 0;
        second = 0.0f;
    }
    // `offset` is read once a thread. Of a cleared one the value is finite, and multiplies zeros.
    __device__ __forceinline__ float resolve(const Codes& codes, float offset) const {
        if (codes.absmax8 == nullptr) return __uint_as_float(first);
        return nested_absmax(__ldg(codes.code2 + first), second, offset);
    }
};

__device__ __forceinline__ float offset_of(const Codes& codes) { return codes.absmax8 == nullptr ? 0.0f : *codes.offset; }

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

__device__ __forceinline__ float load_vector(const Vector& vector, int64_t index) {
    return load_as_float(vector.ptr, index * vector.stride, vector.dtype);
}
__device__ __forceinline__ float load_matrix(const Matrix& matrix, int64_t row, int64_t col) {
    return load_as_float(matrix.ptr, row * matrix.stride_row + col * matrix.stride_col, matrix.dtype);
}

// Eight results to out[0:8], which lies on 16 bytes.
__device__ __forceinline__ void store8(float* out, const float (&v)[8]) {
    reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <class T>
__device__ __forceinline__ void store8(T* out, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(out) =
        make_uint4(pack2(v[0], v[1], T{}), pack2(v[2], v[3], T{}), pack2(v[4], v[5], T{}), pack2(v[6], v[7], T{}));
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

}  // namespace gk
