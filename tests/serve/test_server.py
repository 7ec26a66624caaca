"""The server as its clients see it: tritonclient, plain HTTP, and clients that misbehave."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.conftest import Cli
from tests.each import each
from tests.serve.conftest import Running, serving, top5_of
from van_deploy.bundle import Bundle
from van_deploy.config import ServiceSettings
from van_deploy.errors import UsageError
from van_deploy.model.embedded import digits_images
from van_deploy.model.pixels import normalised, pixels_from_image
from van_deploy.runners.network import Network, TensorSpec
from van_deploy.serve import intake
from van_deploy.serve.intake import RequestError, file_of_form
from van_deploy.serve.protocol import encode_response, parse_request
from van_deploy.serve.service import Service

triton = pytest.importorskip("tritonclient.http")
triton_errors = pytest.importorskip("tritonclient.utils")

BYTES, PLAIN = "van_digits-fp32-uint8", "van_digits-fp32"
ROW = 64 * 64 * 3
PIXELS = {"name": "pixels", "shape": [1, 64, 64, 3], "datatype": "UINT8"}


def pictures(bundle: Bundle, count: int) -> npt.NDArray[np.uint8]:
    """Return ``count`` held-out digits as the network sees them, ``(count, 64, 64, 3)``."""
    images = (Image.fromarray(i).convert("RGB") for i in digits_images("heldout")[0][:count])
    return np.stack([pixels_from_image(i, bundle.manifest.preprocessing) for i in images])


@pytest.fixture(scope="module")
def pixels(digits: Bundle) -> Any:
    return pictures(digits, 8)


@pytest.fixture(scope="module")
def expected(digits: Bundle, pixels: Any) -> Any:
    with Network(digits, "fp32-uint8") as network:
        return network.run(pixels)


@pytest.fixture
def client(server: Running) -> Any:
    with triton.InferenceServerClient(server.address, concurrency=4) as client:
        yield client


def an_input(
    values: Any, name: str = "pixels", datatype: str = "UINT8", binary: bool = True
) -> Any:
    given = triton.InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values, binary_data=binary)
    return given


def post(url: str, body: bytes, headers: Mapping[str, str] | None = None) -> tuple[int, Any, Any]:
    request = urllib.request.Request(url, data=body, headers=dict(headers or {}), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read()), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def get(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers=dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def infer_json(server: Running, document: object, model: str = BYTES) -> tuple[int, dict[str, Any]]:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return post(f"{server.url}/v2/models/{model}/infer", body)[:2]


def until(condition: Callable[[], Any]) -> Any:
    """Return what a condition gives, once that is true."""
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it never became true")


@contextlib.contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        yield client


class TestTritonClient:
    def test_health_and_readiness(self, client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(BYTES)
        assert client.is_model_ready(BYTES, "1")
        assert not client.is_model_ready("nobody")
        assert not client.is_model_ready(BYTES, "2")

    def test_metadata(self, client: Any) -> None:
        assert client.get_server_metadata()["name"] == "van-deploy"
        metadata = client.get_model_metadata(BYTES)
        assert metadata["platform"] == "onnxruntime_onnx"
        assert metadata["inputs"] == [
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, 64, 64, 3]}
        ]
        assert [o["name"] for o in metadata["outputs"]] == [
            *("logits", "probabilities", "top5_classes", "top5_probabilities")
        ]
        assert [m["name"] for m in client.get_model_repository_index()] == [BYTES, PLAIN]

    def test_the_configuration_is_that_of_this_server(self, digits: Bundle) -> None:
        settings: dict[str, Any] = {"instances": 2, "threads": 3, "queue_limit": 77}
        settings["max_delay_ms"] = 2.5
        with (
            serving(digits, **settings) as server,
            triton.InferenceServerClient(server.address) as client,
        ):
            config = client.get_model_config(BYTES)
        assert (config["max_batch_size"], config["backend"]) == (8, "onnxruntime")
        assert config["instance_group"] == [{"count": 2, "kind": "KIND_CPU", "profile": []}]
        assert config["parameters"] == {"intra_op_thread_count": {"string_value": "3"}}
        batching = config["dynamic_batching"]
        assert batching["max_queue_delay_microseconds"] == 2500
        assert batching["default_queue_policy"]["max_queue_size"] == 77

    @each("rows", [1, 3, 8])
    @each("binary", [True, False])
    def test_answers_are_the_artefacts(
        self, client: Any, pixels: Any, expected: Any, rows: int, binary: bool
    ) -> None:
        result = client.infer(BYTES, [an_input(pixels[:rows], binary=binary)], request_id="7")
        assert result.get_response()["id"] == "7"
        for name, values in expected.items():
            found = result.as_numpy(name)
            assert found.dtype == values.dtype
            np.testing.assert_allclose(found, values[:rows], rtol=1e-4, atol=1e-5)

    def test_the_plain_graph_takes_floats(
        self, client: Any, digits: Bundle, pixels: Any, expected: Any
    ) -> None:
        images = normalised(pixels, digits.manifest.preprocessing)
        result = client.infer(PLAIN, [an_input(images, "images", "FP32")])
        found = result.as_numpy("logits")
        np.testing.assert_allclose(found, expected["logits"], rtol=1e-4, atol=1e-5)

    @each("algorithm", ["gzip", "deflate"])
    def test_compressed_requests(
        self, client: Any, pixels: Any, expected: Any, algorithm: str
    ) -> None:
        result = client.infer(
            BYTES,
            [an_input(pixels)],
            request_compression_algorithm=algorithm,
            outputs=[triton.InferRequestedOutput("logits", binary_data=False)],
        )
        found = result.as_numpy("logits")
        np.testing.assert_allclose(found, expected["logits"], rtol=1e-4, atol=1e-5)

    def test_classification(self, client: Any, pixels: Any, expected: Any) -> None:
        wanted = triton.InferRequestedOutput("probabilities", class_count=2)
        found = client.infer(BYTES, [an_input(pixels)], outputs=[wanted]).as_numpy("probabilities")
        first = [row[0].decode().split(":") for row in found]
        best = expected["logits"].argmax(axis=1)
        assert [int(index) for _, index, _ in first] == best.tolist()
        assert [label for _, _, label in first] == [str(i) for i in best]
        values, largest = [float(v) for v, _, _ in first], expected["probabilities"].max(axis=1)
        np.testing.assert_allclose(values, largest, atol=1e-5)

    def test_statistics_count_images(self, client: Any) -> None:
        def counts() -> tuple[int, int]:
            stats = client.get_inference_statistics(PLAIN)["model_stats"][0]
            return int(stats["inference_count"]), stats["inference_stats"]["success"]["count"]

        images, requests = counts()
        client.infer(PLAIN, [an_input(np.zeros((5, 3, 64, 64), np.float32), "images", "FP32")])
        assert counts() == (images + 5, requests + 1)

    @each(
        ("values", "name", "datatype", "message"),
        [
            ((1, 64, 64, 3), "images", "UINT8", "The model has one input, 'pixels'; give that"),
            ((1, 3, 64, 64), "pixels", "UINT8", "the model takes [1..8, 64, 64, 3]"),
            ((9, 64, 64, 3), "pixels", "UINT8", "has shape [9, 64, 64, 3]; the model takes [1..8"),
            ((0, 64, 64, 3), "pixels", "UINT8", "has shape [0, 64, 64, 3]; the model takes [1..8"),
            ((64, 64, 3), "pixels", "UINT8", "has shape [64, 64, 3]; the model takes"),
            ((1, 64, 64, 3), "pixels", "INT8", "is UINT8, not 'INT8'"),
        ],
    )
    def test_a_wrong_tensor_is_refused(
        self, client: Any, values: tuple[int, ...], name: str, datatype: str, message: str
    ) -> None:
        dtype = np.uint8 if datatype == "UINT8" else np.int8
        with pytest.raises(triton_errors.InferenceServerException, match="400") as caught:
            client.infer(BYTES, [an_input(np.zeros(values, dtype), name, datatype)])
        assert message in caught.value.message()

    def test_an_unknown_model_is_404(self, client: Any, pixels: Any) -> None:
        with pytest.raises(triton_errors.InferenceServerException, match="404") as caught:
            client.infer("resnet", [an_input(pixels)])
        assert caught.value.message() == (
            f"There is no model 'resnet' version '1'; this server has {BYTES}, {PLAIN}, version 1."
        )

    def test_an_unknown_output_is_refused(self, client: Any, pixels: Any) -> None:
        with pytest.raises(triton_errors.InferenceServerException, match="no output 'boxes'"):
            client.infer(BYTES, [an_input(pixels)], outputs=[triton.InferRequestedOutput("boxes")])


class TestJson:
    def test_numbers_may_be_nested(self, server: Running, pixels: Any, expected: Any) -> None:
        status, answer = infer_json(server, {"inputs": [{**PIXELS, "data": pixels[:1].tolist()}]})
        assert status == 200
        logits = next(o for o in answer["outputs"] if o["name"] == "logits")
        np.testing.assert_allclose(logits["data"], expected["logits"][0], rtol=1e-4, atol=1e-5)

    @each(
        ("document", "message"),
        [
            (b"\x89PNG", "The request is not JSON"),
            (b"[" * 15_000, "The request is not JSON"),
            (b'{"id": "\\ud800"}', "The request is not JSON"),
            (b'{"id": ' + b"9" * 5000 + b"}", "number out of range"),
            (b"[]", "The request: it should be a table"),
            ({"inputs": []}, "The model has one input, 'pixels'; give that one."),
            ({"inputs": "x"}, "'inputs' is 'x'"),
            ({"inputs": [{}]}, "'inputs.0.name' is missing"),
            ({"inputs": [], "parameters": 3}, "'parameters' is 3"),
            (
                {"inputs": [], "outputs": [{"name": "x", "parameters": {"classification": True}}]},
                "'outputs.0.parameters.classification' is True",
            ),
        ],
    )
    def test_nonsense_is_refused(self, server: Running, document: object, message: str) -> None:
        status, answer = infer_json(server, document)
        assert status == 400
        assert message in answer["error"]

    @each(
        ("change", "message"),
        [
            ({"data": [1, 2, 3]}, "give 12288 numbers"),
            ({"data": None}, "give 12288 numbers"),
            ({"data": ["a"] * ROW}, "give 12288 numbers"),
            ({"data": ["1"] * ROW}, "give 12288 numbers"),
            ({"data": [True] * ROW}, "give 12288 numbers"),
            ({"data": [[1, 2], [3]]}, "give 12288 numbers"),
            ({"data": [[[[1, 2, 3, 4]] * 64] * 48]}, "give 12288 numbers"),
            ({"data": [256] * ROW}, "is UINT8: whole numbers from 0 to 255"),
            ({"data": [0.5] * ROW}, "is UINT8: whole numbers from 0 to 255"),
            ({"data": [10**400] + [0] * (ROW - 1)}, "a number that is too large"),
            ({"shape": [True, 64, 64, 3]}, "'inputs.0.shape.0' is True"),
            ({"shape": "x"}, "'inputs.0.shape' is 'x'"),
            ({"parameters": {"binary_data_size": ROW}}, "12288 were announced and 0 sent"),
            ({"parameters": {"binary_data_size": "x"}}, "'inputs.0.parameters.binary_data_size'"),
        ],
    )
    def test_a_bad_tensor_is_refused(
        self, server: Running, change: dict[str, Any], message: str
    ) -> None:
        document = {"inputs": [{**PIXELS, "data": [0] * ROW, **change}]}
        status, answer = infer_json(server, document)
        assert (status, message in answer["error"]) == (400, True), answer

    def test_values_that_are_not_finite_are_refused(self, server: Running) -> None:
        given = {"name": "images", "shape": [1, 3, 64, 64], "datatype": "FP32"}
        body = json.dumps({"inputs": [{**given, "data": [float("nan")] * ROW}]}).encode()
        status, answer = infer_json(server, body, PLAIN)
        message = "The input 'images' holds values that are not finite."
        assert (status, answer["error"]) == (400, message)

    @each("length", ["x", "-1", "999999999", "9" * 5000, "\u0661"])
    def test_a_wrong_header_length_is_refused(self, server: Running, length: str) -> None:
        headers = {"Inference-Header-Content-Length": length.encode().decode("latin-1")}
        status, answer, _ = post(f"{server.url}/v2/models/{BYTES}/infer", b"{}", headers)
        assert status in {400, 413}
        wrong = ("Inference-Header-Content-Length is", "JSON before binary tensors has 999,999,999")
        assert any(text in answer["error"] for text in wrong)

    def test_a_long_text_among_numbers_takes_no_more_memory_than_the_body(self) -> None:
        """NumPy's array of texts would give each of the numbers 400,000 bytes."""
        data = ["x" * 100_000, *[1] * 1000]
        given = TensorSpec("x", "float32", (1001,))
        tensor = {"name": "x", "shape": [1, 1001], "datatype": "FP32", "data": data}
        body = json.dumps({"inputs": [tensor]}).encode()
        tracemalloc.start()
        with pytest.raises(RequestError, match="give 1001 numbers"):
            parse_request(body, len(body), given, [], 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * len(body)

    def test_large_json_is_refused_and_told_of_bytes(self, server: Running) -> None:
        document = {"inputs": [{**PIXELS, "data": [0] * 600_000}]}
        status, answer = infer_json(server, document)
        assert status == 413
        assert "larger than 1,048,576 bytes" in answer["error"]
        assert "Send tensors as bytes" in answer["error"]
        assert "--max-json-mib" in answer["error"]

    def test_the_json_before_bytes_is_small(self, server: Running) -> None:
        body = b" " * 20_000 + b"{}"
        headers = {"Inference-Header-Content-Length": str(len(body))}
        status, answer, _ = post(f"{server.url}/v2/models/{BYTES}/infer", body, headers)
        assert (status, "16,384 are taken" in answer["error"]) == (413, True)

    def test_large_json_is_parsed_elsewhere_and_others_are_answered(self, digits: Bundle) -> None:
        document = {"inputs": [{**PIXELS, "data": [0] * ROW}]}
        gate, asked = threading.Event(), threading.Event()
        with (
            serving(digits, artefacts=("fp32-uint8",)) as server,
            concurrent.futures.ThreadPoolExecutor(1) as pool,
        ):
            run = server.service.intake.run

            async def held(where: Any, *call: Any) -> Any:
                if where == "process":
                    asked.set()
                    await asyncio.to_thread(gate.wait, 30)
                return await run(where, *call)

            server.service.intake.run = held  # type: ignore
            waiting = pool.submit(infer_json, server, document)
            assert asked.wait(30)
            assert get(f"{server.url}/v2/health/live")[0] == 200
            gate.set()
            assert waiting.result(60)[0] == 200

    def test_large_answers_are_written_elsewhere(
        self, digits: Bundle, pixels: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("van_deploy.serve.app.MANY_NUMBERS", 100)
        written: list[str] = []
        with serving(digits, artefacts=("fp32-uint8",)) as server:
            run = server.service.intake.run

            async def noted(where: Any, function: Any, *given: Any) -> Any:
                written.extend([function.__name__] * (where == "process"))
                return await run(where, function, *given)

            server.service.intake.run = noted  # type: ignore[method-assign]
            with triton.InferenceServerClient(server.address) as client:
                for binary in (False, True):
                    wanted = [triton.InferRequestedOutput("logits", binary_data=binary)]
                    client.infer(BYTES, [an_input(pixels)], outputs=wanted)
                every = [
                    triton.InferRequestedOutput(name, binary_data=False)
                    for name in ("logits", "probabilities")
                ]
                client.infer(BYTES, [an_input(pixels)], outputs=every)
        assert written == ["encode_response"]

    def test_a_parser_that_dies_is_replaced(self, digits: Bundle) -> None:
        document = {"inputs": [{**PIXELS, "data": [0] * ROW}]}
        with serving(digits, artefacts=("fp32-uint8",)) as server:
            assert infer_json(server, document)[0] == 200
            (worker,) = server.service.intake._pool._processes.values()
            assert worker.pid
            os.kill(worker.pid, signal.SIGKILL)
            statuses = [infer_json(server, document)[0] for _ in range(3)]
        assert statuses[-1] == 200
        assert set(statuses) <= {200, 503}

    def test_wrong_addresses_and_methods(self, server: Running) -> None:
        status, answer, _ = post(f"{server.url}/v3", b"")
        assert (status, answer["error"]) == (404, "There is nothing at '/v3'.")
        status, answer, _ = post(f"{server.url}/v2", b"")
        assert (status, answer["error"]) == (405, "'/v2' takes GET, not POST.")
        assert get(f"{server.url}/%ED%A0%80")[0] == 404

    def test_a_name_that_no_encoding_holds_is_told(self) -> None:
        given = TensorSpec("x", "float32", (1,))
        for name in ("\\ud800", "x\\ud800"):
            with pytest.raises(RequestError, match="not JSON"):
                parse_request(
                    body := f'{{"inputs": [{{"name": "{name}"}}]}}'.encode(),
                    len(body),
                    given,
                    [],
                    1,
                )

    def test_half_precision_overflow_is_not_finite(self) -> None:
        given = TensorSpec("x", "float16", (1,))
        tensor = {"name": "x", "shape": [1, 1], "datatype": "FP16", "data": [70_000]}
        body = json.dumps({"inputs": [tensor]}).encode()
        with pytest.raises(RequestError, match="not finite"):
            parse_request(body, len(body), given, [], 1)

    def test_all_outputs_are_given_where_none_is_asked_for(self) -> None:
        given = TensorSpec("x", "float32", (1,))
        outputs = [TensorSpec("a", "float32", (2,)), TensorSpec("b", "int64", (1,))]
        tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.5]}
        body = json.dumps({"inputs": [tensor]}).encode()
        rows, request = parse_request(body, len(body), given, outputs, 1)
        found: dict[str, Any] = {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 1), np.int64)}
        text, length = encode_response(request, found, "m")
        assert (rows.tolist(), length) == ([[1.5]], None)
        assert [o["name"] for o in json.loads(text)["outputs"]] == ["a", "b"]


class TestImages:
    def test_an_image_gets_the_golden_answer(
        self, server: Running, digits: Bundle, original: Path
    ) -> None:
        status, answer, _ = post(f"{server.url}/predict?compare=1", original.read_bytes())
        assert status == 200
        expected = top5_of(digits)
        assert [c["index"] for c in answer["top"]] == [c.index for c in expected]
        found = [c["probability"] for c in answer["top"]]
        np.testing.assert_allclose(found, [c.probability for c in expected], atol=1e-5)
        assert answer["pytorch"]["largest_difference"] < 1e-5
        np.testing.assert_allclose(answer["pytorch"]["beside"], found, atol=1e-5)
        assert answer["image"] == {"width": 8, "height": 8}

    def test_a_form_works_too(self, server: Running, original: Path) -> None:
        start = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
        body = start + original.read_bytes() + b"\r\n--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        status, answer, _ = post(f"{server.url}/predict?top=1", body, headers)
        assert (status, len(answer["top"])) == (200, 1)

    def test_the_file_of_a_form_is_found_among_fields(self) -> None:
        field = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
        file = b'--x\r\ncontent-disposition: form-data; name="f"; FileName="a"\r\n\r\n\r\n-x--y\r\n'
        kind = 'multipart/form-data; charset=utf-8; boundary="x"'
        assert file_of_form(field + file + b"--x--\r\n", kind) == b"\r\n-x--y"

    @each("shift", range(-20, 8))
    def test_a_form_is_found_across_the_pieces_that_are_searched(self, shift: int) -> None:
        start = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n'
        content = bytes(2 * intake.WINDOW - len(start) + shift)
        body = start + content + b"\r\n--x--\r\n"
        assert file_of_form(body, "multipart/form-data; boundary=x") == content

    @each(
        ("body", "headers", "status", "message"),
        [
            (b"", {}, 400, "The request has no image"),
            (b"hello", {}, 422, "it is in no known image format"),
            (b"\x89PNG\r\n\x1a\n", {}, 422, "cannot be read as an image"),
            (b"x", {"Content-Type": "multipart/form-data"}, 400, "no boundary"),
            (b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "has no file"),
            (b"x", {"Content-Encoding": "br"}, 400, "'br' is unknown: gzip or deflate"),
            (b"xyz", {"Content-Encoding": "gzip"}, 400, "is damaged"),
            (
                gzip.compress(b"x" * 99, mtime=0)[:-4],
                {"Content-Encoding": "gzip"},
                400,
                "is truncated",
            ),
        ],
    )
    def test_what_is_no_image_is_refused(
        self, server: Running, body: bytes, headers: dict[str, str], status: int, message: str
    ) -> None:
        found, answer, _ = post(f"{server.url}/predict", body, headers)
        assert (found, message in answer["error"]) == (status, True), answer

    def test_a_truncated_image_is_refused(self, server: Running, original: Path) -> None:
        body = original.read_bytes()
        status, answer, _ = post(f"{server.url}/predict", body[: len(body) // 2])
        assert (status, "cannot be read as an image" in answer["error"]) == (422, True)

    def test_a_decompression_bomb_is_refused(self, server: Running) -> None:
        def chunk(kind: bytes, data: bytes) -> bytes:
            check = zlib.crc32(kind + data).to_bytes(4, "big")
            return len(data).to_bytes(4, "big") + kind + data + check

        size = (30_000).to_bytes(4, "big")
        header = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000))
        status, answer, _ = post(f"{server.url}/predict", bomb)
        assert status == 422
        assert "too large to open safely" in answer["error"]

    def test_a_zip_bomb_is_refused(self, server: Running) -> None:
        body = gzip.compress(b"\0" * 50_000_000, mtime=0)
        status, answer, _ = post(f"{server.url}/predict", body, {"Content-Encoding": "gzip"})
        assert (status, "larger than 4,194,304 bytes" in answer["error"]) == (413, True)

    @each("top", ["0", "-1", "x", "9999", "9" * 5000, "%D9%A1"])
    def test_an_impossible_top_is_refused(self, server: Running, top: str) -> None:
        assert post(f"{server.url}/predict?top={top}", b"x")[0] == 400

    def test_metrics_name_the_model_that_answered(self, digits: Bundle, original: Path) -> None:
        with serving(digits) as server:
            post(f"{server.url}/predict", original.read_bytes())
            post(f"{server.url}/predict?model=invented", b"x")
            text = get(f"{server.url}/metrics")[1].decode()
        line = 'van_deploy_requests_total{model="%s",route="/predict",status="%d"} 1.0'
        assert line % (BYTES, 200) in text
        assert line % ("", 404) in text  # clients cannot invent series

    def test_the_page_may_only_talk_to_its_own_server(self, server: Running) -> None:
        with urllib.request.urlopen(server.url, timeout=30) as response:
            policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy
        for file, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
            with urllib.request.urlopen(f"{server.url}/{file}", timeout=30) as response:
                assert response.headers["content-type"] == kind


class TestLimits:
    def test_an_announced_oversize_is_413(self, server: Running) -> None:
        status, answer, _ = post(f"{server.url}/predict", bytes(5 * 2**20))
        assert status == 413
        assert answer["error"].startswith("The request is larger than 4,194,304 bytes")

    def test_an_unannounced_oversize_is_413(self, server: Running) -> None:
        connection = http.client.HTTPConnection(server.address, timeout=30)
        pieces = (bytes(2**20) for _ in range(6))
        connection.request("POST", "/predict", body=pieces, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()

    def test_a_head_without_end_is_refused(self, server: Running) -> None:
        with connected(server) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    client.sendall(b"X-Long: " + b"a" * 10_000 + b"\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 400")

    def test_too_many_headers_are_refused(self, server: Running) -> None:
        for count, status in ((99, 200), (100, 400)):
            with connected(server) as client:
                head = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
                client.sendall(head + b"a: b\r\n" * count + b"\r\n")
                assert client.recv(65536).startswith(b"HTTP/1.1 %d" % status)

    def test_a_head_that_does_not_come_is_cut_off(self, digits: Bundle) -> None:
        with serving(digits, read_timeout_s=0.5) as server, connected(server) as client:
            client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHo")
            assert client.recv(65536) == b""

    def test_many_requests_at_once_on_one_connection_are_refused(self, server: Running) -> None:
        with connected(server) as client:
            client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
            received = b""
            with contextlib.suppress(ConnectionError):
                while piece := client.recv(65536):
                    received += piece
        assert received.count(b"HTTP/1.1 200") <= 17
        assert b"HTTP/1.1 400" in received

    @each(("size", "status"), [(1, 400), (64, 422)])
    def test_a_body_in_tiny_chunks_is_refused(
        self, server: Running, size: int, status: int
    ) -> None:
        chunk = b"%x\r\n%b\r\n" % (size, b"x" * size)
        with connected(server) as client:
            head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            client.sendall(head + 3000 * chunk + b"0\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 %d" % status)

    def test_a_slow_client_is_cut_off_and_others_are_not_kept_waiting(
        self, digits: Bundle, original: Path
    ) -> None:
        with serving(digits, read_timeout_s=0.5) as server, connected(server) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf")
            assert post(f"{server.url}/predict", original.read_bytes())[0] == 200
            answer = slow.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"not complete after 0.5 s" in answer

    def test_a_client_that_goes_away_harms_nobody(self, server: Running, original: Path) -> None:
        for _ in range(20):
            with connected(server) as gone:
                gone.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf")
        assert post(f"{server.url}/predict", original.read_bytes())[0] == 200
        until(lambda: server.service.intake.held.used == 0)
        assert all(served.queue.used == 0 for served in server.service.models.values())

    def test_bodies_held_at_once_are_limited_and_given_back(
        self, digits: Bundle, original: Path
    ) -> None:
        with serving(digits, max_held_mib=1, read_timeout_s=20) as server:
            with connected(server) as slow:
                head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n"
                slow.sendall(head + bytes(900_000))
                until(lambda: server.service.intake.held.used == 900_000)
                status, answer, headers = post(f"{server.url}/predict", bytes(200_000))
                assert (status, headers["Retry-After"]) == (503, "1")
                assert "hold all the memory they may" in answer["error"]
                assert get(f"{server.url}/v2/health/live")[0] == 200
                assert post(f"{server.url}/predict", original.read_bytes())[0] == 200
            until(lambda: server.service.intake.held.used == 0)
            assert post(f"{server.url}/predict", bytes(200_000))[0] == 422

    def test_a_refused_body_is_freed_at_once(self, server: Running) -> None:
        """Not when the collector finds the traceback that holds it."""
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for size, status in ((5, 413), (3, 422)) * 4:
                assert post(f"{server.url}/predict", bytes(size * 2**20))[0] == status
            left = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
            gc.enable()
        assert left < 2**20

    def test_what_a_compressed_body_may_grow_to_counts(self, digits: Bundle) -> None:
        body = gzip.compress(bytes(100_000), mtime=0)
        headers = {"Content-Encoding": "gzip"}
        with serving(digits, max_held_mib=1, max_body_mib=0.5) as server:
            assert post(f"{server.url}/predict", body, headers)[0] == 422
        with serving(digits, max_held_mib=1, max_body_mib=2) as server:
            small = gzip.compress(bytes(900_000), mtime=0)
            assert post(f"{server.url}/predict", small, headers)[0] in {422, 503}

    def test_a_full_queue_is_429_and_what_waits_is_answered(self, digits: Bundle) -> None:
        gate, body = threading.Event(), pictures(digits, 8)
        with (
            serving(digits, slow=gate, queue_limit=16, artefacts=("fp32-uint8",)) as server,
            concurrent.futures.ThreadPoolExecutor(8) as pool,
        ):

            def ask(_: int) -> int:
                with triton.InferenceServerClient(server.address) as client:
                    try:
                        client.infer(BYTES, [an_input(body)])
                    except triton_errors.InferenceServerException as error:
                        return int(error.status().removeprefix("[").removesuffix("]"))
                    return 200

            asked = [pool.submit(ask, i) for i in range(6)]
            until(lambda: sum(future.done() for future in asked) == 4)  # at once, not after a wait
            assert server.service.models[BYTES].queue.used == 16
            gate.set()
            statuses = sorted(future.result(30) for future in asked)
        assert statuses == [200, 200, 429, 429, 429, 429]

    def test_images_and_comparisons_are_under_the_same_limit(
        self, digits: Bundle, original: Path
    ) -> None:
        gate = threading.Event()
        with (
            serving(digits, queue_limit=8, artefacts=("fp32-uint8",)) as server,
            concurrent.futures.ThreadPoolExecutor(20) as pool,
        ):

            def held(*_: object) -> dict[str, Any]:
                gate.wait(30)
                return {"skipped": "not asked"}

            server.service._ask_pytorch = held  # type: ignore
            url, image = f"{server.url}/predict?compare=1", original.read_bytes()
            asked = [pool.submit(post, url, image) for _ in range(20)]
            until(lambda: sum(future.done() for future in asked) == 12)
            refused, answer, headers = post(f"{server.url}/predict", image)
            assert (refused, headers["Retry-After"]) == (429, "1")
            assert answer["error"].startswith("The queue is full")
            gate.set()
            statuses = [future.result(30)[0] for future in asked]
        assert sorted(statuses) == [200] * 8 + [429] * 12

    def test_a_queue_too_small_to_fill_a_batch_is_refused(self, digits: Bundle) -> None:
        service = Service(digits, ServiceSettings(queue_limit=15, instances=2))
        with pytest.raises(UsageError, match="A queue of 15 images cannot fill 2 x 8 images"):
            service.load()

    def test_two_idle_instances_share_what_waits(self, digits: Bundle, pixels: Any) -> None:
        both = threading.Barrier(2, timeout=30)
        settings: dict[str, Any] = {"instances": 2, "max_delay_ms": 500}
        with serving(digits, artefacts=("fp32-uint8",), **settings) as server:
            network = server.service.models[BYTES].network
            run = network.run

            def together(rows: Any) -> Any:
                both.wait()  # breaks, and fails the batch, where the other never comes
                return run(rows)

            network.run = together  # type: ignore
            with triton.InferenceServerClient(server.address, concurrency=4) as client:
                given = an_input(pixels[:2])
                asked = [client.async_infer(BYTES, [given]) for _ in range(4)]
                found = [request.get_result().as_numpy("logits") for request in asked]
            assert server.service.models[BYTES].counts["batches"] == 2
        assert [f.shape for f in found] == [(2, 10)] * 4

    def test_stopping_answers_what_was_begun(self, digits: Bundle) -> None:
        gate, body = threading.Event(), pictures(digits, 2)
        answers: list[Any] = []

        def ask(address: str) -> None:
            with triton.InferenceServerClient(address) as client:
                answers.append(client.infer(BYTES, [an_input(body)]).as_numpy("logits"))

        with serving(digits, slow=gate, artefacts=("fp32-uint8",)) as server:
            thread = threading.Thread(target=ask, args=(server.address,))
            thread.start()
            until(lambda: server.service.models[BYTES].queue.used == 2)
            server.stop()
            until(lambda: server.service.intake.draining)
            gate.set()
        thread.join(30)
        assert [a.shape for a in answers] == [(2, 10)]

    def test_stopping_waits_for_a_body_that_has_begun(self, digits: Bundle, original: Path) -> None:
        image = original.read_bytes()
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n"
        with serving(digits) as server, connected(server) as client:
            client.sendall(head.encode() + image[:10])
            until(lambda: server.service.intake.held.used == 10)
            server.stop()
            until(lambda: server.service.intake.draining)
            client.sendall(image[10:])
            assert client.recv(65536).startswith(b"HTTP/1.1 200")

    def test_a_draining_server_says_503(self, digits: Bundle, original: Path) -> None:
        with serving(digits) as server:
            server.service.intake.draining = True
            assert get(f"{server.url}/v2/health/ready")[0] == 503
            status, answer, headers = post(f"{server.url}/predict", original.read_bytes())
            assert (status, answer["error"]) == (503, "The server is shutting down.")
            assert headers["Retry-After"] == "1"

    def test_too_many_connections_are_503(self, digits: Bundle) -> None:
        with serving(digits, max_connections=3) as server, contextlib.ExitStack() as stack:
            held = [stack.enter_context(connected(server)) for _ in range(4)]
            held[-1].sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert held[-1].recv(65536).startswith(b"HTTP/1.1 503")

    def test_a_model_that_fails_is_500_and_only_the_log_says_why(
        self, digits: Bundle, original: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with serving(digits, artefacts=("fp32-uint8",)) as server:
            network = server.service.models[BYTES].network
            run = network.run

            def broken(_: object) -> Any:
                raise RuntimeError("out of luck")

            network.run = broken  # type: ignore
            image = original.read_bytes()
            status, answer, _ = post(f"{server.url}/predict", image)
            assert (status, answer["error"]) == (500, "The server failed; its log says why.")
            network.run = run  # type: ignore[method-assign]
            assert post(f"{server.url}/predict", image)[0] == 200
        (line,) = capfd.readouterr().err.splitlines()
        entry = json.loads(line)
        assert (entry["event"], entry["path"]) == ("fault", "/predict")
        assert entry["traceback"].rstrip().endswith("RuntimeError: out of luck")

    def test_every_request_can_be_logged(
        self, digits: Bundle, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with serving(digits, log_requests=True) as server:
            get(f"{server.url}/v2/models/{BYTES}/ready")
        entry = json.loads(capfd.readouterr().err)
        assert entry.pop("time").endswith("Z")
        assert entry.pop("ms") >= 0
        assert entry == {
            "event": "request",
            "method": "GET",
            "status": 200,
            "path": f"/v2/models/{BYTES}/ready",
            "model": BYTES,
        }


class TestKey:
    KEY = "s3cret-" + "k" * 32

    @pytest.mark.parametrize("source", ["file", "environment"])
    def test_only_the_page_and_health_are_open_without_it(
        self,
        digits: Bundle,
        tmp_path: Path,
        original: Path,
        monkeypatch: pytest.MonkeyPatch,
        source: str,
    ) -> None:
        settings: dict[str, Any] = {}
        if source == "file":
            (tmp_path / "key").write_text(f"{self.KEY}\n")
            settings = {"api_key_file": tmp_path / "key"}
        else:
            monkeypatch.setenv("VAN_DEPLOY_API_KEY", self.KEY)
        image = original.read_bytes()
        with serving(digits, **settings) as server:
            for path in ("/", "/page.js", "/page.css", "/v2/health/live", "/v2/health/ready"):
                assert get(server.url + path)[0] == 200
            for path in ("/v2", "/models", "/metrics", f"/v2/models/{BYTES}", "/nothing"):
                assert get(server.url + path)[0] == 401
            status, answer, headers = post(f"{server.url}/predict", image)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert self.KEY not in str(answer)
            for wrong in ("Bearer", f"Bearer {self.KEY}x", self.KEY, "Bearer \u00e9"):
                assert get(f"{server.url}/v2", {"Authorization": wrong})[0] == 401
            good = {"Authorization": f"Bearer {self.KEY}"}
            assert get(f"{server.url}/v2", good)[0] == 200
            assert post(f"{server.url}/predict", image, good)[0] == 200

    @each(
        ("content", "message"),
        [
            (None, "cannot be read: [Errno 2]"),
            (b"\n", "holds no key: one word of printable ASCII characters."),
            (b"two words", "holds no key"),
            (b"\xff", "cannot be read: 'utf-8' codec"),
        ],
    )
    def test_a_file_without_a_key_is_refused(
        self, digits: Bundle, tmp_path: Path, cli: Cli, content: bytes | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / "key").write_bytes(content)
        result = cli("serve", digits.path, "--port", "0", "--api-key-file", tmp_path / "key")
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())

    def test_an_empty_variable_is_no_key_and_is_refused(
        self, digits: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VAN_DEPLOY_API_KEY", "")
        with pytest.raises(UsageError, match="'VAN_DEPLOY_API_KEY' holds no key"), serving(digits):
            pass


def test_many_clients_none_lost_none_wrong_and_batches_are_filled(digits: Bundle) -> None:
    every = pictures(digits, 64)
    with Network(digits, "fp32-uint8") as network:
        logits = np.concatenate([network.run(every[i : i + 1])["logits"] for i in range(64)])
    with serving(digits, artefacts=("fp32-uint8",)) as server:

        def ask(index: int) -> float:
            with triton.InferenceServerClient(server.address) as client:
                rows = [(index + k) % 64 for k in range(1 + index % 3)]
                found = client.infer(BYTES, [an_input(every[rows])]).as_numpy("logits")
                return float(np.abs(found - logits[rows]).max())

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            differences = list(pool.map(ask, range(192)))
        counts = server.service.models[BYTES].counts
        assert len(differences) == counts["requests"] == 192
        assert max(differences) < 1e-4
        assert counts["batches"] < 192  # requests ran together
        text = get(f"{server.url}/metrics")[1].decode()
    route = 'route="/v2/models/MODEL/infer"'
    assert f'van_deploy_requests_total{{model="{BYTES}",{route},status="200"}} 192.0' in text
    assert f'van_deploy_batch_rows_count{{model="{BYTES}"}} {float(counts["batches"])}' in text


@contextlib.contextmanager
def command(bundle: Bundle) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    words = [sys.executable, "-m", "van_deploy", "serve", str(bundle.path), "--port", "0", "--json"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        text = ""
        while not text.endswith("}\n"):
            text += process.stdout.readline()
        try:
            yield process, json.loads(text)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_in_order(
    digits: Bundle, original: Path, number: signal.Signals
) -> None:
    with command(digits) as (process, document):
        assert document["models"] == [BYTES]
        assert post(f"{document['url']}/predict", original.read_bytes())[0] == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
    assert errors == "Stopped; every request that was begun is answered.\n"


def test_the_parser_ends_with_a_server_that_is_killed(digits: Bundle) -> None:
    body = json.dumps({"inputs": [{**PIXELS, "data": [0] * ROW}]}).encode()
    with command(digits) as (process, document):
        assert post(f"{document['url']}/v2/models/{BYTES}/infer", body)[0] == 200
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [Path("/proc", number) for number in found]
        assert children
        process.kill()
        process.wait(30)
    until(lambda: not any(child.exists() for child in children))


@pytest.mark.slow
def test_spoiled_requests_get_a_status_and_leave_no_traceback(
    digits: Bundle, original: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A seeded share of what ``python -m reliability.requests`` sends: ten thousand."""
    from reliability.requests import fuzz_requests

    with serving(digits, artefacts=("fp32-uint8",), read_timeout_s=0.5) as server:
        statuses, faults = fuzz_requests(server.url, 0, 600, original.read_bytes())
        assert server.service.intake.held.used == 0
    assert faults == []
    assert {200, 400, 404, 405, 422} <= set(statuses)
    assert "raceback" not in capfd.readouterr().err
