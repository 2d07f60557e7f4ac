// The epilogues of csrc/cutlass for tests: each on arrays of float32 values, a value at a time.
#include <array>
#include <cstdint>

#include "epilogue.h"

using Value = std::array<float, 1>;

// in: acc, bias; of FOLD acc, mean, rstd, sum, bias; of RESIDUAL acc, bias, gamma, residual.
extern "C" int emulated_epilogue(int64_t name, int64_t activation, int64_t count, const float* const* in, float* out) {
    vf::Activation how;
    if (!vf::find_activation(how, static_cast<int>(activation))) return 0;
    for (int64_t i = 0; i < count; i++) {
        const auto at = [&](int which) { return Value{in[which][i]}; };
        Value value;
        if (name == 0) value = vf::activation_epilogue<1>(at(0), at(1), how);
        else if (name == 1) value = vf::fold_epilogue<1>(at(0), at(1), at(2), at(3), at(4), how);
        else value = vf::residual_epilogue<1>(at(0), at(1), at(2), at(3));
        out[i] = value[0];
    }
    return 1;
}
