// The entries of the epilogue kernels for tests.
#include "epilogue.cu"

extern "C" int emulated_activation(void* out, const void* z, int64_t count, int64_t width, int64_t activation, int64_t type) {
    const vf::ActivationParams p = {out, z, count, static_cast<int>(width)};
    return vf::activation(p, static_cast<int>(activation), static_cast<int>(type), nullptr);
}

extern "C" int emulated_residual(void* out, const void* x, const void* residual, const void* gamma, const void* row_scale,
                                 int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t rows_per_image,
                                 int64_t x_type, int64_t residual_type, int64_t gamma_wide, int64_t scale_wide) {
    vf::ResidualParams p = {};
    p.out = out, p.x = x, p.residual = residual, p.gamma = gamma, p.row_scale = row_scale;
    if (!vf::find_rows(p.residual_rows, sizes, strides, dim)) return 0;
    p.count = 1, p.width = static_cast<int>(sizes[dim - 1]), p.rows_per_image = rows_per_image;
    for (int64_t i = 0; i < dim; i++) p.count *= sizes[i];
    p.gamma_wide = gamma_wide, p.scale_wide = scale_wide;
    return vf::residual(p, static_cast<int>(x_type), static_cast<int>(residual_type), nullptr);
}
