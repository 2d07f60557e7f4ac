// csrc/cutlass for tests, without CUTLASS and without CUDA: its torch operator for CPU tensors, and in the place of each
// kernel of linear.h the same product as a loop on the host, whose sums pass through the epilogues of epilogue.h.
#include "operators.cu"

#include <array>

extern "C" {
int emulated_capability = 90;
void set_emulated_capability(int capability) { emulated_capability = capability; }
}

namespace {

constexpr int N = 8;
using Vector = std::array<float, N>;

Vector load(const float* from, float otherwise) {
    Vector v;
    for (int i = 0; i < N; i++) v[i] = from ? from[i] : otherwise;
    return v;
}
Vector repeat(float value) {
    Vector v;
    v.fill(value);
    return v;
}
template <class V> V advance(V from, int64_t by) { return from ? from + by : from; }

template <class T, int EPILOGUE> const char* run(const LinearParams& p) {
    for (int64_t row = 0; row < p.rows; row++) {
        const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
        for (int64_t column = 0; column < p.features; column += N) {
            Vector acc = repeat(0.0f);
            for (int j = 0; j < N; j++) {
                const T* weight = static_cast<const T*>(p.weight) + (column + j) * p.size;
                for (int k = 0; k < p.size; k++) acc[j] += to_float(x[k]) * to_float(weight[k]);
            }
            const Vector bias = load(advance(p.bias, column), 0.0f);
            if constexpr (EPILOGUE == ACTIVATION) {
                acc = activation_epilogue<N>(acc, bias, p.activation);
            } else if constexpr (EPILOGUE == FOLD) {
                acc = fold_epilogue<N>(acc, repeat(p.mean[row]), repeat(p.rstd[row]), load(p.sums + column, 0.0f), bias, p.activation);
            } else {
                Vector residual;
                const T* from = static_cast<const T*>(p.residual) + row * p.residual_stride + column;
                for (int j = 0; j < N; j++) residual[j] = to_float(from[j]);
                acc = residual_epilogue<N>(acc, bias, load(advance(p.gamma, column), 1.0f), residual);
            }
            T* out = static_cast<T*>(p.out) + row * p.features + column;
            for (int j = 0; j < N; j++) out[j] = from_float<T>(acc[j]);
        }
    }
    return nullptr;
}

}  // namespace

namespace vf {
#define VF_DEFINE(name, family, epilogue, dtype, first, last) \
    const char* name(const LinearParams& p) { return run<std::conditional_t<dtype == FLOAT16, fp16, bf16>, epilogue>(p); }
VF_LINEAR_KERNELS(VF_DEFINE)
}  // namespace vf
