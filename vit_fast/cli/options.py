"""Flags that several verbs have, and the checks of their values."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vit_fast.bench.errors import WrongValueError
from vit_fast.bench.results import check_writable

from .errors import CommandError

if TYPE_CHECKING:
    import torch

    from vit_fast.bench.providers import Variant

DEFAULT_MODEL = "vit_base_patch16_224"
PRECISIONS = ("float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Model = Annotated[str, typer.Option("--model", "-m", help="timm's name of the model.")]
ImgSize = Annotated[int | None, typer.Option(help="Pixels along a side. [default: the model's]")]
Precision = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16 (fp32, bf16, fp16) weights and images. [default: GPU bfloat16, CPU float32]"
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one, else cpu]")]
Backend = Annotated[str | None, typer.Option(help="Force vit_fast's backend: auto, triton, cuda, cpu or torch.")]
Images = Annotated[
    Path | None, typer.Option(help="Folder of photographs. [default: the sample photograph of matplotlib]")
]
ModelKwargs = Annotated[
    list[str] | None, typer.Option(help="A keyword argument of the model, like depth=6; may be given again.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="timm's trained weights (a download).")]


def wrong(flag: str, got: object, wanted: str) -> typer.BadParameter:
    """The error of a flag whose value cannot be used."""
    return typer.BadParameter(f"got {got!r}, wanted {wanted}", param_hint=flag)


def one_of(flag: str, value: str, choices: Sequence[str]) -> str:
    """The value, which must be one of the choices."""
    if value not in choices:
        raise wrong(flag, value, " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1]))))
    return value


def precision(flag: str, name: str | None, choices: Sequence[str] = PRECISIONS) -> str | None:
    """The full name of a dtype given as, for example, bf16 or bfloat16; None stays None."""
    return None if name is None else one_of(flag, _SHORT.get(name, name), choices)


def list_of(flag: str, text: str, choices: Sequence[str]) -> tuple[str, ...]:
    """The values of a comma-separated text, without repetition."""
    return tuple(one_of(flag, value, choices) for value in dict.fromkeys(text.split(",")))


def at_least(flag: str, value: float | None, least: float) -> None:
    """Refuses a number below the least, and a whole one beyond 64 bits; None stands for a default."""
    if isinstance(value, int) and value >= 2**63:  # PyTorch takes no larger one
        raise wrong(flag, value, "a whole number of 64 bits")
    if value is not None and not value >= least:  # refuses NaN too
        raise wrong(flag, value, f"a whole number of {least} or more" if isinstance(value, int) else f"{least} or more")


def _keyword(text):
    import ast

    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise wrong("--model-kwargs", text, "key=value, like depth=6")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def keyword_arguments(texts: list[str] | None, **flags: tuple[str, object]) -> dict[str, Any]:
    """The keyword arguments of --model-kwargs.

    Args:
        flags: the arguments that a flag gives too, as (flag, its value); None stands for one that is not given.
    """
    found = dict(_keyword(part) for text in texts or () for part in text.split())
    for key, (flag, value) in flags.items():
        if key in found and value is not None:
            raise wrong("--model-kwargs", f"{key}={found[key]}", f"{key} by {flag} alone")
    return found


def target_device(text: str | None) -> "torch.device":
    """The device of --device, or the default device."""
    from vit_fast.bench import machine

    try:
        return machine.target_device(text)
    except WrongValueError as error:
        raise wrong("--device", error.got, error.wanted) from None


def backend_name(name: str) -> str:
    """The name, which must be that of a backend."""
    from vit_fast import backends

    return one_of("--backend", name, backends.names())


def backend(name: str | None, device: "torch.device") -> None:
    """Refuses a backend, of ``--backend`` or else of the environment, that can run nothing on the device."""
    from vit_fast import backends

    if name is not None:
        backend_name(name)
    try:
        chosen = name or backends.requested()
    except ValueError as error:
        raise CommandError(str(error)) from error
    reasons = () if chosen == "auto" else backends.unavailable(chosen, device)
    if reasons:
        told = f"a backend that runs on {device}, as torch does: {'; '.join(reasons)}"
        raise wrong("--backend" if name else "VIT_FAST_BACKEND", chosen, told)


def why_not_prepared(variant: "Variant", device: "torch.device", precision: str) -> Sequence[str]:
    """Why weights of a dtype cannot be prepared to a variant's precision on a device; empty where they can."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vit_fast import backends

    if variant.precision is None:
        return ()
    compiled = device.type == "cpu" and not backends.unavailable("cpu", device)
    form = variant.precision.form("cpu") if compiled else variant.precision
    with FakeTensorMode():
        weight = torch.empty(64, 64, dtype=getattr(torch, precision), device=device)
    return form.not_supported_reasons([weight])


def check_prepared(flag: str, name: str, variant: "Variant", device: "torch.device", precision: str) -> None:
    """Refuses a variant, the value of a flag, that weights of a dtype cannot be prepared to on a device."""
    if reasons := why_not_prepared(variant, device, precision):
        raise wrong(flag, name, f"it with another --precision: {'; '.join(reasons)}")


def check_buildable(name: str, kwargs: dict[str, Any], img_size: int | None = None) -> None:
    """Refuses a model that vit_fast cannot make, without allocating it."""
    from vit_fast.bench import models

    models.check_buildable(name, **(kwargs if img_size is None else kwargs | {"img_size": img_size}))


def output_files(files: dict[str, Path | None]) -> None:
    """Checks ahead that every output of a verb, {flag: path or None}, can be opened; keeps existing files."""
    flags: dict[Path, str] = {}
    for flag, path in files.items():
        if path is not None and output_file(flag, path) is not None:
            first = flags.setdefault(path.resolve(), flag)
            if first != flag:
                raise wrong(flag, str(path), f"another file than {first}")


def output_file(flag: str, path: Path | None) -> Path | None:
    """The path, checked to be writable; a file created by the check is removed again."""
    try:
        if path is not None:
            check_writable(path)
    except WrongValueError as error:
        raise wrong(flag, error.got, error.wanted) from error
    return path
