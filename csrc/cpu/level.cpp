// Which level's kernels run: the highest that the processor has, or the one that `use_level` names.
#include "../torch.h"

namespace vit_fast {

#if defined(VF_LEVELS_X86)
extern const Kernels kernels_generic, kernels_avx2, kernels_avx512, kernels_avx512_vnni, kernels_avx512_bf16;

namespace {

// From the lowest to the highest.
const Kernels* const LEVELS[] = {&kernels_generic, &kernels_avx2, &kernels_avx512, &kernels_avx512_vnni,
                                 &kernels_avx512_bf16};

int highest() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  if (!__builtin_cpu_supports("avx512vnni")) return 2;
  return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
}
#else
extern const Kernels kernels_generic;

namespace {

const Kernels* const LEVELS[] = {&kernels_generic};

int highest() { return 0; }
#endif

const Kernels* chosen = LEVELS[highest()];

std::string level() { return chosen->level; }

// Every level that the processor has, from the lowest to the highest, with commas between.
std::string levels() {
  std::string names;
  for (int i = 0; i <= highest(); i++) names += (i ? "," : "") + std::string(LEVELS[i]->level);
  return names;
}

void use_level(std::string name) {
  for (int i = 0; i <= highest(); i++)
    if (name == LEVELS[i]->level) {
      chosen = LEVELS[i];
      return;
    }
  STD_TORCH_CHECK(false, "level is ", name, ", expected one of ", levels());
}

}  // namespace

const Kernels& kernels() { return *chosen; }

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("level", TORCH_BOX(&level));
  m.impl("levels", TORCH_BOX(&levels));
  m.impl("use_level", TORCH_BOX(&use_level));
}

}  // namespace vit_fast
