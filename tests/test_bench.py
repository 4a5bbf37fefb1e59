"""The benchmarks: what is measured, what is counted, what is reported and compared. Nothing here depends on a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import click
import cmake_call
import pytest
import torch
from click.testing import CliRunner, Result
from fastlayers_benchmarks import (
    accuracy,
    cases,
    check,
    contenders,
    goals,
    layers,
    machine,
    memory,
    plots,
    profiling,
    record,
    report,
    steps,
    summary,
    timing,
    traffic,
)
from fastlayers_benchmarks.cases import Case, Variant
from fastlayers_benchmarks.record import Outcome, Record, Row, Setting
from fastlayers_benchmarks.timing import Run
from rich.console import Console
from torch import Tensor, nn

import fastlayers as fl
from fastlayers.cli import main
from fastlayers.experiments.memory import bytes_saved_by
from fastlayers.models import LayerKit
from fastlayers.pooling import resolve

CPU = torch.device("cpu")
TINY = "^2x16x8x8-contiguous-float32-p0-relu$"
P0 = Variant(drop_p=0.0)
POOLED = Case((4, 8, 9, 9), "channels_last", Variant(drop_p=0.4, pool=(5, 3, 2)))


def plain(kind: cases.Grid) -> list[Case]:
    """The cases of a grid without max-pool."""
    return [case for case in cases.grid(kind) if not case.variant.pool]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


class TestGrid:
    def test_shapes_are_those_that_were_asked_for(self) -> None:
        asked = """(100,1024); (100,256,32,32); (100,1024,11,11); (128,64,32,32); (128,128,16,16); (128,256,8,8);
            (128,512,4,4); (32,256,56,56); (32,2048,7,7); (4,32,256,256); (1,3,512,512); (2,16,8,8)"""
        expected = [tuple(map(int, shape.strip(" \n()").split(","))) for shape in asked.split(";")]
        assert list(dict.fromkeys(case.shape for case in plain("default"))) == expected

    def test_pooled_cases_are_those_that_were_asked_for(self) -> None:
        asked = (
            ((100, 256, 32, 32), (5, 3, 2)),
            ((100, 64, 32, 32), (5, 3, 2)),
            ((100, 64, 32, 32), (2, 2, 0)),
            ((128, 64, 28, 28), (2, 2, 0)),
        )
        default = set(cases.grid()) - set(plain("default"))
        for (shape, pool), layout, drop_p in itertools.product(asked, cases.LAYOUTS, (0.0, 0.4)):
            assert Case(shape, layout, Variant(drop_p=drop_p, pool=pool)) in default
        for layout in cases.LAYOUTS:
            variants = {dataclasses.replace(c.variant, pool=None) for c in default if c.layout == layout}
            assert variants == set(cases.POOLED_STAR)
        assert len(default) == 4 * 2 * 4
        assert len(cases.grid("full")) - len(plain("full")) == 4 * 2 * 8
        goals_cases = {
            Case(shape, layout, Variant(drop_p=0.4, pool=pool)) for shape, pool in asked for layout in cases.LAYOUTS
        }
        assert set(cases.grid("gpu")) - set(plain("gpu")) == goals_cases
        assert set(cases.grid("quick")) - set(plain("quick")) < goals_cases

    def test_full_grid_is_the_product(self) -> None:
        dtypes, ps, acts = ("float32", "bfloat16"), (0, 0.5), ("relu", "gelu")
        choices = list(itertools.product(dtypes, ps, acts, (False, True)))
        full = plain("full")
        for shape in cases.SHAPES:
            for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
                variants = [case.variant for case in full if (case.shape, case.layout) == (shape, layout)]
                assert [dataclasses.astuple(variant)[:-1] for variant in variants] == choices
        assert len(full) == 11 * 2 * 16 + 16

    def test_default_grid_has_what_the_targets_are_about(self) -> None:
        default = plain("default")
        assert set(cases.grid()) < set(cases.grid("full"))
        assert len(default) == 11 * 2 * 6 + 6
        for shape, layout in {(case.shape, case.layout) for case in default}:
            variants = {case.variant for case in default if (case.shape, case.layout) == (shape, layout)}
            assert {(v.dtype, v.drop_p) for v in variants} == set(itertools.product(cases.DTYPES, cases.DROP_PS))
            assert any(v.residual for v in variants)
            assert {v.act for v in variants} == set(cases.ACTS)

    def test_quick_grid_is_a_small_part(self) -> None:
        assert set(cases.grid("quick")) < set(cases.grid())
        assert len(cases.grid("quick")) < 20

    def test_gpu_grid_has_what_the_targets_are_about(self) -> None:
        grid = plain("gpu")
        assert len({case.name for case in cases.grid("gpu")}) == len(cases.grid("gpu"))
        assert len(grid) == 16
        for layout, dtype in itertools.product(cases.LAYOUTS, cases.DTYPES):
            sizes = [case.nbytes for case in grid if (case.layout, case.variant.dtype) == (layout, dtype)]
            assert sum(size >= 200e6 for size in sizes) >= 2
            assert any(100e3 <= size <= 40e6 for size in sizes)

    def test_names(self) -> None:
        assert Case((128, 64, 32, 32), "channels_last").name == "128x64x32x32-channels_last-float32-p0.5-relu"
        assert Case((100, 1024)).name == "100x1024-float32-p0.5-relu"
        assert Case((2, 3, 4, 5), variant=Variant("bfloat16", 0.0, "gelu", True)).name == (
            "2x3x4x5-contiguous-bfloat16-p0-gelu-residual"
        )
        assert POOLED.name == "4x8x9x9-channels_last-float32-p0.4-relu-pool5-3-2"
        assert POOLED.about["pool"] == "5/3/2"
        assert CASE.about["pool"] == ""
        full = cases.grid("full")
        assert len({case.name for case in full}) == len(full)

    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    def test_tensors_are_of_the_kind_that_the_case_names(self, layout: str) -> None:
        case = Case((2, 3, 4, 5), layout, Variant("bfloat16", residual=True))
        inputs = cases.make_inputs(case, CPU)
        for tensor in (inputs.input, inputs.residual, inputs.grad_output):
            assert tensor is not None
            assert (tuple(tensor.shape), tensor.dtype) == (case.shape, torch.bfloat16)
            assert tensor.is_contiguous(memory_format=cases.LAYOUTS[layout])
        assert inputs.input.is_leaf
        assert inputs.input.requires_grad
        assert case.nbytes == 2 * 2 * 3 * 4 * 5

    @pytest.mark.parametrize("pool", [(5, 3, 2), (2, 2, 0)])
    def test_gradient_of_a_pooled_case_is_of_the_pooled_shape(self, pool: cases.Window) -> None:
        case = dataclasses.replace(POOLED, variant=Variant("bfloat16", pool=pool))
        inputs = cases.make_inputs(case, CPU)
        assert inputs.grad_output.shape == nn.MaxPool2d(*pool)(inputs.input).shape == case.output_shape
        assert inputs.grad_output.is_contiguous(memory_format=torch.channels_last)
        assert inputs.input.shape == case.shape


class TestTraffic:
    CONTIGUOUS, ROWS = Case((8, 4, 16, 16)), Case((8, 4, 16, 16), "channels_last")

    def passes(self, case: Case, phase: cases.Phase, on_chip: bool, **changes: object) -> float:
        variant = dataclasses.replace(case.variant, **changes)  # type: ignore[arg-type]
        return traffic.passes(dataclasses.replace(case, variant=variant), phase, on_chip)

    @pytest.mark.parametrize("p", [0.0, 0.25, 0.5])
    def test_design(self, p: float) -> None:
        """The table of the design: 5 - p and 4 + 4 (1 - p); 5 and 8."""
        assert self.passes(self.CONTIGUOUS, "forward+backward", True, drop_p=p) == 5 - p
        assert self.passes(self.CONTIGUOUS, "forward+backward", False, drop_p=p) == 4 + 4 * (1 - p)
        for case in (self.ROWS, Case((100, 1024))):
            assert self.passes(case, "forward+backward", True, drop_p=p) == 5
            assert self.passes(case, "forward+backward", False, drop_p=p) == 8

    def test_forward_and_evaluation(self) -> None:
        for case, far in ((self.CONTIGUOUS, 2.5), (self.ROWS, 3)):
            assert self.passes(case, "forward", True) == 2
            assert self.passes(case, "forward", False) == far
            for on_chip in (True, False):
                assert self.passes(case, "eval", on_chip) == 2
                assert self.passes(case, "eval", on_chip, residual=True) == 3

    def test_residual(self) -> None:
        """Read once in forward, its gradient written; ReLU reads bits in backward, GELU reads it with the gradient."""
        for on_chip, without in ((True, 5), (False, 8)):
            for case in (self.CONTIGUOUS, self.ROWS):
                relu = self.passes(case, "forward+backward", on_chip, drop_p=0.0, residual=True)
                gelu = self.passes(case, "forward+backward", on_chip, drop_p=0.0, residual=True, act="gelu")
                assert relu == without + 2
                assert gelu == relu + (1 if on_chip else 2)
        # Half of the planes are dropped: half of the residual is read, its gradient is written as a whole.
        assert self.passes(self.CONTIGUOUS, "forward+backward", True, residual=True) == 4.5 + 0.5 + 1
        far = self.passes(self.CONTIGUOUS, "forward+backward", False, residual=True, act="gelu")
        assert far == 6 + 0.5 + 2 * 0.5 + 1

    @pytest.mark.parametrize("p", [0.0, 0.4])
    def test_max_pool(self, p: float) -> None:
        """The table of `traffic`: what is pooled is a quarter as large, and a position a quarter of an element."""
        pooled = 0.25 * (2 + 1 / 4)
        for on_chip, contiguous, rows in ((True, 3.0, 3.0), (False, 4.0 - p, 4.0)):
            changes = {"drop_p": p, "pool": (2, 2, 0)}
            found = self.passes(self.CONTIGUOUS, "forward+backward", on_chip, **changes)
            assert found == pytest.approx(contiguous + pooled * (2 - p))
            found = self.passes(self.ROWS, "forward+backward", on_chip, **changes)
            assert found == pytest.approx(rows + pooled * 2)
            assert self.passes(self.ROWS, "forward", on_chip, **changes) == pytest.approx(rows - 2 + pooled)
            assert self.passes(self.CONTIGUOUS, "eval", on_chip, **changes) == 1.25
        wider = self.passes(self.ROWS, "forward", True, pool=(2, 2, 0), dtype="bfloat16")
        assert wider == pytest.approx(1 + 0.25 * 2.5)

    def test_what_is_on_chip(self) -> None:
        channel = 8 * 16 * 16 * 4  # bytes
        assert traffic.kept_on_chip(self.CONTIGUOUS, traffic.Caches(2 * channel, 0))
        assert not traffic.kept_on_chip(self.CONTIGUOUS, traffic.Caches(2 * channel - 1, 1e9))
        assert traffic.kept_on_chip(self.ROWS, traffic.Caches(0, 2 * 4 * channel))
        assert not traffic.kept_on_chip(self.ROWS, traffic.Caches(1e9, 2 * 4 * channel - 1))

    def test_threads_share_the_third_level(self) -> None:
        caches = machine.CpuCaches(second=10, third=100, third_shared_by=4)
        assert traffic._cpu_share(caches, 1) == traffic.Caches(10, 10 + 25)
        assert traffic._cpu_share(caches, 8) == traffic.Caches(10, 80 + 100)
        assert traffic._cpu_share(machine.CpuCaches(), 2) == traffic.Caches(0, 0)

    def test_caches_as_linux_describes_them(self, tmp_path: Path) -> None:
        described = (
            ("1", "Data", "32K", "0"),
            ("1", "Instruction", "32K", "0"),
            ("2", "Unified", "1024K", "0-1"),
            ("3", "Unified", "32M", "0-3,8-11"),
        )
        for number, values in enumerate(described):
            folder = tmp_path / f"index{number}"
            folder.mkdir()
            for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
                (folder / name).write_text(value + "\n")
        assert machine.cpu_caches(tmp_path) == machine.CpuCaches(2**20, 2**25, 8)
        assert machine.cpu_caches(tmp_path / "nothing") == machine.CpuCaches()

    def test_copy_rate_counts_a_read_and_a_write(self) -> None:
        case = Case((2, 3, 4, 5))
        assert traffic.copy_rate(case, [3.0, 2.0, 100.0]) == 2 * 480 / 3.0
        traffic.copy_run(case, CPU).call()


class TestTiming:
    def test_quantiles(self) -> None:
        q = timing.quantiles([float(value) for value in range(11)])
        assert q == (5, 2, 8)
        assert q.spread == 6

    def test_outliers_are_far_beyond_the_middle(self) -> None:
        samples = [float(value) for value in range(9)] * 10
        q = timing.quantiles(samples)
        limit = q.q80 + 3 * q.spread
        assert timing.outliers(samples) == 0
        assert timing.outliers([*samples, limit + 2]) == 1
        assert timing.outliers([*samples, 1e6, 1e6]) == 2

    def test_runs_take_turns_and_another_begins_each_round(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)
        order: list[str] = []
        runs = {
            name: Run(lambda name=name: order.append(name), lambda name=name: order.append(f"reset {name}"))  # type: ignore[misc]
            for name in "abc"
        }
        samples = timing.measure(runs, rounds=3, device=CPU)
        assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3, "c": 3}
        calls = order[::2]
        assert order[1::2] == [f"reset {name}" for name in calls]
        assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"

    def test_short_calls_are_repeated_within_a_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 1.0)
        # Two calls before; then as many as make a second.
        times = iter([0.5, 0.25, *[0.25] * 4])
        clock = itertools.accumulate(itertools.chain.from_iterable((0.0, t) for t in times))
        monkeypatch.setattr("fastlayers_benchmarks.timing.time.perf_counter", lambda: next(clock))
        samples = timing.measure({"a": Run(lambda: calls.append(1))}, rounds=1, device=CPU)
        assert samples == {"a": [0.25]}
        assert len(calls) == 2 + 4


class TestMemory:
    def test_peak_is_of_what_is_held_at_one_time(self) -> None:
        def call() -> Tensor:
            for _ in range(3):
                torch.empty(2**20, dtype=torch.uint8)
            held = torch.empty(2**19, dtype=torch.uint8)
            return held.clone()

        assert memory.peak_bytes(Run(call), CPU) == 2**20
        assert memory.peak_bytes(Run(lambda: None), CPU) == 0

    def test_bytes_saved(self) -> None:
        x = torch.randn(100, requires_grad=True)
        assert bytes_saved_by(lambda: x.exp(), []) == 400
        assert bytes_saved_by(lambda: x * x, [x]) == 0


class TestContenders:
    def test_on_cpu(self) -> None:
        names = [contender.name for contender in contenders.contenders(CPU)]
        assert {"eager", "compile", "fastlayers-cpp", "fastlayers-compiled", "reference"} <= set(names)
        assert contenders.fused_contender(CPU) == "fastlayers-cpp"
        assert not set(contenders.why_not(CPU)) & set(names)
        assert "compile-max-autotune" in contenders.why_not(CPU)

    def test_backend_that_cannot_run_is_named_with_the_reason(self) -> None:
        assert "cuda" in contenders.why_not(CPU)["fastlayers-cuda"]

    def test_backend_is_that_of_the_contender(self) -> None:
        for contender in contenders.contenders(CPU):
            with contender.active():
                assert fl.get_backend() == contender.backend
        assert fl.get_backend() == "auto"

    @pytest.mark.parametrize(
        ("case", "modules"),
        [
            (Case((100, 1024)), [nn.BatchNorm1d, nn.ReLU, nn.Dropout]),
            (Case((2, 16, 8, 8)), [nn.BatchNorm2d, nn.ReLU, nn.Dropout2d]),
            (Case((2, 16, 8, 8), variant=Variant(drop_p=0.0, act="gelu")), [nn.BatchNorm2d, nn.GELU]),
            (POOLED, [nn.BatchNorm2d, nn.ReLU, nn.Dropout2d, nn.MaxPool2d]),
        ],
    )
    def test_eager_has_torchs_layers_and_no_dropout_for_p_0(self, case: Case, modules: list[type[nn.Module]]) -> None:
        assert [type(module) for module in contenders.eager_layer(case).children()] == modules

    def test_pool_is_in_the_fused_layer_or_behind_it(self) -> None:
        fused = contenders.fused_layer(POOLED)
        assert isinstance(fused, fl.BatchNormAct2d)
        assert fused.pool == resolve(nn.MaxPool2d(5, 3, 2), 2)
        (behind,) = (c for c in contenders.contenders(CPU) if c.name == "fastlayers-then-pool")
        norm, pool = behind.build(POOLED).children()
        assert isinstance(norm, fl.BatchNormAct2d)
        assert (norm.pool, norm.drop_p) == (None, 0.4)
        assert repr(pool) == repr(nn.MaxPool2d(5, 3, 2))
        assert behind.can(POOLED)
        assert not behind.can(CASE)

    def test_timm_has_torchs_pool_behind_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timm_layers = ModuleType("timm.layers")
        monkeypatch.setattr(
            timm_layers, "BatchNormAct2d", lambda channels, **_: nn.BatchNorm2d(channels), raising=False
        )
        monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
        monkeypatch.setitem(sys.modules, "timm.layers", timm_layers)
        assert [type(layer) for layer in contenders._timm_layer(POOLED).children()] == [nn.BatchNorm2d, nn.MaxPool2d]
        assert isinstance(contenders._timm_layer(CASE), nn.BatchNorm2d)

    def test_timm_takes_only_what_it_computes(self) -> None:
        assert contenders._timm_can(Case((2, 16, 8, 8)))
        assert contenders._timm_can(Case((2, 16, 8, 8), variant=Variant(act="gelu", drop_p=0.0)))
        for other in (Case((100, 1024)), Case((2, 16, 8, 8), variant=Variant(act="gelu"))):
            assert not contenders._timm_can(other)
        assert not contenders._timm_can(Case((2, 16, 8, 8), variant=Variant(residual=True)))


class TestAccuracy:
    CASES = (
        Case((20, 16)),
        Case((4, 5, 6, 7)),
        Case((4, 5, 6, 7), "channels_last", Variant("bfloat16", 0.5, "gelu", True)),
        Case((4, 5, 6, 7), "channels_last", Variant("float32", 0.0, "relu", True)),
        Case((4, 5, 16, 17), variant=Variant(drop_p=0.4, pool=(5, 3, 2))),
        Case((4, 5, 16, 17), "channels_last", Variant("bfloat16", 0.4, pool=(2, 2, 0))),
        Case((4, 5, 16, 17), "channels_last", Variant("bfloat16", 0.0, "gelu", pool=(3, 2, 1))),
    )
    BOUNDS: ClassVar = {"float32": 1e-6, "bfloat16": 2e-2}

    def errors(self, case: Case, build: Callable[[Case], nn.Module]) -> dict[str, float]:
        inputs = cases.make_inputs(case, CPU)
        expected, grad_output = accuracy.expected(case, inputs)
        return accuracy.errors(accuracy.results_of(build(case), inputs, grad_output), expected)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    @pytest.mark.parametrize("build", [contenders.eager_layer, contenders.fused_layer])
    def test_right_layers_differ_by_rounding(self, case: Case, build: Callable[[Case], nn.Module]) -> None:
        errors = self.errors(case, build)
        names = {"output", "grad_input", "grad_weight", "grad_bias"}
        assert set(errors) == names | ({"grad_residual"} if case.variant.residual else set())
        assert max(errors.values()) < self.BOUNDS[case.variant.dtype]

    @pytest.mark.parametrize(
        "pool", [nn.MaxPool2d(5, 3, 2), nn.MaxPool2d(2), nn.MaxPool2d((2, 3), (1, 2), (1, 0))], ids=repr
    )
    def test_ties_are_where_the_largest_two_of_a_window_are_near(self, pool: nn.MaxPool2d) -> None:
        x = torch.randn(2, 3, 9, 11, dtype=torch.float64).mul_(20).round_().div_(20)
        numbers = resolve(pool, 2)
        assert numbers is not None
        tie = accuracy._is_tie(x, pool)
        assert tie.shape == pool(x).shape
        for n, c, row, column in itertools.product(*map(range, tie.shape)):
            top, left = (at * s - p for at, s, p in zip((row, column), numbers.stride, numbers.padding, strict=True))
            window = x[n, c, max(top, 0) : top + numbers.kernel_size[0], max(left, 0) : left + numbers.kernel_size[1]]
            values = window.flatten().sort(descending=True).values.tolist()
            near = len(values) > 1 and values[0] - values[1] < accuracy.TIE_WIDTH * max(1, abs(values[0]))
            assert bool(tie[n, c, row, column]) == near
        assert tie.any()
        assert not tie.all()

    def test_wrong_layer_is_found(self) -> None:
        errors = self.errors(self.CASES[1], lambda case: fl.BatchNormAct2d(5, eps=1e-1, drop_p=0.5))
        assert min(errors["output"], errors["grad_input"]) > 1e-3

    def test_other_mask_is_found(self) -> None:
        errors = self.errors(self.CASES[1], lambda case: fl.BatchNormAct2d(5, drop_p=0.5, drop_mode="element"))
        assert errors["output"] > 0.1


class TestLayers:
    def test_measures_everything_of_every_contender(self) -> None:
        chosen = [c for c in contenders.contenders(CPU) if c.name in ("eager", "fastlayers-cpp", "reference")]
        case = Case((2, 16, 8, 8), "channels_last", Variant(residual=True))
        rows = layers.measure_case(case, chosen, cases.PHASES, 2, CPU)
        assert [row.phase for row in rows] == list(cases.PHASES)
        for row in rows:
            assert row.case == case.name
            assert list(row.outcomes) == [c.name for c in chosen]
            assert row.copy_rate is not None
            assert row.copy_rate > 0
            for outcome in row.outcomes.values():
                assert len(outcome.samples) == 2
                # At least the output is allocated.
                assert outcome.peak_bytes is not None
                assert outcome.peak_bytes >= case.nbytes
        training = rows[1].outcomes
        assert all(outcome.saved_bytes and outcome.errors for outcome in training.values())
        eager, fused = training["eager"], training["fastlayers-cpp"]
        assert fused.saved_bytes is not None
        assert eager.saved_bytes is not None
        assert fused.saved_bytes < eager.saved_bytes
        assert rows[0].outcomes["eager"].errors is None

    def test_max_pool(self) -> None:
        chosen = [c for c in contenders.contenders(CPU) if not c.name.endswith(("compile", "compiled"))]
        forward, training, evaluation = layers.measure_case(POOLED, chosen, cases.PHASES, 1, CPU)
        names = {"eager", "fastlayers-cpp", "fastlayers-then-pool", "reference"}
        for row in (forward, training, evaluation):
            assert (row.about["pool"], row.tensor_bytes) == ("5/3/2", POOLED.nbytes)
            assert names <= row.outcomes.keys()
        for outcome in training.outcomes.values():
            assert outcome.errors is not None
            assert max(outcome.errors.values()) < TestAccuracy.BOUNDS["float32"]

    def test_masks_that_torch_does_not_draw_are_not_compared(self) -> None:
        other = contenders.Contender("other", contenders.eager_layer, same_mask=False)
        eager = contenders.contenders(CPU)[0]
        for variant, compared in ((Variant(), False), (P0, True)):
            (row,) = layers.measure_case(Case((4, 6), variant=variant), [eager, other], ["forward+backward"], 1, CPU)
            assert (row.outcomes["other"].errors is not None) == compared

    def test_contender_that_fails_is_reported_and_the_others_go_on(self) -> None:
        class Fails(nn.Module):
            def forward(self, input: Tensor) -> Tensor:
                raise RuntimeError("no kernel")

        def cannot_be_built(case: Case) -> nn.Module:
            raise ImportError("not here")

        failing = [contenders.Contender("a", lambda case: Fails()), contenders.Contender("b", cannot_be_built)]
        eager = contenders.contenders(CPU)[0]
        (row,) = layers.measure_case(Case((4, 6)), [*failing, eager], ["eval"], 1, CPU)
        assert row.failures == {"a": "RuntimeError: no kernel", "b": "ImportError: not here"}
        assert list(row.outcomes) == ["eager"]


def same_loss(build: Callable[[LayerKit], nn.Module], shape: tuple[int, ...]) -> bool:
    case = steps.StepCase("model", build, shape, steps._sgd)
    eager, fused = (steps.Step(case, name, CPU) for name in ("eager", "fastlayers"))
    losses = []
    for step in (eager, fused):
        torch.manual_seed(0)
        step.run()
        losses.append(step.loss().item())
    return losses[0] == pytest.approx(losses[1], rel=1e-4)


class TestSteps:
    @pytest.mark.parametrize(
        ("build", "shape"),
        [
            (steps.build_mlp, (4, 3072)),
            (steps.build_cnn, (2, 3, 32, 32)),
            (steps.build_cnn_3x3, (2, 3, 32, 32)),
            (steps.build_resnet18, (2, 3, 32, 32)),
        ],
        ids=["mlp", "cnn", "cnn-3x3", "resnet18"],
    )
    def test_both_models_train_alike(
        self, build: Callable[[LayerKit], nn.Module], shape: tuple[int, ...], one_thread: None
    ) -> None:
        assert same_loss(build, shape)

    def test_models_are_those_of_the_studies(self) -> None:
        def modules(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
            return [module for module in model.modules() if isinstance(module, kind)]

        by_name = {case.name: case for case in steps.step_cases()}
        models = ("cnn", "cnn-3x3", "resnet18")
        assert list(by_name) == ["mlp", *(f"{model}-{layout}" for model in models for layout in cases.LAYOUTS)]
        assert {name for _, name in goals.STEPS} == {name for name in by_name if name.startswith("cnn")}
        torch_kit, fused = (steps.CONTENDERS[name][0] for name in ("eager", "fastlayers"))
        resnet = by_name["resnet18-contiguous"].build(torch_kit)
        # ResNet-18 for CIFAR has 11.17 million parameters.
        assert sum(p.numel() for p in resnet.parameters()) == 11_173_962
        assert len(modules(resnet, nn.BatchNorm2d)) == 20
        for case in by_name.values():
            assert case.shape[0] == (64 if case.model == "resnet18" else 100)
            assert modules(case.build(fused), fl.modules.batch_norm._FusedBatchNorm)
            after_norm: list[type[nn.Module]] = [nn.ReLU, nn.modules.dropout._DropoutNd, nn.MaxPool2d]
            for layer in after_norm:
                assert not modules(case.build(fused), layer)
            without = steps.Step(case, "without", CPU).model
            for layer in [*after_norm, nn.modules.batchnorm._BatchNorm]:
                assert not modules(without, layer)
            assert len(modules(case.build(torch_kit), nn.MaxPool2d)) == (2 if case.model.startswith("cnn") else 0)
        assert len(steps.step_cases(quick=True)) == 1

    def test_stand_in_gives_the_recorded_output_and_hands_gradients_through(self) -> None:
        stand_in = steps.StandIn(contenders.EagerChain(nn.BatchNorm2d(3), nn.ReLU()))
        x, residual = (torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(2))
        expected = torch.relu(nn.BatchNorm2d(3)(x) + residual)
        for _ in range(2):
            x.grad = residual.grad = None
            output = stand_in(x, residual)
            torch.testing.assert_close(output, expected)
            grad = torch.randn_like(output)
            output.backward(grad)
            assert x.grad is not None
            assert residual.grad is not None
            assert torch.equal(x.grad, grad)
            assert torch.equal(residual.grad, grad)
        assert list(stand_in.parameters()) == []
        stand_in(x).sum().backward()

    def test_stand_in_that_pools_gives_a_recorded_gradient(self) -> None:
        chain = contenders.EagerChain(nn.BatchNorm2d(3), nn.ReLU(), pool=nn.MaxPool2d(3, 2, 1))
        x = torch.randn(2, 3, 6, 7)
        expected = chain(x)
        stand_in = steps.StandIn(chain)
        with torch.no_grad():  # as a step records
            torch.testing.assert_close(stand_in(x), expected)
        gradients = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            output = stand_in(leaf)
            torch.testing.assert_close(output, expected)
            output.sum().backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)
        # Zero where an element is no window's largest, after BatchNorm's own part: that of a training step.
        assert gradients[0].abs().amax() > 0
        torch.testing.assert_close(gradients[0].sum((0, 2, 3)), torch.zeros(3))

    def test_share_and_what_is_removed_of_it(self) -> None:
        outcomes = {"eager": Outcome([10.0, 10.0]), "without": Outcome([8.0, 8.0]), "fastlayers": Outcome([8.5, 9.5])}
        share = steps.share_of(Row("m", {}, record.STEP, outcomes))
        assert share is not None
        assert share.share.median == pytest.approx(0.2)
        assert share.removed.median == pytest.approx(0.5)
        assert share.removed.q80 == pytest.approx(0.25 + 0.8 * 0.5)
        assert steps.share_of(Row("m", {}, record.STEP, {"eager": Outcome([1.0])})) is None

    def test_measure(self) -> None:
        (case,) = steps.step_cases(quick=True)
        row = steps.measure_step(case, ["eager", "without", "fastlayers"], 2, CPU)
        assert row.phase == record.STEP
        assert [len(outcome.samples) for outcome in row.outcomes.values()] == [2, 2, 2]
        saved = {name: outcome.saved_bytes or 0 for name, outcome in row.outcomes.items()}
        assert saved["without"] < saved["fastlayers"] < saved["eager"]


CASE = Case((2, 16, 8, 8))


def make_row(case: Case = CASE, fused: float = 1.0, phase: str = "forward+backward") -> Row:
    """Eager takes 2 seconds, torch.compile 1.5, this library `fused`, but for a tenth of a percent."""
    times = {"eager": 2.0, "compile": 1.5, "fastlayers-cpp": fused}
    outcomes = {
        name: Outcome([time * scale for scale in (0.999, 1.0, 1.001)], 100, 50, {"output": 1e-7, "grad_input": 2e-7})
        for name, time in times.items()
    }
    return Row(case.name, case.about, phase, outcomes, 4.5, case.nbytes, 2e9)


def make_record(rows: list[Row], **changes: object) -> Record:
    setting = Setting("cpu", 2, "default", "fastlayers-cpp", rows)
    made = Record({"cpu": "some"}, {"torch": "2.13"}, {"grid": "quick"}, {"timm": "not installed"}, [setting])
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


class TestRecord:
    def test_round_trip(self, tmp_path: Path) -> None:
        made = make_record([make_row(), make_row(POOLED), dataclasses.replace(make_row(), failures={"compile": "no"})])
        made.save(tmp_path / "new" / "record.json")
        assert record.load(tmp_path / "new" / "record.json") == made

    def test_file_says_medians_quantiles_and_outliers(self, tmp_path: Path) -> None:
        make_record([make_row()]).save(tmp_path / "record.json")
        content = json.loads((tmp_path / "record.json").read_text())
        found = content["settings"][0]["rows"][0]["outcomes"]["eager"]["summary"]
        assert found["median"] == 2.0
        assert 1.99 < found["q20"] < 2 < found["q80"] < 2.01
        assert found["outliers"] == 0

    def test_records_of_one_machine_make_one(self) -> None:
        other = make_row(Case((100, 1024)))
        parts = [make_record([make_row()], options={"only": "a"}), make_record([other], options={"only": "b"})]
        assert record.merged(parts) == dataclasses.replace(
            make_record([make_row(), other], options={"only": "a; b"}), date=parts[0].date
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"machine": {"cpu": "another"}},
            {"versions": {"torch": "2.14"}},
            {"settings": [Setting("cuda", 2, "default", "fastlayers-cuda", [])]},
        ],
    )
    def test_records_of_several_machines_do_not(self, change: dict[str, object]) -> None:
        with pytest.raises(record.RecordError, match="make no page together"):
            record.merged([make_record([make_row()]), make_record([make_row()], **change)])

    @pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"format": 0}', '{"format": 1}'])
    def test_other_files_are_refused(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "other.json"
        path.write_text(content)
        with pytest.raises(record.RecordError, match=r"other\.json"):
            record.load(path)

    def test_ratios_are_paired_by_round(self) -> None:
        row = Row("c", {}, "eval", {"eager": Outcome([2.0, 20.0]), "x": Outcome([1.0, 10.0])})
        assert row.ratio("x") == (2, 2, 2)
        assert row.ratio("eager", to="x") == (0.5, 0.5, 0.5)
        assert row.ratio("y") is None

    def test_bandwidth(self) -> None:
        row = make_row(fused=0.5)
        bandwidth = 4.5 * (2 * 16 * 8 * 8 * 4) / 0.5
        assert row.bandwidth("fastlayers-cpp") == pytest.approx(bandwidth)
        assert row.of_copy_rate("fastlayers-cpp") == pytest.approx(bandwidth / 2e9)


class TestReport:
    def shown(self, made: Record) -> str:
        console = Console(file=StringIO(), width=120, force_terminal=True, color_system="standard")
        report.show(console, made)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    def test_losses_are_red_and_wins_are_not(self) -> None:
        red = "\x1b[1;31m"
        shown = self.shown(make_record([make_row(fused=1.6)]))
        assert f"{red}0.94 (0.94-0.94)" in shown  # against torch.compile
        assert f"{red}1.25" not in shown
        assert "1.25 (1.25-1.25)" in shown

    def test_losses_are_marked_in_markdown(self, tmp_path: Path) -> None:
        report.save_markdown(make_record([make_row(fused=4.0)]), tmp_path / "page.md", [tmp_path / "img" / "a.png"])
        page = (tmp_path / "page.md").read_text()
        assert "**0.50 (0.50-0.50) ▼**" in page
        assert "timm: not installed" in page
        assert "![a](img/a.png)" in page

    def test_more_memory_and_larger_errors_are_losses(self) -> None:
        row = make_row()
        worse = Outcome([1.0] * 3, 101, 49, {"output": 1.9e-7, "grad_input": 1e-8, "grad_bias": 4.1e-7})
        row.outcomes["fastlayers-cpp"] = worse
        (cells,) = summary.cost_table([row], "fastlayers-cpp").rows
        assert [cell.loss for cell in cells[-8:]] == [False, False, False, True, False, False, False, True]

    def test_geometric_means(self) -> None:
        rows = [make_row(fused=fused) for fused in (0.5, 2.0)] + [make_row(fused=2.5, phase="eval")]
        training, evaluation = summary.means(rows, "fastlayers-cpp").rows
        assert [cell.text for cell in training] == [
            *("forward+backward", "float32", "0.5", "contiguous", "2", "2.00", "1.50", "1")
        ]
        assert [cell.text for cell in evaluation][-3:] == ["0.80", "0.60", "2"]
        assert [cell.loss for cell in evaluation][-3:] == [True, True, False]

    def test_geometric_means_with_max_pool_have_goals(self) -> None:
        rows = [make_row(dataclasses.replace(POOLED, layout=layout), fused=0.24) for layout in cases.LAYOUTS]
        other = dataclasses.replace(POOLED, variant=dataclasses.replace(POOLED.variant, drop_p=0.0))
        rows += [make_row(other), make_row(POOLED, phase="eval")]
        table = summary.pooled_means(rows, "fastlayers-cpp", "cpu")
        about = [[cell.text for cell in cells[:5]] for cells in table.rows]
        assert about == [
            ["forward+backward", "float32", "0", "relu", "channels_last"],
            ["forward+backward", "float32", "0.4", "relu", "channels_last"],
            ["forward+backward", "float32", "0.4", "relu", "contiguous"],
            ["eval", "float32", "any", "relu", "channels_last"],
        ]
        cell_of = summary.Cell
        assert [cell.text for cell in table.rows[0][6:]] == ["2.00", "-", "1.50", "-", "0"]
        assert list(table.rows[1])[6:10] == [cell_of("8.33"), cell_of("4"), cell_of("6.25"), cell_of("5")]
        assert list(table.rows[2])[6:10] == [cell_of("8.33"), cell_of("8"), cell_of("6.25"), cell_of("6")]
        slower = summary.pooled_means([make_row(POOLED, fused=1.0)], "fastlayers-cpp", "cpu").rows[0]
        assert list(slower)[6:10] == [
            cell_of("2.00"),
            cell_of("4", loss=True),
            cell_of("1.50"),
            cell_of("5", loss=True),
        ]
        on_gpu = summary.pooled_means([make_row(POOLED, fused=1.0)], "fastlayers-cpp", "cuda").rows[0]
        assert list(on_gpu)[6:10] == [cell_of("2.00"), cell_of("3", loss=True), cell_of("1.50"), cell_of("1.5")]

    def test_max_pool_has_tables_of_its_own(self) -> None:
        old = make_row()
        del old.about["pool"]  # as in a record of before there were any
        titles = [table.title for table in summary.tables(make_record([old, make_row(POOLED)]).settings[0])]
        assert [title.partition(":")[0] for title in titles] == [
            "Geometric means",
            "With max-pool, geometric means",
            "forward+backward",
            "forward+backward",
            "Memory and errors in forward+backward",
            "forward+backward with max-pool",
            "forward+backward with max-pool",
            "Memory and errors in forward+backward with max-pool",
        ]
        assert "5/3/2" in self.shown(make_record([make_row(POOLED)]))

    @pytest.mark.parametrize(
        ("fused", "compiled", "tuned", "missed"),
        [(5.0, 9.0, 6.0, False), (5.0, 9.0, 4.0, True), (6.0, 9.0, None, True), (5.0, None, None, False)],
    )
    def test_training_steps_have_goals(
        self, fused: float, compiled: float | None, tuned: float | None, missed: bool
    ) -> None:
        times = {"eager": 10.0, "compile": compiled, "compile-max-autotune": tuned, "fastlayers": fused}
        outcomes = {name: Outcome([time]) for name, time in times.items() if time}
        row = Row("cnn-contiguous", {"model": "cnn", "layout": "contiguous"}, record.STEP, outcomes)
        table = summary.step_ratios([row], "cpu")
        cells = dict(zip(table.columns, table.rows[0], strict=True))
        assert cells["goal"] == summary.Cell("1.7, 1", loss=missed)
        fastest = min((time for time in (compiled, tuned) if time), default=None)
        assert cells["vs compile"].text.startswith(f"{fastest / fused:.2f}" if fastest else "-")
        (other,) = summary.step_ratios([dataclasses.replace(row, case="mlp")], "cpu").rows
        assert dict(zip(table.columns, other, strict=True))["goal"] == summary.NOTHING

    def test_outliers_and_failures_are_shown(self) -> None:
        outcomes = {name: Outcome([1.0] * 20 + [last]) for name, last in (("eager", 9.0), ("fastlayers-cpp", 1.0))}
        row = dataclasses.replace(make_row(), outcomes=outcomes, failures={"timm": "RuntimeError: why"})
        assert row.outcomes["eager"].outliers == 1
        (cells,) = summary.time_table("forward", [row]).rows
        assert cells[-1].text == "1/0/0"
        assert cells[-2] == summary.Cell("failed", loss=True)
        assert "timm failed: RuntimeError: why" in self.shown(make_record([make_row(), row]))

    def test_terminal_table_fits_120_columns(self) -> None:
        longest = Case((100, 1024, 11, 11), "channels_last", Variant("bfloat16", 0.5, "gelu", True))
        pooled = Case((100, 256, 32, 32), "channels_last", Variant("bfloat16", 0.4, "gelu", pool=(5, 3, 2)))
        times = {"eager": 161.0, "compile": 203.0, "compile-max-autotune": 201.0, "fastlayers": 149.0}
        times["fastlayers-compiled"] = 149.0
        outcomes = {name: Outcome([time]) for name, time in times.items()} | {"without": Outcome([140.0])}
        step = Row("resnet18-channels_last", {"model": "resnet18", "layout": "channels_last"}, record.STEP, outcomes)
        lines = self.shown(make_record([make_row(longest), make_row(pooled), step])).splitlines()
        for shape in ("100x1024x11x11", "100x256x32x32"):
            assert any(all(text in line for text in (shape, "2.00 (2.00-2.00)", "1.50 (1.50-1.50)")) for line in lines)
        assert any("resnet18-channels_last" in line and "1.08 (1.08-1.08)" in line for line in lines)
        assert not any("…" in line for line in lines)

    def test_pictures(self, tmp_path: Path) -> None:
        step = Row("mlp", {"model": "mlp", "layout": "contiguous"}, record.STEP, {"eager": Outcome([1.0])})
        made = make_record([make_row(), make_row(Case((2, 16, 8, 8), "channels_last"), 3.0), make_row(POOLED), step])
        paths = plots.save(made, tmp_path)
        assert [path.name.split("-")[0] for path in paths] == ["ratios", "roofline", "steps"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0.1234, "123"), (0.01234, "12.3"), (0.001234, "1.23"), (1.234e-5, "0.012")]
    )
    def test_milliseconds(self, seconds: float, text: str) -> None:
        assert summary.milliseconds(seconds) == text


class TestCheck:
    def falls(self, before: float, now: float) -> list[check.Fall]:
        return check.compare(make_record([make_row(fused=before)]), make_record([make_row(fused=now)])).falls

    def test_fall_is_found(self) -> None:
        (fall,) = self.falls(before=1.0, now=1.1)
        assert (fall.contender, fall.case) == ("fastlayers-cpp", make_row().case)
        assert fall.before.median == pytest.approx(2)
        assert fall.now.median == pytest.approx(2 / 1.1)

    def test_rise_is_none(self) -> None:
        assert self.falls(before=1.1, now=1.0) == []

    def test_noise_is_ignored(self) -> None:
        noisy, steady = make_row(), make_row()
        noisy.outcomes["fastlayers-cpp"] = Outcome([1.1, 1.3, 0.9])
        steady.outcomes["fastlayers-cpp"] = Outcome([1.1, 1.1, 1.1])
        before = make_record([make_row()])
        assert check.compare(before, make_record([noisy])).falls == []
        assert len(check.compare(before, make_record([steady])).falls) == 1

    def test_counts_what_was_compared(self) -> None:
        # Eager is what the others are compared with.
        assert check.compare(make_record([make_row()]), make_record([make_row()])).compared == 2

    def test_other_machine_is_refused(self) -> None:
        with pytest.raises(record.RecordError, match=r"another machine \(cpu: other then, some now\)"):
            check.compare(make_record([make_row()], machine={"cpu": "other"}), make_record([make_row()]))

    @pytest.mark.parametrize("change", [{"threads": 1}, {"allocator": "keep"}])
    def test_other_setting_is_refused(self, change: dict[str, object]) -> None:
        later = make_record([make_row()])
        setting = dataclasses.replace(later.settings[0], **change)  # type: ignore[arg-type]
        with pytest.raises(record.RecordError, match="was not made with"):
            check.compare(make_record([make_row()]), make_record([], settings=[setting]))

    def test_nothing_in_common_is_refused(self) -> None:
        with pytest.raises(record.RecordError, match="none of the cases"):
            check.compare(make_record([make_row(phase="eval")]), make_record([make_row()]))


class TestCommand:
    ONE_CASE = ("--quick", "--no-steps", "--rounds", "2", "--only", TINY)

    def test_one_case_from_end_to_end(self, tmp_path: Path) -> None:
        path = tmp_path / "out" / "record.json"
        outputs = ("--json", path, "--markdown", tmp_path / "page.md", "--plots", tmp_path / "img")
        result = invoke(*self.ONE_CASE, *outputs)
        assert result.exit_code == 0, result.output
        for text in ("Geometric means", "forward+backward: fastlayers-cpp", "all contenders", "Memory and errors"):
            assert text in result.output
        made = record.load(path)
        assert made.machine == machine.describe_machine(CPU)
        assert made.versions["torch"] == torch.__version__
        (setting,) = made.settings
        assert (setting.device, setting.threads) == ("cpu", torch.get_num_threads())
        assert [row.phase for row in setting.rows] == list(cases.PHASES)
        for row in setting.rows:
            names = [c.name for c in contenders.contenders(CPU) if not c.name.endswith("then-pool")]
            assert (list(row.outcomes), row.failures) == (names, {})
            assert {len(outcome.samples) for outcome in row.outcomes.values()} == {2}
        assert "2x16x8x8" in (tmp_path / "page.md").read_text()
        assert len(list((tmp_path / "img").glob("*.png"))) == 6

    def test_backends_are_contenders(self, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        result = invoke(*self.ONE_CASE, "--backend", "reference,cpp", "--phase", "eval", "--json", path)
        assert result.exit_code == 0, result.output
        (row,) = record.load(path).settings[0].rows
        assert set(row.outcomes) == {"eager", "fastlayers-cpp", "reference"}

    def test_max_pool_by_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cases, "QUICK_POOLED_SHAPES", ((POOLED.shape, POOLED.variant.pool),))
        path = tmp_path / "record.json"
        options = ("--quick", "--no-steps", "--rounds", "1", "--only", "pool", "--backend", "cpp", "--json", path)
        result = invoke(*options, "--contender", "fastlayers-then-pool")
        assert result.exit_code == 0, result.output
        assert "With max-pool, geometric means" in result.output
        rows = record.load(path).settings[0].rows
        layouts = [(row.about["layout"], row.about["pool"]) for row in rows if row.phase == "eval"]
        assert layouts == [("contiguous", "5/3/2"), ("channels_last", "5/3/2")]
        assert {*rows[0].outcomes} == {"eager", "fastlayers-cpp", "fastlayers-then-pool"}

    def measure(self, *options: str | Path) -> Result:
        """One case without what has to be compiled."""
        return invoke(*self.ONE_CASE, "--contender", "fastlayers", "--phase", "eval", *options)

    def test_check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "record.json"
        assert self.measure("--json", path).exit_code == 0
        made = record.load(path)
        (setting,) = made.settings
        (row,) = setting.rows
        for factor, status, text in ((1e-6, 1, "1 fell by more"), (1e6, 0, "0 fell by more")):
            # As if this library had once been that much faster or slower.
            fused = Outcome([factor * sample for sample in row.outcomes["eager"].samples])
            earlier = dataclasses.replace(row, outcomes={**row.outcomes, "fastlayers-cpp": fused})
            changed = dataclasses.replace(setting, rows=[earlier])
            dataclasses.replace(made, settings=[changed]).save(path)
            result = self.measure("--check", path)
            assert result.exit_code == status, result.output
            assert text in result.output
            slower = "Slower: 2x16x8x8-contiguous-float32-p0-relu, eval, fastlayers-cpp" in result.output
            assert slower == (status == 1)

    def test_fall_that_does_not_last_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "record.json"
        assert self.measure("--json", path).exit_code == 0
        made = record.load(path)
        again: list[str] = []

        def measure_again(options: object, names: list[str]) -> Record:
            again.extend(names)
            return made

        row = dataclasses.replace(made.settings[0].rows[0])
        row.outcomes["fastlayers-cpp"] = Outcome([1e-6 * sample for sample in row.outcomes["eager"].samples])
        made.save(path)
        made = record.load(path)
        monkeypatch.setattr("fastlayers_benchmarks.command._measure_again", measure_again)
        result = self.measure("--check", path)
        assert result.exit_code == 0, result.output
        assert again == ["2x16x8x8-contiguous-float32-p0-relu"]
        assert "seem to have fallen: 1." in result.output
        assert "0 fell by more" in result.output

    def test_check_with_another_machine(self, tmp_path: Path) -> None:
        make_record([make_row()]).save(tmp_path / "record.json")
        result = self.measure("--check", tmp_path / "record.json")
        assert result.exit_code == 1
        assert "of another machine" in result.output

    def test_settings_are_measured_in_processes_of_their_own(self, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        settings = ("--threads", "1", "--allocator", "default", "--allocator", "keep", "--json", path)
        result = self.measure(*settings)
        assert result.exit_code == 0, result.output
        made = record.load(path)
        assert [setting.key for setting in made.settings] == [("cpu", 1, "default"), ("cpu", 1, "keep")]
        for setting in made.settings:
            assert setting.title in result.output
            assert [row.case for row in setting.rows] == ["2x16x8x8-contiguous-float32-p0-relu"]

    def test_allocator_is_that_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(machine.ALLOCATOR_VARIABLE, raising=False)
        assert machine.current_allocator() == "default"
        for name in machine.ALLOCATORS:
            assert machine.environment_for(name).get(machine.ALLOCATOR_VARIABLE) == machine.ALLOCATORS[name]
        keep = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"
        monkeypatch.setenv("GLIBC_TUNABLES", keep)
        assert machine.current_allocator() == "keep"
        assert machine.ALLOCATOR_VARIABLE not in machine.environment_for("default")
        monkeypatch.setenv(machine.ALLOCATOR_VARIABLE, "glibc.malloc.check=1")
        assert machine.current_allocator() is None

    def test_earlier_records_are_reported_together(self, tmp_path: Path) -> None:
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, case in zip(paths, (CASE, Case((100, 1024))), strict=True):
            make_record([make_row(case)], options={"only": case.name}).save(path)
        result = invoke("--load", paths[0], "--load", paths[1], "--markdown", tmp_path / "page.md")
        assert result.exit_code == 0, result.output
        page = (tmp_path / "page.md").read_text()
        assert "2x16x8x8" in page
        assert "100x1024" in page

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--backend", "cpp,nobody"], "unknown: nobody; known: cpp, cuda, triton, reference"),
            (["--backend", "cpp,cuda"], "backend 'cuda' cannot run here"),
            (["--contender", "nobody"], "unknown: nobody; known here: eager, compile"),
            (["--only", "no such case"], "no case of the quick grid matches"),
            (["--only", "("], "is no regular expression"),
            (["--phase", "backward"], "'backward' is not one of"),
            (["--check", "missing.json"], "does not exist"),
        ],
    )
    def test_says_what_is_wrong_with_its_options(self, options: list[str], message: str) -> None:
        result = invoke("--quick", *options)
        assert result.exit_code != 0
        assert message in " ".join(result.output.replace("│", " ").split())

    def test_no_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = invoke("--device", "cuda")
        assert result.exit_code != 0
        assert "no CUDA device is available" in result.output

    def test_process_that_fails_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 3))
        result = self.measure("--threads", "1", "--allocator", "default", "--allocator", "keep")
        assert result.exit_code == 1
        assert "threads 1, allocator default: exit status 3" in result.output

    def test_without_its_extra_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "fastlayers_benchmarks.plots")
        monkeypatch.delattr("fastlayers_benchmarks.plots")
        monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
        result = invoke("--quick")
        assert result.exit_code == 1
        assert 'What this command needs: pip install -e ".[bench]"' in result.output


class TestProfiling:
    def test_takes_the_case_that_is_furthest_from_a_copy(self) -> None:
        slow, fast = cases.grid("gpu")[:2]
        rows = [make_row(fast, fused=1.0), make_row(slow, fused=3.0), make_row(CASE, fused=1e6)]
        assert profiling.slowest([make_record(rows[:1]), make_record(rows[1:])]) == slow

    def test_needs_one(self) -> None:
        with pytest.raises(click.ClickException, match="none of the records has a case of the grid --gpu"):
            profiling.slowest([make_record([make_row(Case((9, 9, 9, 9)))])])


def test_pytest_benchmarks_runs_the_same_cases() -> None:
    chosen = "2x16x8x8-contiguous-float32-p0-relu and (eager or cpp)"
    arguments = ("benchmarks", "--bench-rounds=1", "-k", chosen, "-p", "no:cacheprovider")
    pytest_command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(pytest_command, cwd=cmake_call.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for phase in cases.PHASES:
        assert f"benchmark '2x16x8x8-contiguous-float32-p0-relu {phase}': 2 tests" in done.stdout
