"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and mutants of them.

``cpu_driver.cpp`` calls the kernels of a level on exactly sized heap blocks, with threads of its own, and compares with
plain loops in float64; no PyTorch is needed. Faults planted in a copy of the sources must turn it red. Without
VIT_FAST_DEPTH=full: the lowest and the highest level of the processor, and a few of the mutants.
"""

import contextlib
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from support.properties import FULL, SEED
from vit_fast.csrc import build

pytestmark = pytest.mark.usefixtures("compiler")

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cpu"
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
COMMON = ("-std=c++20", "-O1", "-g1", *build._MATH, "-DVF_LEVEL=tested")
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "PATH": "/usr/bin:/bin"}
CASES = 400 if FULL else 45
FEATURES = {  # what Linux calls what a level needs
    "generic": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
}
FEATURES["avx512_vnni"] = FEATURES["avx512"] | {"avx512_vnni"}
FEATURES["avx512_bf16"] = FEATURES["avx512_vnni"] | {"avx512_bf16"}


def levels_here():
    """The levels that this processor can run, from the lowest to the highest."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = set(next((line for line in lines if line.startswith("flags")), "").split())
        return [level for level in build.levels() if FEATURES[level] <= flags]
    return ["generic"]


LEVELS = levels_here() if FULL else list(dict.fromkeys((levels_here()[0], levels_here()[-1])))


def compiled(output, source, sources, flags):
    command = [*build.compiler().command, *COMMON, *flags, f"-I{sources}", "-c", str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """``drivers(flags)`` is the object of the driver compiled with flags, once."""
    folder, found = tmp_path_factory.mktemp("driver"), {}

    def driver(flags):
        if flags not in found:
            output = folder / f"driver{len(found)}.o"
            found[flags] = compiled(output, HERE / "cpu_driver.cpp", SOURCES, flags)
        return found[flags]

    return driver


def run(folder, driver, level, flags=(), sources=SOURCES, cases=CASES, operation=(), seed=SEED + 1):
    """The finished process of the driver on the kernels of a level."""
    kernels = compiled(folder / "kernels.o", sources / "kernels.cpp", sources, (*build.levels()[level], *flags))
    program = folder / "driver"
    link = [*build.compiler().command, *flags, str(driver), str(kernels), "-pthread", "-o", str(program)]
    subprocess.run(link, check=True, capture_output=True, timeout=120)
    words = [str(program), str(seed), str(cases), *operation]
    return subprocess.run(words, capture_output=True, text=True, timeout=500, env=ENVIRONMENT)


def green(done, cases=CASES):
    told = (done.stdout + done.stderr)[-3000:]
    assert done.returncode == 0 and done.stderr == "" and f"{9 * cases} cases" in done.stdout, told


@pytest.mark.parametrize("level", LEVELS)
def test_memory_and_undefined_behaviour(level, drivers, tmp_path):
    green(run(tmp_path, drivers(ADDRESS), level, ADDRESS))


@pytest.mark.parametrize("level", LEVELS[-1:] if not FULL else LEVELS)
def test_races(level, drivers, tmp_path):
    cases = CASES // 3
    green(run(tmp_path, drivers(THREAD), level, THREAD, cases=cases), cases)


def planted(folder, file, old, new):
    """A copy of the sources with one place changed."""
    copy = folder / "cpu"
    shutil.copytree(SOURCES, copy)
    text = (copy / file).read_text()
    assert old in text, f"{file} has no {old!r}: bring the list of faults up to date"
    (copy / file).write_text(text.replace(old, new, 1))
    return copy


# file, what stands there, what is planted, sanitizer, operation, what its report says
FAULTS = {
    "a tail that is one too long": (
        "rows.h", "for (; i < count; i++) store_one(to, i, from[i], type);",
        "for (; i <= count; i++) store_one(to, i, from[i], type);",
        ADDRESS, "attention", "AddressSanitizer",
    ),
    "a whole vector at the end of a row": (
        "rows.h", "for (int64_t i = whole; i < width; i++) rest += load_one(x, i, type);",
        "if (whole < width) rest += load_as_float(x, whole, type)[0];",
        ADDRESS, "layer_norm", "AddressSanitizer",
    ),
    "a workspace without slots": (
        "attention.h", "static_cast<char*>(a.workspace) + slot * bytes", "static_cast<char*>(a.workspace) + 0 * slot",
        THREAD, "attention", "data race",
    ),
    "a copy of a head without the padding of its width": (
        "attention_bwd.h", "arena.take<char>(longest * width * 4)", "arena.take<char>(longest * size * 4)",
        ADDRESS, "attention_bwd", "AddressSanitizer",
    ),
    "gradients of heads in one workspace": (
        "attention_bwd.h", "(g.workspace) + slot * bytes", "(g.workspace) + 0 * slot",
        THREAD, "attention_bwd", "data race",
    ),
    "a gradient row that is one too long": (
        "layer_norm_bwd.h", "for (i = 0; i < width; i++) dy[i] =", "for (i = 0; i <= n.rows * width; i++) dy[i] =",
        ADDRESS, "layer_norm_bwd", "AddressSanitizer",
    ),
    "sums of a parameter in one row": (
        "layer_norm_bwd.h", "dweights + part * padded, *dbias", "dweights, *dbias",
        THREAD, "layer_norm_bwd", "data race",
    ),
    "tasks counted without an atomic": (
        "tasks.h", "__atomic_fetch_add(&context.next, 1, __ATOMIC_RELAXED)", "context.next++",
        THREAD, "prepared_blocks", "data race",
    ),
    "a padding that is not zeroed": (
        "prepared_blocks.h", "memset(words + width * size_of(as), 0, (padded - width) * size_of(as));", "",
        (), "prepared_blocks", "wrong: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, drivers, tmp_path):
    file, old, new, flags, operation, report = FAULTS[name]
    copy = planted(tmp_path, file, old, new)
    done = run(tmp_path, drivers(flags), LEVELS[0], flags, copy, 60, (operation,), seed=1)
    assert done.returncode != 0 and report in done.stdout + done.stderr, (done.stdout + done.stderr)[-3000:]


# file, what stands there, what stands there in the mutant; at the lowest level.
MUTANTS = (
    ("vec.h", "splat(5.0000001201e-1f)", "splat(5.01e-1f)"),
    ("vec.h", "splat(-0.693359375f)", "splat(-0.6933f)"),
    ("vec.h", "splat(5.192296858534828e33f)", "splat(2.596148429267414e33f)"),
    ("activations.h", "splat(0.044715f)", "splat(0.0457f)"),
    ("activations.h", "splat(1.702f)", "splat(1.701f)"),
    ("activations.h", "return z * sigmoid<LOW>(z);", "return z;"),
    ("rows.h", "if (!rms) {", "{"),
    ("activations.h", "GELU_C = 0.305f", "GELU_C = 0.304f"),
    ("activations.h", "return max_nan(z, splat(0.0f));", "return z;"),
    ("rows.h", "squares[3])) + rest) / width", "squares[3])) + rest) / (width - 1)"),
    ("rows.h", "rest += centred * centred;", "rest += centred;"),
    ("rows.h", "if (bias) y += bias[i];", ""),
    ("layer_norm.h", "row * n.stride * size", "row * n.width * size"),
    ("attention.h", "row_sum * correction + sum(total)", "row_sum + sum(total)"),
    ("attention.h", "block ? fma(load(out), splat(correction[m]), x) : x", "block ? load(out) + x : x"),
    ("attention.h", "+ __builtin_logf(space.row_sum[m] /", "- __builtin_logf(space.row_sum[m] /"),
    ("attention.h", "batch * stride[0] + token * stride[1] + head * D", "batch * stride[0] + token * stride[1] + head"),
    ("attention.h", "last < a.queries ? last : a.queries", "last"),
    ("attention.h", "scale / space.row_sum[m]", "1.0f / space.row_sum[m]"),
    ("attention.h", "+ start + m) * a.keys + block", "+ start + m) * a.keys"),
    ("attention_bwd.h", "p * (dp - delta) * g.scale", "p * dp * g.scale"),
    ("attention_bwd.h", "p * (dp - delta) * g.scale", "p * (dp - delta)"),
    ("attention_bwd.h", "delta += a[d] * b[d];", "delta = a[d] * b[d];"),
    ("attention_bwd.h", "(plane * g.queries + query) * g.keys", "query * g.keys"),
    ("attention_bwd.h", "key, KEYS ? g.keys : 1)", "key)"),
    ("attention_bwd.h", "select(keep, dp * g.dropout.scale", "select(keep, dp"),
    ("attention_bwd.h", "select(keep, p * g.dropout.scale, vf{})", "p"),
    ("attention_bwd.h", "block ? load(to) + load(tile + m * NR + n) : load", "false ? load(to) : load"),
    ("attention_bwd.h", "(block / NR + panel) * D * NR * 4", "panel * D * NR * 4"),
    ("attention_bwd.h", "(panel * columns.count + block) * NR * 4", "panel * columns.count * NR * 4"),
    ("attention_bwd.h", "KEYS ? g.dk_stride : g.dq_stride", "g.dq_stride"),
    ("attention_bwd.h", "(batch * g.num_heads + head) * g.queries;", "head * g.queries;"),
    ("attention_bwd.h", "rows_of(g.grad, g.grad_stride, g.queries)", "rows_of(g.grad, g.out_stride, g.queries)"),
    ("layer_norm_bwd.h", "dbias[i] += dy[i];", "dbias[i] = dy[i];"),
    ("layer_norm_bwd.h", "n.weight ? dy[i] * n.weight[i] : dy[i]", "dy[i]"),
    ("layer_norm_bwd.h", "n.rms ? 0.0f : (total", "(total"),
    ("layer_norm_bwd.h", "total += dy[i], projected += dy[i] * x[i];", "projected += dy[i] * x[i];"),
    ("layer_norm_bwd.h", "totals += load(dy + i);", "totals = load(dy + i);"),
    ("layer_norm_bwd.h", "- x[i] * projected) * rstd", "- x[i] * projected)"),
    ("layer_norm_bwd.h", "row * n.grad_stride", "row * n.stride"),
    ("layer_norm_bwd.h", "dweight += dweights[part * padded + i]", "dweight = dweights[part * padded + i]"),
    ("dropout.h", "word ^ (word >> 31)", "word"),
    ("dropout.h", "round < 10", "round < 9"),
    ("dropout.h", "uint64_t>(drop.seed) >> 32", "uint64_t>(drop.seed) >> 33"),
    ("dropout.h", "memcpy(mask.keep + i, &bytes, end - i)", "memcpy(mask.keep + i, &bytes, end - i - 1)"),
    ("linear.h", "row * features + column + i);", "row * features + column);"),
    ("gemm.h", "a + 4 * k, a_stride, b + 4 * NR * k, count, tile", "a, a_stride, b + 4 * NR * k, count, tile"),
    ("gemm.h", "ADD ? out[1] + sums[m][1] : sums[m][1]", "sums[m][1]"),
    ("linear.h", "row = n < NR / 2 ? unit : half + unit;", "row = unit;"),
    ("linear.h", "results[i / VL] = residual + branch;", "results[i / VL] = residual - branch;"),
    ("linear.h", "row / l.rows_per_scale", "0 * l.rows_per_scale"),
    ("rows.h", "if (weight) y *= weight[i];", ""),
    ("linear.h", "gated && n >= NR / 2 ? half + unit : unit", "unit"),
    ("patch_embed.h", "/ 255.0f", "/ 256.0f"),
    ("patch_embed.h", "patch % p.grid[1] * p.step[1]", "patch % p.grid[1] * p.step[0]"),
    ("patch_embed.h", "image * p.prefix_stride * element", "0 * p.prefix_stride * element"),
    ("patch_embed.h", "p.pos_embed + patch * features + n", "p.pos_embed + n"),
    ("prepared_blocks.h", "float(x.zero[row])", "0.0f"),
    ("prepared_blocks.h", "load(x + i) * load(gain + i), VL)", "load(x + i), VL)"),
    ("prepared_blocks.h", "x[i + j] * gain[i + j]", "x[i + j]"),
    ("linear.h", "l.dropout, row * features + column + i)", "l.dropout, row * features + i)"),
    ("prepared_blocks.h", "range / 255.0f", "range / 300.0f"),
    ("prepared_blocks.h", "smallest(vmin(low, splat(lowest)))", "smallest(low)"),
    ("prepared_blocks.h", "qkv + 2 * s.width, attended", "qkv + s.width, attended"),
    ("prepared_blocks.h", "word & (vi)splat_int(static_cast<int32_t>(0xffff0000))", "word << 16"),
    ("prepared_blocks.h", "to_float((word << 8) >> 24)", "to_float((word << 16) >> 24)"),
    ("prepared_blocks.h", "x[i] += lanes[i];", "x[i] = lanes[i];"),
)  # fmt: skip
CHOSEN = MUTANTS if FULL else random.Random(SEED).sample(MUTANTS, 3)


@pytest.mark.parametrize(
    "file,old,new", CHOSEN, ids=[f"{file}: {new or 'without ' + old}" for file, old, new in CHOSEN]
)
def test_mutants_are_found(file, old, new, drivers, tmp_path):
    copy = planted(tmp_path, file, old, new)
    done = run(tmp_path, drivers(()), LEVELS[0], (), copy, 150, seed=1)
    assert done.returncode == 3 or done.returncode < 0, done.stdout + done.stderr


def test_the_faults_stand_in_the_sources():
    for file, old, *_ in (*MUTANTS, *FAULTS.values()):
        assert old in (SOURCES / file).read_text(), f"{file} has no {old!r}: bring the list up to date"
