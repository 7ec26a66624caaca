"""The server with tritonclient, plain HTTP clients, and clients that misbehave."""

import contextlib
import gc
import json
import os
import platform
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reliability.load import run_server
from tests.each import each
from tests.serve.conftest import Running, serving, tensor_of, top5_of
from van_deploy.bundle import Bundle
from van_deploy.config import ServiceSettings
from van_deploy.errors import UsageError
from van_deploy.model.preprocess import normalise
from van_deploy.runners.network import Network, TensorSpec
from van_deploy.serve.app import Response, limit_malloc_retention
from van_deploy.serve.models import ServedModel, ServerMetrics, Service
from van_deploy.serve.requests import RequestError, parse_request

triton = pytest.importorskip("tritonclient.http")

BYTES, PLAIN = "van_digits-fp32-uint8", "van_digits-fp32"
INFER, LIVE = f"/v2/models/{BYTES}/infer", "/v2/health/live"
ROW, MIB = 64 * 64 * 3, 2**20
JSON_LENGTH = "Inference-Header-Content-Length"
HEAD = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
JAVA = b"POST /predict HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 5\r\n"
JAVA += b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nUpgrade: h2c\r\n\r\n"
CHUNKED = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def image(golden_image: Path) -> bytes:
    return golden_image.read_bytes()


def client_of(server: Running) -> Any:
    return triton.InferenceServerClient(server.address, concurrency=4)


def tensor(outputs: object = (), **changes: Any) -> bytes:
    """Return the JSON of a request with one image of zeros, with some fields changed."""
    described = {"name": "pixels", "shape": [1, 64, 64, 3], "datatype": "UINT8", "data": [0] * ROW}
    return json.dumps({"inputs": [{**described, **changes}], "outputs": outputs}).encode()


def binary_request(*outputs: object) -> tuple[str, bytes, Mapping[str, str]]:
    """Return path, body and headers of a request with eight images after the JSON."""
    size = {"binary_data_size": 8 * ROW}
    head = tensor(outputs, shape=[8, 64, 64, 3], parameters=size, data=None)
    return INFER, head + bytes(8 * ROW), {JSON_LENGTH: str(len(head))}


def send(
    server: Running, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Any, Any]:
    """Return status, body (JSON parsed) and headers of a GET, or of a POST with a body."""
    with contextlib.closing(HTTPConnection(server.address, timeout=60)) as connection:
        connection.request("GET" if body is None else "POST", path, body, dict(headers or {}))
        response = connection.getresponse()
        text, kind = response.read().decode(errors="replace"), response.headers["content-type"]
    is_json = kind == "application/json"
    return response.status, json.loads(text) if is_json else text, response.headers


def wait_until(condition: Callable[[], Any]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("timeout")


def call_before_batches(server: Running, function: Callable[[Any], Any]) -> None:
    """Let the model call a function with the rows of each batch before it runs the batch."""
    network = server.service.models[BYTES].network
    run = network.run

    def run_after(rows: Any) -> Any:
        function(rows)
        return run(rows)

    network.run = run_after  # type: ignore


@contextlib.contextmanager
def connected(server: Running, sent: bytes = b"") -> Iterator[socket.socket]:
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(sent)
        yield client


def post_head(length: int) -> bytes:
    return f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def test_health_metadata_and_configuration_of_a_model(digits: Bundle) -> None:
    settings = {"instances": 2, "threads": 3, "queue_limit": 77, "max_delay_ms": 2.5}
    with serving(digits, **settings) as server, client_of(server) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        models = [(BYTES, ""), (BYTES, "1"), ("nobody", ""), (BYTES, "2")]
        assert [client.is_model_ready(*model) for model in models] == [True, True, False, False]
        assert client.get_server_metadata()["name"] == "van-deploy"
        assert [m["name"] for m in client.get_model_repository_index()] == [BYTES]
        metadata, config = client.get_model_metadata(BYTES), client.get_model_config(BYTES)
    assert metadata["platform"] == "onnxruntime_onnx"
    assert metadata["inputs"] == [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 64, 64, 3]}]
    assert metadata["outputs"][2] == {"name": "top5_classes", "datatype": "INT64", "shape": [-1, 5]}
    assert config["instance_group"] == [{"count": 2, "kind": "KIND_CPU", "profile": []}]
    assert config["parameters"] == {"intra_op_thread_count": {"string_value": "3"}}
    batching = config["dynamic_batching"]
    assert batching["max_queue_delay_microseconds"] == 2500
    assert batching["default_queue_policy"]["max_queue_size"] == 77
    original = ServedModel(Network(digits, "pytorch"), ServiceSettings(), ServerMetrics())
    assert original.config["backend"] == "pytorch"


def test_inference_results_match_the_artifacts(
    server: Running, digits: Bundle, pixels: Any, expected: Any
) -> None:
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    with client_of(server) as client:
        for rows, binary in ((1, True), (3, False), (8, True)):
            tensor_in = tensor_of(triton, pixels[:rows], binary_data=binary)
            result = client.infer(BYTES, [tensor_in], request_id="7")
            assert result.get_response()["id"] == "7"
            for output, values in expected.items():
                actual = result.as_numpy(output)
                assert actual.dtype == values.dtype
                np.testing.assert_allclose(actual, values[:rows], **close)
        images = normalise(pixels[:1], digits.manifest.preprocessing)
        plain = client.infer(PLAIN, [tensor_of(triton, images, "images", binary_data=False)])
    np.testing.assert_allclose(plain.as_numpy("logits"), expected["logits"][:1], **close)
    _, answer, _ = send(server, INFER, tensor(data=pixels[:1].tolist()))  # nested numbers
    assert [output["name"] for output in answer["outputs"]] == [*expected]  # all by default
    np.testing.assert_allclose(answer["outputs"][0]["data"], expected["logits"][0], **close)


NUMBERS = "give 12288 numbers"
SHAPE = "the model takes [1..8, 64, 64, 3]"
NAN = {"name": "images", "shape": [1, 3, 64, 64], "datatype": "FP32", "data": [float("nan")] * ROW}
CLASSES = [{"name": "logits", "parameters": {"classification": 2}}]
INVALID_TENSORS: list[tuple[bytes, str]] = [
    (b"\x89PNG", "The request is not JSON"),
    (b'{"inputs": [{"name": "x\\ud800"}]}', "The request is not JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", "number out of range"),
    (b"[]", "The request: it should be a table"),
    (b'{"inputs": []}', "Send exactly one input, 'pixels'."),
    (tensor(CLASSES), "outputs.0.parameters.classification' is 2"),
    (tensor([{"name": "logits"}] * 2), "The request has an output twice."),
    (tensor([{"name": "boxes"}]), "no output 'boxes'; the model has logits"),
    (tensor(name="images"), "Send exactly one input, 'pixels'."),
    (tensor(datatype="INT8"), "is UINT8, not 'INT8'"),
    *((tensor(shape=[n, 64, 64, 3]), f"[{n}, 64, 64, 3]; {SHAPE}") for n in (0, 9)),
    (tensor(shape=[1, 3, 64, 64]), SHAPE),
    (tensor(shape=[True, 64, 64, 3]), "'inputs.0.shape.0' is True"),
    *((tensor(data=data), NUMBERS) for data in ([1, 2, 3], None, [[1, 2], [3]])),
    *((tensor(data=[item] * ROW), NUMBERS) for item in ("1", True)),
    (tensor(data=[[[[1, 2, 3, 4]] * 64] * 48]), NUMBERS),
    *((tensor(data=[number] * ROW), "UINT8: integers from 0") for number in (256, -1, 0.5)),
    (tensor(data=[10**400] + [0] * (ROW - 1)), "contains too large a number"),
    (tensor(parameters={"binary_data_size": ROW}), "is 12288, and 0 were sent"),
]
REFUSED: list[tuple[str, bytes | None, Mapping[str, str], int, str]] = [
    ("/v3", b"", {}, 404, "There is nothing at '/v3'."),
    ("/v2", b"", {}, 405, "'/v2' takes GET, not POST."),
    ("/%ED%A0%80", None, {}, 404, "There is nothing at"),
    ("/v2/models/resnet/infer", b"{}", {}, 404, "There is no model 'resnet' version '1'; this"),
    *((INFER, body, {}, 400, message) for body, message in INVALID_TENSORS),
    (f"/v2/models/{PLAIN}/infer", tensor(**NAN), {}, 400, "contains values that are not finite."),
    (INFER, tensor(data=[0] * 600_000), {}, 413, "larger than 1,048,576 bytes.\nSend binary"),
    (INFER, b"{}", {JSON_LENGTH: "3"}, 400, "The JSON should have 3 bytes; the body has 2."),
    (INFER, b"{}", {JSON_LENGTH: "20000"}, 413, "16,384 bytes of JSON"),
    *(
        (INFER, b"{}", {JSON_LENGTH: text}, 400, "not a number")
        for text in ("x", "-1", "9" * 5000, "\xd9\xa1")
    ),
    ("/predict", b"", {}, 400, "The request has no image"),
    ("/predict", b"hello", {}, 422, "it is in no known image format"),
    ("/predict", b"P6 30000 30000 255\n", {}, 422, "too large to open safely"),
    ("/predict", b"x", {"Content-Type": "multipart/form-data"}, 415, "Forms and"),
    ("/predict", b"x", {"Content-Encoding": "gzip"}, 415, "Content-Encoding are not"),
    ("/predict", bytes(5 * MIB), {}, 413, "The request is larger than 4,194,304 bytes"),
    *(
        (f"/predict?top={top}", b"x", {}, 400, "it must be a number from 1 to 1000")
        for top in ("0", "x", "9999", "9" * 5000, "%D9%A1")
    ),
]


@each("case", REFUSED)
def test_invalid_requests_are_refused(server: Running, case: Any) -> None:
    *request, status, message = case
    actual, answer, _ = send(server, *request)
    assert (actual, message in answer["error"]) == (status, True), answer


def test_float16_overflow_long_strings_and_bytes_after_numbers_are_refused() -> None:
    """A NumPy array of strings would use 400,000 bytes for each number."""
    long, given = ["x" * 100_000, *[1] * 1000], "binary_data_size is None, and 8 were sent"
    cases: list[tuple[str, str, list[Any], dict[str, Any], bytes, str]] = [
        ("FP16", "float16", [70_000], {}, b"", "not finite"),
        ("FP32", "float32", long, {}, b"", "give 1001 numbers"),
        ("FP32", "float32", [1, 2], {}, bytes(8), given),
        ("FP32", "float32", [1], {"outputs": [1] * 20_000}, b"", "outputs.0' is 1: it should be a"),
        ("FP32", "float32", [1], {"shape": ["a"] * 20_000}, b"", "shape.0' is 'a': it should be a"),
    ]
    for datatype, dtype, data, changes, tail, message in cases:
        described = {"name": "x", "shape": [1, len(data)], "datatype": datatype, "data": data}
        body = tensor(**{**described, **changes})
        tracemalloc.start()
        with pytest.raises(RequestError, match=message):
            parse_request(body + tail, len(body), TensorSpec("x", dtype, (len(data),)), [], 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < max(MIB, 10 * len(body))


def test_large_json_is_parsed_and_written_in_another_process(
    digits: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.serve.app.MANY_NUMBERS", 100)
    as_bytes = {"name": "probabilities", "parameters": {"binary_data": True}}
    with serving(digits) as server, ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        assert send(server, INFER, tensor())[0] == 200  # starts the process
        parser = server.service.reader._pool
        ((pid, worker),) = parser._processes.items()
        stack.callback(worker.kill)
        os.kill(pid, signal.SIGSTOP)
        assert send(server, *binary_request({"name": "logits"}, as_bytes))[0] == 200
        large = ((INFER, tensor()), binary_request())  # all outputs are 240 numbers
        waiting = [pool.submit(send, server, *request) for request in large]
        wait_until(lambda: len(parser._pending_work_items) == 2)
        assert send(server, LIVE)[0] == 200
        worker.kill()
        assert [request.result(60)[0] for request in waiting] == [503, 503]
        assert send(server, INFER, tensor())[0] == 200  # in a new process


def test_predict_matches_the_golden_sample(server: Running, digits: Bundle, image: bytes) -> None:
    top = top5_of(digits)
    status, answer, _ = send(server, "/predict?compare=1", image)
    assert (status, answer["image"]) == (200, {"width": 8, "height": 8})
    actual = {c["index"]: c["probability"] for c in answer["top"]}
    assert actual == pytest.approx({c.index: c.probability for c in top}, abs=1e-5)
    assert list(actual) == [c.index for c in top]
    assert answer["pytorch"]["largest_difference"] < 1e-5
    assert answer["pytorch"]["beside"] == pytest.approx(list(actual.values()), abs=1e-5)
    status, answer, _ = send(server, f"/predict?top=1&model={PLAIN}", image)
    assert (status, [c["index"] for c in answer["top"]]) == (200, [top[0].index])


@each(
    ("sent", "status"),
    [
        (HEAD + (b"X-Long: " + b"a" * 10_000 + b"\r\n") * 100, 400),  # an endless head
        (HEAD + b"a: b\r\n" * 99 + b"\r\n", 200),
        (HEAD + b"a: b\r\n" * 100 + b"\r\n", 400),
        (CHUNKED + 3000 * b"1\r\nx\r\n" + b"0\r\n\r\n", 400),
        (CHUNKED + 3000 * (b"40\r\n" + b"x" * 64 + b"\r\n") + b"0\r\n\r\n", 422),
        (CHUNKED + 6 * (b"100000\r\n" + bytes(MIB) + b"\r\n") + b"0\r\n\r\n", 413),
    ],
)
def test_limits_of_heads_and_chunks(server: Running, sent: bytes, status: int) -> None:
    with contextlib.suppress(ConnectionError), connected(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        assert client.recv(65536).startswith(b"HTTP/1.1 %d" % status)


def test_bodies_of_requests_that_offer_http2_are_read(server: Running) -> None:
    with connected(server) as client:
        for _ in range(2):
            client.sendall(JAVA + b"hello")
            assert client.recv(65536).startswith(b"HTTP/1.1 422")


def test_slow_pipelined_and_aborted_requests(digits: Bundle, image: bytes) -> None:
    received = b""
    with (
        serving(digits, read_timeout_s=0.5) as server,
        connected(server, HEAD + b"\r\n") as client,
        connected(server, post_head(99) + b"half") as slow,
    ):
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHo")
        answer = slow.recv(65536)
        assert client.recv(65536) == b""
        many = connected(server, (HEAD + b"\r\n") * 1000)
        with many as pipelined, contextlib.suppress(ConnectionError):
            while piece := pipelined.recv(65536):
                received += piece
        for _ in range(20):
            with connected(server, post_head(99) + b"half"):
                pass
        assert send(server, "/predict", image)[0] == 200
        wait_until(lambda: server.service.reader.quota.used == 0)
        assert server.service.models[BYTES].queue.used == 0
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"not complete after 0.5 s" in answer
    assert received.count(b"HTTP/1.1 200") <= 17
    assert b"HTTP/1.1 400" in received


def test_clients_that_do_not_read_or_do_not_end_an_answered_request_lose_their_connection(
    digits: Bundle,
) -> None:
    endless, closing = post_head(10**9).replace(b"/predict", b"/v3"), b"Connection: close\r\n"
    with serving(digits) as server:
        server.app._routes["/v2/health/live"] = lambda _: Response(bytes(8 * MIB))
        for sent in (endless, HEAD + b"\r\n", HEAD + closing + b"\r\n", (HEAD + b"\r\n") * 2):
            with connected(server) as client:
                wait_until(lambda: server.app.connections)
                (connection,) = server.app.connections
                connection.timeout_keep_alive = 0.5  # type: ignore[attr-defined]
                client.sendall(sent)

                def disconnected(client: socket.socket = client, sent: bytes = sent) -> bool:
                    with contextlib.suppress(ConnectionError):
                        client.sendall(b"x" * (sent is endless))
                    return not server.app.connections

                wait_until(disconnected)


def test_memory_of_all_bodies_is_limited_and_released(digits: Bundle, image: bytes) -> None:
    options = {"max_held_mib": 1, "max_body_mib": 0.9, "compare": False}
    with serving(digits, **options) as server:
        quota = server.service.reader.quota
        with connected(server, post_head(920_000) + bytes(900_000)):
            wait_until(lambda: quota.used == 900_000)
            status, answer, headers = send(server, "/predict", bytes(200_000))
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "use all the memory they may" in answer["error"]
            with connected(server, post_head(2 * MIB) + bytes(2 * MIB)) as large:
                assert large.recv(99).startswith(b"HTTP/1.1 413")  # read to its end, not stored
            status, answer, _ = send(server, "/predict?compare=1", image)
            assert (status, "pytorch" in answer) == (200, False)
        wait_until(lambda: quota.used == 0)
        assert send(server, "/predict", bytes(200_000))[0] == 422
    with serving(digits, max_held_mib=1) as server:  # such a body could never be received
        status, answer, _ = send(server, "/predict", bytes(2 * MIB))
        assert (status, "--max-body-mib and --max-held-mib." in answer["error"]) == (413, True)


def test_refused_bodies_are_freed_immediately(server: Running) -> None:
    """Without waiting for the garbage collector to free the traceback."""
    assert limit_malloc_retention() == (platform.libc_ver()[0] == "glibc")
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for size, status in ((5, 413), (3, 422)) * 4:
            assert send(server, "/predict", bytes(size * MIB))[0] == status
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert left < MIB


def test_full_queue_returns_429_and_queued_requests_are_answered(
    digits: Bundle, image: bytes
) -> None:
    gate = threading.Event()
    with serving(digits, queue_limit=16) as server, ThreadPoolExecutor(20) as pool:
        call_before_batches(server, lambda _: gate.wait(30))
        server.service._run_pytorch = lambda *_: {"released": gate.wait(30)}  # type: ignore
        queue = server.service.models[BYTES].queue
        cases: Any = ((binary_request(), 2), (("/predict?compare=1", image), 16))
        for request, accepted in cases:
            futures = [pool.submit(send, server, *request) for _ in range(accepted + 4)]
            wait_until(lambda: sum(f.done() for f in futures) == 4)  # noqa: B023 - called here
            assert queue.used == 16
            refused, answer, headers = send(server, "/predict", image)
            assert (refused, headers["Retry-After"]) == (429, "1")
            assert answer["error"].startswith("The queue is full")
            gate.set()
            assert sorted(f.result(30)[0] for f in futures) == [200] * accepted + [429] * 4
            gate.clear()
            wait_until(lambda: queue.used == 0)


def test_idle_instances_share_queued_requests(digits: Bundle, pixels: Any) -> None:
    with pytest.raises(UsageError, match="A queue of 15 images cannot hold the 16"):
        Service(digits, ServiceSettings(queue_limit=15, instances=2))
    both, sizes = threading.Barrier(2, timeout=30), list[int]()

    def wait_for_other_instance(rows: Any) -> None:
        both.wait()  # times out and fails the batch if the other instance is not used
        sizes.append(len(rows))

    with serving(digits, instances=2, max_delay_ms=500) as server, client_of(server) as client:
        call_before_batches(server, wait_for_other_instance)
        tensors = [tensor_of(triton, pixels[:2])]
        for request in [client.async_infer(BYTES, tensors) for _ in range(4)]:
            request.get_result()
        text = send(server, "/metrics")[1]
    assert sizes == [4, 4]
    for figure, value in (
        ("batch_rows_sum", 8),
        ("batch_rows_count", 2),
        ("queue_seconds_count", 4),
    ):
        assert f'van_deploy_{figure}{{model="{BYTES}"}} {value}.0' in text


def test_shutdown_finishes_requests_in_progress(digits: Bundle, image: bytes) -> None:
    gate = threading.Event()
    with (
        ThreadPoolExecutor(1) as pool,
        serving(digits) as server,
        connected(server, post_head(len(image)) + image[:10]) as client,
    ):
        call_before_batches(server, lambda _: gate.wait(30))
        pending = pool.submit(send, server, INFER, tensor())
        wait_until(lambda: server.service.models[BYTES].queue.used == 1)
        wait_until(lambda: server.service.reader.quota.used > 10)
        server.stop()
        wait_until(lambda: server.service.reader.draining)
        gate.set()
        client.sendall(image[10:])
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        assert pending.result(30)[0] == 200


def test_draining_or_full_server_returns_503(digits: Bundle, image: bytes) -> None:
    with serving(digits, max_connections=3) as server, contextlib.ExitStack() as stack:
        server.service.reader.draining = True
        assert send(server, "/v2/health/ready")[0] == 503
        status, answer, _ = send(server, "/predict", image)
        assert (status, answer["error"]) == (503, "The server is shutting down.")
        wait_until(lambda: not server.app.connections)
        for allowed in (True, True, True, False):
            client = stack.enter_context(connected(server))
            client.sendall(HEAD + b"\r\n")
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200" if allowed else b"HTTP/1.1 503")
        assert b"retry-after: 1\r\n" in answer
        assert b"too many connections" in answer
        stack.close()
        wait_until(lambda: not server.app.connections)
        text = send(server, "/metrics")[1]
    assert 'requests_total{model="",route="",status="503"} 1.0' in text


def test_graph_of_any_size_is_served_at_the_size_of_the_bundle(
    dynamic_size: Bundle, image: bytes
) -> None:
    with serving(dynamic_size, threads=1) as server, client_of(server) as client:
        (served,) = client.get_model_metadata(BYTES)["inputs"]
        assert served["shape"] == [-1, 64, 96, 3]
        (served,) = client.get_model_config(BYTES)["input"]
        assert served["dims"] == [64, 96, 3]
        assert send(server, "/predict?compare=1", image)[1]["pytorch"]["largest_difference"] < 1e-5
        assert server.service._original.loaded_runner.threads == 1


@each("binary", [True, False])
def test_outputs_that_are_not_finite_are_not_returned(server: Running, binary: bool) -> None:
    images = np.full((1, 3, 64, 64), 1e38, np.float32)
    logits = triton.InferRequestedOutput("logits", binary_data=binary)
    with client_of(server) as client, pytest.raises(Exception, match="The server failed"):
        client.infer(PLAIN, [tensor_of(triton, images, "images")], outputs=[logits])


def test_model_failure_returns_500_and_is_logged(
    digits: Bundle, image: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(digits, log_requests=True) as server:
        call_before_batches(server, lambda _: [][0])
        for _ in range(2):
            status, answer, _ = send(server, "/predict", image)
            assert (status, answer["error"]) == (500, "The server failed; its log has the reason.")
        send(server, "/predict?model=invented", b"x")
        text = send(server, "/metrics")[1]
    fault, request, *_ = (json.loads(line) for line in capfd.readouterr().err.splitlines())
    assert (fault["event"], fault["path"]) == ("fault", "/predict")
    assert fault["traceback"].rstrip().endswith("IndexError: list index out of range")
    assert [*request] == ["time", "event", "method", "path", "model", "status", "ms"]
    assert [*request.values()][1:6] == ["request", "POST", "/predict", BYTES, 500]
    line = 'van_deploy_requests_total{model="%s",route="/predict",status="%d"} %d.0'
    assert line % (BYTES, 500, 2) in text
    assert line % ("", 404, 1) in text  # clients cannot create metric series


def test_requests_are_answered_after_the_reader_of_the_log_has_ended(
    digits: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w", buffering=1) as log:
        monkeypatch.setattr("sys.stderr", log)
        with serving(digits, log_requests=True) as server:
            statuses = [send(server, LIVE)[0] for _ in range(2)]
    assert statuses == [200, 200]


@pytest.mark.parametrize("in_a_file", [True, False])
def test_only_page_and_health_are_accessible_without_the_key(
    digits: Bundle, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch, in_a_file: bool
) -> None:
    key, file = "s3cret-" + "k" * 32, tmp_path / "key"
    file.write_text(f"{key}\n")
    settings: dict[str, Any] = {"api_key_file": file} if in_a_file else {}
    monkeypatch.setenv("VAN_DEPLOY_API_KEY", "another" if in_a_file else key)
    with serving(digits, **settings) as server:
        for path in ("/", "/page.js", "/page.css", LIVE, "/v2/health/ready"):
            assert send(server, path)[0] == 200
        policy = send(server, "/")[2]["content-security-policy"]
        assert ("default-src 'none'" in policy, "unsafe-inline" in policy) == (True, False)
        for path in ("/v2", "/models", "/metrics", f"/v2/models/{BYTES}", "/nothing"):
            assert send(server, path)[0] == 401
        status, answer, headers = send(server, "/predict", image)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert key not in str(answer)
        for wrong in ("Bearer", f"Bearer {key}x", key, "Bearer \u00e9"):
            assert send(server, "/v2", None, {"Authorization": wrong})[0] == 401
        assert send(server, "/predict", image, {"Authorization": f"Bearer {key}"})[0] == 200


def test_invalid_api_keys_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    settings = ServiceSettings(api_key_file=file)
    with pytest.raises(UsageError, match="cannot be read"):
        settings.api_key()
    for content, message in ((b"two words", "is not a key"), (b"\xff", "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            settings.api_key()
    monkeypatch.setenv("VAN_DEPLOY_API_KEY", "")
    with pytest.raises(UsageError, match="'VAN_DEPLOY_API_KEY' is not a key"):
        ServiceSettings().api_key()


def test_concurrent_clients_get_their_own_results(
    server: Running, pixels: Any, expected: Any
) -> None:
    def difference(index: int) -> float:
        with client_of(server) as client:
            rows = [(index + k) % 64 for k in range(1 + index % 3)]
            logits = client.infer(BYTES, [tensor_of(triton, pixels[rows])]).as_numpy("logits")
            return float(np.abs(logits - expected["logits"][rows]).max())

    with ThreadPoolExecutor(16) as pool:
        assert all(value < 1e-4 for value in pool.map(difference, range(192)))


COMPLETED, LOST = "all requests in progress were completed", "requests in progress that were not"


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ([signal.SIGTERM], COMPLETED),
        ([signal.SIGINT], COMPLETED),
        ([signal.SIGINT] * 2, f"{LOST} completed: 1"),
        ([signal.SIGKILL], ""),
    ],
)
def test_serve_command_ends_with_its_parser_process(
    digits: Bundle, image: bytes, tmp_path: Path, signals: list[signal.Signals], message: str
) -> None:
    unfinished = (post_head(99) + b"half") * (len(signals) - 1)
    with run_server(digits.path, log=tmp_path / "log") as (process, url):
        server = Running(None, url.removeprefix("http://"), process.kill)  # type: ignore[arg-type]
        with connected(server, unfinished):
            assert send(server, "/predict", image)[0] == 200
            assert send(server, INFER, tensor())[0] == 200
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for number in signals:
                process.send_signal(number)
                time.sleep(0.5)  # signals of one kind are not queued
            code = process.wait(60)
    assert children
    wait_until(lambda: not any(Path("/proc", child).exists() for child in children))
    if message:
        assert (code, (tmp_path / "log").read_text()) == (0, f"Stopped; {message}.\n")


@pytest.mark.slow
def test_fuzzed_requests_get_a_status_and_no_traceback(
    digits: Bundle, image: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """A seeded sample of the 10,000 requests of ``python -m reliability --only requests``."""
    from reliability.requests import fuzz_requests

    with serving(digits, read_timeout_s=0.5) as server:
        statuses, faults = fuzz_requests(f"http://{server.address}", 0, 600, image)
        assert server.service.reader.quota.used == 0
    assert faults == []
    assert {200, 400, 404, 405, 422} <= set(statuses)
    assert "raceback" not in capfd.readouterr().err
