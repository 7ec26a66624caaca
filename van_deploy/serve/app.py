"""The server's addresses, as an ASGI application: v2 protocol, page, images, health, metrics."""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
import traceback
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from van_deploy import __version__
from van_deploy.errors import ImageError, UsageError
from van_deploy.serve.body import ClientGoneError, Receive, file_of_form, read_body
from van_deploy.serve.protocol import InferRequest, Values, encode_response, parse_request
from van_deploy.serve.refusal import Refusal
from van_deploy.serve.service import Served, Service

__all__ = ["App", "log"]

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "statistics"]
MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/infer|/ready|/config|/stats)?")
OPEN = {"/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready"}  # without the key
MAX_TOP = 1000
SMALL_JSON = 16 * 2**10  # bytes parsed in the event loop: less than a millisecond
MANY_BYTES = 2**20  # of a tensor, checked in a thread
MANY_NUMBERS = 4096  # of an answer, written as JSON in another process
FAULT = "The server failed; its log says why."
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; "
    "script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Send = Callable[[Mapping[str, Any]], Awaitable[None]]


@dataclass
class Request:
    """One request, as far as its head says.

    Attributes:
        method: HEAD counts as GET; its answer's body is not sent.
        path: decoded.
        query: last value of each parameter.
        headers: by their names in lower case.
        receive: ASGI's, for the body.
        route: of the path, for the metrics; "" until one is found.
        model: in the path or the query; likewise.
        version: of the model, in the path.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    receive: Receive
    route: str = ""
    model: str = ""
    version: str = "1"


@dataclass
class Response:
    """One answer."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Any, status: int = 200, **headers: str) -> Response:
        """Return JSON; every character beyond ASCII is escaped, so any text can be sent."""
        headers = {"content-type": "application/json", **headers}
        return cls(json.dumps(document).encode(), status, headers)


class App:
    """Answers for ``service``, which is loaded and started."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._routes = {
            "/v2/models/{}/infer": ("POST", self._infer),
            "/predict": ("POST", self._predict),
            "/v2/health/live": ("GET", self._live),
            "/v2/health/ready": ("GET", self._ready),
            "/": ("GET", self._page("page.html", "text/html; charset=utf-8")),
            "/page.css": ("GET", self._page("page.css", "text/css")),
            "/page.js": ("GET", self._page("page.js", "text/javascript")),
            "/models": ("GET", self._models),
            "/metrics": ("GET", self._metrics),
            "/v2": ("GET", self._server),
            "/v2/repository/index": ("POST", self._index),
            "/v2/models/stats": ("GET", self._statistics),
            "/v2/models/{}": ("GET", self._metadata),
            "/v2/models/{}/config": ("GET", self._config),
            "/v2/models/{}/ready": ("GET", self._live),
            "/v2/models/{}/stats": ("GET", self._statistics),
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; whatever happens, with a status."""
        start = time.perf_counter()
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        query = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), True)
        heads = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request = Request(method, scope["path"], dict(query), heads, receive)
        try:
            response = await self._answered(request)
        except (Refusal, ImageError, UsageError) as refusal:
            response = _refused(refusal)
        except ClientGoneError:
            response = Response(status=499)  # nobody reads it
        except Exception:  # one request's failure must not be the server's
            response = Response.of({"error": FAULT}, 500)
            log("fault", path=request.path, model=request.model, traceback=traceback.format_exc())
        seconds = time.perf_counter() - start
        model = request.model if request.model in self.service.models else ""
        self.service.metrics.answered(request.route, model, response.status, seconds)
        if self.service.settings.log_requests:
            what = {"method": scope["method"], "path": request.path, "model": model}
            log("request", **what, status=response.status, ms=round(1e3 * seconds, 3))
        headers = {"content-length": str(len(response.body)), **response.headers}
        pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": response.status, "headers": pairs})
        await send({"type": "http.response.body", "body": response.body})

    async def _answered(self, request: Request) -> Response:
        """Return the answer of the path's handler."""
        key = self.service.settings.api_key
        given = request.headers.get("authorization", "").encode()
        if key and request.path not in OPEN:
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                raise Refusal("This server wants its key: 'Authorization: Bearer KEY'.", status=401)
        path, match = request.path, MODEL.fullmatch(request.path)
        if match and path not in self._routes:
            request.model, request.version = match[1], match[2] or "1"
            path = f"/v2/models/{{}}{match[3] or ''}"
        if path not in self._routes:
            raise Refusal(f"There is nothing at {request.path[:200]!r} on this server.", status=404)
        method, handler = self._routes[path]
        if method != request.method:
            text = f"{request.path[:200]!r} does not take {request.method}."
            return Response.of({"error": text}, 405, allow=method)
        request.route = path
        return await handler(request)

    # --- answers -----------------------------------------------------------------------------

    async def _infer(self, request: Request) -> Response:
        served, workers = self._served(request), self.service.workers
        with self.service.held.hold() as take_bytes, served.queue.hold() as take_images:
            body = await self._body(request, take_bytes)
            take_images(1)
            rows, parsed = await self._parsed(request, body, served)
            take_images(len(rows) - 1)
            answer = await self.service.infer(served, rows)
            arguments = (parsed, answer.outputs, served.name, served.labels)
            if sum(answer.outputs[wanted.name].size for wanted in parsed.outputs) > MANY_NUMBERS:
                content, length = await workers.in_process(encode_response, *arguments)
            else:
                content, length = encode_response(*arguments)
        if length is None:
            return Response(content, headers={"content-type": "application/json"})
        headers = {"inference-header-content-length": str(length)}
        return Response(content, headers={"content-type": "application/octet-stream", **headers})

    async def _parsed(
        self, request: Request, body: bytes | bytearray, served: Served
    ) -> tuple[Values, InferRequest]:
        """Return what a body holds; large JSON is parsed in another process."""
        text = request.headers.get("inference-header-content-length")
        if text is not None and not re.fullmatch("[0-9]{1,18}", text):
            raise Refusal(f"Inference-Header-Content-Length is {text[:20]!r}, not a number.")
        size = len(body) if text is None else min(int(text), len(body))
        limit = self.service.settings.max_json_bytes if text is None else SMALL_JSON
        if size > limit:
            raise Refusal(
                f"The JSON has {size:,} bytes; this server takes {limit:,} of it here.",
                "Send tensors as bytes (the binary tensor extension), or start the server with a "
                "higher --max-json-mib.",
                status=413,
            )
        network, workers = served.network, self.service.workers
        length = None if text is None else int(text)
        arguments = (body, length, network.input, network.outputs, network.max_batch)
        if size > SMALL_JSON:
            return await workers.in_process(parse_request, *arguments)
        if len(body) > MANY_BYTES:
            return await workers.in_thread(parse_request, *arguments)
        return parse_request(*arguments)

    async def _predict(self, request: Request) -> Response:
        query = request.query
        request.model = query.get("model", next(iter(self.service.models)))
        served, top = self._served(request), query.get("top", "5")
        if not re.fullmatch("[0-9]{1,4}", top) or not 1 <= int(top) <= MAX_TOP:
            raise Refusal(f"'top' is {top[:20]!r}; it must be a number from 1 to {MAX_TOP}.")
        compare = query.get("compare", "0") not in {"0", "false", ""}
        with self.service.held.hold() as take_bytes, served.queue.hold() as take_images:
            image = bytes(await self._body(request, take_bytes))
            take_images(1)
            kind = request.headers.get("content-type", "")
            if kind.lower().startswith("multipart/form-data"):
                image = file_of_form(image, kind)
            if not image:
                raise Refusal("The request has no image: send an image file as its body.")
            return Response.of(await self.service.look(served, image, int(top), compare=compare))

    async def _body(self, request: Request, take: Callable[[int], None]) -> bytes | bytearray:
        settings = self.service.settings
        if self.service.draining:
            raise Refusal("The server is shutting down.", status=503)
        limits = (settings.max_body_bytes, settings.read_timeout_s)
        given = (request.receive, request.headers, *limits, take, self.service.workers)
        return await read_body(*given)

    def _served(self, request: Request) -> Served:
        served = self.service.models.get(request.model)
        if served is None or request.version != "1":
            names = ", ".join(self.service.models)
            text = f"There is no model {request.model[:99]!r} version {request.version[:20]!r}"
            raise Refusal(f"{text}; this server has {names}, version 1.", status=404)
        return served

    # --- what is there -----------------------------------------------------------------------

    def _page(self, name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
        content = (resources.files("van_deploy.serve") / name).read_bytes()

        async def shown(_: Request) -> Response:
            return Response(content, headers={"content-type": kind, **PAGE_HEADERS})

        return shown

    async def _live(self, request: Request) -> Response:
        if request.model:
            self._served(request)
        return Response()

    async def _ready(self, _: Request) -> Response:
        return Response(status=503 if self.service.draining else 200)

    async def _models(self, _: Request) -> Response:
        """Return what the page shows of the bundle."""
        manifest, settings = self.service.bundle.manifest, self.service.settings
        plain = manifest.model_dump(mode="json", include={"preprocessing", "parameters"})
        plain |= {"bundle": manifest.name, "classes": manifest.architecture.num_classes}
        plain |= {"compare": settings.compare, "max_body_bytes": settings.max_body_bytes}
        plain["models"] = [
            {"name": name, "artefact": served.network.name, "runner": served.network.runner}
            for name, served in self.service.models.items()
        ]
        return Response.of(plain)

    async def _metrics(self, _: Request) -> Response:
        text, kind = self.service.metrics.text()
        return Response(text, headers={"content-type": kind})

    async def _server(self, _: Request) -> Response:
        names = {"name": "van-deploy", "version": __version__}
        return Response.of({**names, "extensions": EXTENSIONS})

    async def _index(self, _: Request) -> Response:
        names = self.service.models
        return Response.of([{"name": n, "version": "1", "state": "READY"} for n in names])

    async def _config(self, request: Request) -> Response:
        return Response.of(self._served(request).config)

    async def _metadata(self, request: Request) -> Response:
        config = self._served(request).config
        platforms = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
        document = {"name": config["name"], "versions": ["1"]}
        document["platform"] = platforms[config["backend"]]
        for side in ("input", "output"):
            document[f"{side}s"] = [_metadata_of(tensor) for tensor in config[side]]
        return Response.of(document)

    async def _statistics(self, request: Request) -> Response:
        """Return the protocol's statistics; times are in nanoseconds."""
        models = [self._served(request)] if request.model else self.service.models.values()
        return Response.of({"model_stats": [_counts(served) for served in models]})


def log(event: str, **fields: object) -> None:
    """Write one JSON object on one line of standard error."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"time": stamp, "event": event, **fields}), file=sys.stderr, flush=True)


def _refused(refusal: Refusal | ImageError | UsageError) -> Response:
    """Return what a client is told that is not answered."""
    status = 422 if isinstance(refusal, ImageError) else getattr(refusal, "status", 400)
    headers = {"retry-after": "1"} if status in {429, 503} else {}
    if status in {408, 503}:
        headers["connection"] = "close"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response.of({"error": str(refusal)}, status, **headers)


def _metadata_of(tensor: Mapping[str, Any]) -> dict[str, Any]:
    datatype = tensor["data_type"].removeprefix("TYPE_")
    return {"name": tensor["name"], "datatype": datatype, "shape": [-1, *tensor["dims"]]}


def _counts(served: Served) -> dict[str, Any]:
    counts, names = served.counts, {"name": served.name, "version": "1"}
    done = counts["requests"]
    durations = {
        "success": (done, counts["queue_ns"] + counts["infer_ns"]),
        "fail": (counts["failures"], 0),
        "queue": (done, counts["queue_ns"]),
        "compute_infer": (done, counts["infer_ns"]),
    }
    inference = {name: {"count": n, "ns": ns} for name, (n, ns) in durations.items()}
    totals = {"inference_count": counts["rows"], "execution_count": counts["batches"]}
    return {**names, "last_inference": counts["last_ms"], **totals, "inference_stats": inference}
