// The visitor trees of csrc/cutlass/linear_sm90.cu on the host: CUTLASS's own visitors, thread by thread, with the sums of a
// product given. visitors.h is the part of that file from its types to its trees (support/cuda_emulator.py cuts it).
// TMA, which brings the residual and takes the result, is left out: both are read and written where the sums belong.
#include "cute/tensor.hpp"

#include "cute/arch/mma_sm90.hpp"
#include "cute/atom/copy_atom.hpp"
#include "cute/atom/mma_atom.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/functional.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/gemm.h"
#include "cutlass/numeric_conversion.h"
#include "cutlass/workspace.h"

// After the above, whose declarations they take for granted.
#include "cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"

namespace cutlass::epilogue::fusion {
template <class Node, class... Children> using Sm90EVT = Sm90TreeVisitor<Node, Children...>;  // as CUTLASS has it
}
namespace cutlass::epilogue::collective {}

#include "functors.h"
#include "linear.h"
#include "visitors.h"

namespace vf {
namespace {

constexpr int FRAGMENT = 16;  // sums of a call of visit

// As the epilogue of a kernel calls the visitors (CUTLASS's sm90_epilogue_tma_warpspecialized.hpp, store). EpilogueTile is
// what its builder chooses for the tile.
template <int WARP_GROUPS, class Tile, class EpilogueTile, class Kind> void visit(const LinearParams& p, const float* product) {
    using Tree = typename Kind::template Tree<Tile>;
    using Atom = decltype(SM90::GMMA::ss_op_selector<Element, Element, float, Tile, SM90::GMMA::Major::K, SM90::GMMA::Major::K>());
    const auto mma = make_tiled_mma(Atom{}, Layout<Shape<Int<WARP_GROUPS>, _1, _1>>{});
    const auto by_mma = make_tiled_copy_C_atom(Copy_Atom<SM90_U32x4_STSM_N, cutlass::half_t>{}, mma);
    const auto to_shared = make_tiled_copy_S(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, by_mma);
    const auto problem = cute::make_tuple(p.rows, p.features, 64, 1);
    const auto extent = make_coord(p.rows, p.features);
    const auto params = Tree::to_underlying_arguments(problem, Kind::template arguments<Tile>(p), nullptr);
    const int tiles_m = ceil_div(p.rows, size<0>(Tile{})), tiles_n = ceil_div(p.features, size<1>(Tile{}));
    for (int tile = 0; tile < tiles_m * tiles_n; tile++) {
        typename Tree::SharedStorage shared;
        Tree tree(params, shared);
        const auto here = make_coord(tile / tiles_n, tile % tiles_n);
        const auto with_callbacks = [&](int thread, auto&& run) {
            auto coordinates = local_tile(make_identity_tensor(make_shape(p.rows, p.features)), take<0, 2>(Tile{}), here);
            auto own = to_shared.get_slice(thread).partition_S(flat_divide(coordinates, EpilogueTile{}));
            auto residual = make_tensor<Element>(make_layout(take<0, 3>(shape(own))));
            const fusion::detail::ConsumerStoreArgs arguments(
                problem, Tile{}, make_coord(get<0>(here), get<1>(here), _, 0), mma, EpilogueTile{}, to_shared,
                make_coord_tensor(coordinates.layout()), extent - coordinates(_0{}), make_coord_tensor(own.layout()),
                extent - own(_0{}), residual, thread);
            auto callbacks = tree.template get_consumer_store_callbacks<true>(arguments);
            callbacks.begin();
            run(callbacks, own, residual);
        };
        // What begin() puts into shared memory is of all threads, before the first of them reads it.
        for (int thread = 0; thread < 128 * WARP_GROUPS; thread++) with_callbacks(thread, [](auto&, auto&, auto&) {});
        for (int thread = 0; thread < 128 * WARP_GROUPS; thread++) {
            with_callbacks(thread, [&](auto& callbacks, auto& own, auto& residual) {
                for (int i = 0; i < size<3>(own) * size<4>(own); i++) {
                    const int epi_m = i % size<3>(own), epi_n = i / size<3>(own);
                    const auto at = own(_, _, _, epi_m, epi_n);
                    const auto inside = [&](int j) { return elem_less(at(j), extent); };
                    const auto offset = [&](int j, int64_t stride) { return get<0>(at(j)) * stride + get<1>(at(j)); };
                    callbacks.begin_loop(epi_m, epi_n);
                    for (int j = 0; p.residual && j < size(at); j++)
                        if (inside(j)) residual(j) = static_cast<const Element*>(p.residual)[offset(j, p.residual_stride)];
                    callbacks.previsit(epi_m, epi_n, 0, false);
                    for (int v = 0; v < size(at) / FRAGMENT; v++) {
                        cutlass::Array<float, FRAGMENT> acc;
                        for (int j = 0; j < FRAGMENT; j++) {
                            const int e = v * FRAGMENT + j;
                            acc[j] = inside(e) ? product[offset(e, p.features)] : 0.0f;
                        }
                        const auto result = callbacks.visit(acc, v, epi_m, epi_n);
                        for (int j = 0; j < FRAGMENT; j++) {
                            const int e = v * FRAGMENT + j;
                            if (inside(e)) static_cast<Element*>(p.out)[offset(e, p.features)] = result[j];
                        }
                    }
                    callbacks.end_loop(epi_m, epi_n);
                }
                callbacks.end();
            });
        }
    }
}

template <class Kind> void visit(const LinearParams& p, const float* product, bool cooperative) {
    using Tile = std::conditional_t<std::is_same_v<Kind, ActivationTree>, Shape<_128, _256, _64>, Shape<_256, _128, _64>>;
    if (cooperative) visit<2, Tile, Shape<_128, _32>, Kind>(p, product);
    else visit<1, Shape<_128, _128, _64>, Shape<_64, _32>, Kind>(p, product);
}

}  // namespace
}  // namespace vf

extern "C" int emulated_visitors_sm90(
    void* out, const float* product, const float* bias, const float* gamma, const void* residual, const float* mean,
    const float* rstd, const float* sums, int64_t rows, int64_t features, int64_t residual_stride, int64_t activation,
    int64_t cooperative) {
    vf::LinearParams p = {};
    p.out = out, p.bias = bias, p.gamma = gamma, p.residual = residual, p.residual_stride = residual_stride;
    p.mean = mean, p.rstd = rstd, p.sums = sums;
    p.rows = static_cast<int>(rows), p.features = static_cast<int>(features);
    if (!vf::find_activation(p.activation, static_cast<int>(activation))) return 0;
    if (residual) vf::visit<vf::ResidualTree>(p, product, cooperative);
    else if (mean) vf::visit<vf::FoldTree>(p, product, cooperative);
    else vf::visit<vf::ActivationTree>(p, product, cooperative);
    return 1;
}
