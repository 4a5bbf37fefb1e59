"""One run of a study, from data to result: trained by Lightning, resumed where it was stopped, filed when done."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import nn
from torch.utils.data import DataLoader

import fastlayers as fl
from fastlayers import data, models
from fastlayers.data.augmentation import Augmentation, Augmenter
from fastlayers.fusion.interrupts import uninterrupted
from fastlayers.studies.checkpoints import RunCheckpoints
from fastlayers.studies.classifier import Batch, Classifier
from fastlayers.studies.config import Network, Training
from fastlayers.studies.landscape import Landscape
from fastlayers.studies.results import FAILURE_FILE, Environment, Job, Layers, Precision, Result, Store
from fastlayers.writing import remove_partials, write_whole

# Nothing is kept of an evaluation, so that its batches can be large.
EVALUATION_BATCH = 500
# Of each of the data sets.
CLASSES = 10
BEST, LAST = "best", "last"

_PRECISIONS: dict[Precision, str] = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


class Machine(BaseModel):
    """Where and how runs run; none of it changes what they compute, but for rounding.

    `devices` processes on each of `nodes` machines share every batch.
    """

    model_config = ConfigDict(frozen=True)

    out: Path
    data_dir: Path | None = None
    download: bool = False
    device: str = "auto"
    devices: PositiveInt = 1
    nodes: PositiveInt = 1
    threads: PositiveInt | None = None
    progress: bool = True

    @property
    def processes(self) -> int:
        """All of them."""
        return self.devices * self.nodes


def share_of_batch(batch_size: int, processes: int) -> int:
    """How many images of a batch each process takes; ValueError where they cannot all take as many."""
    share, rest = divmod(batch_size, processes)
    if rest:
        raise ValueError(f"batch_size: {batch_size} cannot be shared by {processes} processes")
    return share


class _ProgressBar(TQDMProgressBar):
    """Lightning's, without the number of a version."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class Images(pl.LightningDataModule):
    """A data set in the memory of the device that trains, and its loaders."""

    def __init__(self, images: data.DataSet, training: Training, seed: int) -> None:
        super().__init__()
        self.images = images
        self.training = training
        self.seed = seed
        count = round(len(images.train) * training.validation_share)
        self.train = images.train
        self.validation: data.Split | None = None
        if count:
            self.train, self.validation = images.train.split_off(count)

    @property
    def evaluated(self) -> str:
        """What is evaluated in training: "val", or "test" where there is no validation set."""
        return "val" if self.validation is not None else "test"

    def setup(self, stage: str) -> None:
        """Moves the images."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        self._train, self._test = self.train.to(device), self.images.test.to(device)
        self._evaluated = self._test if self.validation is None else self.validation.to(device)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled anew in every epoch."""
        return self._loader(self._train, self.training.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation images, or the test images."""
        return self._loader(self._evaluated, EVALUATION_BATCH, shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images."""
        return self._loader(self._test, EVALUATION_BATCH, shuffle=False)

    def _loader(self, split: data.Split, batch_size: int, shuffle: bool) -> DataLoader[Batch]:
        assert self.trainer is not None
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        share = share_of_batch(batch_size, processes)
        return data.loader(split, share, shuffle=shuffle, seed=self.seed, rank=rank, world_size=processes)


def run(job: Job, machine: Machine) -> Result | None:
    """Does the run, or the rest of it; its result is filed in `machine.out`.

    Returns None in processes that only help.

    Raises what training raises, KeyboardInterrupt for Ctrl-C, and CheckpointError where `last.ckpt` is nothing to go on
    from. Errors, which Ctrl-C is not, are in `failure.txt` beside the checkpoints, too.
    """
    store = Store(machine.out)
    folder = store.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "job.json", job.model_dump_json(indent=1))
    try:
        result = _train(job, machine, folder)
    except Exception as error:
        try:
            write_whole(folder / FAILURE_FILE, traceback.format_exc())
        except OSError as other:  # of a full disk, say, which the first may be about
            error.add_note(f"That could not be written down: {other}")
        raise
    if result is not None:
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        store.write(result)
        remove_partials(folder)
        if (folder / f"{BEST}.ckpt").is_file():
            (folder / f"{LAST}.ckpt").unlink(missing_ok=True)
    return result


def _train(job: Job, machine: Machine, folder: Path) -> Result | None:
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    images = load(job.training, machine)
    module = Images(images, job.training, job.seed)
    with _quiet():
        torch.manual_seed(job.seed)
        classifier = _classifier(job, images, module.evaluated)
        interruptible = _Interruptible()
        trainer = _trainer(job, machine, folder, interruptible)
        last = folder / f"{LAST}.ckpt"
        with interruptible.during(trainer):
            trainer.fit(classifier, datamodule=module, ckpt_path=last if last.is_file() else None, weights_only=True)
            best = folder / f"{BEST}.ckpt"
            scored = best if best.is_file() else last
            (scores,) = trainer.test(classifier, datamodule=module, ckpt_path=scored, verbose=False, weights_only=True)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning has it
        if isinstance(callback, Landscape) and trainer.is_global_zero:
            callback.save(folder)
    return _result(job, machine, module, classifier, scores) if trainer.is_global_zero else None


class _Interruptible(Callback):
    """Has Ctrl-C be KeyboardInterrupt, at the end of a batch, and again the next time.

    In the middle of a batch it may break the loggers off: TensorBoard's thread, and who waits for it, then wait for
    ever. Lightning makes SystemExit of it, and ignores Ctrl-C from then on.
    """

    def __init__(self) -> None:
        self._take_effect: Callable[[], None] = lambda: None

    @contextmanager
    def during(self, trainer: pl.Trainer) -> Iterator[None]:
        """While `trainer` is at work in the block. Ctrl-C takes effect at once when given again a second later."""
        try:
            with uninterrupted() as self._take_effect:
                yield
        except SystemExit:
            if not trainer.interrupted:
                raise
            raise KeyboardInterrupt from None

    def on_train_batch_end(self, *args: Any) -> None:
        """After a step."""
        self._take_effect()

    def on_validation_batch_end(self, *args: Any) -> None:
        """After a batch that is evaluated."""
        self._take_effect()

    def on_test_batch_end(self, *args: Any) -> None:
        """After a batch that is evaluated."""
        self._take_effect()


def load(training: Training, machine: Machine) -> data.DataSet:
    """The images of a training, which runs that follow each other share; raises what `fastlayers.data.load` raises."""
    return _load(training.dataset, machine.data_dir, training.fraction, machine.download)


@lru_cache(maxsize=2)
def _load(name: str, data_dir: Path | None, fraction: float, download: bool) -> data.DataSet:
    return data.load(name, data_dir, fraction, download=download)


def _classifier(job: Job, images: data.DataSet, evaluated: str) -> Classifier:
    training = job.training
    channels, *sizes = images.train.images.shape[1:]
    size = max(training.least_image_size, *sizes)
    preparation = Augmenter(Augmentation(**training.augmentation.model_dump(), resize=size), images)
    built = network(training.network, channels, size, job.layers)
    return Classifier(built, preparation, training, CLASSES, job.seed, evaluated)


def network(network: Network, channels: int, size: int, layers: Layers) -> nn.Module:
    """The network for images (N, channels, size, size)."""
    of_images = {"in_features": channels * size**2, "in_channels": channels, "image_size": size}
    taken = models.MODELS[network.name].arguments if network.name in models.MODELS else ()  # build says so
    arguments = {name: value for name, value in of_images.items() if name in taken}
    return models.build(network.name, layers=layers, num_classes=CLASSES, **arguments, **network.arguments)


def _trainer(job: Job, machine: Machine, folder: Path, interruptible: _Interruptible) -> pl.Trainer:
    training = job.training
    several = machine.processes > 1
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(machine.device, machine.device),
        devices=machine.devices,
        num_nodes=machine.nodes,
        strategy="ddp" if several else "auto",
        precision=_PRECISIONS[job.precision],  # type: ignore[arg-type]  # one of Lightning's
        max_epochs=training.epochs,
        check_val_every_n_epoch=training.test_every,
        num_sanity_val_steps=0,
        # The CSV files are numbered: a resumed training starts another, and the first is kept.
        logger=[CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard", version="")],
        log_every_n_steps=1,
        callbacks=[*_callbacks(training, machine, folder), interruptible],
        plugins=[RunCheckpoints(job, folder)],
        use_distributed_sampler=False,
        enable_progress_bar=machine.progress,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    if trainer.precision != _PRECISIONS[job.precision]:
        device = trainer.strategy.root_device.type
        raise ValueError(f"precision: {job.precision} is not there on {device}; allowed: float32, bfloat16")
    return trainer


def _callbacks(training: Training, machine: Machine, folder: Path) -> list[Callback]:
    callbacks: list[Callback] = []
    monitored = "val_accuracy" if training.validation_share else "test_accuracy"
    if training.validation_share:
        callbacks.append(ModelCheckpoint(folder, BEST, monitor=monitored, mode="max", enable_version_counter=False))
    # After the best one, whose accuracy is a part of it: who goes on from it knows what is to be beaten.
    callbacks.append(ModelCheckpoint(folder, LAST, save_on_train_epoch_end=True, enable_version_counter=False))
    if training.patience is not None:
        callbacks.append(EarlyStopping(monitored, mode="max", patience=training.patience))
    if training.record_landscape:
        callbacks.append(Landscape())
    if machine.progress:
        callbacks.append(_ProgressBar(leave=True))
    return callbacks


def _result(job: Job, machine: Machine, module: Images, classifier: Classifier, scores: Mapping[str, float]) -> Result:
    history = classifier.history
    evaluated = [epoch for epoch in history if epoch.val_accuracy is not None]
    scored = max(evaluated, key=lambda epoch: epoch.val_accuracy or 0.0) if evaluated else history[-1]
    return Result(
        job=job,
        history=tuple(history),
        scored_epoch=scored.epoch,
        test_loss=scores["test_loss"],
        test_accuracy=scores["test_accuracy"],
        seconds=classifier.wall_seconds,
        train_images=len(module.train),
        validation_images=0 if module.validation is None else len(module.validation),
        test_images=len(module.images.test),
        parameters=models.count_parameters(classifier.network),
        state_mib=models.state_mib(classifier.network),
        environment=Environment(
            device=torch.cuda.get_device_name() if classifier.device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            processes=machine.processes,
            torch=torch.__version__,
            fastlayers=fl.__version__,
            backend=fl.get_backend(),
        ),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice that does not apply.

    The images are in memory, runs are resumed on purpose, and what is logged is the same in all processes.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU.*")  # _trainer raises
        warnings.filterwarnings("ignore", message=".*treespec.*", category=FutureWarning)
        try:
            yield
        finally:
            logger.setLevel(level)
