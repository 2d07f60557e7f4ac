// The torch operators of csrc/cuda as operators of CPU tensors, whose kernels the emulator runs.
#include "attention.cu"
#include "epilogue.cu"
#include "layer_norm.cu"
#include "patch_embed.cu"
