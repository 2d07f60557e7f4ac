// The epilogues of epilogue.h as CUTLASS's visitor trees take them: functors of arrays, those of an activation with an
// argument. Sm90Compute and VisitorCompute<Functor, …> give each input as an array of float32.
#pragma once

#include "cutlass/array.h"
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

}  // namespace vf
