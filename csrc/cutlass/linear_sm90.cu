// The products of linear.h for sm_90a in bfloat16: CUTLASS 3 kernels, TMA and wgmma, specialised warps, persistent.
//
//   pingpong      tiles of 128 × 128, K in steps of 64: one warp group multiplies while the other runs its epilogue
//   cooperative   128 × 256 (activation) or 256 × 128 (fold, residual), two warp groups on one tile, clusters of two
//                 multiprocessors along M that share the tile of the weight
// The epilogue is a visitor tree over the sums in registers: bias, gamma and sums are rows of float32, mean and rstd
// columns, the residual comes and the result goes by TMA. Shared memory decides the number of stages.
// A compile makes one kernel: VF_KERNEL is its name, VF_SCHEDULE, VF_TREE and VF_TILE what it is made of (csrc/build.py).
// Not measured, never run. Source: CUTLASS 4.2, "49_hopper_gemm_with_collective_builder"; kernels.md of CUTLASS for the tiles.
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "functors.h"
#include "linear.h"

namespace vf {
namespace {

using namespace cute;
namespace collective = cutlass::epilogue::collective;
namespace fusion = cutlass::epilogue::fusion;

using Element = cutlass::bfloat16_t;
constexpr auto ROUND = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int ALIGNMENT = 16 / sizeof(Element);

struct Pingpong {
    using Cluster = Shape<_1, _1, _1>;
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
    using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};
struct Cooperative {
    using Cluster = Shape<_2, _1, _1>;
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
    using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

template <class Tile> using Row = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>>;
template <class Tile> using Column = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<_1, _0, _0>>;
template <template <class> class Functor> using Compute = fusion::Sm90Compute<Functor, Element, float, ROUND>;
using Sum = fusion::Sm90AccFetch;

struct ActivationTree {
    using Source = void;
    template <class Tile> using Tree = fusion::Sm90EVT<Compute<ActivationFunctor>, Sum, Row<Tile>>;
    template <class Tile> static typename Tree<Tile>::Arguments arguments(const LinearParams& p) {
        return {{}, {p.bias, 0.0f, {}}, p.activation};
    }
};
struct FoldTree {
    using Source = void;
    template <class Tile>
    using Tree = fusion::Sm90EVT<Compute<FoldFunctor>, Sum, Column<Tile>, Column<Tile>, Row<Tile>, Row<Tile>>;
    template <class Tile> static typename Tree<Tile>::Arguments arguments(const LinearParams& p) {
        return {{}, {p.mean, 0.0f, {}}, {p.rstd, 0.0f, {}}, {p.sums, 0.0f, {}}, {p.bias, 0.0f, {}}, p.activation};
    }
};
struct ResidualTree {
    using Source = Element;
    template <class Tile>
    using Tree = fusion::Sm90EVT<Compute<ResidualFunctor>, Sum, Row<Tile>, Row<Tile>, fusion::Sm90SrcFetch<Element>>;
    template <class Tile> static typename Tree<Tile>::Arguments arguments(const LinearParams& p) {
        return {{}, {p.bias, 0.0f, {}}, {p.gamma, 1.0f, {}}, {}, {}};
    }
};

template <class Schedule, class Kind, class Tile> struct Product {
    using RowMajor = cutlass::layout::RowMajor;
    using Epilogue = typename collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, typename Schedule::Cluster,
        collective::EpilogueTileAuto, float, float, typename Kind::Source, RowMajor, ALIGNMENT, Element, RowMajor, ALIGNMENT,
        typename Schedule::Epilogue, typename Kind::template Tree<Tile>>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, ALIGNMENT, Element,
        cutlass::layout::ColumnMajor, ALIGNMENT, float, Tile, typename Schedule::Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        typename Schedule::Mainloop>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    static_assert(Kernel::SharedStorageSize <= 232448, "more shared memory than a block may have");

    static const char* run(const LinearParams& p) {
        typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm, {p.rows, p.features, p.size, 1}};
        arguments.mainloop = {static_cast<const Element*>(p.x), {p.x_stride, _1{}, 0},
                              static_cast<const Element*>(p.weight), {p.size, _1{}, 0}};
        arguments.epilogue.thread = Kind::template arguments<Tile>(p);
        if constexpr (!std::is_void_v<typename Kind::Source>) {
            arguments.epilogue.ptr_C = static_cast<const Element*>(p.residual);
            arguments.epilogue.dC = {p.residual_stride, _1{}, 0};
        }
        arguments.epilogue.ptr_D = static_cast<Element*>(p.out);
        arguments.epilogue.dD = {p.features, _1{}, 0};
        arguments.hw_info.sm_count = p.multiprocessors;
        arguments.scheduler.max_swizzle_size = p.swizzle;
        return launch<Gemm>(arguments, p.stream);
    }
};

using Square = Shape<_128, _128, _64>;
using Wide = Shape<_128, _256, _64>;
using Tall = Shape<_256, _128, _64>;
using Chosen = Product<VF_SCHEDULE, VF_TREE, VF_TILE>;

}  // namespace

const char* VF_KERNEL(const LinearParams& p) { return Chosen::run(p); }

}  // namespace vf

#ifdef VF_LEDGER
extern "C" __device__ int vf_dynamic_shared = vf::Chosen::Kernel::SharedStorageSize;
#endif
