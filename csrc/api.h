// What the bindings call: plain structs of pointers, sizes and strides. Checks of shapes are on the Python side
// (glora_kernels/four_bit/cuda.py); every function returns the error of its launch.
#pragma once

#include <cuda_runtime_api.h>

#include "maps.cuh"

namespace gk {

// A vector (stride 0 repeats a constant) or a matrix of fp32, fp16 or bf16. Absent where ptr is null.
struct Vector {
    const void* ptr;
    int64_t stride;
    int dtype;
};
struct Matrix {
    const void* ptr;
    int64_t stride_row, stride_col;
    int dtype;
};

// One term of dequantize: a vector over the rows, or factors up (N, R) and down (R, K).
struct Term {
    Vector vector;
    Matrix up, down;
    int rank;
};

struct Dequantize {
    Codes codes;
    void* out;
    int out_dtype;
    int64_t n, k;
    Term a, b;
    float scale;
    int vectorized;  // packed on 4 bytes, out on 16, and with adapters K % 8 == 0
};

// Where blocks meet: `arrived` counts finished items of the low-rank path, `left` the blocks that have read them all.
// Both are zero between launches: the last block to leave resets them.
struct Barrier {
    unsigned int arrived, left;
};

struct SmallM {
    Codes codes;
    const void* x;
    int64_t stride_x;
    int x_dtype;  // also of y and h
    void* y;
    int64_t stride_y, stride_y_col;
    int m, n, k;
    Vector a, b, bias, wc, d, e;
    Matrix b_up, b_down;
    int rank;
    float scale;
    void* h;
    float* sigma;
    int has_sigma;  // sigma is needed, by b or as an output
    Barrier* barrier;
    float* scratch;  // (slices, M, columns) partial sums of [h, sigma]
    int slices;
    int warps_k;   // warps of a block along k; the others along the rows
    int x_staged;  // GEMV: x lies in shared memory
    int blocks;
    int shared_bytes;

    GK_HD int columns() const { return rank + (has_sigma ? 1 : 0); }
    GK_HD int pitch() const { return low_rank_pitch(columns()); }
};

cudaError_t dequantize(const Dequantize& call, cudaStream_t stream);
cudaError_t small_m_gemv(const SmallM& call, cudaStream_t stream);  // M 1 to 4
cudaError_t small_m_mma(const SmallM& call, cudaStream_t stream);   // M 1 to 64

}  // namespace gk
