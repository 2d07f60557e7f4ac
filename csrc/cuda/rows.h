// Where the rows of a tensor [..., C] begin, on the host and in kernels.
#pragma once

#include "device.h"

namespace vf {

// Row r begins at (r / inner) · stride_outer + (r % inner) · stride_inner, in elements. `inner` is the number of rows
// where one stride is enough.
struct Rows {
    int64_t inner, stride_outer, stride_inner;
    __device__ __forceinline__ int64_t offset(int64_t row) const {
        const int64_t outer = row / inner;
        return outer * stride_outer + (row - outer * inner) * stride_inner;
    }
};

// The leading axes of a tensor, merged where one continues another; false where they need more than two strides.
inline bool find_rows(Rows& rows, const int64_t* sizes, const int64_t* strides, int64_t dim) {
    int64_t count = 0, axis_size[2] = {1, 1}, axis_stride[2] = {0, 0};
    for (int64_t i = dim - 2; i >= 0; i--) {
        if (sizes[i] == 1) continue;
        if (count && strides[i] == axis_size[count - 1] * axis_stride[count - 1]) {
            axis_size[count - 1] *= sizes[i];
        } else if (count == 2) {
            return false;
        } else {
            axis_size[count] = sizes[i];
            axis_stride[count++] = strides[i];
        }
    }
    rows = {axis_size[0] > 0 ? axis_size[0] : 1, axis_stride[1], axis_stride[0]};
    return true;
}

// Whether pieces of 16 bytes at all rows are aligned.
inline bool rows_aligned(const void* address, const Rows& rows, int64_t element_size) {
    const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
    return aligned(reinterpret_cast<int64_t>(address)) && aligned(rows.stride_outer * element_size) &&
           aligned(rows.stride_inner * element_size);
}

}  // namespace vf
