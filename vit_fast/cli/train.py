"""``vit-fast train``: its flags, checked before anything heavy is imported, and what it prints."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from vit_fast.bench.errors import require
from vit_fast.training.settings import DATASETS, Settings

from . import options
from .errors import INTERRUPTED
from .output import say

AMP_DTYPES = ("bfloat16", "float16")
CLIP_MODES = ("norm", "value", "agc")
SEEDS = 2**31  # numpy takes 32 bits, and each process adds its rank
DEFAULT_FOLDER = Path("out") / "train"
# Where a data set is not photographs: flags left out take these values.
OF_DATASET: dict[str, dict[str, Any]] = {"digits": dict(model="test_vit", no_aug=True, batch_size=64, workers=0)}


def _pair(flag: str, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 < low <= high:
        raise options.wrong(flag, text, "two numbers, the smaller first, like 0.08,1")
    return low, high


def _numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(","))
    except ValueError:
        raise options.wrong(flag, text, "numbers with commas between, like 0.9,0.999") from None


def _check_numbers(given: dict[str, Any]) -> None:
    """Refuses numbers out of their range; None stands for a default."""

    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    for name in ("img_size", "in_chans", "num_classes", "batch_size", "validation_batch_size", "grad_accum_steps"):
        options.at_least(flag(name), given[name], 1)
    for name in ("epochs", "log_interval"):
        options.at_least(flag(name), given[name], 1)
    for name in ("warmup_epochs", "cooldown_epochs", "workers", "recovery_interval", "lora_rank", "seed", "split_seed"):
        options.at_least(flag(name), given[name], 0)
    for name in ("weight_decay", "warmup_lr", "min_lr", "color_jitter", "mixup", "cutmix"):
        options.at_least(flag(name), given[name], 0.0)
    for name in ("lr", "clip_grad", "layer_decay", "opt_eps", "lora_alpha", "decay_epochs", "decay_rate"):
        if given[name] is not None and not 0 < given[name] < float("inf"):
            raise options.wrong(flag(name), given[name], "a number above 0")
    for name in ("drop", "drop_path", "smoothing", "momentum"):
        if not 0 <= given[name] < 1:
            raise options.wrong(flag(name), given[name], "0 or more and less than 1")
    for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob", "model_ema_decay"):
        if not 0 <= given[name] <= 1:
            raise options.wrong(flag(name), given[name], "0 to 1")
    for name in ("seed", "split_seed"):
        if given[name] >= SEEDS:
            raise options.wrong(flag(name), given[name], f"less than {SEEDS}")
    if not 0 < given["val_share"] < 1:
        raise options.wrong("--val-share", given["val_share"], "more than 0 and less than 1")


def _saved(resume: Path | None) -> tuple[dict[str, Any], Path | None]:
    """(the settings in the state of --resume, its folder)."""
    if resume is None:
        return {}, None
    from vit_fast.training import state

    path = state.path_of(resume)
    return state.read(path)["settings"], path.parent


def _as_field(name: str, value: Any) -> Any:
    """A value of JSON as the field of ``Settings`` has it."""
    if name in ("output", "data_dir", "initial_checkpoint") and value is not None:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _settings(context: typer.Context, given: dict[str, Any], saved: dict[str, Any], folder: Path | None) -> Settings:
    """The settings of flags; those left out are the ones of the run that goes on, or of the data set."""
    defaults = saved or OF_DATASET.get(given["dataset"], {})
    sources = {name: context.get_parameter_source(name) for name in given}
    told = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    if "amp" in told:
        told.add("amp_dtype")
    fields = {field.name for field in dataclasses.fields(Settings)}
    values = {}
    for name in fields:
        if name in defaults and name not in told:
            values[name] = _as_field(name, defaults[name])
        else:
            values[name] = given[name]
    if folder is not None:
        if "output" in told and Path(given["output"]).resolve() != folder.resolve():
            raise options.wrong("--output", str(given["output"]), f"it without --resume, or {folder}")
        values["output"] = folder
    elif values["output"] is None:
        values["output"] = DEFAULT_FOLDER / values["model"].replace("/", "_").replace(":", "_")
    return Settings(**values)


def train(
    context: typer.Context,
    data_dir: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of images: train/ and val/ with a folder for each class, or the class folders themselves, of "
            "which --val-share is kept for validation."
        ),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="folder, or digits: scikit-learn's 1797 digits, which need no download.")
    ] = "folder",
    train_split: Annotated[str, typer.Option(help="Folder in DATA_DIR to train on.")] = "train",
    val_split: Annotated[str, typer.Option(help="Folder in DATA_DIR to validate on.")] = "val",
    val_share: Annotated[float, typer.Option(help="Share of each class for validation, without these folders.")] = 0.2,
    split_seed: Annotated[int, typer.Option(help="Draws that share.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder of the run. [default: out/train/MODEL]")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder, bit for bit; its flags are kept.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name of vit_fast or timm. [digits: test_vit]")
    ] = options.DEFAULT_MODEL,
    pretrained: options.Pretrained = False,
    initial_checkpoint: Annotated[
        Path | None, typer.Option(help="File of weights to begin with; a head of other classes is made new.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Outputs. [default: the classes of the data]")] = None,
    img_size: options.ImgSize = None,
    in_chans: Annotated[int | None, typer.Option(help="1 (grey) or 3. [default: the model's; digits 1]")] = None,
    drop: Annotated[float, typer.Option(help="Dropout rate.")] = 0.0,
    drop_path: Annotated[float, typer.Option(help="Drop-path rate.")] = 0.0,
    model_kwargs: options.ModelKwargs = None,
    grad_checkpointing: Annotated[
        bool, typer.Option("--grad-checkpointing", help="Compute activations again in the backward pass.")
    ] = False,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Shell pattern of parameters that are not trained, like 'blocks.0.*'; may be given again."),
    ] = None,
    linear_probe: Annotated[bool, typer.Option("--linear-probe", help="Train the classifier alone.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Train LoRA adapters of this rank and the classifier (peft).")] = 0,
    lora_alpha: Annotated[float, typer.Option(help="Their scale, over the rank.")] = 16.0,
    lora_targets: Annotated[str, typer.Option(help="Names of the layers that get one.")] = "qkv,proj,fc1,fc2",
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", help="Images of a process and a backward pass. [digits: 64]")
    ] = 128,
    validation_batch_size: Annotated[
        int | None, typer.Option("--validation-batch-size", "-vb", help="[default: as --batch-size]")
    ] = None,
    grad_accum_steps: Annotated[int, typer.Option(help="Backward passes of an update.")] = 1,
    opt: Annotated[str, typer.Option(help="Optimiser of timm.")] = "adamw",
    opt_eps: Annotated[float | None, typer.Option(help="Its epsilon.")] = None,
    opt_betas: Annotated[str | None, typer.Option(help="Its betas, like 0.9,0.999.")] = None,
    momentum: Annotated[float, typer.Option(help="Its momentum.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay, not of biases and norms.")] = 0.05,
    layer_decay: Annotated[
        float | None, typer.Option(help="Factor of the rate from each block to the one before.")
    ] = None,
    clip_grad: Annotated[float | None, typer.Option(help="Clip gradients to this. [default: not]")] = None,
    clip_mode: Annotated[str, typer.Option(help="norm, value or agc.")] = "norm",
    sched: Annotated[str, typer.Option(help="Schedule of timm: cosine, tanh, step, poly, ...")] = "cosine",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    warmup_lr: Annotated[float, typer.Option(help="Rate at the start of the warm-up.")] = 1e-5,
    min_lr: Annotated[float, typer.Option(help="Rate at the end.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Epochs, warm-up included.")] = 30,
    warmup_epochs: Annotated[int, typer.Option(help="Epochs of the warm-up.")] = 5,
    cooldown_epochs: Annotated[int, typer.Option(help="Further epochs at --min-lr.")] = 0,
    decay_epochs: Annotated[float, typer.Option(help="Epochs between the steps of --sched step.")] = 90.0,
    decay_rate: Annotated[float, typer.Option(help="Factor of the steps, power of poly.")] = 0.1,
    no_aug: Annotated[bool, typer.Option("--no-aug", help="No augmentation. [digits: so]")] = False,
    scale: Annotated[str | None, typer.Option(help="Share of the image in a crop. [default: 0.08,1]")] = None,
    ratio: Annotated[str | None, typer.Option(help="Its width over its height. [default: 0.75,1.33]")] = None,
    hflip: Annotated[float, typer.Option(help="Probability of a horizontal flip.")] = 0.5,
    vflip: Annotated[float, typer.Option(help="Probability of a vertical flip.")] = 0.0,
    color_jitter: Annotated[float, typer.Option(help="Strength of colour jitter.")] = 0.4,
    aa: Annotated[str | None, typer.Option(help="timm's auto-augment policy, like rand-m9-mstd0.5-inc1.")] = None,
    reprob: Annotated[float, typer.Option(help="Probability of random erasing.")] = 0.0,
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
    mixup: Annotated[float, typer.Option(help="Mixup alpha; 0 is none.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="CutMix alpha; 0 is none.")] = 0.0,
    mixup_prob: Annotated[float, typer.Option(help="Probability of either.")] = 1.0,
    mixup_switch_prob: Annotated[float, typer.Option(help="Probability of CutMix where both are on.")] = 0.5,
    model_ema: Annotated[bool, typer.Option("--model-ema", help="Keep and validate averaged weights.")] = False,
    model_ema_decay: Annotated[float, typer.Option(help="Their decay.")] = 0.9998,
    model_ema_warmup: Annotated[bool, typer.Option("--model-ema-warmup", help="A smaller decay at first.")] = False,
    amp: Annotated[bool, typer.Option("--amp", help="Train under autocast.")] = False,
    amp_dtype: Annotated[
        str | None, typer.Option(help="bfloat16, or float16 with loss scaling, for --amp. [default: bfloat16]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order, augmentation, dropout.")] = 42,
    workers: Annotated[int, typer.Option("--workers", "-j", help="Processes that load images. [digits: 0]")] = 4,
    log_interval: Annotated[int, typer.Option(help="Updates between looks at the loss.")] = 50,
    recovery_interval: Annotated[int, typer.Option(help="Updates between savings; 0: after each epoch alone.")] = 0,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Under torchrun: FSDP2 in the place of DDP.")] = False,
    device: options.Device = None,
    backend: options.Backend = None,
) -> None:
    """Train or fine-tune a model on images by class. torchrun -m vit_fast train ... trains in several processes."""
    given = dict(locals())
    options.one_of("--dataset", dataset, DATASETS)
    options.one_of("--clip-mode", clip_mode, CLIP_MODES)
    _check_numbers(given)
    if amp_dtype is not None:
        amp_dtype = options.precision("--amp-dtype", amp_dtype, AMP_DTYPES)
        if not amp and resume is None:
            raise options.wrong("--amp-dtype", amp_dtype, "it together with --amp")
    if linear_probe and lora_rank:
        raise options.wrong("--linear-probe", linear_probe, "it without --lora-rank, which trains adapters too")
    given |= dict(
        model_kwargs=options.keyword_arguments(
            model_kwargs,
            img_size=("--img-size", img_size),
            in_chans=("--in-chans", in_chans),
            drop_rate=("--drop", drop or None),
            drop_path_rate=("--drop-path", drop_path or None),
            num_classes=("--num-classes", True),
            pretrained=("--pretrained", True),
        ),
        freeze=tuple(freeze or ()),
        lora_targets=tuple(lora_targets.split(",")),
        opt_betas=_numbers("--opt-betas", opt_betas),
        scale=_pair("--scale", scale) or Settings.scale,
        ratio=_pair("--ratio", ratio) or Settings.ratio,
        amp_dtype=(amp_dtype or "bfloat16") if amp else amp_dtype,
    )
    target = options.target_device(device)
    options.backend(backend, target)
    for module in ("timm", "matplotlib", "safetensors"):
        require(module, "train")
    saved, folder = _saved(resume)
    settings = _settings(context, given, saved, folder)
    if (settings.data_dir is None) == (settings.dataset == "folder"):
        wanted = "a folder of images by class" if settings.dataset == "folder" else "it with --dataset folder alone"
        raise options.wrong("DATA_DIR", settings.data_dir and str(settings.data_dir), wanted)
    if settings.data_dir is not None and not settings.data_dir.is_dir():
        raise options.wrong("DATA_DIR", str(settings.data_dir), "a folder of images by class")
    if settings.initial_checkpoint is not None and resume is None:
        if settings.pretrained:
            raise options.wrong("--initial-checkpoint", str(settings.initial_checkpoint), "it without --pretrained")
        if not settings.initial_checkpoint.is_file():
            raise options.wrong("--initial-checkpoint", str(settings.initial_checkpoint), "a file of weights")
    _run(settings, target, resume)


def _run(settings: Settings, device: Any, resume: Path | None) -> None:
    from vit_fast.training import loop, parallel, run_folder

    from . import report

    with parallel.joined(device) as processes, report.progress() as tell:

        def warn(text: str) -> None:
            if processes.first:
                tell.warn(text)

        def keep(row: dict[str, Any]) -> None:
            if processes.first:
                with tell.paused():
                    say(_sentence(row, run))

        run = loop.Run(settings, processes, warn, resume)
        if processes.first:
            with tell.paused():
                say(_head(run))
        try:
            rows = run.fit(tell if processes.first else lambda text, done: None, keep)
        except KeyboardInterrupt:
            if processes.first:
                with tell.paused():
                    say(f"Interrupted. {_way_on(run_folder.STATE, settings.output)}")
            raise typer.Exit(INTERRUPTED) from None
        finally:
            if processes.first and run.progress.rows:
                run_folder.save_plot(settings.output, run.progress.rows, _title(settings))
    if processes.first:
        best = rows[run.progress.best or 0]
        say(
            f"Best top-1 accuracy {best['eval_top1']:.2f} % after epoch {best['epoch'] + 1}. Weights, table and plot: "
            f"{settings.output}"
        )
    parallel.end(processes)


def _way_on(state: str, folder: Path) -> str:
    """How a run that was stopped is taken up again."""
    if (folder / state).exists():
        return f"--resume {folder} goes on where the last state was saved."
    return "No state was saved yet; the same command begins again."


def _title(settings: Settings) -> str:
    return f"{settings.model}, {settings.data_dir or settings.dataset}"


def _head(run: Any) -> str:
    own, count = run.settings, sum(parameter.numel() for parameter in run.parameters)
    processes = f", {run.processes.count} processes" if run.processes.count > 1 else ""
    begun = f", going on after {len(run.progress.rows)} epochs" if run.progress.rows or run.progress.update else ""
    return (
        f"{own.model}, {count / 1e6:.2f} M parameters to train, {len(run.data.classes)} classes, "
        f"{len(run.data.train.labels)} images to train on, {len(run.data.val.labels)} to validate on; "
        f"{run.updates} updates an epoch, {run.processes.device}{processes}{begun}."
    )


def _sentence(row: dict[str, Any], run: Any) -> str:
    return (
        f"epoch {row['epoch'] + 1}/{run.epochs}: loss {row['train_loss']:.4f}, validation {row['eval_loss']:.4f}, "
        f"top-1 {row['eval_top1']:.2f} %, lr {row['lr']:.2e}, {row['train_samples_per_sec']:.0f} images/s"
    )
