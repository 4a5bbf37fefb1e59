"""Export, ONNX and tracing: programs of torch's own operators, which run without this library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fastlayers as fl
from tests.cases import SEED


@pytest.fixture(autouse=True)
def _on_the_cpu(device: torch.device) -> Iterator[None]:
    if device.type != "cpu":
        pytest.skip("what is exported does not depend on the device")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Network(nn.Module):
    """Every kind of layer: BatchNorm, with all that is fused with it, and dropout of channels and elements."""

    def __init__(self, act: str = "relu", drop_p: float = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.first = fl.BatchNormAct2d(8, act_layer=act, drop_p=drop_p, pool=nn.MaxPool2d(3, 2, 1))
        self.norm = fl.BatchNorm2d(8)
        self.second = fl.BatchNormAct2d(8, act_layer=act)
        self.channels, self.elements = fl.Dropout2d(drop_p), fl.Dropout(drop_p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x))
        output: Tensor = self.elements(self.channels(self.second(self.norm(x), x)))
        return output


def _trained(network: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics and parameters that are not those of the start."""
    torch.manual_seed(SEED)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network(torch.randn(4, 3, 9, 9))
    return network.eval()


def _export(network: nn.Module, x: Tensor, strict: bool = False) -> ExportedProgram:
    return torch.export.export(network, (x,), strict=strict, dynamic_shapes=({0: Dim("batch", min=2, max=4096)},))


def _operators(program: ExportedProgram) -> dict[str, int]:
    """How often each operator is called."""
    names = [str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("aten.")]
    others = [str(node.target) for node in program.graph.nodes if "fastlayers" in str(node.target)]
    assert not others
    return {name: names.count(name) for name in names}


PLAIN = {"conv2d": 1, "batch_norm": 3, "relu": 2, "add": 1, "max_pool2d": 1}


@pytest.mark.parametrize("strict", [False, True])
def test_evaluation_is_plain(strict: bool) -> None:
    """One node per operation, any batch, small and large, and the numbers of the layers."""
    network, x = _trained(Network()), torch.randn(2, 3, 9, 9)
    program = _export(network, x, strict)
    assert _operators(program) == PLAIN
    for batch in (2, 7, 400):  # the last is beyond what layers hand to torch's kernels by themselves
        x = torch.randn(batch, 3, 9, 9)
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-4)
    lower = program.run_decompositions()
    assert _operators(lower)["_native_batch_norm_legit_no_training"] == 3
    torch.testing.assert_close(lower.module()(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", [name for name in fl.activations.NAMES if name != "identity"])
def test_activations_are_one_node(act: str) -> None:
    network = _trained(fl.BatchNormAct2d(3, act_layer=act))
    x = torch.randn(4, 3, 5, 5)
    program = _export(network, x)
    found = _operators(program)
    assert found.pop("batch_norm") == 1
    assert list(found.values()) == [1], found
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer", [fl.BatchNorm2d(3, affine=False), fl.BatchNorm2d(3, momentum=None), fl.BatchNorm2d(3, bias=False)]
)
def test_options_in_evaluation(layer: nn.Module) -> None:
    x = torch.randn(4, 3, 5, 5)
    program = _export(_trained(layer), x)
    assert _operators(program) == {"batch_norm": 1}
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
def test_training_is_that_of_torchs_layers(strict: bool) -> None:
    """The same operators, statistics and mask; NaN in what is dropped stays, as in torch's layers."""
    network = Network().train()
    x = torch.randn(4, 3, 9, 9)
    program = _export(network, x, strict)
    assert _operators(program) == PLAIN | {"add_": 3, "feature_dropout": 2, "dropout": 1}
    exported = program.module()
    torch.manual_seed(SEED)
    got = exported(x)
    torch.manual_seed(SEED)
    expected = network(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    state = exported.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4)


def test_cumulative_statistics_in_training() -> None:
    """The layer of torch cannot be exported so: its operator wants a number. Ours is plain arithmetic then."""
    layer = fl.BatchNorm2d(3, momentum=None)
    exported = torch.export.export(layer, (torch.randn(4, 3, 5, 5),)).module()
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5) + 1
        torch.testing.assert_close(exported(x), layer(x), rtol=1e-4, atol=1e-5)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[name], value)


def test_backends_that_are_asked_for() -> None:
    """A program of our operators where a backend is set, which then needs this library; or of the reference's."""
    x = torch.randn(4, 3, 5, 5)
    network = _trained(fl.BatchNormAct2d(3))
    for backend, operator in (("cpp", "fastlayers.batch_norm_act_fwd.default"), ("reference", "aten.rsqrt.default")):
        with fl.use_backend(backend):
            program = torch.export.export(network, (x,))
        assert operator in [str(node.target) for node in program.graph.nodes]
        torch.testing.assert_close(program.module()(x), network(x))


RUN_WITHOUT = """
import sys, torch
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), expected)
traced = torch.jit.load(sys.argv[3])
torch.testing.assert_close(traced(x), expected)
assert "fastlayers" not in sys.modules
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_runs_without_this_library(tmp_path: Path) -> None:
    """Saved, and loaded in a process that never imports it: exported, and traced."""
    network, x = _trained(Network()), torch.randn(4, 3, 9, 9)
    paths = [tmp_path / name for name in ("program.pt2", "numbers.pt", "traced.pt")]
    torch.export.save(_export(network, x), paths[0])
    torch.save((x, network(x).detach()), paths[1])
    torch.jit.save(torch.jit.trace(network, (x,)), paths[2])
    process = subprocess.run([sys.executable, "-c", RUN_WITHOUT, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [False, True])
def test_trace(training: bool) -> None:
    """Nodes of torch's, for a batch of any size."""
    network = _trained(Network()).train(training)
    traced = torch.jit.trace(network, (torch.randn(4, 3, 9, 9),), check_trace=not training)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("aten::batch_norm") == 3
    assert kinds.count("aten::feature_dropout") == 2 * training
    assert kinds.count("aten::max_pool2d") == 1
    assert not [kind for kind in kinds if "PythonOp" in kind or "fastlayers" in kind]
    x = torch.randn(300, 3, 9, 9)
    results = []
    for call in (traced, network):
        torch.manual_seed(SEED)
        results.append(call(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "layer", [fl.BatchNorm1d(3), fl.BatchNormAct2d(3), fl.Dropout(), fl.Dropout1d(), fl.Dropout2d(), fl.Dropout3d()]
)
def test_script_says_no(layer: nn.Module) -> None:
    for module in (layer, nn.Sequential(nn.ReLU(), layer)):
        with pytest.raises(
            NotImplementedError, match=rf"torch.jit.script cannot compile {type(layer).__name__}.*trace"
        ):
            torch.jit.script(module)


#: What the two exporters are told.
EXPORTERS: dict[str, dict[str, Any]] = {
    "dynamo": {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: Dim("batch", min=2, max=4096)},)},
    "tracing": {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("act", ["relu", "hardswish", "sigmoid"])
def test_onnx(exporter: str, act: str, tmp_path: Path) -> None:
    """BatchNormalization and activation nodes, and the numbers of the layers by ONNX's own evaluator."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    network = _trained(Network(act))
    torch.onnx.export(network, (torch.randn(2, 3, 9, 9),), tmp_path / "model.onnx", **EXPORTERS[exporter])
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    # An exporter may fold the one that follows the convolution into it.
    assert kinds.count("BatchNormalization") in (2, 3), kinds
    assert {kind.lower() for kind in kinds} >= {"conv", "add", "maxpool", act}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    reference = pytest.importorskip("onnx.reference")
    x = torch.randn(5, 3, 9, 9)
    (got,) = reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), network(x).detach(), rtol=1e-3, atol=1e-3)
