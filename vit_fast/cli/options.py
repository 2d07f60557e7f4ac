"""Flags that several verbs have, and the checks of what was given."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "vit_base_patch16_224"
PRECISIONS = ("float32", "bfloat16", "float16")
BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")

Model = Annotated[str, typer.Option("--model", "-m", help="timm's name of the model.")]
ImgSize = Annotated[int | None, typer.Option(help="Pixels along a side. [default: the model's]")]
Precision = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16 weights and images. [default: GPU bfloat16, CPU float32]"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one, else cpu]")]
Backend = Annotated[str | None, typer.Option(help="Force vit_fast's backend: auto, triton, cuda, cpu or torch.")]
Images = Annotated[
    Path | None, typer.Option(help="Folder of photographs. [default: the sample photograph of matplotlib]")
]
ModelKwargs = Annotated[list[str] | None, typer.Option(help="A constructor word, like depth=6; may be given again.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="timm's trained weights (a download).")]


def wrong(flag, got, wanted):
    return typer.BadParameter(f"got {got!r}, wanted {wanted}", param_hint=flag)


def one_of(flag, value, words):
    if value not in words:
        raise wrong(flag, value, " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))))
    return value


def list_of(flag, text, words):
    return tuple(one_of(flag, word, words) for word in dict.fromkeys(text.split(",")))


def at_least(flag, value, least):
    if value is not None and value < least:
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


def keywords(texts):
    """The constructor words of --model-kwargs."""
    return dict(_keyword(part) for text in texts or () for part in text.split())


def target_device(text):
    import torch

    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise wrong("--device", text, "cpu, cuda or cuda:N") from None
    if device.type not in ("cuda", "cpu"):
        raise wrong("--device", text, "cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise wrong("--device", text, "cpu: there is no CUDA device here")
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        if device.index >= count:
            raise wrong("--device", text, f"one of cuda:0 to cuda:{count - 1}")
    return device


def output_file(flag, path):
    if path is None:
        return None
    if path.is_dir():
        raise wrong(flag, str(path), "the name of a file, not of a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise wrong(flag, str(path), f"a file in a folder that can be made ({error})") from error
    return path
