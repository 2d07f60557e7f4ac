// The entry of the LayerNorm kernels for tests.
#include "layer_norm.cu"

extern "C" int emulated_layer_norm(void* y, void* mean, void* rstd, const void* x, const void* weight, const void* bias,
                                   int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t x_type,
                                   int64_t param_type, int64_t y_type, double eps, int64_t rms) {
    vf::Rows rows;
    if (!vf::find_rows(rows, sizes, strides, dim)) return 0;
    int64_t count = 1;
    for (int64_t i = 0; i < dim - 1; i++) count *= sizes[i];
    const vf::LayerNormParams p = {
        y, static_cast<float*>(mean), static_cast<float*>(rstd), x, weight, bias, rows, count,
        static_cast<int>(sizes[dim - 1]), static_cast<float>(eps), rms != 0};
    return vf::layer_norm(p, static_cast<int>(x_type), static_cast<int>(param_type), static_cast<int>(y_type), nullptr);
}
