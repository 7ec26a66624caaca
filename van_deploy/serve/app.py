"""The server: its addresses as an ASGI application, and uvicorn on a listening socket."""

from __future__ import annotations

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
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, NamedTuple

from van_deploy import __version__
from van_deploy.errors import ImageError, UsageError
from van_deploy.serve.models import ServedModel, Service
from van_deploy.serve.requests import (
    MIB,
    Request,
    RequestError,
    Where,
    encode_response,
    limited_protocol,
    parse_request,
)

MODEL_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/infer|/ready|/config)?")
MODEL = "/v2/models/MODEL"
POSTED = {f"{MODEL}/infer", "/predict", "/v2/repository/index"}  # the others are read with GET
EXTENSIONS = ["binary_tensor_data", "model_configuration"]
READY = {"version": "1", "state": "READY"}
SERVER = {"name": "van-deploy", "version": __version__, "extensions": EXTENSIONS}
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "pytorch": "pytorch"}
KEYLESS = {"/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready"}
MAX_TOP = 1000
SMALL_JSON = 16 * 2**10  # bytes parsed in the event loop: less than a millisecond
MANY_NUMBERS = 4096  # of an answer, written as JSON in another process
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; "
    "script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
REFUSED_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
}
THREADS = 2  # that decode and check arrays


class Response(NamedTuple):
    """One answer."""

    body: bytes = b""
    headers: Mapping[str, str] = {}
    status: int = 200


class App:
    """Answers for ``service``.

    Attributes:
        service: likewise.
        requires_key: whether clients must send a key.

    Raises:
        UsageError: the key cannot be had.
    """

    def __init__(self, service: Service) -> None:
        self.service, key = service, service.settings.api_key()
        self.requires_key, self._authorization = bool(key), f"Bearer {key}".encode()
        models, metrics = service.models, service.metrics
        self._routes: dict[str, Callable[[Request], Any]] = {
            f"{MODEL}/infer": self._infer,
            "/predict": self._predict,
            "/v2/repository/index": lambda _: [{"name": name, **READY} for name in models],
            "/v2/health/live": lambda _: Response(),
            "/v2/health/ready": lambda _: Response(status=503 if service.intake.draining else 200),
            "/": _page("page.html", "text/html; charset=utf-8"),
            "/page.css": _page("page.css", "text/css"),
            "/page.js": _page("page.js", "text/javascript"),
            "/models": lambda _: service.description(),
            "/metrics": lambda _: Response(metrics.text(), metrics.kind),
            "/v2": lambda _: SERVER,
            MODEL: lambda request: _metadata(self._served(request).config),
            f"{MODEL}/config": lambda request: self._served(request).config,
            f"{MODEL}/ready": lambda request: self._served(request) and Response(),
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one request; whatever happens, with a status."""
        start, metrics = time.perf_counter(), self.service.metrics
        query = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), True)
        heads = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        request = Request(method, scope["path"], dict(query), heads, receive)
        try:
            answer = self._handler(request)(request)
            answer = await answer if isinstance(answer, Awaitable) else answer
            response = answer if isinstance(answer, Response) else _json(answer)
        except (RequestError, ImageError, UsageError) as error:
            status = 422 if isinstance(error, ImageError) else getattr(error, "status", 400)
            response = _json({"error": str(error)}, status)
            traceback.clear_frames(error.__traceback__)  # so that the body is freed now
        except Exception:  # one request's failure must not be the server's
            response = _json({"error": "The server failed; its log says why."}, 500)
            _log("fault", path=request.path, traceback=traceback.format_exc())
        seconds, status = time.perf_counter() - start, response.status
        model = request.model if request.model in self.service.models else ""
        metrics.of("requests", request.route, model, status).inc()
        metrics.of("request_seconds", request.route, model).observe(seconds)
        if self.service.settings.log_requests:
            what = {"method": scope["method"], "path": request.path, "model": model}
            _log("request", **what, status=status, ms=round(1e3 * seconds, 3))
        headers = {"content-length": str(len(response.body)), **response.headers}
        pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": response.body})

    def _handler(self, request: Request) -> Callable[[Request], Any]:
        """Return what answers a request; it may do so at once, or in its own time."""
        path, given = request.path, request.headers.get("authorization", "").encode()
        allowed = not self.requires_key or hmac.compare_digest(given, self._authorization)
        if path not in KEYLESS and not allowed:
            raise RequestError("Send the key: 'Authorization: Bearer KEY'.", status=401)
        match = MODEL_PATH.fullmatch(path)
        if match:
            request.model, request.version = match[1], match[2] or "1"
            path = f"{MODEL}{match[3] or ''}"
        if path not in self._routes:
            raise RequestError(f"There is nothing at {request.path[:200]!r}.", status=404)
        method = "POST" if path in POSTED else "GET"
        if method != request.method:
            text = f"{request.path[:200]!r} takes {method}, not {request.method}."
            raise RequestError(text, status=405)
        request.route = path
        return self._routes[path]

    async def _infer(self, request: Request) -> Response:
        served, intake = self._served(request), self.service.intake
        text = request.headers.get("inference-header-content-length")
        if text is not None and not re.fullmatch("[0-9]{1,18}", text):
            raise RequestError(f"Inference-Header-Content-Length is {text[:20]!r}, not a number.")
        if text is not None and int(text) > SMALL_JSON:
            raise RequestError(f"Over {SMALL_JSON:,} bytes of JSON before tensors.", status=413)
        with contextlib.ExitStack() as held:
            body = await intake.body(request, held, is_json=text is None)
            served.queue.take(held, 1)
            network, size = served.network, len(body) if text is None else int(text)
            given = (body, size, network.input, network.outputs, network.max_batch)
            where: Where = "thread" if len(body) > MIB else "here"
            where = "process" if size > SMALL_JSON else where
            rows, parsed = await intake.run(where, parse_request, *given)
            served.queue.take(held, len(rows) - 1)
            outputs, *_ = await served.infer(rows)
            numbers = sum(outputs[w.name].size for w in parsed.outputs if not parsed.in_bytes(w))
            where = "process" if numbers > MANY_NUMBERS else "here"
            answer = (parsed, outputs, served.name)
            content, json_size = await intake.run(where, encode_response, *answer)
        if json_size is None:
            return Response(content, {"content-type": "application/json"})
        kind = {"content-type": "application/octet-stream"}
        return Response(content, {**kind, "inference-header-content-length": str(json_size)})

    async def _predict(self, request: Request) -> dict[str, Any]:
        query, intake = request.query, self.service.intake
        request.model = query.get("model", next(iter(self.service.models)))
        served, top = self._served(request), query.get("top", "5")
        if not re.fullmatch("[0-9]{1,4}", top) or not 1 <= int(top) <= MAX_TOP:
            raise RequestError(f"'top' is {top[:20]!r}; it must be a number from 1 to {MAX_TOP}.")
        compare = query.get("compare", "0") not in {"0", "false", ""}
        with contextlib.ExitStack() as held:
            image = await intake.body(request, held)
            served.queue.take(held, 1)
            if not image:
                raise RequestError("The request has no image: send an image file as its body.")
            return await self.service.look(served, image, int(top), compare=compare)

    def _served(self, request: Request) -> ServedModel:
        served = self.service.models.get(request.model)
        if served is None or request.version != "1":
            names = ", ".join(self.service.models)
            text = f"There is no model {request.model[:99]!r} version {request.version[:20]!r}"
            raise RequestError(f"{text}; this server has {names}, version 1.", status=404)
        return served


def _json(document: Any, status: int = 200) -> Response:
    """Return JSON; every character beyond ASCII is escaped, so any text can be sent."""
    headers = {"content-type": "application/json", **REFUSED_HEADERS.get(status, {})}
    return Response(json.dumps(document).encode(), headers, status)


def _page(name: str, kind: str) -> Callable[[Request], Response]:
    content = (resources.files("van_deploy.serve") / name).read_bytes()
    return lambda _: Response(content, {"content-type": kind, **PAGE_HEADERS})


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the protocol's metadata of a model from Triton's description of it."""
    tensors = {
        f"{side}s": [
            {
                "name": t["name"],
                "datatype": t["data_type"][len("TYPE_") :],
                "shape": [-1, *t["dims"]],
            }
            for t in config[side]
        ]
        for side in ("input", "output")
    }
    platform = PLATFORMS[config["backend"]]
    return {"name": config["name"], "versions": ["1"], "platform": platform, **tensors}


def _log(event: str, **fields: object) -> None:
    """Write one JSON object on one line of standard error."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sys.stderr.write(json.dumps({"time": stamp, "event": event, **fields}) + "\n")


def listen(host: str = "127.0.0.1", port: int = 8000) -> tuple[socket.socket, str]:
    """Return a bound socket, and the URL at which it answers; port 0 takes a free one.

    Raises:
        UsageError: the address is taken, forbidden or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or "").partition(" (while")[0]
        raise UsageError(
            f"Cannot listen on {host} port {port}: {reason}.",
            "Check --host, or choose another --port; 0 takes a free one.",
        ) from error
    host, port = bound.getsockname()[:2]
    return bound, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: App, bound: socket.socket, on_ready: Callable[[Any], None]) -> None:
    """Answer until SIGINT or SIGTERM, then finish what was begun.

    Args:
        app: which answers.
        bound: from :func:`listen`; closed at the end.
        on_ready: called once requests are answered, with a function that ends the server
            from any thread.
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
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=75,  # seconds: longer than most clients' pools
        timeout_graceful_shutdown=30,
    )
    return_large_blocks()
    server, service = uvicorn.Server(config), app.service
    # Signals are taken below, and end it with code 0.
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(THREADS, "van-deploy-decode"))

        def end() -> None:
            server.force_exit = server.should_exit  # asked twice
            service.intake.draining = server.should_exit = True

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, end)
        running = asyncio.create_task(server.serve(sockets=[bound]))
        answering = asyncio.create_task(service.answer(running))
        while not (server.started or running.done()):
            await asyncio.sleep(0.01)
        on_ready(lambda: loop.call_soon_threadsafe(end))
        await answering

    loop = (config.get_loop_factory() or asyncio.new_event_loop)()
    with bound, contextlib.closing(loop):
        loop.run_until_complete(serve())


def return_large_blocks() -> bool:
    """Give blocks from 128 KiB on back to the system when they are freed; tell whether it took.

    glibc raises that threshold to the size of what is freed, up to 32 MiB; bodies and images then
    stay in its heaps: 1.2 GiB above the model under the worst bodies, and 0.8 GiB with this
    (``python -m benchmarks.serve worst``). Other C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(-3, 128 * 1024))  # M_MMAP_THRESHOLD of malloc.h
