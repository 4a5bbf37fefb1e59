"""Plots of formulas, for which nothing is trained: focal loss against confidence, and the slopes of activations."""

from __future__ import annotations

import matplotlib as mpl
import torch
from kornia.losses import FocalLoss
from matplotlib.figure import Figure
from torch import Tensor

from fastlayers import activations
from fastlayers.studies.report import style
from fastlayers.studies.report.findings import Finding

GAMMAS = (0, 0.5, 1, 2, 3, 4, 5)
CLASSES = 10


def focal_loss(confidence: Tensor, gamma: float, classes: int = CLASSES) -> Tensor:
    """The focal loss of a network that gives `confidence` to the true class and the rest evenly to the others.

    Lin et al. 2017 (https://arxiv.org/abs/1708.02002), equation 4, with no weights of classes.

    Args:
        confidence: probabilities (N,), above 0 and below 1.
        gamma: how much confidence lowers the loss; 0 is cross-entropy.
        classes: how many there are.

    Returns:
        The losses (N,), in the dtype of `confidence`.
    """
    others = ((1 - confidence) / (classes - 1)).log()
    logits = torch.stack([confidence.log(), *[others] * (classes - 1)], 1)
    labels = torch.zeros(len(confidence), dtype=torch.int64)
    each: Tensor = FocalLoss(alpha=None, gamma=gamma, reduction="none")(logits, labels)
    return each.sum(1)


def draw_focal(finding: Finding) -> Figure:
    """Focal loss against the probability of the true class, and against its logit's lead over nine equal others."""
    drawn = style.figure(12, 4.4, f"{finding.study.id}. {finding.study.title}")
    left, right = drawn.subplots(1, 2)
    confidence = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    lead = torch.linspace(-4, 10, 400, dtype=torch.float64)
    # What softmax gives to one logit that leads nine equal ones.
    of_lead = torch.softmax(torch.cat([lead[:, None], torch.zeros(len(lead), CLASSES - 1)], 1), 1)[:, 0]
    lines = []
    for index, gamma in enumerate(GAMMAS):
        colour = mpl.colormaps["plasma"](0.88 * index / (len(GAMMAS) - 1))
        name = rf"$\gamma$ = {gamma:g}" + (" (cross-entropy)" if gamma == 0 else "")
        lines += left.plot(confidence, focal_loss(confidence, gamma), color=colour, label=name)
        right.plot(lead, focal_loss(of_lead, gamma), color=colour)
    chance = left.axvline(1 / CLASSES, color="grey", linestyle=":", label=f"chance, {CLASSES} classes")
    right.axvline(0, color="grey", linestyle=":")
    style.tidy(left, xlabel="confidence p of the true class", ylabel=r"loss, $(1 - p)^\gamma \cdot (-\log p)$")
    left.set_ylim(0, 5)
    style.tidy(right, xlabel=f"lead of the true class's logit over {CLASSES - 1} equal others", ylabel="loss")
    style.legend(drawn, [*lines, chance])
    return drawn


def draw_slopes(finding: Finding) -> Figure:
    """The derivative of the sigmoid beside those of tanh and of the study's activations."""
    drawn = style.figure(10, 4.4, "Derivatives of activations: the sigmoid's is never above 1/4")
    axes = drawn.subplots()
    used = [str(run.training.network.arguments["act"]) for run in finding.study.runs]
    others = [name for name in dict.fromkeys([*used, "tanh"]) if name != "sigmoid"]
    inputs = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    for name in others:
        axes.plot(inputs, slope(name, inputs), linewidth=1.3, label=name)
    axes.plot(inputs, slope("sigmoid", inputs), color="black", linewidth=3, label="sigmoid")
    axes.axhline(0.25, color="black", linestyle=":", linewidth=1)
    style.tidy(axes, xlabel="input", ylabel="derivative")
    style.legend(drawn, axes.get_legend_handles_labels()[0])
    return drawn


def slope(name: str, inputs: Tensor) -> Tensor:
    """The derivative (N,) of the activation `name` in evaluation at `inputs` (N,)."""
    inputs = inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(activations.resolve(name).apply(inputs).sum(), inputs)
    return gradient
