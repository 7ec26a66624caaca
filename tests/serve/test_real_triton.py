"""Packages in a real Triton server, tested with tritonclient over HTTP and gRPC.

The server comes from the ``nvidia-pytriton`` wheel (see :mod:`reliability.tritonserver`). It has
only the Python backend; for the others it validates the configuration and then reports that the
backend is missing.
"""

from __future__ import annotations

import queue
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reliability.tritonserver import PYTHON, TritonServer, install_tritonserver, run_tritonserver
from tests.each import each
from tests.serve.conftest import PlanMaker, pixels_of, tensor_of
from van_deploy.api import open_bundle
from van_deploy.bundle import Bundle
from van_deploy.data.images import find_images
from van_deploy.runners.network import Network
from van_deploy.serve import package as triton_files

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.slow

NAME = "van_digits-fp32-uint8"
CLIENTS = (http, grpc)


@pytest.fixture(scope="module", autouse=True)
def server() -> Path:
    """Return the folder of the server, or skip where pip cannot download it."""
    try:
        return install_tritonserver()
    except RuntimeError as error:
        pytest.skip(str(error))


def package(bundle: Bundle, output: Path, **options: Any) -> Path:
    report = open_bundle(bundle.path).package(output, **options)
    assert report.passed, report.findings
    return output / "models"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Return options for a package with this Python; pip downloads its environment once."""
    cached, write = (
        tmp_path_factory.mktemp("environment") / "cached",
        triton_files.write_environment,
    )

    def copy_environment(archive: Path, python: str) -> None:
        if not cached.exists():
            write(cached, python)
        shutil.copy(cached, archive)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_files, "write_environment", copy_environment)
        options = {"triton_python": PYTHON, "triton_release": "24.10", "threads": 1}
        yield {"backend": "python", **options}


@pytest.fixture(scope="module")
def triton(
    tmp_path_factory: pytest.TempPathFactory, uint8_bundle: Bundle, environment: dict[str, Any]
) -> Iterator[TritonServer]:
    """Serve the digits with two instances, after their warm-up."""
    folder = tmp_path_factory.mktemp("triton")
    models = package(uint8_bundle, folder / "package", instances=2, **environment)
    with run_tritonserver(models, folder / "server") as running:
        assert running.process.poll() is None, running.log_text()
        text = urllib.request.urlopen(running.metrics, timeout=30).read().decode()
        pattern = rf'^(nv_\w+){{model="{NAME}",version="1"}} (\d+)'
        metrics = dict(re.findall(pattern, text, re.MULTILINE))
        assert int(metrics["nv_inference_exec_count"]) == 4  # batches of 1 and 8, two instances
        assert int(metrics["nv_inference_count"]) == 18
        assert "nv_inference_pending_request_count" in metrics  # GPU deployments scale on it
        yield running


def client_of(module: Any, triton: TritonServer) -> Any:
    return module.InferenceServerClient(triton.http if module is http else triton.grpc)


@each("module", CLIENTS)
def test_metadata_and_configuration_match_the_package(module: Any, triton: TritonServer) -> None:
    with client_of(module, triton) as client:
        assert client.is_server_ready()
        assert client.is_model_ready(NAME, "1")
        with pytest.raises(Exception, match="must be <= 8"):
            client.infer(NAME, [tensor_of(module, np.zeros((9, 64, 64, 3), np.uint8))])
    with client_of(http, triton) as client:
        metadata, config = client.get_model_metadata(NAME), client.get_model_config(NAME)
    assert metadata["platform"] == "python"
    shapes = {t["name"]: [int(n) for n in t["shape"]] for t in metadata["inputs"]}
    assert shapes == {"pixels": [-1, 64, 64, 3]}
    names = ["logits", "probabilities", "top5_classes", "top5_probabilities"]
    assert [t["name"] for t in metadata["outputs"]] == names
    (group,) = config["instance_group"]
    assert (group["count"], group["kind"]) == (2, "KIND_CPU")
    assert config["parameters"]["intra_op_thread_count"]["string_value"] == "1"


@each("module", CLIENTS)
def test_results_match_the_artifact(
    module: Any, triton: TritonServer, uint8_bundle: Bundle, heldout_200: Path
) -> None:
    pixels = pixels_of(uint8_bundle, find_images(heldout_200))
    with Network(uint8_bundle, "fp32-uint8", threads=1) as network:
        expected = np.concatenate([network.run(p[None])["logits"] for p in pixels])
    classified = [module.InferRequestedOutput("logits", class_count=1)]
    with client_of(module, triton) as client:
        batches = [pixels[start : start + 8] for start in range(0, len(pixels), 8)]
        results = [client.infer(NAME, [tensor_of(module, batch)]) for batch in batches]
        actual = np.concatenate([result.as_numpy("logits") for result in results])
        first = client.infer(NAME, [tensor_of(module, pixels[:1])], outputs=classified)
        (text,) = first.as_numpy("logits")
    assert len(pixels) == 200
    assert (actual.argmax(axis=1) == expected.argmax(axis=1)).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    _, index, label = text[0].decode().split(":")
    assert (int(index), label) == (expected[0].argmax(), str(expected[0].argmax()))


def test_concurrent_requests_are_batched(
    triton: TritonServer, uint8_bundle: Bundle, heldout_200: Path
) -> None:
    pixels = pixels_of(uint8_bundle, find_images(heldout_200))[:64]
    with grpc.InferenceServerClient(triton.grpc) as client:
        before = batches_of(client)
        assert errors_of(client, NAME, [tensor_of(grpc, p[None]) for p in pixels]) == [None] * 64
        for _ in range(50):  # a response may arrive before it is counted
            ran = {n: count - before.get(n, 0) for n, count in batches_of(client).items()}
            if sum(size * count for size, count in ran.items()) == 64:
                break
            time.sleep(0.1)
    assert sum(size * count for size, count in ran.items()) == 64
    assert 1 < max(size for size, count in ran.items() if count) <= 8


def errors_of(client: Any, name: str, tensors: list[Any]) -> list[Any]:
    """Send one request for each tensor at once; return their errors, None for success."""
    answers: queue.Queue[Any] = queue.Queue()
    for tensor in tensors:
        client.async_infer(name, [tensor], callback=lambda result, error: answers.put(error))
    return [answers.get(timeout=60) for _ in tensors]


def batches_of(client: Any) -> dict[int, int]:
    """Return the number of batches by batch size."""
    (stats,) = client.get_inference_statistics(NAME).model_stats
    return {b.batch_size: b.compute_infer.count for b in stats.batch_stats}


def test_cifar_results_match_and_a_full_queue_is_refused(
    tmp_path: Path, cifar_bundle: Bundle, shared: Path, environment: dict[str, Any]
) -> None:
    options = {"artifacts": ("fp32",), "queue_limit": 2, **environment}
    models = package(cifar_bundle, tmp_path / "package", **options)
    name, largest = f"{cifar_bundle.name}-fp32", cifar_bundle.manifest.batch.max
    pixels = pixels_of(cifar_bundle, find_images(shared / "data/cifar10/eval"))
    actual, expected = [], []
    with (
        run_tritonserver(models, tmp_path / "server") as running,
        http.InferenceServerClient(running.http, network_timeout=60) as client,
        grpc.InferenceServerClient(running.grpc) as many,
        Network(cifar_bundle, "fp32", threads=1) as network,
    ):
        for start in range(0, len(pixels), largest):
            rows = network.prepare(pixels[start : start + largest])
            actual.append(client.infer(name, [tensor_of(http, rows, "images")]).as_numpy("logits"))
            expected.append(network.run(rows)["logits"])
        full = network.prepare(pixels[:largest])
        errors = errors_of(many, name, [tensor_of(grpc, full, "images") for _ in range(16)])
    tops = [np.concatenate(logits).argmax(axis=1) for logits in (actual, expected)]
    assert len(tops[0]) == len(pixels) >= 1000
    assert (tops[0] == tops[1]).all()
    refused = [str(error) for error in errors if error is not None]
    assert 0 < len(refused) < 16  # queued requests are answered
    assert all("Exceeds maximum queue size" in text for text in refused), refused


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_only_the_backend_library_is_missing_for_other_backends(
    backend: str, uint8_bundle: Bundle, with_plans: PlanMaker, tmp_path: Path
) -> None:
    bundle, names = uint8_bundle, tuple[str, ...](["fp32-uint8"])
    if backend == "tensorrt":
        bundle, names = with_plans("1:1:1,2:8:8", "sm_89", "sm_90"), ("plan-sm_89", "plan-sm_90")
    models = package(bundle, tmp_path / "package", artifacts=names)
    with run_tritonserver(models, tmp_path / "server") as ended:
        assert ended.process.poll() is not None
        log = ended.log_text()
    errors = re.findall(r"^E\d{4} .*?\] \"(.*)\"$", log, re.MULTILINE)
    relevant = [e for e in errors if "CudaDriverHelper" not in e]
    assert len(relevant) == 1, log
    assert f"unable to find backend library for backend '{backend}'" in relevant[0]
    assert "Poll failed" not in log
