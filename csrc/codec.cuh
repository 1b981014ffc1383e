// The 4-bit codec: codebooks, decode, encode and rounding, the same code on a GPU and on the host.
//
//     a = absmax[block], or nested fl32(fl32(code2[q[block]] * absmax2[block / blocksize2]) + offset)
//     w = fl32(level[nibble] * a), rounded to nearest even to the type it was quantized from, then to that of the result
//
// bit for bit as bitsandbytes computes it: every product and sum rounds by itself, none is contracted into a fused
// multiply-add. Element 2i of the flat tensor is the high nibble of byte i; blocks run over the flat tensor.
// A plain C++17 compiler takes this header as well.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GK_HD __host__ __device__ __forceinline__
#else
#define GK_HD inline
#endif

namespace gk {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// fp32 held in 16 bits; the storage types of every 16-bit pointer here.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// What stands beside the packed codes. Plain absmax: `absmax`; nested: `absmax8` (not null), `absmax2`, `code2`, `offset`.
struct Codes {
    const uint8_t* packed;
    const float* absmax;
    const uint8_t* absmax8;
    const float* absmax2;
    const float* code2;
    const float* offset;
    int log2_block;
    int log2_block2;
    int is_fp4;
    int stored;  // the DType that w is rounded to before any other; kFloat32: it is not
};

// ---------------------------------------------------------------------------------------------------- arithmetic

GK_HD uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

GK_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// A little-endian word on four bytes.
GK_HD uint32_t load_u32(const uint8_t* ptr) {
#ifdef __CUDA_ARCH__
    return __ldg(reinterpret_cast<const uint32_t*>(ptr));
#else
    uint32_t word;
    std::memcpy(&word, ptr, sizeof word);
    return word;
#endif
}

// A product and a sum that round once each, whatever the compiler may contract: on the host through a volatile.
GK_HD float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    volatile float product = a * b;
    return product;
#endif
}

GK_HD float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    volatile float sum = a + b;
    return sum;
#endif
}

GK_HD uint16_t bf16_bits(float value) {
#ifdef __CUDA_ARCH__
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
}

GK_HD uint16_t fp16_bits(float value) {
#ifdef __CUDA_ARCH__
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    if (magnitude > 0x7F800000u) return 0x7FFF;
    if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // 65520 and above round to infinity
    if (magnitude < 0x33000001u) return sign;            // up to 2^-25 round to zero
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    const uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
    const int dropped = exponent < -14 ? -1 - exponent : 13;  // subnormals keep fewer bits
    const uint32_t kept = mantissa >> dropped, rest = mantissa & ((1u << dropped) - 1u), half = 1u << (dropped - 1);
    const uint32_t rounded = kept + ((rest > half || (rest == half && (kept & 1u))) ? 1u : 0u);
    const uint32_t base = exponent < -14 ? 0u : static_cast<uint32_t>(exponent + 14) << 10;
    return static_cast<uint16_t>(sign | (base + rounded));  // the implicit one carries into the exponent
#endif
}

GK_HD float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

GK_HD float from_fp16(uint16_t bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
    if (exponent == 31) return float_of(sign | 0x7F800000u | (mantissa << 13));
    if (exponent) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
    const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-08f;  // 2^-24, exact
    return sign ? -tiny : tiny;
#endif
}

GK_HD void convert(float value, float& out) { out = value; }
GK_HD void convert(float value, Half& out) { out.bits = fp16_bits(value); }
GK_HD void convert(float value, BFloat16& out) { out.bits = bf16_bits(value); }
GK_HD float to_float(float value) { return value; }
GK_HD float to_float(Half value) { return from_fp16(value.bits); }
GK_HD float to_float(BFloat16 value) { return from_bf16(value.bits); }

// A value rounded to a type, in fp32.
GK_HD float rounded_to(float value, int dtype) {
    if (dtype == kBFloat16) return from_bf16(bf16_bits(value));
    return dtype == kFloat16 ? from_fp16(fp16_bits(value)) : value;
}

// Element `index` of a tensor whose type is known at run time, in fp32.
GK_HD float load_as_float(const void* ptr, int64_t index, int dtype) {
    if (dtype == kFloat32) return static_cast<const float*>(ptr)[index];
    const uint16_t bits = static_cast<const uint16_t*>(ptr)[index];
    return dtype == kFloat16 ? from_fp16(bits) : from_bf16(bits);
}

// The lattice dither of the reference (reference/random.py, the same integers): fp32 to 16 bits, keeping the mean.
constexpr uint32_t kDitherRow = 0xC13FA9A9u, kDitherCol = 0x91E10DA5u;

GK_HD float dithered(float value, int64_t row, int64_t col, int dropped) {
    const uint32_t lattice = static_cast<uint32_t>(row) * kDitherRow + static_cast<uint32_t>(col) * kDitherCol;
    const uint32_t raw = bits_of(value);
    // An infinity or a NaN (exponent all ones) has no last place to dither.
    if ((raw & 0x7F800000u) == 0x7F800000u) return value;
    return float_of((raw + (lattice >> (32 - dropped))) & ~((1u << dropped) - 1u));
}

GK_HD void round_dithered(float value, int64_t, int64_t, float& out) { out = value; }
GK_HD void round_dithered(float value, int64_t row, int64_t col, Half& out) { convert(dithered(value, row, col, 13), out); }
GK_HD void round_dithered(float value, int64_t row, int64_t col, BFloat16& out) {
    convert(dithered(value, row, col, 16), out);
}

// ------------------------------------------------------------------------------------------------------ codebooks

// The level of each 4-bit code in fp32, NF4 first. FP4: 0, 0.0625, 8, 12, 4, 6, 2, 3 over 12, then their negatives.
#define GK_LEVELS                                                                                                    \
    {                                                                                                                \
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,             \
        -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,              \
        0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,  \
        1.0f,                                                                                                        \
        0.0f, 0.0625f / 12.0f, 8.0f / 12.0f, 1.0f, 4.0f / 12.0f, 6.0f / 12.0f, 2.0f / 12.0f, 3.0f / 12.0f,           \
        0.0f, -0.0625f / 12.0f, -8.0f / 12.0f, -1.0f, -4.0f / 12.0f, -6.0f / 12.0f, -2.0f / 12.0f, -3.0f / 12.0f,    \
    }
constexpr float kLevels[32] = GK_LEVELS;
#ifdef __CUDACC__
static __constant__ float kDeviceLevels[32] = GK_LEVELS;  // a table indexed at run time must not land in local memory
#endif

GK_HD float level_of(int code, int is_fp4) {
#ifdef __CUDA_ARCH__
    return kDeviceLevels[16 * is_fp4 + code];
#else
    return kLevels[16 * is_fp4 + code];
#endif
}

// How far a little-endian word of eight codes is shifted for element e: the high nibble of a byte comes first.
GK_HD constexpr int nibble_shift(int e) { return 4 * (e ^ 1); }

// ---------------------------------------------------------------------------------------------------------- decode

GK_HD float nested_absmax(float code2, float absmax2, float offset) { return add_rn(mul_rn(code2, absmax2), offset); }

// absmax of a block of the flat tensor.
GK_HD float absmax_of(const Codes& codes, int64_t block) {
    if (codes.absmax8 == nullptr) return codes.absmax[block];
    return nested_absmax(codes.code2[codes.absmax8[block]], codes.absmax2[block >> codes.log2_block2], *codes.offset);
}

GK_HD int nibble_at(const uint8_t* packed, int64_t index) {
    const uint8_t byte = packed[index >> 1];
    return index & 1 ? byte & 15 : byte >> 4;
}

// w of one element of the flat tensor, in fp32.
GK_HD float decode(const Codes& codes, int64_t index) {
    const float level = level_of(nibble_at(codes.packed, index), codes.is_fp4);
    return rounded_to(mul_rn(level, absmax_of(codes, index >> codes.log2_block)), codes.stored);
}

// ---------------------------------------------------------------------------------------------------------- encode

// The nearest code of a value in [-1, 1]; one that lies on the bound between two levels takes the lower.
GK_HD int nearest_code(float value, int is_fp4) {
    constexpr int fp4_order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
    int below = 0;
    for (int i = 0; i < 15; ++i) {
        const float low = level_of(is_fp4 ? fp4_order[i] : i, is_fp4);
        const float high = level_of(is_fp4 ? fp4_order[i + 1] : i + 1, is_fp4);
        below += add_rn(low, high) / 2.0f < value;
    }
    return is_fp4 ? fp4_order[below] : below;
}

// Codes and absmax of a flat tensor. A whole block is multiplied by the rounded reciprocal of its absmax; the last, shorter
// one is divided, and its absmax clamped, as bitsandbytes does.
inline void encode(const float* values, int64_t total, int log2_block, int is_fp4, uint8_t* packed, float* absmax) {
    const int64_t size = static_cast<int64_t>(1) << log2_block;
    for (int64_t i = 0; i < (total + 1) / 2; ++i) packed[i] = 0;
    for (int64_t first = 0; first < total; first += size) {
        const int64_t last = first + size < total ? first + size : total;
        float largest = 0.0f;
        for (int64_t i = first; i < last; ++i) {
            const float magnitude = values[i] < 0.0f ? -values[i] : values[i];
            if (magnitude > largest) largest = magnitude;
        }
        const float clamped = largest > 1e-38f ? largest : 1e-38f;
        const bool whole = last - first == size;
        absmax[first >> log2_block] = whole ? largest : clamped;
        const volatile float inverse = 1.0f / clamped;
        for (int64_t i = first; i < last; ++i) {
            const float scaled = whole ? mul_rn(values[i], inverse) : values[i] / clamped;
            const int code = nearest_code(scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled, is_fp4);
            packed[i >> 1] |= static_cast<uint8_t>(i & 1 ? code : code << 4);
        }
    }
    if (total & 1) packed[total >> 1] |= static_cast<uint8_t>(nearest_code(0.0f, is_fp4));  // the padding stands for 0
}

}  // namespace gk
