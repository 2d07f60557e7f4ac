// Stands before CUTLASS's own, which has launches in CUDA's syntax: nothing is launched.
#pragma once
