"""Measures single layers: time, memory and accuracy of every contender on one case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlayers.experiments.memory import bytes_saved_by
from fastlayers_benchmarks import accuracy, traffic
from fastlayers_benchmarks.cases import Case, Inputs, Phase, make_inputs
from fastlayers_benchmarks.contenders import EAGER, Contender
from fastlayers_benchmarks.memory import peak_bytes
from fastlayers_benchmarks.record import Outcome, Row
from fastlayers_benchmarks.timing import Run, captured, measure

TRAINING: Phase = "forward+backward"  # the phase that memory for backward and accuracy are reported with


COPY = "copy"  # takes its turn with the contenders


@dataclass(frozen=True)
class Entrant:
    """A contender with its layer for one case."""

    contender: Contender
    layer: nn.Module

    def run(self, phase: Phase, inputs: Inputs) -> Run:
        """The call that is timed in `phase`, with the layer put into the phase's mode."""
        layer = self.layer.train(phase != "eval")
        tensors = _tensors(inputs)
        grad_output = inputs.grad_output

        def forward() -> Tensor:
            output: Tensor = layer(*tensors)
            return output

        def forward_and_backward() -> None:
            forward().backward(grad_output)

        @torch.no_grad()
        def evaluate() -> Tensor:
            return forward()

        calls: dict[Phase, Callable[[], object]] = {
            "forward": forward,
            "forward+backward": forward_and_backward,
            "eval": evaluate,
        }
        forget = self._forget_gradients_of(tensors)
        call = captured(calls[phase], forget) if self.contender.graph else calls[phase]
        return Run(call, forget, self.contender.active)

    def _forget_gradients_of(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        leaves = [*tensors, *self.layer.parameters()]

        def forget() -> None:
            for leaf in leaves:
                leaf.grad = None

        return forget

    def saved_bytes(self, inputs: Inputs) -> int:
        """What a forward pass in training keeps for backward, besides the parameters."""
        layer = self.layer.train()
        with self.contender.active():
            return bytes_saved_by(lambda: layer(*_tensors(inputs)), layer.parameters())

    def errors(self, inputs: Inputs, grad_output: Tensor, expected: accuracy.Results) -> dict[str, float]:
        """See `accuracy.errors`."""
        with self.contender.active():
            found = accuracy.results_of(self.layer.train(), inputs, grad_output)
        self._forget_gradients_of(())()
        return accuracy.errors(found, expected)


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [inputs.input] if inputs.residual is None else [inputs.input, inputs.residual]


def measure_case(
    case: Case, contenders: Sequence[Contender], phases: Sequence[Phase], rounds: int, device: torch.device
) -> list[Row]:
    """One row per phase."""
    # Compiled afresh: what was compiled for another shape would make this one dynamic, and slower.
    torch._dynamo.reset()
    inputs = make_inputs(case, device)
    entrants, failures = _try_out([c for c in contenders if c.can(case)], case, inputs, phases)
    copy = traffic.copy_run(case, device)
    timed = {phase: _time(entrants, copy, phase, inputs, rounds, device) for phase in phases}
    peaks = {phase: _peaks(entrants, phase, inputs, device) for phase in phases}
    saved, errors = _of_training(entrants, case, inputs) if TRAINING in phases else ({}, {})
    on_chip = traffic.kept_on_chip(case, traffic.caches_of(device))
    return [
        Row(
            case.name,
            case.about,
            phase,
            {
                name: Outcome(
                    timed[phase][name],
                    peaks[phase][name],
                    saved.get(name) if phase == TRAINING else None,
                    errors.get(name) if phase == TRAINING else None,
                )
                for name in entrants
            },
            traffic.passes(case, phase, on_chip),
            case.nbytes,
            traffic.copy_rate(case, timed[phase][COPY]),
            failures,
        )
        for phase in phases
    ]


def _try_out(
    contenders: Sequence[Contender], case: Case, inputs: Inputs, phases: Sequence[Phase]
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """Those that can be built and called, and what the others said. Eager has to work."""
    entrants: dict[str, Entrant] = {}
    failures: dict[str, str] = {}
    for contender in contenders:
        try:
            entrant = Entrant(contender, contender.layer(case, inputs.input.device))
            for run in (entrant.run(phase, inputs) for phase in phases):
                with run.active():
                    run.call()
                    run.reset()
        except Exception as error:
            if contender.name == EAGER:
                raise
            failures[contender.name] = f"{type(error).__name__}: {error}"
        else:
            entrants[contender.name] = entrant
    return entrants, failures


def _time(
    entrants: Mapping[str, Entrant], copy: Run, phase: Phase, inputs: Inputs, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    runs = {name: entrant.run(phase, inputs) for name, entrant in entrants.items()}
    return measure({**runs, COPY: copy}, rounds, device)


def _peaks(entrants: Mapping[str, Entrant], phase: Phase, inputs: Inputs, device: torch.device) -> dict[str, int]:
    return {name: peak_bytes(entrant.run(phase, inputs), device) for name, entrant in entrants.items()}


def _of_training(
    entrants: Mapping[str, Entrant], case: Case, inputs: Inputs
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Bytes saved for backward, and errors, of each entrant."""
    saved = {name: entrant.saved_bytes(inputs) for name, entrant in entrants.items()}
    expected, grad_output = accuracy.expected(case, inputs)
    # Element by element, everybody's masks on a GPU are their own: torch's come out of its kernel.
    torchs_mask = inputs.input.is_cpu or len(case.shape) > 2
    errors = {
        name: entrant.errors(inputs, grad_output, expected)
        for name, entrant in entrants.items()
        if case.variant.drop_p == 0 or (torchs_mask and entrant.contender.same_mask)
    }
    return saved, errors
