"""``vit-fast profile``: its flags, tables and sentences; ``vit_fast.bench.profile`` measures, ``predict`` predicts."""

from pathlib import Path
from typing import Annotated

import typer

from vit_fast.bench.errors import require
from vit_fast.bench.gpus import GPUS
from vit_fast.bench.providers import PROFILED, PROFILED_VARIANTS

from . import options
from .output import save, say, show_table

BATCH_SIZE = {"cuda": 256, "cpu": 4}
ITERATIONS = {"cuda": 20, "cpu": 5}
LEAST_SHARE = 0.1  # percent of the step; the table omits smaller operators that belong to no operation
CPU_SENTENCE = "These are CPU numbers: they say nothing about a GPU, where the Triton kernels run instead."


def profile(
    model: options.Model = options.DEFAULT_MODEL,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Images a step. [default: GPU 256, CPU 4]")
    ] = None,
    provider: Annotated[
        str,
        typer.Option(
            help="vit_fast, prepared (vit_fast.prepare), fp8 or int8 (its precisions), or timm: eager, compile, "
            "compile-max-autotune."
        ),
    ] = "vit_fast",
    img_size: options.ImgSize = None,
    precision: options.Precision = None,
    device: options.Device = None,
    backend: options.Backend = None,
    model_kwargs: options.ModelKwargs = None,
    num_iter: Annotated[
        int | None, typer.Option(help="Forward passes, timed and then profiled. [default: GPU 20, CPU 5]")
    ] = None,
    results_file: Annotated[Path | None, typer.Option(help="Write the rows here, .csv or .json.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Keep the profiler's Chrome trace here, .json.")] = None,
    predict: Annotated[
        str | None, typer.Option(help=f"Run nothing: predict it on a GPU that is not here: {', '.join(GPUS)}.")
    ] = None,
) -> None:
    """Profile a forward pass: time of every operation, its share of the step, and its roofline bound on this device.

    With --predict nothing runs: a model of the GPU says what each launch would take, from shapes alone.
    """
    options.one_of("--provider", provider, PROFILED)
    for flag, value, least in (
        ("--batch-size", batch_size, 1),
        ("--img-size", img_size, 1),
        ("--num-iter", num_iter, 1),
    ):
        options.at_least(flag, value, least)
    precision = options.precision("--precision", precision)
    if backend is not None:
        options.backend_name(backend)
        if provider not in PROFILED_VARIANTS:
            raise options.wrong(
                "--backend",
                backend,
                f"it with --provider {', '.join(PROFILED_VARIANTS)}: timm's models have one backend",
            )
    if results_file is not None and results_file.suffix not in (".csv", ".json"):
        raise options.wrong("--results-file", str(results_file), "a name that ends in .csv or .json")
    if trace is not None and trace.suffix != ".json":
        raise options.wrong("--trace", str(trace), "a name that ends in .json")
    kwargs = options.keyword_arguments(model_kwargs, img_size=("--img-size", img_size))
    if predict is not None:
        given = {"--device": device, "--backend": backend, "--num-iter": num_iter, "--trace": trace}
        _check_prediction(predict, provider, given)
        precision = precision or "bfloat16"
        if PROFILED_VARIANTS[provider].precision and precision == "float32":
            raise options.wrong("--provider", provider, "it with --precision bfloat16 or float16 with --predict")
        options.output_files({"--results-file": results_file})
        _predict(model, provider, batch_size, predict, precision, kwargs, img_size, results_file)
        return
    target = options.target_device(device)
    precision = precision or ("bfloat16" if target.type == "cuda" else "float32")
    if provider in PROFILED_VARIANTS:
        options.check_prepared("--provider", provider, PROFILED_VARIANTS[provider], target, precision)
        options.backend(backend, target)
        options.check_buildable(model, kwargs, img_size)
    else:
        require("timm", "bench")
    options.output_files({"--results-file": results_file, "--trace": trace})

    from vit_fast.bench import profile as profiling
    from vit_fast.bench import results

    from . import report

    settings = profiling.Settings(
        model=model,
        provider=provider,
        batch=batch_size or BATCH_SIZE[target.type],
        device=target,
        precision=precision,
        img_size=img_size,
        model_kwargs=kwargs,
        backend=backend,
        iterations=num_iter or ITERATIONS[target.type],
    )
    with report.progress() as tell:
        facts, rows, trace_text = profiling.run(settings, tell)
    _print_table(rows, settings)
    say()
    for sentence in _sentences(facts, rows, settings):
        say(sentence)
    written = save("rows", results_file, lambda path: results.write_profile(facts, rows, path))
    written &= save("trace", trace, lambda path: path.write_text(trace_text, encoding="utf-8"))
    if not written:
        raise typer.Exit(1)


def _check_prediction(gpu, provider, given):
    from vit_fast.bench.predict import PROVIDERS

    options.one_of("--predict", gpu, tuple(GPUS))
    if provider not in PROVIDERS:
        raise options.wrong("--provider", provider, f"{', '.join(PROVIDERS)} with --predict")
    for flag, value in given.items():
        if value is not None:
            raise options.wrong(flag, str(value), "it without --predict, which runs nothing")


def _predict(model, provider, batch_size, gpu, precision, kwargs, img_size, results_file):
    from vit_fast.bench import predict as predicting
    from vit_fast.bench import results

    kwargs = kwargs if img_size is None else kwargs | {"img_size": img_size}
    settings = predicting.Settings(model, provider, batch_size or BATCH_SIZE["cuda"], gpu, precision, kwargs)
    facts, rows = predicting.run(settings)
    heads = ["operation", *(head for _, head, _ in _PREDICTED)]
    lines = [
        [
            f"{row['operation']} {row['module']}".strip(),
            *("" if row[k] is None else format(row[k], f) for k, _, f in _PREDICTED),
        ]
        for row in rows
    ]
    show_table(heads, lines, text=("resources",))
    say()
    for sentence in _prediction_sentences(facts):
        say(sentence)
    if not save("rows", results_file, lambda path: results.write_profile(facts, rows, path)):
        raise typer.Exit(1)


def _prediction_sentences(facts):
    yield (
        f"{facts['statement']} {facts['model']} by {facts['provider']}: batch {facts['batch_size']}, "
        f"{facts['img_size']} pixels, {facts['precision']}, on {facts['gpu']}: {facts['step_ms']:.4g} ms, "
        f"{facts['images_per_second']:.0f} images/s, ± {facts['uncertainty_percent']:.0f} % of the time "
        f"({facts['images_per_second_low']:.0f} to {facts['images_per_second_high']:.0f})."
    )
    yield (
        "± 10 % with the token rows of ViT-B/16 at batch 256, ± 40 % at batch 1, between them linear in the logarithm "
        "of the rows; twice that on GPUs whose machine code was not read (all but capability 9.0)."
    )
    yield (
        f"Assumed: {facts['tflops_assumed']:.4g} TFLOP/s and {facts['tb_per_s_assumed']:.3g} TB/s for the roofline "
        f"bound, {facts['clock_ghz_assumed']:.3g} GHz. The time is the GPU's: a host that launches more slowly (small "
        "batches without CUDA graphs) and a power limit make it longer."
    )


_COLUMNS = (
    ("calls", "calls", ".3g"),
    ("us_per_call", "µs/call", ".1f"),
    ("us", "µs", ".1f"),
    ("percent_of_step", "% of step", ".1f"),
    ("gflop", "GFLOP", ".4g"),
    ("mb", "MB", ".4g"),
    ("roofline_us", "roofline µs", ".1f"),
    ("percent_of_roofline", "% of roofline", ".1f"),
)
_PREDICTED = (
    *_COLUMNS,
    ("programs", "programs", "d"),
    ("programs_per_multiprocessor", "per SM", "d"),
    ("waves", "waves", ".2f"),
    ("registers", "registers", "d"),
    ("shared_kib", "shared KiB", ".0f"),
    ("resources", "resources", ""),
)
_GRADED = (("predicted_us", "predicted µs", ".1f"), ("predicted_error_percent", "error %", "+.1f"))


def _is_small(row):
    """Whether the table omits a row: on a CPU an eager step calls dozens of operators that only inspect tensors."""
    return row["roofline_us"] is None and row["calls"] and row["percent_of_step"] < LEAST_SHARE


def _print_table(rows, settings):
    on_gpu = settings.device.type == "cuda"
    graded = any(row["predicted_us"] is not None for row in rows)
    columns = (*_COLUMNS, *_GRADED) if graded else _COLUMNS
    heads = ["operation", *(head for _, head, _ in columns), *(["kernels"] if on_gpu else [])]
    lines = []
    for row in rows:
        if on_gpu or not _is_small(row):
            figures = ("" if row[key] is None else format(row[key], form) for key, _, form in columns)
            known = row["roofline_us"] is not None and row["kernels"]
            kernels = [row["kernels"] if known else ""] if on_gpu else []
            lines.append([f"{row['operation']} {row['module']}".strip(), *figures, *kernels])
    show_table(heads, lines, text=("kernels",))


def _sentences(facts, rows, settings):
    gpu = settings.device.type == "cuda"
    ran = f", backend {facts['vit_fast_backend']}" if facts["vit_fast_backend"] else ""
    threads = "" if gpu else f", {facts['cpu_threads']} threads"
    yield (
        f"{facts['model']} by {facts['provider']}{ran}: batch {facts['batch_size']}, {facts['img_size']} pixels, "
        f"{facts['precision']}, random weights and pixels, on {facts['device']}, {facts['device_name']}{threads}."
    )
    if not gpu:
        yield CPU_SENTENCE
    yield (
        f"Without the profiler a step takes {facts['step_ms']:.4g} ms, {facts['images_per_second']:.4g} images/s; the "
        f"call returns after {facts['host_ms']:.4g} ms (medians of {facts['iterations']}). The rows are means of as "
        "many steps under the profiler, which slows the host: gaps are shorter without it."
    )
    yield (
        "Roofline bound: the greater of FLOP at "
        f"{facts['matmul_peak_tflops']:.4g} TFLOP/s (a large matrix product) and bytes at "
        f"{facts['copy_tb_per_s']:.3g} TB/s (a copy, read and write), both measured in this run; % of roofline is that "
        "bound / time, above 100 where data stay in a cache."
    )
    if settings.narrow and (rate := facts["matmul_peak_narrow_tflops"]):
        yield f"FLOP of products in {settings.narrow.products} at {rate:.4g} TFLOP/s, likewise measured."
    elif settings.narrow:
        yield (
            f"This device has no products in {settings.narrow.products}: their emulation ran, and the bounds are those "
            "of the emulation."
        )
    if any(row["predicted_us"] is not None for row in rows):
        yield (
            "Predicted: what the model of this GPU says (`vit-fast profile --predict`); error: by how much it departs "
            "from the measured time."
        )
    elif facts["predicted"]:
        yield f"{facts['predicted']}."
    if not gpu and (small := [row for row in rows if _is_small(row)]):
        share = sum(row["percent_of_step"] for row in small)
        names = ", ".join(row["operation"] for row in small)
        yield f"Not in the table, each below {LEAST_SHARE} % of the step, together {share:.2f} %: {names}."
    if not gpu and settings.provider.startswith("compile"):
        yield "What the compiler fused runs inside CompiledFxGraph, which has no events of its own on a CPU."
