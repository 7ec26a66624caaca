"""Packages for Triton: judged by Triton's own schema, and by a client that was generated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Cli
from tests.described import entry
from tests.each import each
from tests.serve.conftest import Running, top5_of
from van_deploy.bundle import Bundle, writing
from van_deploy.errors import InputError, UsageError
from van_deploy.serve.triton import package_triton, preferred_batches
from van_deploy.serve.triton_check import check_package

pytest.importorskip("tritonclient.grpc", reason="Triton's schema is in tritonclient[grpc]")

NAME = "van_digits-fp32-uint8"


@pytest.fixture
def package(digits: Bundle, tmp_path: Path) -> Path:
    return package_triton(digits, tmp_path / "out", ["fp32-uint8", "fp32"]).path


def config_of(package: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (package / "models" / NAME / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_package_is_what_the_bundle_says(package: Path, digits: Bundle) -> None:
    report = check_package(package, digits)
    assert report.passed, report.findings
    assert len(report.findings) == 17  # the files, and eight for each model
    served = (package / "models" / NAME / "1/model.onnx").read_bytes()
    assert served == (digits.path / "model.uint8.onnx").read_bytes()


def test_the_configuration_as_triton_reads_it(package: Path) -> None:
    config = config_of(package)
    assert (config.name, config.backend, config.max_batch_size) == (NAME, "onnxruntime", 8)
    assert list(config.input[0].dims) == [64, 64, 3]
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 8]
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 256
    assert [w.batch_size for w in config.model_warmup] == [1, 8]
    assert not config.response_cache.enable
    assert config.output[0].label_filename == "labels.txt"


def in_config(old: str, new: str) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        file = package / "models" / NAME / "config.pbtxt"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


def shorten_labels(package: Path) -> None:
    (package / "models" / NAME / "labels.txt").write_text("one\n")


def swap_graphs(package: Path) -> None:
    models = package / "models"
    shutil.copyfile(models / "van_digits-fp32/1/model.onnx", models / NAME / "1/model.onnx")


def remove_graph(package: Path) -> None:
    (package / "models" / NAME / "1/model.onnx").unlink()


@each(
    ("change", "check", "detail"),
    [
        (in_config("max_batch_size: 8", "max_batch_size: 16"), "batches", "max_batch_size is 16"),
        (in_config("batch_size: 2", "batch_size: 64"), "batches", "preferred sizes [64, 8]"),
        (in_config("TYPE_UINT8", "TYPE_FP32"), "tensors", "the inputs are"),
        (in_config("dims: 64", "dims: 32"), "tensors", "the inputs are"),
        (in_config('name: "pixels"', 'name: "images"'), "tensors", "the inputs are"),
        (in_config("TYPE_INT64", "TYPE_INT32"), "tensors", "the outputs are"),
        (in_config("enable: false", "enable: true"), "identity", "the response cache is on"),
        (in_config(NAME, "resnet"), "identity", "the name is 'resnet'"),
        (in_config("onnxruntime", "tensorrt"), "identity", "the back end is 'tensorrt'"),
        (in_config("max_batch_size", "max_batchsize"), "config", "not a ModelConfig"),
        (in_config('key: "pixels"', 'key: "x"'), "warmup", "sends"),
        (shorten_labels, "labels", "1 names for an output of shape [10]"),
        (swap_graphs, "graph", "the graph's inputs are"),
        (remove_graph, "identity", "which must exist"),
    ],
    fresh="package",
)
def test_every_disagreement_is_found(
    package: Path, digits: Bundle, change: Callable[[Path], None], check: str, detail: str
) -> None:
    change(package)
    report = check_package(package, digits)
    failed = {f.name.rsplit(": ")[-1]: f.detail for f in report.findings if not f.outcome}
    assert "files" in failed  # its digest says so too
    assert detail in failed[check]


def test_a_bundle_made_anew_is_noticed(package: Path, digits: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(shutil.copytree(digits.path, tmp_path / "copy"))
    old = copy.artefact("fp32-uint8")
    with writing(copy.path) as draft:
        text = (digits.path / "model.onnx").read_bytes()
        draft.file("model.uint8.onnx").write_bytes(text)
        draft.record(old)
    report = check_package(package, Bundle.open(copy.path))
    failed = [f for f in report.findings if not f.outcome]
    assert [f.name for f in failed][:1] == [f"{NAME}: artefact"]
    assert "made anew since" in failed[0].detail


def test_preferred_sizes_come_from_the_benchmark(digits: Bundle) -> None:
    assert preferred_batches(digits, "fp32-uint8", 8) == (2, 8)
    rates = {1: 100.0, 2: 150.0, 4: 195.0, 8: 200.0, 16: 300.0}
    rows = [
        {"contender": "ort-cpu/fp32", "batch": batch, "images_per_s": rate}
        for batch, rate in rates.items()
        if batch <= 8
    ]
    rows.append({"contender": "ort-cpu/int8", "batch": 1, "images_per_s": 9e9})
    checks = {**digits.manifest.checks, "bench": {"rows": rows}}
    measured = Bundle(digits.path, digits.manifest.model_copy(update={"checks": checks}))
    assert preferred_batches(measured, "fp32-uint8", 8) == (4, 8)


def test_an_rtx_plan_is_refused(digits: Bundle, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert trt
    from van_deploy.config import BuildOptions
    from van_deploy.engine.sidecar import SCHEMA, Sidecar, Tensor, sidecar_path, write_sidecar

    copy = shutil.copytree(digits.path, tmp_path / "copy")
    fields: dict[str, Any] = {
        "name": "e", "plan_sha256": "", "plan_bytes": 4, "onnx_file": "model.onnx",
        "onnx_sha256": "", "backend": "tensorrt-rtx", "backend_version": "1.7.1.116", "cuda": 13,
        "precision": "fp32", "targets": ("sm_89",), "built_on": None,
        "options": BuildOptions(), "schema": SCHEMA,
        "inputs": (Tensor(name="images", shape=(-1, 3, 64, 64), dtype="float"),),
        "outputs": (Tensor(name="logits", shape=(-1, 10), dtype="float"),), "parser_layers": 1,
        "parse_seconds": 0.0, "build_seconds": 0.0, "peak_memory_bytes": 0, "workspace_bytes": 0,
        "device_memory": {}, "warnings": {}, "fixed_addresses": True, "reproducible": True,
    }  # fmt: skip
    import hashlib

    with writing(copy) as draft:
        plan = draft.file("engines/e.plan")
        plan.write_bytes(b"plan")
        fields["plan_sha256"] = hashlib.sha256(b"plan").hexdigest()
        write_sidecar(plan, Sidecar(**fields))
        beside = sidecar_path(plan).name
        files = ("engines/e.plan", f"engines/{beside}")
        draft.record(entry("e", "engine", "fp32", "engines/e.plan", files))
    with pytest.raises(InputError, match="cannot load 'e': it was built by tensorrt-rtx"):
        package_triton(Bundle.open(copy), tmp_path / "out", ["e"])
    assert not (tmp_path / "out").exists()


def test_something_else_is_not_overwritten(digits: Bundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds something else and no package"):
        package_triton(digits, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_package_is_replaced_whole(digits: Bundle, tmp_path: Path) -> None:
    package_triton(digits, tmp_path / "out", ["fp32-uint8"])
    package_triton(digits, tmp_path / "out", ["fp32"])
    assert [p.name for p in (tmp_path / "out/models").iterdir()] == ["van_digits-fp32"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_manifests_are_yaml_with_probes_requests_and_scaling(package: Path) -> None:
    yaml = pytest.importorskip("yaml")
    deployment, service, scaler = yaml.safe_load_all((package / "kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probes = {"startupProbe", "readinessProbe", "livenessProbe"}
    assert probes <= set(container)
    assert container["resources"]["requests"] == {"cpu": "2", "memory": "2052Mi"}
    assert deployment["metadata"]["name"] == "van-digits"
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == "van-digits"
    kserve = yaml.safe_load((package / "kserve.yaml").read_text())
    assert kserve["spec"]["predictor"]["triton"]["protocolVersion"] == "v2"
    compose = yaml.safe_load((package / "compose.yaml").read_text())
    assert compose["services"]["triton"]["volumes"] == ["./models:/models:ro"]
    assert all(p.startswith("127.0.0.1:") for p in compose["services"]["triton"]["ports"])


@pytest.mark.parametrize("artefact", ["fp32-uint8", "fp32"])
def test_the_generated_client_gets_the_originals_answer(
    digits: Bundle, server: Running, original: Path, tmp_path: Path, artefact: str
) -> None:
    package_triton(digits, tmp_path / "out", [artefact])
    done = subprocess.run(
        [sys.executable, tmp_path / "out/client.py", "--url", server.address, original],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    expected = top5_of(digits)
    assert [row[2] for row in rows] == [str(item.index) for item in expected]
    found = [float(row[1]) for row in rows]
    np.testing.assert_allclose(found, [i.probability for i in expected], atol=6e-5)


def test_the_client_computes_the_librarys_pixels(digits: Bundle, tmp_path: Path) -> None:
    import importlib.util

    from PIL import Image

    from van_deploy.data import open_image
    from van_deploy.model.pixels import pixels_from_image

    package_triton(digits, tmp_path / "out")
    spec = importlib.util.spec_from_file_location("client", tmp_path / "out/client.py")
    assert spec is not None
    assert spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    preprocessing = digits.manifest.preprocessing
    rng = np.random.default_rng(0)
    for width, height in ((50, 70), (301, 200), (64, 64)):
        path = tmp_path / "a.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        expected = pixels_from_image(open_image(path), preprocessing)
        assert np.array_equal(client.pixels_from_file(path), expected)


def test_the_command_packages_and_checks(digits: Bundle, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    made = cli("package", "triton", digits.path, "--output", out, "--json")
    assert (made.exit_code, json.loads(made.stdout)["passed"]) == (0, True)
    assert cli("package", "triton", digits.path, "-o", out, "--check").exit_code == 0
    in_config("max_batch_size: 8", "max_batch_size: 9")(out)
    failed = cli("package", "triton", digits.path, "-o", out, "--check")
    assert failed.exit_code == 1
    assert "max_batch_size is 9, the artefact's limit 8" in " ".join(failed.stdout.split())
    nothing = cli("package", "triton", digits.path, "-o", tmp_path / "none", "--check")
    assert nothing.exit_code == 5
