// What the CUTLASS kernels of this folder share: the epilogues of epilogue.h as visitor trees take them, functors of arrays
// of float32, those of an activation with an argument; and the launch.
#pragma once

#include "cutlass/array.h"
#include "cutlass/cutlass.h"
#include "epilogue.h"

namespace vf {

template <class F> struct ActivationFunctor {
    using Arguments = Activation;
    CUTLASS_DEVICE F operator()(F const& acc, F const& bias, Activation const& how) const {
        return activation_epilogue<F::kElements>(acc, bias, how);
    }
};

template <class F> struct FoldFunctor {
    using Arguments = Activation;
    CUTLASS_DEVICE F operator()(
        F const& acc, F const& mean, F const& rstd, F const& sum, F const& bias, Activation const& how) const {
        return fold_epilogue<F::kElements>(acc, mean, rstd, sum, bias, how);
    }
};

template <class F> struct ResidualFunctor {
    CUTLASS_DEVICE F operator()(F const& acc, F const& bias, F const& gamma, F const& residual) const {
        return residual_epilogue<F::kElements>(acc, bias, gamma, residual);
    }
};

// Null, or what CUTLASS says.
template <class Gemm> const char* launch(const typename Gemm::Arguments& arguments, void* stream) {
    if (Gemm::get_workspace_size(arguments)) return "the kernel asks for a workspace";
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(arguments);
    if (status == cutlass::Status::kSuccess) status = gemm(arguments, nullptr, static_cast<cudaStream_t>(stream));
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
}

}  // namespace vf
