// What the kernels share on the device: absmax in two steps, adapters of any type, results eight at a time.
#pragma once

#include "primitives.cuh"

namespace gk {

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

}  // namespace gk
