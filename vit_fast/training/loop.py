"""A run: epochs of training and validation, a row for each, and what is written after it.

Nothing that is not finite is ever written: a loss of NaN or infinity ends the run, and so do weights that are not
finite when they are about to be saved. The files of before stay.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vit_fast

from . import datasets, models, optimization, run_folder, state
from .errors import TrainingError
from .loading import NOT_COUNTED, TrainingBatches, ValidationBatches, transforms
from .parallel import Processes, synchronised, wrapped
from .settings import Settings, check_same


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: the current one, from 0; update: updates done in it.
        loss, images: the sum of the losses of these updates, times their images; the number of these images.
        rows: of the epochs that are done.
        best: the number of the epoch with the best accuracy.
    """

    epoch: int = 0
    update: int = 0
    loss: float = 0.0
    images: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: int | None = None


def check(settings: Settings) -> None:
    """Refuses settings that contradict each other."""
    if settings.fsdp:
        for name in ("model_ema", "lora_rank"):
            if getattr(settings, name):
                raise TrainingError(f"--{name.replace('_', '-')} is given with --fsdp, expected it without")
        if settings.amp_dtype == "float16":
            raise TrainingError("--amp-dtype is 'float16' with --fsdp, expected bfloat16")
    if settings.lora_rank and settings.layer_decay is not None:
        raise TrainingError("--layer-decay is given with --lora-rank, expected it without")
    if (settings.mixup or settings.cutmix) and settings.batch_size % 2:
        raise TrainingError(f"--batch-size is {settings.batch_size}, expected an even number for mixup and cutmix")
    optimization.check(settings)


class Run:
    """A run, ready to begin or to go on: everything that can be wrong ahead has been looked at.

    Args:
        resume: the file or folder of a run to go on with, in the folder of the settings.
        warn: told what the user should know.
    Raises:
        TrainingError: data, a model, a checkpoint or a folder that cannot be used.
    """

    def __init__(
        self, settings: Settings, processes: Processes, warn: Callable[[str], None], resume: Path | None = None
    ) -> None:
        check(settings)
        self.settings, self.processes = settings, processes
        saved = None if resume is None else state.read(path := state.path_of(resume))
        if saved is not None:
            check_same(saved["settings"], settings, repr(str(path)))
            if len(saved["random"]) != processes.count:
                raise TrainingError(
                    f"--resume: {str(path)!r} is of {len(saved['random'])} processes, expected as many as now: "
                    f"{processes.count}"
                )
            if saved["torch"] != torch.__version__:
                warn(f"the state was written by torch {saved['torch']}: with {torch.__version__} bits may differ")
        in_chans = models.check(settings)
        self.data = datasets.load(settings, in_chans, warn)
        self.images = [len(part.labels) for part in (self.data.train, self.data.val)]
        if saved is not None:
            state.check_data(saved, self.data.classes, self.images, path)
        self.classes = settings.num_classes or len(self.data.classes)
        torch.manual_seed(settings.seed)
        begin = settings if saved is None else replace(settings, pretrained=False, initial_checkpoint=None)
        self.plain = models.build(begin, len(self.data.classes), warn).to(processes.device)
        config = models.data_config(self.plain, settings)
        train, val = transforms(settings, config)
        self.training = TrainingBatches(self.data.train, train, settings, processes)
        self.validation = ValidationBatches(self.data.val, val, settings, processes)
        self.updates = -(-self.training.count // settings.grad_accum_steps)  # of an epoch
        with self._backend():
            self.plain.eval()
            models.check_logits(
                self.plain, torch.zeros(2, *config["input_size"], device=processes.device), self.classes
            )
            self.plain.train()
        self.ema = self._average()
        self.model = wrapped(self.plain, processes, settings.fsdp)
        self.optimizer = optimization.optimizer(self.plain, settings)
        self.parameters = [parameter for parameter in self.plain.parameters() if parameter.requires_grad]
        self.scheduler, self.epochs = optimization.scheduler(self.optimizer, settings, self.updates)
        self.stepping = optimization.Updates(settings, processes.device)
        self.mix = self._mix()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mix else settings.smoothing)
        self.progress = Progress()
        self._seed()
        if saved is not None:
            self._load(saved)
        processes.together(lambda: run_folder.claim(settings.output, resumed=saved is not None))
        processes.together(lambda: run_folder.save_settings(settings.output, settings))

    def _backend(self) -> contextlib.AbstractContextManager[Any]:
        name = self.settings.backend
        return vit_fast.backend(name) if name else contextlib.nullcontext()

    def _average(self) -> Any:
        from timm.utils import ModelEmaV3

        if not self.settings.model_ema:
            return None
        own = self.settings
        return ModelEmaV3(self.plain, decay=own.model_ema_decay, use_warmup=own.model_ema_warmup)

    def _mix(self) -> Any:
        from timm.data import Mixup

        own = self.settings
        if not (own.mixup or own.cutmix):
            return None
        return Mixup(
            mixup_alpha=own.mixup,
            cutmix_alpha=own.cutmix,
            prob=own.mixup_prob,
            switch_prob=own.mixup_switch_prob,
            label_smoothing=own.smoothing,
            num_classes=self.classes,
        )

    def _seed(self) -> None:
        """Other numbers in every process: the model, made before, is the same in all."""
        from timm.utils import random_seed

        random_seed(self.settings.seed, self.processes.rank)

    def _load(self, saved: dict[str, Any]) -> None:
        state.load_model(self.plain, self.optimizer, saved, self.settings.fsdp)
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["state_dict_ema"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.stepping.scaler is not None:
            self.stepping.scaler.load_state_dict(saved["scaler"])
        self.progress = Progress(**saved["progress"])
        state.set_random_state(saved["random"][self.processes.rank], self.processes.device)

    def fit(
        self,
        tell: Callable[[str, float], None] = lambda text, done: None,
        keep: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> list[dict[str, Any]]:
        """Trains to the last epoch; returns a row for each.

        Args:
            tell: called with a text and the fraction of the run that is done.
            keep: called with the row of each epoch.
        Raises:
            TrainingError: a loss or weights that are not finite, an image that cannot be read, a file that cannot be
                written. The files of before are kept.
        """
        done = self.progress
        with self._backend():
            while done.epoch < self.epochs:
                began, before = time.perf_counter(), done.images
                self._train(tell)
                seconds = time.perf_counter() - began
                row = self._row((done.images - before) * self.processes.count / seconds)
                done.rows.append(row)
                better = done.best is None or row["eval_top1"] > done.rows[done.best]["eval_top1"]
                done.best = done.epoch if better else done.best
                done.epoch, done.update, done.loss, done.images = done.epoch + 1, 0, 0.0, 0
                self._save(True, better)
                keep(row)
        return done.rows

    def _train(self, tell: Callable[[str, float], None]) -> None:
        """The updates of the current epoch that are left."""
        own, done = self.settings, self.progress
        self.model.train()
        batches = self.training.epoch(done.epoch, done.update * own.grad_accum_steps)
        unseen: list[tuple[float, torch.Tensor, int]] = []  # learning rate, mean loss, images of updates
        while done.update < self.updates:
            rate = self.optimizer.param_groups[-1]["lr"]
            loss, images = self._update(batches)
            unseen.append((rate, loss, images))
            done.update += 1
            total = done.epoch * self.updates + done.update
            self.scheduler.step_update(total)
            if self.ema is not None:
                self.ema.update(self.plain, step=total)
            saves = own.recovery_interval and done.update % own.recovery_interval == 0 and done.update < self.updates
            if len(unseen) >= own.log_interval or saves or done.update == self.updates:
                mean = self._look_at(unseen)
                text = f"epoch {done.epoch + 1}/{self.epochs}, update {done.update}/{self.updates}, loss {mean:.4f}"
                tell(text, total / (self.epochs * self.updates))
                unseen.clear()
            if saves:
                self._save(ended=False)

    def _update(self, batches: Iterator[Any]) -> tuple[torch.Tensor, int]:
        """One update; returns its mean loss, on the device, and its images."""
        own = self.settings
        left = self.training.count - self.progress.update * own.grad_accum_steps
        count = min(own.grad_accum_steps, left)
        total, images_seen = torch.zeros((), device=self.processes.device), 0
        for turn in range(count):
            images, labels = next(batches)
            images_seen += len(images)
            if self.mix is not None:
                images, labels = self.mix(images, labels)
            last = turn == count - 1
            with synchronised(self.model, last):
                with self.stepping.autocast():
                    logits = self.model(images)
                    if not isinstance(logits, torch.Tensor):
                        raise TrainingError(f"--model: its output in training is a {type(logits).__name__}, not logits")
                    loss = self.criterion(logits, labels) / count
                total += loss.detach()
                self.stepping.backward(loss, self.optimizer, self.parameters, update=last)
        return total, images_seen

    def _look_at(self, unseen: list[tuple[float, torch.Tensor, int]]) -> float:
        """Adds up losses, and ends the run at the first that is not finite; returns the mean."""
        done = self.progress
        losses = torch.stack([loss for _, loss, _ in unseen]).tolist()
        first = done.update - len(unseen)
        for index, (loss, (rate, _, images)) in enumerate(zip(losses, unseen)):
            if not abs(loss) < float("inf"):
                raise TrainingError(
                    f"the loss is {loss} at update {first + index + 1} of epoch {done.epoch + 1} (step "
                    f"{done.epoch * self.updates + first + index + 1}), with the learning rate {rate:.3g}; "
                    f"{self._kept()}. A smaller --lr, --clip-grad 1 or --amp-dtype bfloat16 may help"
                )
            done.loss += loss * images
            done.images += images
        return sum(losses) / len(losses)

    def _kept(self) -> str:
        path = self.settings.output / run_folder.STATE
        return f"{str(path)!r} is the last good checkpoint" if path.exists() else "no checkpoint was written yet"

    @torch.no_grad()
    def _validate(self) -> tuple[float, float, float]:
        """(mean loss, top-1 and top-5 accuracy in percent) of the weights that are kept."""
        model = self.model if self.ema is None else self.ema.module
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.processes.device)  # loss, top-1, top-5, images
        for images, labels in self.validation:
            with self.stepping.autocast():
                logits = model(images)
            losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=NOT_COUNTED)
            hits = logits.topk(min(5, self.classes), dim=1).indices == labels[:, None]
            sums += torch.stack([losses.sum(), hits[:, 0].sum(), hits.sum(), (labels != NOT_COUNTED).sum()])
        loss, top1, top5, count = self.processes.summed(sums.tolist())
        return loss / count, 100 * top1 / count, 100 * top5 / count

    def _row(self, speed: float) -> dict[str, Any]:
        done = self.progress
        loss, images = self.processes.summed([done.loss, float(done.images)])
        eval_loss, top1, top5 = self._validate()
        if not eval_loss < float("inf"):
            raise TrainingError(
                f"the loss of validation is {eval_loss} after epoch {done.epoch + 1} (step "
                f"{(done.epoch + 1) * self.updates}), with the learning rate {self._rate():.3g}; {self._kept()}"
            )
        return {
            "epoch": done.epoch,
            "train_loss": loss / images,
            "eval_loss": eval_loss,
            "eval_top1": top1,
            "eval_top5": top5,
            "lr": self._rate(),
            "train_samples_per_sec": speed,
        }

    def _rate(self) -> float:
        return self.optimizer.param_groups[-1]["lr"]

    def _save(self, ended: bool, better: bool = False) -> None:
        """Writes the state of the run, and at the end of an epoch before it what else the epoch leaves.

        The state comes last: where a failure keeps it from being written, the epoch is done again.
        """
        own, done = self.settings, self.progress
        weights, adapted = state.model_state(self.plain, self.optimizer, own.fsdp)
        whole = {
            "format": state.FORMAT,
            "version": state.VERSION,
            "vit_fast": vit_fast.__version__,
            "torch": str(torch.__version__),
            "settings": own.as_dict(),
            "classes": list(self.data.classes),
            "images": self.images,
            "progress": vars(done),
            "state_dict": weights,
            "optimizer": adapted,
            "scheduler": self.scheduler.state_dict(),
            "random": self.processes.gathered(state.random_state(self.processes.device)),
        }
        if self.ema is not None:
            whole["state_dict_ema"] = self.ema.module.state_dict()
        if self.stepping.scaler is not None:
            whole["scaler"] = self.stepping.scaler.state_dict()

        def write() -> None:
            for name, tensor in weights.items():  # whole in the first process alone, where FSDP2 shards them
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    step = done.epoch * self.updates + done.update
                    raise TrainingError(
                        f"{name} is not finite after step {step}, with the learning rate {self._rate():.3g}; "
                        f"{self._kept()}"
                    )
            if ended:
                kept = weights if own.fsdp else models.plain_state(self.ema.module if self.ema else self.plain)
                facts = {"model": own.model, "classes": "\n".join(self.data.classes), "epoch": str(done.epoch)}
                for name in (run_folder.LAST, *[run_folder.BEST] * better):
                    run_folder.save_weights(own.output / name, kept, facts)
                run_folder.save_table(own.output, done.rows)
            run_folder.save_state(own.output, whole)

        self.processes.together(write)
