"""The settings of a training run, named as timm's flags where timm has them. Needs no torch."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import TrainingError

DATASETS = ("folder", "digits")
# A run may go on with another value of these, and computes the same.
FREE = ("output", "workers", "log_interval", "recovery_interval", "device")


@dataclass(frozen=True)
class Settings:
    """The settings of a run; lengths in epochs, rates per update.

    Attributes:
        model: a name of ``vit_fast.create_model`` or of timm.
        output: the folder of the run.
        data_dir: a folder with the sub-folders ``train_split`` and ``val_split``, or one of class folders, of which a
            share ``val_share`` of each class, drawn with ``split_seed``, is kept for validation.
        num_classes: outputs of the model; None: as many as the data set has classes.
        batch_size: images of one process and one backward pass; an update has ``grad_accum_steps`` of them.
        lora_rank: rank of the adapters of the linear layers in ``lora_targets``; 0 for none.
        freeze: shell patterns of names of parameters that are not trained; linear_probe: all but the classifier.
        amp_dtype: dtype of autocast, None without.
        recovery_interval: updates between savings inside an epoch; 0 saves at its end alone.
        backend: forced backend of vit_fast.
    """

    model: str
    output: Path
    dataset: str = "folder"
    data_dir: Path | None = None
    train_split: str = "train"
    val_split: str = "val"
    val_share: float = 0.2
    split_seed: int = 0
    num_classes: int | None = None
    pretrained: bool = False
    initial_checkpoint: Path | None = None
    img_size: int | None = None
    in_chans: int | None = None
    drop: float = 0.0
    drop_path: float = 0.0
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    grad_checkpointing: bool = False
    freeze: tuple[str, ...] = ()
    linear_probe: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")
    batch_size: int = 128
    validation_batch_size: int | None = None
    grad_accum_steps: int = 1
    opt: str = "adamw"
    opt_eps: float | None = None
    opt_betas: tuple[float, ...] | None = None
    momentum: float = 0.9
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = None
    clip_mode: str = "norm"
    sched: str = "cosine"
    lr: float = 1e-3
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    epochs: int = 30
    warmup_epochs: int = 5
    cooldown_epochs: int = 0
    decay_epochs: float = 90.0
    decay_rate: float = 0.1
    no_aug: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    aa: str | None = None
    reprob: float = 0.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    amp_dtype: str | None = None
    seed: int = 42
    workers: int = 4
    log_interval: int = 50
    recovery_interval: int = 0
    fsdp: bool = False
    device: str | None = None
    backend: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The settings in types of JSON."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def check_same(saved: dict[str, Any], now: Settings, subject: str) -> None:
    """Refuses to go on with settings by which a run would compute something else.

    Args:
        saved: ``as_dict`` of the settings in a checkpoint, which ``subject`` names.
    """
    own = now.as_dict()
    if saved.keys() != own.keys():
        odd = ", ".join(sorted(saved.keys() ^ own.keys()))
        raise TrainingError(f"{subject} is of another version of vit_fast: its settings differ in {odd}")
    for name, value in own.items():
        if name not in FREE and saved[name] != value:
            flag = f"--{name.replace('_', '-')}"
            raise TrainingError(f"{flag} is {value!r}, expected {saved[name]!r} as in {subject}")
