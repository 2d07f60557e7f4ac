// The torch operator of the products by CUTLASS: checks, the kernel of the table in linear.h, the launch.
//
//   linear   out = act(x · weightᵀ + bias); with mean, rstd and sums, of a LayerNorm folded into weight and bias; or, with a
//            residual, residual + gamma · (x · weightᵀ + bias)
// x and residual [..., C] with rows at one stride, out contiguous, weight [N, K] contiguous, all of one 16-bit dtype; the
// vectors float32 and contiguous. Limits: LinearParams.
// The kernel is named by the caller (vit_fast/backends/cutlass.py); epilogue, dtype and device choose among its forms.
#include "linear.h"
#include "../cuda/operators.h"

#ifdef VF_EMULATED
extern "C" int emulated_capability;
#endif

namespace {

using namespace vf;

// 10 · major + minor of the capability, and the number of multiprocessors.
struct Device {
    int capability, multiprocessors;
};

#ifdef VF_EMULATED
Device device_of(const Tensor&) { return {emulated_capability, 4}; }
#else
Device device_of(const Tensor& x) {
    const auto attribute = [&](cudaDeviceAttr which) {
        int value = 0;
        STD_TORCH_CHECK(cudaDeviceGetAttribute(&value, which, x.get_device_index()) == cudaSuccess,
                        "vit_fast_cutlass::linear: the device does not answer");
        return value;
    };
    return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
            attribute(cudaDevAttrMultiProcessorCount)};
}
#endif

LinearKernel find_kernel(int64_t family, int epilogue, int type, int capability) {
#define VF_FIND(name, family_, epilogue_, type_, first, last)                              \
    if (family == family_ && epilogue == epilogue_ && type == type_ && first <= capability && capability <= last) return name;
    VF_LINEAR_KERNELS(VF_FIND)
#undef VF_FIND
    return nullptr;
}

void check(bool right, const char* what) { STD_TORCH_CHECK(right, "vit_fast_cutlass::linear: ", what); }

// The stride of the rows of x [rows, width]; one row has none that counts.
int64_t row_stride(const Tensor& x, int64_t rows, int64_t width) {
    const Rows found = rows_of(x);
    check(rows == 1 || found.inner >= rows, "rows at more than one stride");
    const int64_t stride = rows == 1 ? width : found.stride_inner;
    check(stride >= width && rows_aligned(data(x), {1, 0, stride}, 2), "rows are not aligned");
    return stride;
}

const float* vector(const MaybeTensor& v, int64_t length, const char* what) {
    if (!v) return nullptr;
    check(type_of(v) == FLOAT32 && v->is_contiguous() && v->numel() == length && rows_aligned(data(v), {}, 4), what);
    return data<float>(v);
}

void linear(Tensor out, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor gamma, MaybeTensor residual, MaybeTensor mean,
            MaybeTensor rstd, MaybeTensor sums, int64_t activation, int64_t family, int64_t swizzle) {
    check(weight.dim() == 2 && weight.is_contiguous() && out.is_contiguous(), "weight or out is not contiguous");
    LinearParams p = {};
    const int64_t features = weight.size(0), size = weight.size(1);
    check(features > 0 && size > 0 && features % 8 == 0 && size % 8 == 0 && x.size(x.dim() - 1) == size, "sizes");
    const int64_t rows = x.numel() / size;
    check(0 < rows && rows < int64_t{1} << 31 && features < int64_t{1} << 31 && size < int64_t{1} << 31 &&
              out.numel() == rows * features && out.size(out.dim() - 1) == features,
          "sizes");
    const int type = type_of(x);
    check(type_of(weight) == type && type_of(out) == type && (!residual || type_of(residual) == type), "dtypes");
    check(rows_aligned(data(weight), {}, 2) && rows_aligned(data(out), {}, 2), "weight or out is not aligned");
    p.out = data(out), p.x = data(x), p.weight = data(weight);
    p.rows = static_cast<int>(rows), p.features = static_cast<int>(features), p.size = static_cast<int>(size);
    p.x_stride = row_stride(x, rows, size);
    p.bias = vector(bias, features, "bias"), p.gamma = vector(gamma, features, "gamma");
    p.mean = vector(mean, rows, "mean"), p.rstd = vector(rstd, rows, "rstd"), p.sums = vector(sums, features, "sums");
    const int epilogue = residual ? RESIDUAL : mean ? FOLD : ACTIVATION;
    check(!mean == !rstd && !mean == !sums && !(mean && residual) && (residual || !gamma), "options that exclude each other");
    if (residual) {
        check(residual->numel() == rows * features && residual->size(residual->dim() - 1) == features, "residual");
        p.residual = data(residual), p.residual_stride = row_stride(*residual, rows, features);
    }
    check(find_activation(p.activation, static_cast<int>(activation)) && (!residual || activation == NONE), "activation");
    check(swizzle == 1 || swizzle == 2 || swizzle == 4 || swizzle == 8, "swizzle");
    p.swizzle = static_cast<int>(swizzle);
    const Device properties = device_of(x);
    const LinearKernel kernel = find_kernel(family, epilogue, type, properties.capability);
    check(kernel, "there is no such kernel for the device");
    const OnDevice device(x);
    p.multiprocessors = properties.multiprocessors, p.stream = device.stream;
    const char* error = kernel(p);
    STD_TORCH_CHECK(!error, "vit_fast_cutlass::linear: ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cutlass, VF_DISPATCH_KEY, m) { m.impl("linear", TORCH_BOX(&linear)); }
