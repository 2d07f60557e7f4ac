// The visitor trees of csrc/cutlass/linear_sm80.cu on the host: CUTLASS's own visitors, thread by thread, with the sums of a
// product given. visitors.h is the part of that file from its types to its trees (support/cuda_emulator.py cuts it).
#include "cute/tensor.hpp"
#include "cutlass/epilogue/threadblock/default_thread_map_tensor_op.h"
#include "cutlass/functional.h"
#include "cutlass/gemm/gemm.h"
#include "cutlass/numeric_conversion.h"
#include "cutlass/workspace.h"

// After the above, whose declarations it takes for granted.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"
#include "functors.h"
#include "linear.h"
#include "visitors.h"

namespace vf {
namespace {

// As the epilogue of a kernel calls the visitors. Thread, step, row and column name the elements of a tile that a call of
// visit has; Threads::partition tells which those are.
template <class Kind> void visit(const LinearParams& p, const float* product) {
    using Tree = typename Kind::Tree;
    const cute::tuple<int, int, int> problem{p.rows, p.features, 1};
    const auto params = Tree::to_underlying_arguments(problem, Kind::arguments(p), nullptr);
    typename Tree::SharedStorage shared;
    const int tiles_m = (p.rows + Block::kM - 1) / Block::kM, tiles_n = (p.features + Block::kN - 1) / Block::kN;
    for (int i = 0; i < tiles_m * tiles_n * Threads::kThreads; i++) {
        const int thread = i % Threads::kThreads, tile_index = i / Threads::kThreads;
        const cutlass::gemm::GemmCoord tile(tile_index / tiles_n, tile_index % tiles_n, 0);
        Tree tree(params, shared);
        auto callbacks = tree.get_callbacks(tile, thread, problem);
        const auto elements = group_modes<3, 6>(Threads::partition(make_identity_tensor(problem), thread, tile));
        callbacks.begin_epilogue();
        for (int step = 0; step < size<3>(elements); step++) {
            callbacks.begin_step(step);
            for (int row = 0; row < size<2>(elements); row++) {
                callbacks.begin_row(row);
                for (int column = 0; column < size<1>(elements); column++) {
                    cutlass::Array<float, ALIGNMENT> acc;
                    for (int v = 0; v < ALIGNMENT; v++) {
                        const auto at = elements(v, column, row, step);
                        const int m = get<0>(at), n = get<1>(at);
                        acc[v] = m < p.rows && n < p.features ? product[static_cast<int64_t>(m) * p.features + n] : 0.0f;
                    }
                    callbacks.visit(step, row, column, row * size<1>(elements) + column, acc);
                }
                callbacks.end_row(row);
            }
            callbacks.end_step(step);
        }
        callbacks.end_epilogue();
    }
}

}  // namespace
}  // namespace vf

extern "C" int emulated_visitors(void* out, const float* product, const float* bias, const float* gamma, const void* residual,
                                 int64_t rows, int64_t features, int64_t residual_stride, int64_t activation) {
    vf::LinearParams p = {};
    p.out = out, p.bias = bias, p.gamma = gamma, p.residual = residual, p.residual_stride = residual_stride;
    p.rows = static_cast<int>(rows), p.features = static_cast<int>(features);
    if (!vf::find_activation(p.activation, static_cast<int>(activation))) return 0;
    if (residual) vf::visit<vf::ResidualTree>(p, product);
    else vf::visit<vf::ActivationTree>(p, product);
    return 1;
}
