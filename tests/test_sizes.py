"""Every combination of batch, size, outputs and precision, from the network to its graphs."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import van_deploy as vd
from tests.artifacts import int8_graph
from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.checks.outputs import batch_sizes
from van_deploy.config import BatchRange
from van_deploy.config.sizes import ImageSize, SizeRange, height_width
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import fold_van
from van_deploy.graph.names import make_batch_dynamic_
from van_deploy.metrics import sqnr_db
from van_deploy.model.checkpoint import network_from_state
from van_deploy.model.van import VAN, random_van, smooth_images
from van_deploy.model.variants import VanConfig
from van_deploy.precision.fp16 import bf16_from_fp32, default_fp32_nodes, fp16_from_fp32
from van_deploy.runners.network import Network
from van_deploy.runners.onnxruntime import onnxruntime_outputs
from van_deploy.schema import validate

CONFIG = VanConfig((8, 12, 16, 24), (1, 1, 2, 1), (4, 4, 2, 2), num_classes=5)
OPERATORS = {"Conv", "Gelu", "Add", "Mul", "Transpose", "LayerNormalization", "ReduceMean", "Gemm"}
SIZES: dict[str, tuple[ImageSize, SizeRange | None]] = {
    "square": (64, None),
    "64x96": ((64, 96), None),
    "dynamic size": ((64, 96), SizeRange(32, (64, 96), (96, 128))),
}
MIN_DB = {"fp32": 105.0, "fp16": 50.0, "bf16": 34.0, "int8": 20.0}
ALL = list(itertools.product((None, 2), SIZES, ((), (0, 1, 2, 3))))
FAST = (
    *((None, "64x96", (0, 1, 2, 3)), (None, "dynamic size", ())),
    *((2, "square", (0, 1, 2, 3)), (2, "dynamic size", (0, 1, 2, 3))),
)


@pytest.fixture(scope="module")
def original() -> VAN:
    return random_van(CONFIG, seed=5)


@pytest.mark.parametrize(
    ("batch", "size", "indices"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in ALL],
)
def test_every_combination_agrees_with_pytorch(
    original: VAN, batch: int | None, size: str, indices: tuple[int, ...]
) -> None:
    native, sizes = SIZES[size]
    config = CONFIG.backbone(indices) if indices else CONFIG
    network = network_from_state(original.state_dict(), config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = smooth_images(8, 3, 128)
    height, width = height_width(native)
    folded = fold_van(network, images[:1, :, :height, :width]).model
    fp32 = onnx_from_van(folded, native, batch=batch, sizes=sizes)
    assert {node.op_type for node in fp32.graph.node} <= OPERATORS
    dims = [d.dim_param or d.dim_value for d in fp32.graph.input[0].type.tensor_type.shape.dim]
    assert dims == [batch or "batch", 3, *(("height", "width") if sizes else (height, width))]
    kept = default_fp32_nodes(fp32)
    graphs = {
        "fp32": fp32,
        "fp16": fp16_from_fp32(fp32, kept),
        "bf16": bf16_from_fp32(fp32, kept),
        "int8": int8_graph(fp32, config, [images[:, :, :height, :width].numpy()]),
    }
    for graph in graphs.values():
        onnx.checker.check_model(graph, full_check=True)
    network = network.double()
    for at in sizes.sample_sizes() if sizes else (native,):
        rows, columns = height_width(at)
        crops = images[:2, :, :rows, :columns].contiguous()
        with torch.no_grad():
            outputs = network(crops.double())
        expected = outputs if isinstance(outputs, tuple) else (outputs,)
        for name, graph in graphs.items():
            actual = onnxruntime_outputs(graph, crops.numpy())
            assert list(actual) == list(config.output_names)
            for stage, value in zip(expected, actual.values(), strict=True):
                assert sqnr_db(stage.numpy(), value) >= MIN_DB[name], (name, at)


def test_static_graph_refuses_other_batches(original: VAN) -> None:
    graph = onnx_from_van(fold_van(original, torch.zeros(1, 3, 64, 64)).model, 64, batch=2)
    images = np.zeros((3, 3, 64, 64), np.float32)
    with pytest.raises(Exception, match="dimension"):
        onnxruntime_outputs(graph, images)
    make_batch_dynamic_(graph)  # which is only a name
    assert onnxruntime_outputs(graph, images)["logits"].shape == (3, 5)


def test_ranges_of_sizes_and_batches() -> None:
    sizes = SizeRange(64, (64, 96), (96, 128))
    assert (sizes.contains((96, 64)), sizes.contains((97, 64))) == (True, False)
    assert str(sizes) == "64:64x96:96x128"
    assert SizeRange(64, 64, 64).sample_sizes() == (64,)
    sizes = SizeRange((64, 32), (64, 48), (64, 64))
    assert sizes.sample_sizes() == ((64, 32), (64, 48), (64, 49), 64)
    eight, rising = validate(BatchRange, "8"), validate(BatchRange, "1:8:8")
    assert (batch_sizes(eight), eight.fixed, rising.fixed) == ((8,), 8, None)
    assert batch_sizes(BatchRange()) == (1, 2, 3, 5, 8, 32)
    assert batch_sizes(BatchRange(1, 2, 2)) == (1, 2)


@pytest.fixture(scope="module")
def dynamic_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the digits at 64x96 in batches of 3, sizes dynamic."""
    path = tmp_path_factory.mktemp("sizes") / "b"
    options: Any = {"batch": "3", "image_size": "64x96", "dynamic_size": "64:64x96:96x128"}
    vd.export("van_digits", path, **options)
    return Bundle.open(path)


def test_bundle_is_checked_at_its_batch_and_every_size(dynamic_bundle: Bundle) -> None:
    agreement = dynamic_bundle.manifest.checks["agreement"]
    assert [row["batch"] for row in agreement["batches"]] == [3]
    rules = [finding["rule"] for finding in agreement["findings"]]
    assert rules.count("SQNR") == 1 + 3  # at its own size and the others
    assert agreement["outcome"] == "pass"
    with np.load(dynamic_bundle.path / "golden.npz") as arrays:
        sizes = {name.split()[1] for name in arrays.files if " " in name}
    assert sizes == {"64x64", "81x97", "96x128"}


def test_network_pads_to_the_fixed_batch(dynamic_bundle: Bundle) -> None:
    images = np.random.default_rng(0).standard_normal((4, 3, 64, 96)).astype(np.float32)
    with Network(dynamic_bundle, "fp32") as network:
        assert [network.supports_batch(3), network.supports_batch(2)] == [True, False]
        assert [network.supports_size((96, 64)), network.supports_size((96, 160))] == [True, False]
        together = network.run(images)["logits"]
        apart = np.concatenate([network.run(images[i : i + 1])["logits"] for i in range(4)])
    assert np.allclose(together, apart, atol=1e-4)


def test_precisions_and_engines_of_dynamic_sizes(
    dynamic_bundle: Bundle, digits_bundle: Bundle, cli: Cli
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    for precision in ("fp16", "bf16"):
        result = cli("quantize", dynamic_bundle.path, "--precision", precision)
        assert result.exit_code == 0, result.stdout
    built = cli("build", dynamic_bundle.path, "--precision", "fp16", "--target", "sm_89")
    assert built.exit_code == 0, built.stderr
    verified = cli("verify", dynamic_bundle.path, "--allow-skip", "engines")
    assert verified.exit_code == 0, verified.stdout
    engine = next(
        a for a in dynamic_bundle.open(dynamic_bundle.path).artifacts.values() if a.kind == "engine"
    )
    sidecar = json.loads((dynamic_bundle.path / engine.file).with_suffix(".json").read_text())
    assert sidecar["inputs"][0]["shape"] == [3, 3, -1, -1]
    for bundle, option, value, message in (
        (dynamic_bundle, "--batch", "1:2:4", "has a fixed batch of 3, so it cannot serve 1:2:4"),
        (dynamic_bundle, "--dynamic-size", "64:32:96", "is not min <= opt <= max"),
        (digits_bundle, "--dynamic-size", "64:64:96", "size, so it cannot serve 64:64:96"),
    ):
        result = cli("build", bundle.path, "--target", "sm_89", option, value)
        assert result.exit_code in (2, 5)
        assert message in " ".join(result.stderr.split())


def test_message_shows_the_size_as_written(cli: Cli) -> None:
    for words in (("export", "van_digits"), ("bench", "dist/none")):
        result = cli(*words, "--image-size", "64x30")
        assert result.exit_code == 2
        assert "'64x30': it should be greater than or equal to 32" in " ".join(
            result.stderr.split()
        )
