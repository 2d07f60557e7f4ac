"""Flags that several verbs have, and the checks of what was given."""

import difflib
import os
from pathlib import Path
from typing import Annotated

import typer

from . import CommandError, reason

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
ModelKwargs = Annotated[list[str] | None, typer.Option(help="A constructor word, like depth=6; may be given again.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="timm's trained weights (a download).")]


def wrong(flag, got, wanted):
    return typer.BadParameter(f"got {got!r}, wanted {wanted}", param_hint=flag)


def one_of(flag, value, words):
    if value not in words:
        raise wrong(flag, value, " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))))
    return value


def precision(flag, word, words=PRECISIONS):
    """The dtype of a word such as bf16 or bfloat16; None stays None."""
    return None if word is None else one_of(flag, _SHORT.get(word, word), words)


def list_of(flag, text, words):
    return tuple(one_of(flag, word, words) for word in dict.fromkeys(text.split(",")))


def at_least(flag, value, least):
    if value is not None and not value >= least:  # NaN is neither
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


def backend_word(word):
    from vit_fast import backends

    return one_of("--backend", word, backends.words())


def backend(word, device):
    """Refuses a backend, of ``--backend`` or else of the environment, that can run nothing on the device."""
    from vit_fast import backends

    if word is not None:
        backend_word(word)
    try:
        chosen = word or backends.requested()
    except ValueError as error:
        raise CommandError(str(error)) from error
    reasons = () if chosen == "auto" else backends.unavailable(chosen, device)
    if reasons:
        told = f"a backend that runs on {device}, as torch does: {'; '.join(reasons)}"
        raise wrong("--backend" if word else "VIT_FAST_BACKEND", chosen, told)


def _cannot_make(owner, name, error):
    return CommandError(f"{owner} cannot make the model {name!r}: {reason(error)}")


def buildable(name, words):
    """Refuses a model that vit_fast cannot make, at no cost: it is made without memory."""
    import torch

    import vit_fast

    try:
        with torch.device("meta"):
            vit_fast.create_model(name, **words)
    except (ValueError, TypeError, vit_fast.UnsupportedError) as error:
        raise _cannot_make("vit_fast", name, error) from error


def timm_model(name, pretrained=False, **words):
    """A model of timm; an unknown name is told with its neighbours."""
    import timm

    if not timm.is_model(name) and ":" not in name:
        near = ", ".join(difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5))
        raise _cannot_make("timm", name, f"unknown model{near and '; near: ' + near}")
    try:
        return timm.create_model(name, pretrained=pretrained, **words)
    except Exception as error:
        raise _cannot_make("timm", name, error) from error


def output_files(files):
    """Opens every output of a verb before its work, {flag: path or None}, and leaves what is there as it is."""
    flags = {}
    for flag, path in files.items():
        if output_file(flag, path) is not None:
            first = flags.setdefault(path.resolve(), flag)
            if first != flag:
                raise wrong(flag, str(path), f"another file than {first}")


def output_file(flag, path):
    """The path, once a file there has been opened for writing; a file that this makes is removed again."""
    if path is None:
        return None
    if path.is_dir():
        raise wrong(flag, str(path), "the name of a file, not of a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not os.path.lexists(path)
        with open(path, "ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise wrong(flag, str(path), f"a file that can be written ({error.strerror or error})") from error
    return path
