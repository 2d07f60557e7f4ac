// The products of linear.h for sm_75 (float16) and for sm_80 and newer (bfloat16, float16): CUTLASS 2 multistage kernels.
//
// Tiles of 128 × 128, K in steps of 32, four warps of 64 × 64. sm_80: mma.m16n8k16, four stages by cp.async; sm_75:
// mma.m16n8k8, two stages. The epilogue is a visitor tree over the sums, which pass through shared memory to be stored in
// pieces of 16 bytes: bias and gamma are rows of float32, the residual is read in the same pieces.
// A compile makes one kernel: VF_KERNEL is its name, VF_ARCH, VF_TREE and VF_ELEMENT what it is made of (csrc/build.py).
// Not measured, never run. Source: CUTLASS 4.2, example 47.
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"

// After the above, whose declarations it takes for granted.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"
#include "functors.h"
#include "linear.h"

namespace vf {
namespace {

using namespace cute;
namespace visitor = cutlass::epilogue::threadblock;

using Element = VF_ELEMENT;
constexpr auto ROUND = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int ALIGNMENT = 16 / sizeof(Element), EPILOGUE_STAGES = 1;

struct Sm75 {
    using Tag = cutlass::arch::Sm75;
    using Instruction = cutlass::gemm::GemmShape<16, 8, 8>;
    static constexpr int STAGES = 2, SHARED = 64 * 1024;
};
struct Sm80 {
    using Tag = cutlass::arch::Sm80;
    using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
    static constexpr int STAGES = 4, SHARED = 99 * 1024;  // of sm_86, the least
};

using Block = cutlass::gemm::GemmShape<128, 128, 32>;
using Warp = cutlass::gemm::GemmShape<64, 64, 32>;
using Threads = visitor::OutputTileThreadLayout<Block, Warp, Element, ALIGNMENT, EPILOGUE_STAGES>;
using Row = visitor::VisitorRowBroadcast<Threads, float, Stride<_0, _1, int64_t>>;
using Matrix = Stride<int64_t, _1, int64_t>;
using Store = visitor::VisitorAuxStore<Threads, Element, ROUND, Matrix>;
using Sum = visitor::VisitorAccFetch;

// VisitorCompute with an activation, which that of CUTLASS 2 cannot take.
struct ComputeActivation {
    using Arguments = Activation;
    using Params = Activation;
    struct SharedStorage {};
    template <class Problem> static constexpr Params to_underlying_arguments(Problem const&, Arguments const& how, void*) {
        return how;
    }
    template <class Problem> static size_t get_workspace_size(Problem const&, Arguments const&) { return 0; }

    CUTLASS_HOST_DEVICE ComputeActivation() {}
    CUTLASS_HOST_DEVICE ComputeActivation(Params const& how, SharedStorage const&) : params(&how) {}
    Params const* params = nullptr;

    struct Callbacks : visitor::EmptyCallbacks {
        Params const* params;
        CUTLASS_DEVICE explicit Callbacks(Params const* how) : params(how) {}
        template <int N>
        CUTLASS_DEVICE cutlass::Array<float, N> visit(int, int, int, int, cutlass::Array<float, N> const&,
                                                      cutlass::Array<float, N> const& acc, cutlass::Array<float, N> const& bias) {
            return ActivationFunctor<cutlass::Array<float, N>>{}(acc, bias, *params);
        }
    };
    template <class Problem> CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord, int, Problem) { return Callbacks(params); }
};

struct ActivationTree {
    using Tree = visitor::Sm80EVT<Store, visitor::Sm80EVT<ComputeActivation, Sum, Row>>;
    static typename Tree::Arguments arguments(const LinearParams& p) {
        return {{{}, {p.bias, 0.0f, {}}, p.activation}, {static_cast<Element*>(p.out), {p.features, _1{}, 0}}};
    }
};
struct ResidualTree {
    using Residual = visitor::VisitorAuxLoad<Threads, Element, Matrix>;
    using Compute = visitor::VisitorCompute<ResidualFunctor, float, float, ROUND>;
    using Tree = visitor::Sm80EVT<Store, visitor::Sm80EVT<Compute, Sum, Row, Row, Residual>>;
    static typename Tree::Arguments arguments(const LinearParams& p) {
        auto* residual = static_cast<Element*>(const_cast<void*>(p.residual));
        return {{{}, {p.bias, 0.0f, {}}, {p.gamma, 1.0f, {}}, {residual, Element(0), {p.residual_stride, _1{}, 0}}, {}},
                {static_cast<Element*>(p.out), {p.features, _1{}, 0}}};
    }
};

template <class Arch, class Kind> struct Product {
    static constexpr auto NONE = cutlass::ComplexTransform::kNone;
    using RowMajor = cutlass::layout::RowMajor;
    using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
        Element, RowMajor, NONE, ALIGNMENT, Element, cutlass::layout::ColumnMajor, NONE, ALIGNMENT, Element, RowMajor,
        ALIGNMENT, float, float, cutlass::arch::OpClassTensorOp, typename Arch::Tag, Block, Warp, typename Arch::Instruction,
        typename Kind::Tree, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, Arch::STAGES,
        cutlass::arch::OpMultiplyAdd, EPILOGUE_STAGES>::GemmKernel;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    static constexpr int SHARED = sizeof(typename Kernel::SharedStorage);
    static_assert(SHARED <= Arch::SHARED, "more shared memory than a block may have");

    static const char* run(const LinearParams& p) {
        const typename Gemm::Arguments arguments(
            cutlass::gemm::GemmUniversalMode::kGemm, {p.rows, p.features, p.size}, 1, Kind::arguments(p), p.x, p.weight,
            nullptr, nullptr, 0, 0, 0, 0, p.x_stride, p.size, 0, 0);
        return launch<Gemm>(arguments, p.stream);
    }
};

using Chosen = Product<VF_ARCH, VF_TREE>;

}  // namespace

const char* VF_KERNEL(const LinearParams& p) { return Chosen::run(p); }

}  // namespace vf

#ifdef VF_LEDGER
extern "C" __device__ int vf_dynamic_shared = vf::Chosen::SHARED;
#endif
