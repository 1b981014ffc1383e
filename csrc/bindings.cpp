// glora_kernels._C: the kernels by raw pointer and stream, and the codec on host buffers. No torch, no look at a device
// before a launch.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "api.h"
#include "maps.cuh"

namespace py = pybind11;

namespace {

// How the Python side hands tensors over: addresses (0 where absent), strides in elements, dtype codes of gk::DType.
using VectorArgs = std::tuple<uintptr_t, int64_t, int>;
using MatrixArgs = std::tuple<uintptr_t, int64_t, int64_t, int>;
using CodesArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, int, bool, int>;
using TermArgs = std::tuple<VectorArgs, MatrixArgs, MatrixArgs, int>;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

gk::Vector vector_of(const VectorArgs& args) {
    const auto& [ptr, stride, dtype] = args;
    return {at<const void>(ptr), stride, dtype};
}

gk::Matrix matrix_of(const MatrixArgs& args) {
    const auto& [ptr, stride_row, stride_col, dtype] = args;
    return {at<const void>(ptr), stride_row, stride_col, dtype};
}

gk::Term term_of(const TermArgs& args) {
    const auto& [vector, up, down, rank] = args;
    return {vector_of(vector), matrix_of(up), matrix_of(down), rank};
}

// packed, absmax, absmax8, absmax2, code2, offset, log2 of the block sizes, fp4, the dtype of the weight as quantized.
gk::Codes codes_of(const CodesArgs& args) {
    const auto& [packed, absmax, absmax8, absmax2, code2, offset, log2_block, log2_block2, is_fp4, stored] = args;
    return {at<const uint8_t>(packed), at<const float>(absmax), at<const uint8_t>(absmax8), at<const float>(absmax2),
            at<const float>(code2), at<const float>(offset), log2_block, log2_block2, is_fp4, stored};
}

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

void use_device(int device) {
    int current = -1;
    check(cudaGetDevice(&current), "cudaGetDevice");
    if (current != device) check(cudaSetDevice(device), "cudaSetDevice");
}

void dequantize(int device, uintptr_t stream, const CodesArgs& codes, uintptr_t out, int out_dtype, int64_t n, int64_t k,
                const TermArgs& a, const TermArgs& b, float scale, bool vectorized) {
    use_device(device);
    const gk::Dequantize call{codes_of(codes), at<void>(out), out_dtype, n, k, term_of(a), term_of(b), scale, vectorized};
    check(gk::dequantize(call, at<CUstream_st>(stream)), "dequantize");
}

void small_m(int device, uintptr_t stream, bool gemv, const CodesArgs& codes, std::pair<uintptr_t, int64_t> x, int x_dtype,
             std::tuple<uintptr_t, int64_t, int64_t> y, std::tuple<int, int, int> sizes, const VectorArgs& a, const VectorArgs& b,
             const VectorArgs& bias, const VectorArgs& wc, const VectorArgs& d, const VectorArgs& e, const MatrixArgs& b_up,
             const MatrixArgs& b_down, int rank, float scale, uintptr_t h, uintptr_t sigma, bool has_sigma, uintptr_t barrier,
             uintptr_t scratch, int slices, int warps_k, bool x_staged, int blocks, int shared_bytes) {
    use_device(device);
    gk::SmallM call{};
    call.codes = codes_of(codes);
    call.x = at<const void>(x.first), call.stride_x = x.second, call.x_dtype = x_dtype;
    call.y = at<void>(std::get<0>(y)), call.stride_y = std::get<1>(y), call.stride_y_col = std::get<2>(y);
    std::tie(call.m, call.n, call.k) = sizes;
    call.a = vector_of(a), call.b = vector_of(b), call.bias = vector_of(bias);
    call.wc = vector_of(wc), call.d = vector_of(d), call.e = vector_of(e);
    call.b_up = matrix_of(b_up), call.b_down = matrix_of(b_down);
    call.rank = rank, call.scale = scale;
    call.h = at<void>(h), call.sigma = at<float>(sigma), call.has_sigma = has_sigma;
    call.barrier = at<gk::Barrier>(barrier), call.scratch = at<float>(scratch), call.slices = slices;
    call.warps_k = warps_k, call.x_staged = x_staged, call.blocks = blocks, call.shared_bytes = shared_bytes;
    check(gemv ? gk::small_m_gemv(call, at<CUstream_st>(stream)) : gk::small_m_mma(call, at<CUstream_st>(stream)), "small_m");
}

// The decode of `total` elements on host buffers, into fp32, fp16 or bf16.
void decode_host(const CodesArgs& args, uintptr_t out, int out_dtype, int64_t total) {
    const gk::Codes codes = codes_of(args);
    for (int64_t i = 0; i < total; ++i) {
        const float w = gk::decode(codes, i);
        if (out_dtype == gk::kFloat32)
            at<float>(out)[i] = w;
        else if (out_dtype == gk::kFloat16)
            at<uint16_t>(out)[i] = gk::fp16_bits(w);
        else
            at<uint16_t>(out)[i] = gk::bf16_bits(w);
    }
}

// The codes and absmax of `total` fp32 values on host buffers.
void encode_host(uintptr_t values, int64_t total, int log2_block, bool is_fp4, uintptr_t packed, uintptr_t absmax) {
    gk::encode(at<const float>(values), total, log2_block, is_fp4, at<uint8_t>(packed), at<float>(absmax));
}

// The dithered rounding of a (rows, cols) fp32 matrix on host buffers.
void round_dithered_host(uintptr_t values, uintptr_t out, int out_dtype, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows * cols; ++i) {
        const float value = at<const float>(values)[i];
        if (out_dtype == gk::kFloat16)
            gk::round_dithered(value, i / cols, i % cols, at<gk::Half>(out)[i]);
        else
            gk::round_dithered(value, i / cols, i % cols, at<gk::BFloat16>(out)[i]);
    }
}

py::dict build_info() {
    py::dict info;
    info["archs"] = GK_ARCHS;
    info["nvcc"] = GK_NVCC;
    return info;
}

// (CUDA version the driver serves, 0 without a driver; CUDA version of the runtime within). Makes no context.
std::pair<int, int> versions() {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    return {driver, runtime};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of the 4-bit base, by raw pointer; glora_kernels.four_bit.cuda checks and calls them.";
    module.def("build_info", &build_info, "The architectures of the machine code and the version of nvcc.");
    module.def("versions", &versions, "CUDA versions of the driver (0 without one) and of the runtime in the module.");
    // Without the GIL: a launch blocks where the queue of the card is full.
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    module.def("dequantize", &dequantize, Unlocked(), py::arg("device"), py::arg("stream"), py::arg("codes"), py::arg("out"),
               py::arg("out_dtype"), py::arg("n"), py::arg("k"), py::arg("a"), py::arg("b"), py::arg("scale"),
               py::arg("vectorized"));
    module.def("small_m", &small_m, Unlocked(), py::arg("device"), py::arg("stream"), py::arg("gemv"), py::arg("codes"), py::arg("x"),
               py::arg("x_dtype"), py::arg("y"), py::arg("sizes"), py::arg("a"), py::arg("b"), py::arg("bias"), py::arg("wc"),
               py::arg("d"), py::arg("e"), py::arg("b_up"), py::arg("b_down"), py::arg("rank"), py::arg("scale"),
               py::arg("h"), py::arg("sigma"), py::arg("has_sigma"), py::arg("barrier"), py::arg("scratch"),
               py::arg("slices"), py::arg("warps_k"), py::arg("x_staged"), py::arg("blocks"), py::arg("shared_bytes"));
    module.def("decode_host", &decode_host, py::arg("codes"), py::arg("out"), py::arg("out_dtype"), py::arg("total"));
    module.def("encode_host", &encode_host, py::arg("values"), py::arg("total"), py::arg("log2_block"), py::arg("is_fp4"),
               py::arg("packed"), py::arg("absmax"));
    module.def("round_dithered_host", &round_dithered_host, py::arg("values"), py::arg("out"), py::arg("out_dtype"),
               py::arg("rows"), py::arg("cols"));
}
