"""Packages in a real Triton server, tested with tritonclient over HTTP and gRPC.

The server comes from the ``nvidia-pytriton`` wheel (see :mod:`reliability.tritonserver`). It has
only the Python backend; for the others it validates the configuration and then reports that the
backend is missing.
"""

import queue
import re
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reliability.tritonserver import PYTHON, TritonServer, install_tritonserver, run_tritonserver
from tests.each import each
from tests.plans import PlanMaker
from tests.serve.conftest import pixels_of, tensor_of, write_package
from van_deploy.bundle import Bundle
from van_deploy.data.images import find_images
from van_deploy.runners.network import Network
from van_deploy.serve import package as triton_files

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.slow

NAME = "van_digits-fp32-uint8"


@pytest.fixture(scope="module", autouse=True)
def server() -> Path:
    """Return the folder of the server, or skip where pip cannot download it."""
    try:
        return install_tritonserver()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Return options for a package with this Python; pip downloads its environment once."""
    cached = tmp_path_factory.mktemp("environment") / "cached"
    triton_files.write_environment(cached, PYTHON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_files, "write_environment", lambda path, _: shutil.copy(cached, path))
        options = {"triton_python": PYTHON, "triton_release": "24.10", "threads": 1}
        yield {"backend": "python", **options}


@pytest.fixture(scope="module")
def triton(
    tmp_path_factory: pytest.TempPathFactory, uint8_bundle: Bundle, environment: dict[str, Any]
) -> Iterator[TritonServer]:
    """Serve the digits with two instances, after their warm-up."""
    folder = tmp_path_factory.mktemp("triton")
    package = write_package(folder / "package", uint8_bundle, instances=2, **environment)
    with run_tritonserver(package / "models", folder / "server") as running:
        assert running.process.poll() is None, running.log_text()
        text = urllib.request.urlopen(running.metrics, timeout=30).read().decode()
        model = f'{{model="{NAME}",version="1"}}'
        assert f"nv_inference_exec_count{model} 4\n" in text  # batches of 1 and 8, two instances
        assert f"nv_inference_count{model} 18\n" in text
        assert f"nv_inference_pending_request_count{model}" in text  # GPU deployments scale on it
        yield running


def test_metadata_and_configuration_match_the_package(triton: TritonServer) -> None:
    with http.InferenceServerClient(triton.http) as client:
        assert client.is_server_ready()
        assert client.is_model_ready(NAME, "1")
        metadata, config = client.get_model_metadata(NAME), client.get_model_config(NAME)
    assert metadata["platform"] == "python"
    shapes = {t["name"]: [int(n) for n in t["shape"]] for t in metadata["inputs"]}
    assert shapes == {"pixels": [-1, 64, 64, 3]}
    names = ["logits", "probabilities", "top5_classes", "top5_probabilities"]
    assert [t["name"] for t in metadata["outputs"]] == names
    (group,) = config["instance_group"]
    assert (group["count"], group["kind"]) == (2, "KIND_CPU")
    assert config["parameters"]["intra_op_thread_count"]["string_value"] == "1"


@each("module", [http, grpc])
def test_results_match_the_artifact(
    module: Any, triton: TritonServer, pixels: Any, expected: Any
) -> None:
    classified = [module.InferRequestedOutput("logits", class_count=1)]
    with module.InferenceServerClient(triton.http if module is http else triton.grpc) as client:
        batches = [pixels[start : start + 8] for start in range(0, len(pixels), 8)]
        results = [client.infer(NAME, [tensor_of(module, batch)]) for batch in batches]
        first = client.infer(NAME, [tensor_of(module, pixels[:1])], outputs=classified)
        with pytest.raises(Exception, match="must be <= 8"):
            client.infer(NAME, [tensor_of(module, pixels[:9])])
    logits = expected["logits"]
    check_logits(results, logits)
    _, index, label = first.as_numpy("logits")[0, 0].decode().split(":")
    assert (int(index), label) == (logits[0].argmax(), str(logits[0].argmax()))


def check_logits(results: list[Any], expected: Any) -> None:
    actual = np.concatenate([result.as_numpy("logits") for result in results])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def answers_of(client: Any, name: str, tensors: list[Any]) -> list[Any]:
    """Send one request for each tensor at once; return their results, or errors, in order."""
    answers = [queue.SimpleQueue[Any]() for _ in tensors]
    for tensor, answer in zip(tensors, answers, strict=True):
        client.async_infer(name, [tensor], lambda result, error, to=answer: to.put(error or result))
    return [answer.get(timeout=60) for answer in answers]


def test_concurrent_requests_are_batched_and_get_their_own_results(
    triton: TritonServer, pixels: Any, expected: Any
) -> None:
    def batches() -> Counter[int]:
        """Return the number of batches by batch size."""
        (stats,) = client.get_inference_statistics(NAME).model_stats
        return Counter({b.batch_size: b.compute_infer.count for b in stats.batch_stats})

    with grpc.InferenceServerClient(triton.grpc) as client:
        before = batches()
        answers = answers_of(client, NAME, [tensor_of(grpc, image[None]) for image in pixels])
        check_logits(answers, expected["logits"])
        assert 1 < max(batches() - before) <= 8


def test_every_cifar_image_matches_and_a_full_queue_is_refused(
    tmp_path: Path, cifar_bundle: Bundle, shared: Path, environment: dict[str, Any]
) -> None:
    options = {"queue_limit": 2, **environment}
    package = write_package(tmp_path / "package", cifar_bundle, "fp32", **options)
    name, largest = f"{cifar_bundle.name}-fp32", cifar_bundle.manifest.batch.max
    images = pixels_of(cifar_bundle, find_images(shared / "data/cifar10/eval"))
    assert len(images) >= 1000
    with (
        run_tritonserver(package / "models", tmp_path / "server") as running,
        grpc.InferenceServerClient(running.grpc) as client,
        Network(cifar_bundle, "fp32", threads=1) as network,
    ):
        for start in range(0, len(images), largest):
            rows = network.prepare(images[start : start + largest])
            result = client.infer(name, [tensor_of(grpc, rows, "images")])
            check_logits([result], network.run(rows)["logits"])
        rows = network.prepare(images[:largest])
        requests = [tensor_of(grpc, rows, "images") for _ in range(16)]
        answers = answers_of(client, name, requests)
        expected = network.run(rows)["logits"]
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert 0 < len(refused) < 16
    assert all("Exceeds maximum queue size" in str(error) for error in refused), refused
    for answer in answers:
        if answer not in refused:
            check_logits([answer], expected)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_only_the_backend_library_is_missing_for_other_backends(
    backend: str, digits: Bundle, with_plans: PlanMaker, tmp_path: Path
) -> None:
    if backend == "tensorrt":
        bundle = with_plans("sm_89", "sm_90", profiles="1:1:1,2:8:8")
        package = write_package(tmp_path / "package", bundle, "plan-sm_89", "plan-sm_90")
    else:
        package = write_package(tmp_path / "package", digits)
    with run_tritonserver(package / "models", tmp_path / "server") as ended:
        assert ended.process.poll() is not None
        log = ended.log_text()
    errors = re.findall(r"^E\d{4} .*?\] \"(.*)\"$", log, re.MULTILINE)
    (relevant,) = [error for error in errors if "CudaDriverHelper" not in error]
    assert f"unable to find backend library for backend '{backend}'" in relevant
    assert "Poll failed" not in log
