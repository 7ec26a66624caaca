"""The server as its clients see it: tritonclient, plain HTTP, and clients that misbehave."""

from __future__ import annotations

import concurrent.futures
import gzip
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.each import each
from tests.serve.conftest import Running, serving, top5_of
from van_deploy.bundle import Bundle
from van_deploy.model.embedded import digits_images
from van_deploy.model.pixels import normalised, pixels_from_image
from van_deploy.runners.network import Network

triton = pytest.importorskip("tritonclient.http")
triton_errors = pytest.importorskip("tritonclient.utils")

BYTES, PLAIN = "van_digits-fp32-uint8", "van_digits-fp32"


def pictures(bundle: Bundle, count: int) -> Any:
    """Return ``count`` held-out digits as the network sees them, ``(count, 64, 64, 3)``."""
    from PIL import Image

    preprocessing = bundle.manifest.preprocessing
    images = digits_images("heldout")[0][:count]
    return np.stack(
        [pixels_from_image(Image.fromarray(i).convert("RGB"), preprocessing) for i in images]
    )


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
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read()), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def infer_json(server: Running, document: object, model: str = BYTES) -> tuple[int, dict[str, Any]]:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return post(f"{server.url}/v2/models/{model}/infer", body)[:2]


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
        assert metadata["inputs"] == [
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, 64, 64, 3]}
        ]
        assert [o["name"] for o in metadata["outputs"]] == [
            *("logits", "probabilities", "top5_classes", "top5_probabilities")
        ]
        config = client.get_model_config(BYTES)
        assert (config["max_batch_size"], config["backend"]) == (8, "onnxruntime")
        assert [m["name"] for m in client.get_model_repository_index()] == [BYTES, PLAIN]

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
        np.testing.assert_allclose(
            [float(value) for value, _, _ in first],
            expected["probabilities"].max(axis=1),
            atol=1e-5,
        )

    def test_statistics_count_pictures(self, client: Any, pixels: Any) -> None:
        def count() -> int:
            stats = client.get_inference_statistics(PLAIN)["model_stats"][0]
            return int(stats["inference_count"])

        before = count()
        client.infer(PLAIN, [an_input(np.zeros((5, 3, 64, 64), np.float32), "images", "FP32")])
        assert count() == before + 5

    @each(
        ("values", "name", "datatype", "message"),
        [
            ((1, 64, 64, 3), "images", "UINT8", "There is no input 'images'"),
            ((1, 3, 64, 64), "pixels", "UINT8", "the model takes [1..8, 64, 64, 3]"),
            ((9, 64, 64, 3), "pixels", "UINT8", "has 9 rows; the model takes 1 to 8"),
            ((0, 64, 64, 3), "pixels", "UINT8", "has 0 rows; the model takes 1 to 8"),
            ((64, 64, 3), "pixels", "UINT8", "has shape [64, 64, 3]; the model takes"),
            ((1, 64, 64, 3), "pixels", "INT8", "is UINT8, not INT8"),
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
            f"There is no model 'resnet'; this server has {BYTES}, {PLAIN}, version 1."
        )

    def test_an_unknown_output_is_refused(self, client: Any, pixels: Any) -> None:
        with pytest.raises(triton_errors.InferenceServerException, match="no output 'boxes'"):
            client.infer(BYTES, [an_input(pixels)], outputs=[triton.InferRequestedOutput("boxes")])


class TestJson:
    def test_numbers_may_be_nested(self, server: Running, pixels: Any, expected: Any) -> None:
        given = {"name": "pixels", "shape": [1, 64, 64, 3], "datatype": "UINT8"}
        status, answer = infer_json(server, {"inputs": [{**given, "data": pixels[:1].tolist()}]})
        assert status == 200
        logits = next(o for o in answer["outputs"] if o["name"] == "logits")
        np.testing.assert_allclose(logits["data"], expected["logits"][0], rtol=1e-4, atol=1e-5)

    @each(
        ("document", "message"),
        [
            (b"\x89PNG", "The request is not JSON"),
            (b"[" * 100_000, "The request is not JSON"),
            (b"[]", "must be a JSON object"),
            ({"inputs": []}, "The model has one input, 'pixels'; the request gives 0."),
            ({"inputs": "x"}, "The model has one input"),
            ({"inputs": [{}], "parameters": 3}, "There is no input 'None'"),
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
            ({"data": ["a"] * 12288}, "give 12288 numbers"),
            ({"data": [[1, 2], [3]]}, "give 12288 numbers"),
            ({"data": [256] * 12288}, "values outside 0 to 255"),
            ({"data": [0.5] * 12288}, "holds fractions"),
            ({"shape": [True, 64, 64, 3]}, "has shape"),
            ({"shape": "x"}, "has shape x"),
            ({"parameters": {"binary_data_size": 12288}}, "12288 were announced and 0 sent"),
            ({"parameters": {"binary_data_size": "x"}}, "x were announced"),
        ],
    )
    def test_a_bad_tensor_is_refused(
        self, server: Running, change: dict[str, Any], message: str
    ) -> None:
        good = {"name": "pixels", "shape": [1, 64, 64, 3], "datatype": "UINT8", "data": [0] * 12288}
        status, answer = infer_json(server, {"inputs": [{**good, **change}]})
        assert (status, message in answer["error"]) == (400, True), answer

    def test_values_that_are_not_finite_are_refused(self, server: Running) -> None:
        values = np.full((1, 3, 64, 64), np.nan, np.float32)
        given = {"name": "images", "shape": [1, 3, 64, 64], "datatype": "FP32"}
        body = json.dumps({"inputs": [{**given, "data": values.ravel().tolist()}]}).encode()
        status, answer = infer_json(server, body, PLAIN)
        assert (status, answer["error"]) == (
            400,
            "The input 'images' holds values that are not finite.",
        )

    @each("length", ["x", "-1", "999999999"])
    def test_a_wrong_header_length_is_refused(self, server: Running, length: str) -> None:
        headers = {"Inference-Header-Content-Length": length}
        status, answer, _ = post(f"{server.url}/v2/models/{BYTES}/infer", b"{}", headers)
        assert status == 400
        assert length in answer["error"]

    def test_wrong_addresses_and_methods(self, server: Running) -> None:
        status, answer, _ = post(f"{server.url}/v3", b"")
        assert (status, answer["error"]) == (404, "There is nothing at '/v3' on this server.")
        status, answer, headers = post(f"{server.url}/v2", b"")
        assert (status, answer["error"]) == (405, "'/v2' does not take POST.")
        assert "GET" in headers["Allow"]


class TestPictures:
    def test_a_picture_gets_the_originals_answer(
        self, server: Running, digits: Bundle, original: Path
    ) -> None:
        status, answer, _ = post(f"{server.url}/predict?compare=1", original.read_bytes())
        assert status == 200
        expected = top5_of(digits)
        assert [c["index"] for c in answer["top"]] == [c.index for c in expected]
        found = [c["probability"] for c in answer["top"]]
        np.testing.assert_allclose(found, [c.probability for c in expected], atol=1e-5)
        assert answer["pytorch"]["largest_difference"] < 1e-5
        assert answer["picture"] == {"width": 8, "height": 8}

    def test_a_form_works_too(self, server: Running, original: Path) -> None:
        start = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
        body = start + original.read_bytes() + b"\r\n--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        status, answer, _ = post(f"{server.url}/predict?top=1", body, headers)
        assert (status, len(answer["top"])) == (200, 1)

    @each(
        ("body", "headers", "status", "message"),
        [
            (b"", {}, 400, "The request has no picture"),
            (b"hello", {}, 422, "it is in no known image format"),
            (b"\x89PNG\r\n\x1a\n", {}, 422, "cannot be read as an image"),
            (b"x", {"Content-Type": "multipart/form-data"}, 400, "Missing boundary"),
            (
                b"--x--\r\n",
                {"Content-Type": "multipart/form-data; boundary=x"},
                400,
                "The form has no file",
            ),
            (b"x", {"Content-Encoding": "br"}, 400, "use gzip or deflate"),
            (b"xyz", {"Content-Encoding": "gzip"}, 400, "is damaged"),
            (
                gzip.compress(b"x" * 99, mtime=0)[:-4],
                {"Content-Encoding": "gzip"},
                400,
                "is truncated",
            ),
        ],
    )
    def test_what_is_no_picture_is_refused(
        self, server: Running, body: bytes, headers: dict[str, str], status: int, message: str
    ) -> None:
        found, answer, _ = post(f"{server.url}/predict", body, headers)
        assert (found, message in answer["error"]) == (status, True), answer

    def test_a_truncated_picture_is_refused(self, server: Running, original: Path) -> None:
        body = original.read_bytes()
        status, answer, _ = post(f"{server.url}/predict", body[: len(body) // 2])
        assert (status, "cannot be read as an image" in answer["error"]) == (422, True)

    def test_a_decompression_bomb_is_refused(self, server: Running) -> None:
        import zlib

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
        assert (status, "larger than the 4,194,304 bytes" in answer["error"]) == (413, True)

    @each("top", ["0", "-1", "x", "9999", "9" * 5000])
    def test_an_impossible_top_is_refused(self, server: Running, top: str) -> None:
        assert post(f"{server.url}/predict?top={top}", b"x")[0] == 400

    def test_the_page_may_only_talk_to_its_own_server(self, server: Running) -> None:
        with urllib.request.urlopen(server.url, timeout=30) as response:
            policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy


class TestLimits:
    def test_an_announced_oversize_is_413(self, server: Running) -> None:
        status, answer, _ = post(f"{server.url}/predict", bytes(5 * 2**20))
        assert status == 413
        assert answer["error"].startswith("The request is larger than the 4,194,304 bytes")

    def test_an_unannounced_oversize_is_413(self, server: Running) -> None:
        connection = http.client.HTTPConnection(server.address, timeout=30)
        pieces = (bytes(2**20) for _ in range(6))
        connection.request("POST", "/predict", body=pieces, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()

    def test_a_slow_client_is_cut_off_and_others_are_not_kept_waiting(
        self, digits: Bundle, original: Path
    ) -> None:
        with serving(digits, read_timeout_s=0.5) as server:
            host, port = server.address.split(":")
            with socket.create_connection((host, int(port)), timeout=30) as slow:
                slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf")
                assert post(f"{server.url}/predict", original.read_bytes())[0] == 200
                answer = slow.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"not complete after 0.5 s" in answer

    def test_a_client_that_goes_away_harms_nobody(self, server: Running, original: Path) -> None:
        host, port = server.address.split(":")
        for _ in range(20):
            with socket.create_connection((host, int(port)), timeout=30) as gone:
                gone.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf")
        assert post(f"{server.url}/predict", original.read_bytes())[0] == 200

    def test_a_full_queue_is_429_and_what_waits_is_answered(self, digits: Bundle) -> None:
        gate = threading.Event()
        body = pictures(digits, 8)
        with (
            serving(digits, slow=gate, queue_limit=8, artefacts=("fp32-uint8",)) as server,
            concurrent.futures.ThreadPoolExecutor(8) as pool,
        ):

            def ask(_: int) -> int:
                with triton.InferenceServerClient(server.address) as client:
                    try:
                        client.infer(BYTES, [an_input(body)])
                    except triton_errors.InferenceServerException as error:
                        return int(error.status().removeprefix("[").removesuffix("]"))
                    return 200

            first = pool.submit(ask, 0)  # its batch is held, so the queue is empty again
            time.sleep(1.0)
            others = [pool.submit(ask, i) for i in range(5)]
            refused = concurrent.futures.wait(others, timeout=2).done
            gate.set()
            statuses = sorted(future.result(30) for future in [first, *others])
        assert len(refused) == 4  # at once, not after a wait
        assert statuses == [200, 200, 429, 429, 429, 429]

    def test_stopping_answers_what_was_begun(self, digits: Bundle) -> None:
        gate = threading.Event()
        body = pictures(digits, 2)
        answers: list[Any] = []

        def ask(address: str) -> None:
            with triton.InferenceServerClient(address) as client:
                answers.append(client.infer(BYTES, [an_input(body)]).as_numpy("logits"))

        with serving(digits, slow=gate, artefacts=("fp32-uint8",)) as server:
            thread = threading.Thread(target=ask, args=(server.address,))
            thread.start()
            time.sleep(0.5)
            threading.Timer(0.5, gate.set).start()  # after the server was told to stop
        thread.join(30)
        assert [a.shape for a in answers] == [(2, 10)]

    def test_a_draining_server_says_503(self, digits: Bundle) -> None:
        with serving(digits) as server:
            server.service.draining = True
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"{server.url}/v2/health/ready", timeout=30)
            status, answer, headers = post(
                f"{server.url}/predict", (digits.path / "golden/0.png").read_bytes()
            )
            assert (status, answer["error"]) == (503, "The server is shutting down.")
            assert headers["Retry-After"] == "1"

    def test_too_many_connections_are_503(self, digits: Bundle) -> None:
        with serving(digits, max_connections=3) as server:
            host, port = server.address.split(":")
            held = [socket.create_connection((host, int(port)), timeout=30) for _ in range(4)]
            held[-1].sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert held[-1].recv(65536).startswith(b"HTTP/1.1 503")
            for connection in held:
                connection.close()

    def test_a_model_that_fails_is_500_and_the_server_stays_up(self, digits: Bundle) -> None:
        with serving(digits, artefacts=("fp32-uint8",)) as server:
            batcher = server.service.models[BYTES].batcher
            run = batcher._run

            def broken(_: object) -> Any:
                raise RuntimeError("out of luck")

            batcher._run = broken
            picture = (digits.path / "golden/0.png").read_bytes()
            status, answer, _ = post(f"{server.url}/predict", picture)
            assert (status, answer["error"]) == (500, "The model failed: RuntimeError: out of luck")
            batcher._run = run
            assert post(f"{server.url}/predict", picture)[0] == 200


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
        served = server.service.models[BYTES]
        assert len(differences) == served.requests == 192
        assert max(differences) < 1e-4
        assert served.batches < 192  # requests ran together
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
            text = response.read().decode()
    assert f'van_deploy_requests_total{{model="{BYTES}",route="infer",status="200"}} 192.0' in text
    assert f'van_deploy_batch_rows_count{{model="{BYTES}"}} {float(served.batches)}' in text


def test_the_command_serves_and_ends_in_order(digits: Bundle) -> None:
    command = [*(sys.executable, "-m", "van_deploy", "serve", str(digits.path)), "--port", "0"]
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            text += process.stdout.readline()
        document = json.loads(text)
        assert document["models"] == [BYTES]
        picture = (digits.path / "golden/0.png").read_bytes()
        assert post(f"{document['url']}/predict", picture)[0] == 200
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors == "Stopped; every request that was begun is answered.\n"
