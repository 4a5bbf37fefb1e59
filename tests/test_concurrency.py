"""Several threads and processes at once, and what interrupts: exceptions, hooks that raise, Ctrl-C."""

from __future__ import annotations

import gc
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

import fastlayers as fl
from fastlayers.fusion import interrupts
from fastlayers.fusion.trace import _ATTEMPTS
from tests import scripts
from tests.resources import Held, growth

WORKERS = 6


@pytest.fixture(autouse=True)
def _switching_often() -> Iterator[None]:
    """Between Python's threads: after tens of microseconds instead of five milliseconds."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def at_once(function: Callable[[int], Any], count: int = 4 * WORKERS) -> list[Any]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(function, range(count)))


# Threads

KINDS: dict[str, Callable[[], nn.Module]] = {
    "torch's kernels": lambda: fl.BatchNorm2d(6),
    "rows of torch's": lambda: fl.BatchNorm2d(6),
    "own kernels": lambda: fl.BatchNormAct2d(6, act_layer="gelu"),
    "in spans": lambda: fl.BatchNormAct2d(6, act_layer="relu", eps=1e-3),
    "fused": lambda: fl.fuse(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))),
}
SHAPES = {"torch's kernels": (4, 6, 5, 5), "rows of torch's": (4, 6, 5, 5), "in spans": (4, 6, 90, 90)}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_their_own_in_training(kind: str) -> None:
    """Each thread trains a layer of its own; what comes out is what comes out alone, bit by bit."""
    shape = SHAPES.get(kind, (4, 6, 30, 30))

    def trained(number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number)
        layer = built[number]
        for _ in range(3):
            x = torch.randn(shape, generator=generator)
            if kind == "rows of torch's":
                x = x.contiguous(memory_format=torch.channels_last)
            x.requires_grad_()
            layer(x).square().sum().backward()
        assert x.grad is not None
        return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None), *layer.state_dict().values()]

    torch.set_num_threads(1)
    state = KINDS[kind]().state_dict()

    def fresh() -> list[nn.Module]:
        layers = [KINDS[kind]() for _ in range(4 * WORKERS)]
        for layer in layers:
            layer.load_state_dict(state)
        return layers

    built = fresh()
    expected = [trained(number) for number in range(len(built))]
    built = fresh()
    found = at_once(trained)
    assert all(
        torch.equal(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_in_evaluation(kind: str) -> None:
    """Forward and backward of inputs of their own through the same layer, by as many threads."""
    layer = KINDS[kind]().eval().requires_grad_(False)
    inputs = [torch.randn(SHAPES.get(kind, (4, 6, 30, 30))) for _ in range(4 * WORKERS)]

    def gradient(number: int) -> Tensor:
        x = inputs[number].clone().requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = [gradient(number) for number in range(len(inputs))]
    assert all(torch.equal(*pair) for pair in zip(at_once(gradient), expected, strict=True))


@pytest.mark.parametrize("mode", ["channel", "element"])
def test_dropout_in_threads(mode: str) -> None:
    """The generator is one for all of them: each call has a mask of its own, and backward the mask of its forward."""
    layer = fl.BatchNormAct2d(16, drop_p=0.5, drop_mode=mode)

    def mask(number: int) -> Tensor:
        x = torch.randn(8, 16, 20, 20, requires_grad=True)
        y = fl.functional.batch_norm_act(x, None, None, training=True, drop_p=0.5, drop_mode=mode)
        kept = y.detach() != 0
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        assert torch.equal(fl.functional.dropout(x.detach(), 0.0), x.detach())
        share = kept.double().mean().item()
        assert 0.2 < share < 0.8
        return kept

    found = at_once(mask)
    assert len({mask.numpy().tobytes() for mask in found}) == len(found)
    assert layer.training


def test_one_graph_backward_in_several_threads() -> None:
    """As torch's own nodes, ours keep nothing of a backward that another one could find."""
    x = torch.randn(4, 6, 30, 30, requires_grad=True)
    layers = nn.Sequential(*(build() for name, build in KINDS.items() if name != "rows of torch's"))
    y = layers(x).sin().sum()

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        return grad(y, (x, *layers.parameters()), retain_graph=True, create_graph=create_graph)

    expected = gradients(False)
    for found in at_once(lambda number: gradients(number % 2 == 0)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-4, atol=1e-4)


def test_number_of_threads_changes_meanwhile() -> None:
    """Between calls and, by another thread, during them: the kernels' results are the same bits."""
    x, layer = torch.randn(8, 12, 60, 60), fl.BatchNormAct2d(12, act_layer="silu")
    expected = layer(x)

    def run(number: int) -> bool:
        torch.set_num_threads(1 + number % 4)
        same = torch.equal(fl.functional.batch_norm_act(x, None, None, training=True, act="silu"), expected)
        torch.set_num_threads(1 + (number + 1) % 3)
        return same

    assert all(run(number) for number in range(8))
    assert all(at_once(run))


# Processes

_LOADER = """
    import torch, fastlayers as fl
    from torch.utils.data import DataLoader, Dataset

    class Normalised(Dataset):
        def __init__(self):
            self.layer = fl.BatchNormAct2d(8, act_layer="gelu").eval()
            self.fused = fl.fuse(torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU())).eval()

        def __len__(self):
            return 12

        def __getitem__(self, index):
            x = torch.linspace(-index, index + 1, 8 * 60 * 60).view(1, 8, 60, 60).requires_grad_()
            y = self.layer(x) + self.fused(x)
            y.sum().backward()
            trained = fl.BatchNormAct2d(8, act_layer="relu", drop_p=0.5)(x)
            assert trained.isfinite().all()
            return y.detach()[0] + x.grad[0]

    if __name__ == "__main__":
        torch.set_num_threads(2)
        data = Normalised()
        expected = [data[index] for index in range(len(data))]  # also starts the threads that a fork does not have
        for workers, context in ((0, None), (2, "fork"), (1, "spawn")):
            loader = DataLoader(data, batch_size=3, num_workers=workers, multiprocessing_context=context)
            assert torch.equal(torch.cat(list(loader)), torch.stack(expected)), context
        data[0]
        print("same")
"""


def test_layers_in_workers_of_a_data_loader(tmp_path: Path) -> None:
    """Forked ones, without the threads that their parent has used; and spawned ones."""
    assert scripts.output_of(_LOADER, tmp_path) == "same\n"


_FORK = """
    import os, sys, threading, torch, fastlayers as fl
    from torch import nn

    sys.setswitchinterval(1e-5)
    methods = {name: nn.Module.__dict__.get(name) for name in ("__call__", "__getattribute__", "__setattr__")}
    stop = threading.Event()

    def fuse():
        while not stop.is_set():
            fl.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))

    thread = threading.Thread(target=fuse)
    thread.start()
    torch.set_num_threads(1)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            same = all(nn.Module.__dict__.get(name) is method for name, method in methods.items())
            model = fl.fuse(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
            os._exit(not (same and len(fl.fusion_report(model).fused) == 1))
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    thread.join()
    print("whole")
"""


def test_processes_forked_while_a_thread_fuses(tmp_path: Path) -> None:
    """They have modules as they should be, and do not wait for ever for a thread that they do not have."""
    assert scripts.output_of(_FORK, tmp_path) == "whole\n"


_FORK_OF_A_COMPILING_PROCESS = """
    import os, signal, threading, torch, fastlayers as fl
    from torch import nn
    from torch._dynamo.convert_frame import compile_lock

    held, done = threading.Event(), threading.Event()

    def compile():
        with compile_lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=compile)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        model = fl.fuse(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
        os._exit(len(fl.fusion_report(model).fused) != 1)
    assert os.waitpid(child, 0)[1] == 0
    done.set()
    thread.join()
    print("fused")
"""


def test_a_process_forked_while_a_thread_compiles(tmp_path: Path) -> None:
    """It fuses without waiting for a compilation that ended with the fork."""
    assert scripts.output_of(_FORK_OF_A_COMPILING_PROCESS, tmp_path) == "fused\n"


# Fusing while other threads run models


class Counting(nn.Module):
    """Does what fusing must not see in what it traces: sets attributes, draws, asks for gradients' mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        with torch.no_grad():
            y: Tensor = self.act(self.norm(self.conv(x)))
        return y


@contextmanager
def running(work: Callable[[], object]) -> Iterator[Counter[str]]:
    """Has other threads repeat `work`; counts how often, and the errors."""
    stop, counts = threading.Event(), Counter[str]()

    def repeat() -> None:
        while not stop.is_set():
            try:
                work()
                counts["done"] += 1
            except BaseException as error:
                counts[f"{type(error).__name__}: {error}"] += 1

    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _fuse_some() -> list[int]:
    chains = []
    for _ in range(3):
        inner = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.SiLU())
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), inner)
        chains.append(len(fl.fusion_report(fl.fuse(model)).fused))
    return chains


_METHODS = ("__call__", "__getattr__", "__getattribute__", "__setattr__", "__delattr__")


@pytest.fixture
def _modules_unchanged() -> Iterator[None]:
    before = {name: nn.Module.__dict__.get(name) for name in _METHODS}
    # From torch 2.15 on each thread has a flag of its own.
    tracing = getattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", None)
    yield
    assert {name: nn.Module.__dict__.get(name) for name in _METHODS} == before
    assert getattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", None) is tracing


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("_modules_unchanged")
@pytest.mark.parametrize("how", ["eager", "fused", "compiled", "training"])
def test_other_threads_run_models_while_one_fuses(how: str) -> None:
    """torch.fx, and what watches it, replace methods of all modules: to other threads nothing is different."""
    x = torch.randn(2, 3, 6, 6)
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    models: dict[str, Callable[[], Callable[..., Any]]] = {
        "eager": lambda: Counting().eval(),
        "fused": lambda: fl.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval(),
        "compiled": lambda: torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), backend=backend),
        "training": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), fl.BatchNormAct2d(4, drop_p=0.5)),
    }
    model = models[how]()
    expected = model(x)

    def work() -> None:
        y = model(x)
        if how == "training":
            y.sum().backward()
        else:
            assert torch.equal(y, expected)

    with running(work) as counts:
        assert _fuse_some() == [2, 2, 2]
    assert counts["done"] > 0
    assert set(counts) == {"done"}
    assert len(compiled) == (how == "compiled")  # once, and not anew for what fusing replaces meanwhile


@pytest.mark.usefixtures("_modules_unchanged")
def test_several_threads_fuse() -> None:
    assert at_once(lambda _: _fuse_some(), WORKERS) == [[2, 2, 2]] * WORKERS


class _DrawnBeside(nn.Module):
    """While it is traced, another thread draws a random number; `times` times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if LEFT:
            LEFT.pop()
            thread = threading.Thread(target=random.random)
            thread.start()
            thread.join()
        y: Tensor = self.act(self.norm(x))
        return y


LEFT: list[int] = []


@pytest.mark.parametrize("times", [1, 1000])
def test_random_numbers_that_another_thread_draws(times: int) -> None:
    """A forward is traced once more; where they seem to be its own time and again, it is not fused, and why is said."""
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        LEFT[:] = [0] * times
        report = fl.fusion_report(fl.fuse(_DrawnBeside()))
    finally:
        LEFT.clear()
        stop.set()
        other.join()
    assert bool(report.fused) == (times < _ATTEMPTS)
    if times >= _ATTEMPTS:
        assert "draws random numbers" in str(report)


# Exceptions


class StopError(Exception):
    """Raised by a hook."""


def _raise(*_: object) -> None:
    raise StopError


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("drop_mode", ["channel", "element"])
def test_hooks_that_raise_in_the_middle_of_backward(residual: bool, drop_mode: str) -> None:
    """What was saved goes with the graph, and the layers work on."""
    first, second = (fl.BatchNormAct2d(6, act_layer="relu", drop_p=0.3, drop_mode=drop_mode) for _ in range(2))
    saved: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        x = torch.randn(4, 6, 30, 30, requires_grad=True)
        middle = first(x, x if residual else None)
        middle.register_hook(_raise)
        saved.extend(map(weakref.ref, (x, middle)))
        with pytest.raises(StopError):
            second(middle).sum().backward()

    _, more = growth(fail, 20)
    assert not more
    assert not [reference for reference in saved if reference() is not None]
    x = torch.randn(4, 6, 30, 30, requires_grad=True)
    second(first(x)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"])
def test_hooks_of_modules_that_raise(hook: str) -> None:
    layer = fl.BatchNormAct2d(6, act_layer="relu", drop_p=0.3)
    handle = getattr(layer, hook)(_raise)

    def fail() -> None:
        x = torch.randn(4, 6, 30, 30, requires_grad=True)
        with pytest.raises(StopError):
            layer(x).sum().backward()

    fail()
    before = Held.now()
    for _ in range(10):
        fail()
    assert not Held.now().beyond(before)
    handle.remove()
    layer(torch.randn(4, 6, 30, 30)).sum().backward()


def test_refused_calls_hold_nothing() -> None:
    layer = fl.BatchNormAct2d(6, act_layer="relu", drop_p=0.3)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for make in (lambda: torch.randn(4, 5, 8, 8), lambda: torch.randn(4, 6), lambda: torch.ones(4, 6, 8, 8).int()):
        wrong = make()
        reference = weakref.ref(wrong)
        with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
            layer(wrong)
        del wrong
        gc.collect()
        assert reference() is None
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


# Ctrl-C


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_ctrl_c_given_again(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon after the first it is the same; later it is for what does not end."""
    monkeypatch.setattr(interrupts, "_PATIENCE", patience)
    done: list[int] = []

    def block() -> None:
        with interrupts.uninterrupted():
            for step in range(3):
                signal.raise_signal(signal.SIGINT)
                time.sleep(1e-3)
                done.append(step)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            block()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ([0] if patience == 0 else [0, 1, 2])


_INTERRUPTED = """
    import signal, threading, torch, fastlayers as fl
    from pathlib import Path
    from torch import nn

    def kernels():
        layer(x).sum().backward()

    def masks():
        fl.functional.dropout(x, 0.5)

    def fuse():
        fl.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))

    # As Python's own handler, but while there is nothing to interrupt.
    def interrupt(number, frame):
        global armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    def interrupted(work):
        global armed
        work()
        print("ready", flush=True)
        times, stop = 0, Path(f"stop-{work.__name__}")
        while not stop.exists():
            try:
                armed = True
                work()
                armed = False
            except KeyboardInterrupt:
                times += 1
        work()
        return times

    def check():
        assert torch.equal(fl.functional.batch_norm_act(x, None, None, training=True, act="silu"), expected)
        assert all(nn.Module.__dict__.get(name) is method for name, method in methods.items())
        model = fl.fuse(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()))
        assert len(fl.fusion_report(model).fused) == 1
        torch.manual_seed(0)
        masked = fl.functional.dropout(x, 0.5)
        torch.manual_seed(0)
        assert torch.equal(masked, nn.functional.dropout(x, 0.5))
        assert threading.active_count() == 1

    signal.signal(signal.SIGINT, interrupt)
    armed = False
    torch.set_num_threads(2)
    layer = fl.BatchNormAct2d(16, act_layer="gelu", drop_p=0.3, drop_mode="element")
    methods = {name: nn.Module.__dict__.get(name) for name in ("__call__", "__getattribute__", "__setattr__")}
    x = torch.randn(16, 16, 100, 100, requires_grad=True)
    expected = fl.functional.batch_norm_act(x, None, None, training=True, act="silu")
    for work in (kernels, masks, fuse):
        print(work.__name__, interrupted(work), flush=True)
        check()
"""


@pytest.mark.parametrize("times", [20, pytest.param(500, marks=pytest.mark.long)])
def test_ctrl_c_in_the_middle(times: int, tmp_path: Path) -> None:
    """Of kernels, of masks being drawn, of fusing: KeyboardInterrupt once the kernel has ended, and all works on."""
    interrupted: dict[str, int] = {}

    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        chance = random.Random(0)
        for what in ("kernels", "masks", "fuse"):
            assert process.stdout.readline() == "ready\n"
            for _ in range(times):
                time.sleep(chance.uniform(0.01, 0.04))
                process.send_signal(signal.SIGINT)
            (tmp_path / f"stop-{what}").touch()
            name, count = process.stdout.readline().split()
            interrupted[name] = int(count)

    scripts.output_of(_INTERRUPTED, tmp_path, meanwhile=interrupt)
    # Python drops what is raised in a finaliser, and two signals that come before it looks are one.
    assert all(times / 2 < count <= times for count in interrupted.values()), interrupted
    assert list(interrupted) == ["kernels", "masks", "fuse"]
    print(f"KeyboardInterrupt, of {times} each: {interrupted}")
