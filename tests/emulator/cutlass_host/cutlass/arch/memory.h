// Stands before CUTLASS's own, whose accesses are PTX: the same on the host.
#pragma once

#include <cstring>

#include "cutlass/arch/cache_operation.h"
#include "cutlass/cutlass.h"

namespace cutlass::arch {

template <typename AccessType, int BYTES, CacheOperation::Kind = CacheOperation::Always> struct global_load {
    global_load(AccessType& to, void const* from, bool guard) {
        if (guard) std::memcpy(&to, from, BYTES);
    }
};
template <typename AccessType, int BYTES> struct global_store {
    global_store(AccessType const& from, void* to, bool guard) {
        if (guard) std::memcpy(to, &from, BYTES);
    }
};
template <int BYTES> void shared_load(void*, uint32_t);
template <int BYTES> void shared_store(uint32_t, void const*);

}  // namespace cutlass::arch
