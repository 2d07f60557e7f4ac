"""``vit-fast bench``: its flags, checked before anything heavy is imported, and the order of its output."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vit_fast.bench import machine, photographs
from vit_fast.bench.errors import require
from vit_fast.bench.providers import BASELINES, CPU_ONLY, FREEZING, GPU_BASELINES, PRECISION_OF, SCALED_MM, VARIANTS
from vit_fast.bench.weights import KINDS

from . import options
from .errors import INTERRUPTED
from .output import save, say

FAMILIES = ("clip", "deit", "hybrid", "scratch", "lanl", "t2t")
DEFAULT_BASELINES = {
    "cuda": GPU_BASELINES[:-1],
    "cpu": ("eager", FREEZING, "compile-max-autotune"),
}
CUDA_GRAPHS = ("compile-cudagraphs", *(name for name, variant in VARIANTS.items() if variant.graphed))
FORMATS = ("csv", "json")
BENCHES = ("inference", "train")
TRAIN_BASELINES = ("eager", "torchvision", "transformers", "compile", "compile-max-autotune")
DEFAULT_TRAIN_BASELINES = ("eager", "transformers", "compile")
AMP_PRECISIONS = {"amp": "float16", "amp_bfloat16": "bfloat16"}
BATCH_SIZES = {"cuda": (1, 8, 64, 256), "cpu": (1, 4)}
TIME_BUDGET = {"cuda": 0.0, "cpu": 150.0}


def _batch_sizes(text):
    try:
        sizes = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise options.wrong(
            "--batch-size", text, "a whole number of 1 or more, or several with commas between, like 1,8,64"
        )
    return sizes


def _results_format(path, name):
    if name is not None:
        options.one_of("--results-format", name, FORMATS)
        if path is None:
            raise options.wrong("--results-format", name, "it together with --results-file")
        return name
    if path is not None:
        suffix = path.suffix.lstrip(".")
        if suffix not in FORMATS:
            raise options.wrong("--results-file", str(path), "a name that ends in .csv or .json, or --results-format")
        return suffix
    return None


def _default_variants(target, precision, amp, family):
    """The default variants of a device: those whose precision takes the weights and is not emulated there.

    On a CPU float32 weights, and products narrower than the weights, gain speed on the compiled backend only. Under
    autocast no prepared weights are used.
    """
    from vit_fast import backends

    if amp:
        return ("plain",)
    found = []
    for name, variant in VARIANTS.items():
        narrow = variant.products is not None
        if variant.precision is not None:
            if (
                options.why_not_prepared(variant, target, precision)
                or variant.precision.why_emulated(target) is not None
            ):
                continue
            if narrow and family is not None:
                continue
            if target.type == "cpu" and (narrow or precision == "float32") and backends.unavailable("cpu", target):
                continue
        if target.type == "cuda" or not variant.graphed:
            found.append(name)
    return tuple(found)


def _default_baselines(target, variants):
    """The default baselines of a device, with timm in float8 if one of our variants is in float8."""
    float8 = PRECISION_OF[SCALED_MM].products in {VARIANTS[name].products for name in variants}
    return DEFAULT_BASELINES[target.type] + (SCALED_MM,) * (target.type == "cuda" and float8)


def bench(
    model: options.Model = options.DEFAULT_MODEL,
    bench: Annotated[
        str,
        typer.Option(
            help="inference, or train: forward+backward and the whole step with AdamW, of our model against any of "
            f"{','.join(TRAIN_BASELINES)}. [train: {','.join(DEFAULT_TRAIN_BASELINES)}]"
        ),
    ] = BENCHES[0],
    batch_size: Annotated[
        str | None,
        typer.Option("--batch-size", "-b", help="One, or several: 1,8,64. [default: GPU 1,8,64,256, CPU 1,4]"),
    ] = None,
    img_size: options.ImgSize = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16 (fp32, bf16, fp16) weights and images; amp and amp_bfloat16 as timm: "
            "--amp in float16, or in bfloat16. [default: GPU bfloat16, CPU float32]"
        ),
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="float32 weights under autocast.")] = False,
    amp_dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float16 for --amp. [default: GPU float16, CPU bfloat16]")
    ] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Images in channels-last layout.")] = False,
    device: options.Device = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help=f"Any of {','.join(BASELINES)}, or none: timm by itself or through torch.compile, the same network of "
            "the other libraries, timm by OpenVINO and ONNX Runtime (on a CPU), and compiled with its products in "
            "float8 (torch._scaled_mm). [default: GPU all but those of a CPU, scaled-mm where a variant is in float8, "
            f"CPU {','.join(DEFAULT_BASELINES['cpu'])}]"
        ),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help=f"Any of {','.join(VARIANTS)}: our model as it is, after vit_fast.prepare, and that in a CUDA graph; "
            "the same with narrower products. [default: those that the weights can be prepared to and that are fast on "
            "the device; float32 and narrower products on a CPU need the backend cpu]"
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Instead of --model: a family's main preset against plain PyTorch, or all of them."),
    ] = None,
    backend: options.Backend = None,
    images: options.Images = None,
    pretrained: options.Pretrained = False,
    weights: Annotated[
        str,
        typer.Option(
            help="random (timm's initial ones, each moved), initial, or structured: uneven channels and outliers as in "
            "trained ones, which quantisation is sensitive to."
        ),
    ] = KINDS[0],
    model_kwargs: options.ModelKwargs = None,
    num_warm_iter: Annotated[int, typer.Option(help="Calls before the timing, per provider.")] = 10,
    num_bench_iter: Annotated[int, typer.Option(help="Timed calls, per provider and batch size.")] = 40,
    time_budget: Annotated[
        float | None,
        typer.Option(help="Seconds: fewer calls where time is short; 0 is no limit. [default: GPU 0, CPU 150]"),
    ] = None,
    results_file: Annotated[Path | None, typer.Option(help="Write the rows here, .csv or .json.")] = None,
    results_format: Annotated[str | None, typer.Option(help="csv or json. [default: as --results-file ends]")] = None,
    peak_rss: Annotated[
        bool,
        typer.Option("--peak-rss", help="Also the peak memory of each provider in a process of its own (CPU)."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw images/s by batch size here, .png, .svg or .pdf.")] = None,
) -> None:
    """Benchmark a model against timm, torch.compile and other libraries: parity first, then speed and memory."""
    start, load = time.perf_counter(), machine.load_average()
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise options.wrong("--plot", str(plot), "a name that ends in .png, .svg or .pdf")
    for flag, value, least in (
        ("--img-size", img_size, 1),
        ("--num-warm-iter", num_warm_iter, 0),
        ("--num-bench-iter", num_bench_iter, 1),
        ("--time-budget", time_budget, 0),
    ):
        options.at_least(flag, value, least)
    file_format = _results_format(results_file, results_format)
    if precision in AMP_PRECISIONS:
        if amp_dtype is not None:
            raise options.wrong("--amp-dtype", amp_dtype, f"it without --precision {precision}, which says it")
        amp, amp_dtype, precision = True, AMP_PRECISIONS[precision], None
    precision = options.precision("--precision", precision)
    if amp_dtype is not None:
        amp_dtype = options.precision("--amp-dtype", amp_dtype, options.PRECISIONS[1:])
        if not amp:
            raise options.wrong("--amp-dtype", amp_dtype, "it together with --amp")
    if amp and precision not in (None, "float32"):
        raise options.wrong("--amp", precision, "float32 weights: leave out --precision")
    if family is not None:
        options.one_of("--family", family, (*FAMILIES, "all"))
        for flag, given in (
            ("--model", model != options.DEFAULT_MODEL and model),
            ("--model-kwargs", " ".join(model_kwargs or ())),
            ("--img-size", img_size),
            ("--pretrained", pretrained),
            ("--variants", variants),
            ("--weights", weights != KINDS[0] and weights),
            ("--peak-rss", peak_rss),
        ):
            if given:
                raise options.wrong(flag, given, "it without --family")
    options.one_of("--weights", weights, KINDS)
    options.one_of("--bench", bench, BENCHES)
    if bench == "train":
        for flag, given in (("--family", family), ("--variants", variants), ("--channels-last", channels_last)):
            if given:
                raise options.wrong(flag, given, "it without --bench train")
    if pretrained and weights != KINDS[0]:
        raise options.wrong("--weights", weights, "it without --pretrained")
    if images is not None and not images.is_dir():
        raise options.wrong("--images", str(images), "a folder of photographs")
    our_variants = None if variants is None else options.list_of("--variants", variants, tuple(VARIANTS))
    others: tuple[str, ...] | None = None
    if baselines is not None:
        known = TRAIN_BASELINES if bench == "train" else BASELINES
        others = () if baselines == "none" else options.list_of("--baselines", baselines, known)
    sizes = _batch_sizes(batch_size) if batch_size is not None else None
    kwargs = options.keyword_arguments(
        model_kwargs, img_size=("--img-size", img_size), pretrained=("--pretrained", pretrained)
    )
    target = options.target_device(device)
    on_gpu = target.type == "cuda"
    for flag, chosen in (("--baselines", others), ("--variants", our_variants)):
        for name in CUDA_GRAPHS:
            if not on_gpu and name in (chosen or ()):
                raise options.wrong(flag, name, "it on a CUDA device only: CUDA graphs need one")
    for name in CPU_ONLY:
        if on_gpu and name in (others or ()):
            raise options.wrong("--baselines", name, "it on a CPU only (--device cpu)")
    if on_gpu and peak_rss:
        raise options.wrong("--peak-rss", str(target), "it on a CPU only (--device cpu)")
    precision = "float32" if amp else precision or ("bfloat16" if on_gpu else "float32")
    refused = {name: options.why_not_prepared(VARIANTS[name], target, precision) for name in our_variants or ()}
    if refused and all(refused.values()):
        told = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
        raise options.wrong("--variants", ",".join(refused), f"plain among them, or another --precision ({told})")
    options.backend(backend, target)
    if family is None:
        options.check_buildable(model, kwargs, img_size)
    photographs.check_folder(images)
    for module in ("timm", *(["matplotlib"] if plot else [])):
        require(module, "bench")
    options.output_files({"--results-file": results_file, "--plot": plot})

    from vit_fast.bench import compare, results, training
    from vit_fast.bench.settings import Settings
    from vit_fast.bench.time_budget import TimeBudget
    from vit_fast.bench.training_step import STEP

    from . import report

    if bench == "train":
        our_variants, others = ("plain",), DEFAULT_TRAIN_BASELINES if others is None else others
    if our_variants is None:
        our_variants = _default_variants(target, precision, amp, family)
    if others is None:
        others = _default_baselines(target, our_variants)

    settings = Settings(
        model=model,
        batch_sizes=sizes or BATCH_SIZES[target.type],
        device=target,
        precision=precision,
        amp_dtype=(amp_dtype or ("float16" if on_gpu else "bfloat16")) if amp else None,
        img_size=img_size,
        model_kwargs=kwargs,
        variants=tuple(name for name in VARIANTS if name in our_variants),
        baselines=others,
        warm_iterations=num_warm_iter,
        bench_iterations=num_bench_iter,
        channels_last=channels_last,
        pretrained=pretrained,
        weights=weights,
        peak_rss=peak_rss,
        bench=bench,
        images=images,
        backend=backend,
        load_average=load,
    )
    seconds = TIME_BUDGET[target.type] if time_budget is None else time_budget
    contests = [settings]
    if family is not None:
        names = FAMILIES if family == "all" else (family,)
        contests = [replace(settings, family=name, model=name, model_kwargs={}) for name in names]
    rows: list[dict[str, Any]] = []
    failed, interrupted, budgeted = False, False, seconds > 0

    def write_rows(path):
        results.write_rows(rows, path, file_format)

    for index, contest in enumerate(contests):
        began = start if index == 0 else time.perf_counter()
        limit = max(seconds / (len(contests) - index), 1e-3) if budgeted else 0.0
        its_rows: list[dict[str, Any]] = []
        with report.progress() as tell:

            def keep(batch_rows, contest=contest, its_rows=its_rows, tell=tell):
                its_rows += batch_rows
                rows.extend(batch_rows)
                if results_file is not None:
                    with contextlib.suppress(OSError):  # reported at the end, if it still fails then
                        write_rows(results_file)
                with tell.paused():
                    (report.print_training_batch if bench == "train" else report.print_batch)(batch_rows, contest)

            try:
                failed |= (training.run if bench == "train" else compare.run)(
                    contest, TimeBudget(limit, began), tell, keep
                )
            except KeyboardInterrupt:
                interrupted = True
        if its_rows:
            (report.print_training_report if bench == "train" else report.print_report)(its_rows, contest, limit)
        if interrupted:
            break
        seconds -= time.perf_counter() - began
    if interrupted:
        say("Interrupted: the rows that were finished by then." if rows else "Interrupted before a row was finished.")
    steps = [training.part_of(row, STEP) for row in rows] if bench == "train" else rows
    written = save("rows", results_file, write_rows) if rows else True
    written &= save("plot", plot, lambda path: results.draw(steps, path)) if rows else True
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if failed or not written:
        raise typer.Exit(1)
