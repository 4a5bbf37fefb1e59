"""A study's run that takes a second, and what of its result does not depend on the time it took."""

from __future__ import annotations

from typing import Any

from fastlayers.studies import config
from fastlayers.studies.results import Job, Result


def job(**changes: Any) -> Job:
    """A small MLP with BatchNorm and Dropout on the digits."""
    training = config.Training(
        dataset="digits",
        network=config.Network.model_validate({"name": "mlp", "hidden": [32], "drop_p": 0.5}),
        optimizer=config.Optimizer(name="adam", lr=1e-2),
        epochs=4,
        batch_size=60,
        validation_share=0.2,
    )
    return Job(published=training.key, training=training.model_copy(update=changes))


def curve(result: Result | None) -> list[tuple[float | None, ...]]:
    """Everything that the epochs measured, but for the time they took."""
    assert result is not None
    return [(e.lr, e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy) for e in result.history]


def found(result: Result | None) -> tuple[object, ...]:
    """Everything that a run found, but for the time it took."""
    assert result is not None
    return curve(result), result.scored_epoch, result.test_loss, result.test_accuracy
