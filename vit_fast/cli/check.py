"""``vit-fast check``: the parity certificate of a model on this machine."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vit_fast.bench import photographs
from vit_fast.bench.errors import reason
from vit_fast.bench.providers import VARIANTS

from . import options
from .errors import CommandError
from .output import save, say, show_table

_HEADS = ("layer", "error", "eager's", "allowed", "rms error", "eager's rms", "cosine", "verdict")


def _print_certificate(found):
    """The text of a certificate, with its table at the width of the terminal."""
    rows = []
    for layer in (*found.layers, *found.outputs):
        its = layer.parity
        figures = (its.error, its.reference_error, its.allowed, its.relative_error, its.reference_relative_error)
        verdict = "holds" if its.passed else "beyond what is allowed"
        rows.append([layer.name, *(f"{figure:.2e}" for figure in figures), f"{its.cosine:.7f}", verdict])
    first, _, *lines = str(found).splitlines()
    say(first)
    say()
    show_table(_HEADS, rows, text=("verdict",))
    say()
    for line in lines[len(rows) :]:
        say(line)


def check(
    model: options.Model = options.DEFAULT_MODEL,
    variant: Annotated[
        str, typer.Option(help=f"{', '.join(VARIANTS)}: the model as it is, after vit_fast.prepare, in CUDA graphs.")
    ] = "plain",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images.")] = 2,
    img_size: options.ImgSize = None,
    precision: options.Precision = None,
    device: options.Device = None,
    backend: options.Backend = None,
    images: options.Images = None,
    model_kwargs: options.ModelKwargs = None,
    pretrained: options.Pretrained = False,
    results_file: Annotated[Path | None, typer.Option(help="Write the certificate here, .json.")] = None,
) -> None:
    """Compare a model with plain PyTorch, at its precision and in float64, layer by layer; exit status 1 if it errs."""
    options.one_of("--variant", variant, tuple(VARIANTS))
    options.at_least("--batch-size", batch_size, 1)
    options.at_least("--img-size", img_size, 1)
    precision = options.precision("--precision", precision)
    if results_file is not None and results_file.suffix != ".json":
        raise options.wrong("--results-file", str(results_file), "a name that ends in .json")
    kwargs = options.keyword_arguments(
        model_kwargs, img_size=("--img-size", img_size), pretrained=("--pretrained", pretrained)
    )
    if img_size is not None:
        kwargs["img_size"] = img_size
    target = options.target_device(device)
    precision = precision or ("bfloat16" if target.type == "cuda" else "float32")
    if VARIANTS[variant].graphed and target.type != "cuda":
        raise options.wrong("--variant", variant, "it on a CUDA device only: CUDA graphs need one")
    options.check_prepared("--variant", variant, VARIANTS[variant], target, precision)
    options.backend(backend, target)
    options.check_buildable(model, kwargs)
    photographs.check_folder(images)
    options.output_files({"--results-file": results_file})

    import torch

    import vit_fast
    from vit_fast import parity
    from vit_fast.bench import machine, models
    from vit_fast.input_size import input_size

    torch.manual_seed(0)
    made: Any = models.vit_fast_model(model, pretrained, **kwargs)
    if not pretrained:
        parity.perturb(made)
    made.to(target, getattr(torch, precision))
    size = input_size(made)
    assert size is not None  # every model of the registry has it
    channels, height, width = size
    mean, std = (made.default_cfg.get(key, (0.5,) * channels) for key in ("mean", "std"))
    if len(mean) != channels:
        mean = std = (0.5,) * channels
    photos = photographs.load(images, batch_size, height, width, mean, std)
    pixels = photos.pixels.to(next(made.parameters()))
    try:
        with vit_fast.backend(backend) if backend else contextlib.nullcontext():
            if precision_of := VARIANTS[variant].precision:
                vit_fast.prepare(made, precision=precision_of.name)
            if VARIANTS[variant].graphed:
                made = vit_fast.graphed(made, batch_sizes=[batch_size])
            found = vit_fast.check(made, pixels)
    except (ValueError, vit_fast.UnsupportedError) as error:
        raise CommandError(reason(error)) from error
    _print_certificate(found)
    weights = "pretrained" if pretrained else "random"
    say(f"{model}, variant {variant}, {weights} weights; pixels: {photos.source}.")
    facts: dict[str, Any] = {"name": model, "variant": variant, "weights": weights, "images": photos.source}
    facts |= {"vit_fast": vit_fast.__version__, "commit": machine.commit(), **machine.gpu_state(target)}
    text = json.dumps(facts | found.as_dict(), indent=1, ensure_ascii=False) + "\n"
    written = save("certificate", results_file, lambda path: path.write_text(text, encoding="utf-8"))
    if not (found.passed and written):
        raise typer.Exit(1)
