"""The HTTP server: an ASGI application with its routes, run by uvicorn."""

import asyncio
import contextlib
import ctypes
import hmac
import json
import re
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, NamedTuple

from van_deploy import __version__
from van_deploy.errors import ImageError, UsageError
from van_deploy.serve.models import ServedModel, Service
from van_deploy.serve.requests import (
    MIB,
    Executor,
    Request,
    RequestError,
    encode_response,
    limited_protocol,
    parse_request,
)
from van_deploy.serve.triton import DATATYPES

MODEL_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/infer|/ready|/config)?")
MODEL = "/v2/models/MODEL"
POST_ROUTES = {f"{MODEL}/infer", "/predict", "/v2/repository/index"}
EXTENSIONS = ["binary_tensor_data", "model_configuration"]
READY = {"version": "1", "state": "READY"}
SERVER = {"name": "van-deploy", "version": __version__, "extensions": EXTENSIONS}
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "pytorch": "pytorch"}
OPEN_PATHS = {"/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready"}
MAX_TOP = 1000
SMALL_JSON = 16 * 2**10  # bytes: parsed in the event loop in less than a millisecond
MANY_NUMBERS = 4096  # a response with more is written as JSON in another process
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; "
    "script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
ERROR_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1", "connection": "close"},
}
THREADS = 2  # for decoding images and checking arrays


class Response(NamedTuple):
    """One HTTP response."""

    body: bytes = b""
    headers: Mapping[str, str] = {}
    status: int = 200


class App:
    """The ASGI application of a service.

    Attributes:
        service: the service.
        requires_key: whether clients must send an API key.
        connections: the server's open connections.

    Raises:
        UsageError: the API key cannot be read.
    """

    def __init__(self, service: Service) -> None:
        self.service, key = service, service.settings.api_key()
        self.requires_key, self._authorization = bool(key), f"Bearer {key}".encode()
        self.connections: Collection[object] = ()
        models, metrics = service.models, service.metrics
        self._routes: dict[str, Callable[[Request], Any]] = {
            f"{MODEL}/infer": self._infer,
            "/predict": self._predict,
            "/v2/repository/index": lambda _: [{"name": name, **READY} for name in models],
            "/v2/health/live": lambda _: Response(),
            "/v2/health/ready": lambda _: Response(status=503 if service.reader.draining else 200),
            "/": _page("page.html", "text/html; charset=utf-8"),
            "/page.css": _page("page.css", "text/css"),
            "/page.js": _page("page.js", "text/javascript"),
            "/models": lambda _: service.description(),
            "/metrics": lambda _: Response(metrics.text(), metrics.headers),
            "/v2": lambda _: SERVER,
            MODEL: lambda request: _metadata(self._model(request)),
            f"{MODEL}/config": lambda request: self._model(request).config,
            f"{MODEL}/ready": lambda request: self._model(request) and Response(),
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Handle one request; every failure becomes a status."""
        start, metrics = time.perf_counter(), self.service.metrics
        query = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), True)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        request = Request(method, scope["path"], dict(query), headers, receive)
        try:
            result = self._handler(request)(request)
            result = await result if isinstance(result, Awaitable) else result
            response = result if isinstance(result, Response) else _json(result)
        except (RequestError, ImageError, UsageError) as error:
            status = 422 if isinstance(error, ImageError) else getattr(error, "status", 400)
            response = _json({"error": str(error)}, status)
            traceback.clear_frames(error.__traceback__)  # frees the body immediately
        except Exception:  # a failed request must not stop the server
            response = _json({"error": "The server failed; its log has the reason."}, 500)
            _log("fault", path=request.path, traceback=traceback.format_exc())
        seconds, status = time.perf_counter() - start, response.status
        model = request.model if request.model in self.service.models else ""
        metrics.metric("requests", request.route, model, status).inc()
        metrics.metric("request_seconds", request.route, model).observe(seconds)
        if self.service.settings.log_requests:
            fields = {"method": scope["method"], "path": request.path, "model": model}
            _log("request", **fields, status=status, ms=round(1e3 * seconds, 3))
        headers = {"content-length": str(len(response.body)), **response.headers}
        pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": response.body})

    def _handler(self, request: Request) -> Callable[[Request], Any]:
        """Return the handler of a request: a function or a coroutine function."""
        if len(self.connections) > self.service.settings.max_connections:
            raise RequestError("The server has too many connections.", status=503)
        path, key = request.path, request.headers.get("authorization", "").encode()
        allowed = not self.requires_key or hmac.compare_digest(key, self._authorization)
        if path not in OPEN_PATHS and not allowed:
            raise RequestError("Send the API key: 'Authorization: Bearer KEY'.", status=401)
        match = MODEL_PATH.fullmatch(path)
        if match:
            request.model, request.version = match[1], match[2] or "1"
            path = f"{MODEL}{match[3] or ''}"
        if path not in self._routes:
            raise RequestError(f"There is nothing at {request.path[:200]!r}.", status=404)
        method = "POST" if path in POST_ROUTES else "GET"
        if method != request.method:
            text = f"{request.path[:200]!r} takes {method}, not {request.method}."
            raise RequestError(text, status=405)
        request.route = path
        return self._routes[path]

    async def _infer(self, request: Request) -> Response:
        served, reader = self._model(request), self.service.reader
        text = request.headers.get("inference-header-content-length")
        if text is not None and not re.fullmatch("[0-9]{1,18}", text):
            raise RequestError(f"Inference-Header-Content-Length is {text[:20]!r}, not a number.")
        if text is not None and int(text) > SMALL_JSON:
            raise RequestError(f"Over {SMALL_JSON:,} bytes of JSON before tensors.", status=413)
        with contextlib.ExitStack() as stack:
            body = await reader.read(request, stack, is_json=text is None)
            served.queue.acquire(stack, 1)
            network, size = served.network, len(body) if text is None else int(text)
            args = (body, size, network.input, network.outputs, network.max_batch)
            executor: Executor = "thread" if len(body) > MIB else "here"
            executor = "process" if size > SMALL_JSON else executor
            rows, parsed = await reader.run(executor, parse_request, *args)
            served.queue.acquire(stack, len(rows) - 1)
            outputs, *_ = await served.infer(rows)
            as_text = [outputs[o.name].size for o in parsed.outputs if not parsed.is_binary(o)]
            executor = "process" if sum(as_text) > MANY_NUMBERS else "here"
            answer = (parsed, outputs, served.name)
            return Response(*await reader.run(executor, encode_response, *answer))

    async def _predict(self, request: Request) -> dict[str, Any]:
        query, reader = request.query, self.service.reader
        request.model = query.get("model", next(iter(self.service.models)))
        served, top = self._model(request), query.get("top", "5")
        if not re.fullmatch("[0-9]{1,4}", top) or not 1 <= int(top) <= MAX_TOP:
            raise RequestError(f"'top' is {top[:20]!r}; it must be a number from 1 to {MAX_TOP}.")
        compare = query.get("compare", "0") not in {"0", "false", ""}
        with contextlib.ExitStack() as stack:
            image = await reader.read(request, stack)
            served.queue.acquire(stack, 1)
            if not image:
                raise RequestError("The request has no image: send an image file as its body.")
            return await self.service.classify(served, image, int(top), compare=compare)

    def _model(self, request: Request) -> ServedModel:
        served = self.service.models.get(request.model)
        if served is None or request.version != "1":
            names = ", ".join(self.service.models)
            text = f"There is no model {request.model[:99]!r} version {request.version[:20]!r}"
            raise RequestError(f"{text}; this server has {names}, version 1.", status=404)
        return served


def _json(document: Any, status: int = 200) -> Response:
    """Return a JSON response, in ASCII with escapes, so that any text can be encoded."""
    headers = {"content-type": "application/json", **ERROR_HEADERS.get(status, {})}
    return Response(json.dumps(document).encode(), headers, status)


def _page(name: str, kind: str) -> Callable[[Request], Response]:
    content = (resources.files("van_deploy.serve") / name).read_bytes()
    return lambda _: Response(content, {"content-type": kind, **PAGE_HEADERS})


def _metadata(served: ServedModel) -> dict[str, Any]:
    """Return the protocol's metadata of a model."""
    inputs, outputs = (
        [{"name": t.name, "datatype": DATATYPES[t.dtype], "shape": [-1, *t.shape]} for t in tensors]
        for tensors in ((served.network.input,), served.network.outputs)
    )
    document = {"name": served.name, "versions": ["1"], "inputs": inputs, "outputs": outputs}
    return {**document, "platform": PLATFORMS[served.config["backend"]]}


def _log(event: str, **fields: object) -> None:
    """Write one line of JSON to standard error, if its reader has not ended."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with contextlib.suppress(OSError):
        sys.stderr.write(json.dumps({"time": stamp, "event": event, **fields}) + "\n")


def listen(host: str = "127.0.0.1", port: int = 8000) -> tuple[socket.socket, str]:
    """Return a listening socket and its URL; port 0 selects a free port.

    Raises:
        UsageError: the address is in use, forbidden or not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or "").partition(" (while")[0]
        raise UsageError(
            f"Cannot listen on {host} port {port}: {reason}.",
            "Check --host, or choose another --port; 0 selects a free one.",
        ) from error
    host, port = bound.getsockname()[:2]
    return bound, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: App, bound: socket.socket, on_ready: Callable[[Any], None]) -> int:
    """Serve until SIGINT or SIGTERM, then finish the requests in progress.

    Returns the number of requests that were not finished: after a second signal, or 30 seconds.

    Args:
        app: the application.
        bound: socket from :func:`listen`; closed at the end.
        on_ready: called when the server is ready, with a function that stops it from any thread.
    """
    import uvicorn

    settings = app.service.settings
    config = uvicorn.Config(
        app,
        http=limited_protocol(settings.read_timeout_s),
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="critical",
        server_header=False,
        timeout_keep_alive=75,  # seconds: longer than most clients' pools
        timeout_graceful_shutdown=30,
    )
    limit_malloc_retention()
    server, service = uvicorn.Server(config), app.service
    app.connections = server.server_state.connections
    # Signals are handled below, so that the process exits with code 0.
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]

    async def serve_http() -> int:
        await server.serve(sockets=[bound])
        unfinished = tuple(server.server_state.tasks)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        return len(unfinished)

    async def serve() -> int:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(THREADS, "van-deploy-decode"))

        def stop() -> None:
            server.force_exit = server.should_exit  # at the second signal
            service.reader.draining = server.should_exit = True

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop)
        running = asyncio.create_task(serve_http())
        batching = asyncio.create_task(service.run(running))
        while not (server.started or running.done()):
            await asyncio.sleep(0.01)
        on_ready(lambda: loop.call_soon_threadsafe(stop))
        await batching
        return running.result()

    loop = (config.get_loop_factory() or asyncio.new_event_loop)()
    with bound, contextlib.closing(loop):
        return loop.run_until_complete(serve())


def limit_malloc_retention() -> bool:
    """Make malloc return freed blocks of at least 128 KiB to the system; return whether it can.

    glibc raises that threshold to the size of freed blocks, up to 32 MiB; bodies and images then
    stay in its heaps. ``python -m benchmarks --only serve`` measures the memory under the most
    expensive requests. Other C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(-3, 128 * 1024))  # M_MMAP_THRESHOLD of malloc.h
