"""The server's addresses, as an ASGI application: v2 protocol, web page, images, health, metrics."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from van_deploy import __version__
from van_deploy.errors import ImageError, UsageError
from van_deploy.serve.body import ClientGoneError, Receive, file_of_form, read_body
from van_deploy.serve.protocol import InferRequest, encode_response, parse_request
from van_deploy.serve.refusal import Refusal
from van_deploy.serve.service import Served, Service
from van_deploy.serve.workers import SMALL_JSON

__all__ = ["LOG", "App"]

LOG = logging.getLogger("van_deploy.serve")
EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "statistics"]
OPEN_TO_ALL = {"/", "/v2/health/live", "/v2/health/ready"}  # without the key: page and probes
MAX_TOP = 1000
MANY_BYTES = 2**20  # of a tensor, checked and copied in a thread
MANY_NUMBERS = 4096  # of an answer, written as JSON in another process
FAULT = "The server failed; its log says why."

Send = Callable[[Mapping[str, Any]], Awaitable[None]]


@dataclass
class Request:
    """One request, as far as it has come: its head."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    receive: Receive
    route: str = ""
    model: str = ""

    @classmethod
    def of(cls, scope: Mapping[str, Any], receive: Receive) -> Request:
        """Return the request of an ASGI scope; HEAD is answered as GET, without the body."""
        query = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), True)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        return cls(method, scope["path"], dict(query), headers, receive)


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
        page = (resources.files("van_deploy.serve") / "page.html").read_text(encoding="utf-8")
        self._page = Response(page.encode(), headers=_page_headers(page))
        get, post = "GET", "POST"
        version = r"/v2/models/(?P<model>[^/]+)(/versions/(?P<version>[^/]+))?"
        self._routes = [  # looked through in this order, so the busy ones come first
            (re.compile(pattern), route, method, handler)
            for pattern, route, method, handler in (
                (f"{version}/infer", "infer", post, self._infer),
                ("/predict", "predict", post, self._predict),
                ("/v2/health/live", "live", get, self._live),
                ("/v2/health/ready", "ready", get, self._ready),
                ("/", "page", get, self._show_page),
                ("/models", "models", get, self._models),
                ("/metrics", "metrics", get, self._metrics),
                ("/v2", "server", get, self._server),
                ("/v2/repository/index", "index", post, self._index),
                ("/v2/models/stats", "stats", get, self._statistics),
                (f"{version}/stats", "stats", get, self._statistics),
                (f"{version}/ready", "model_ready", get, self._live),
                (f"{version}/config", "config", get, self._config),
                (version, "metadata", get, self._metadata),
            )
        ]

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; whatever happens, with a status and a line in the log."""
        start = time.perf_counter()
        request = Request.of(scope, receive)
        try:
            response = await self._answered(request)
        except (Refusal, ImageError, UsageError) as refusal:
            response = _refused(refusal)
        except ClientGoneError:
            response = Response(status=499)  # nobody reads it
        except Exception:  # one request's failure must not be the server's
            response = Response.of({"error": FAULT}, 500)
            LOG.exception("fault", extra={"fields": {"route": request.route, "model": request.model}})
        seconds = time.perf_counter() - start
        self.service.metrics.answered(request.route, request.model, response.status, seconds)
        if LOG.isEnabledFor(logging.INFO):
            fields = {k: getattr(request, k) for k in ("method", "path", "route", "model")}
            fields |= {"status": response.status, "ms": round(1e3 * seconds, 3)}
            LOG.info("request", extra={"fields": fields})
        headers = {"content-length": str(len(response.body)), **response.headers}
        pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": response.status, "headers": pairs})
        await send({"type": "http.response.body", "body": response.body})

    async def _answered(self, request: Request) -> Response:
        """Return the answer of the route's handler."""
        key = self.service.settings.api_key
        if key and request.path not in OPEN_TO_ALL:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Refusal("This server wants its key: 'Authorization: Bearer KEY'.", status=401)
        allowed = []
        for pattern, route, method, handler in self._routes:
            match = pattern.fullmatch(request.path)
            if match and method == request.method:
                request.route = route
                return await handler(request, **match.groupdict())
            if match:
                allowed.append(method)
        if allowed:
            text = f"{request.path[:200]!r} does not take {request.method}."
            return Response.of({"error": text}, 405, allow=", ".join(allowed))
        raise Refusal(f"There is nothing at {request.path[:200]!r} on this server.", status=404)

    # --- answers -----------------------------------------------------------------------------

    async def _infer(self, request: Request, model: str, version: str | None) -> Response:
        served = self._served(request, model, version)
        with self.service.held.hold() as take_bytes, served.queue.hold() as take_images:
            body = await self._body(request, take_bytes)
            take_images(1)
            parsed = await self._parsed(request, body, served)
            take_images(len(parsed.batch) - 1)
            answer = await self.service.infer(served, parsed.batch)
            arguments = (parsed.id, parsed.outputs, answer.outputs, served.name, served.labels)
            numbers = sum(answer.outputs[o.name].size for o in parsed.outputs if not o.binary)
            if numbers > MANY_NUMBERS:
                content, length = await self.service.workers.in_process(encode_response, *arguments)
            else:
                content, length = encode_response(*arguments)
        headers = {"content-type": "application/json"}
        if length is not None:
            headers = {"content-type": "application/octet-stream"}
            headers["inference-header-content-length"] = str(length)
        return Response(content, headers=headers)

    async def _parsed(self, request: Request, body: bytes, served: Served) -> InferRequest:
        """Return the request in a body; large JSON in another process, large tensors in a thread."""
        workers, largest = self.service.workers, self.service.settings.max_json_bytes
        length = _json_length(request)
        size = len(body) if length is None else min(length, len(body))
        if size > (largest if length is None else SMALL_JSON):
            raise Refusal(
                f"The JSON has {size:,} bytes; this server takes "
                f"{largest:,}, and {SMALL_JSON:,} before binary tensors.",
                "Send tensors as bytes (the binary tensor extension), or start the server with a "
                "higher --max-json-mib.",
                status=413,
            )
        network = served.network
        arguments = (body, length, network.input, network.outputs, network.max_batch)
        if size > SMALL_JSON:
            return await workers.in_process(parse_request, *arguments)
        if len(body) > MANY_BYTES:
            return await workers.in_thread(parse_request, *arguments)
        return parse_request(*arguments)

    async def _predict(self, request: Request) -> Response:
        query = request.query
        served = self._served(request, query.get("model"), None)
        top = query.get("top", "5")
        if not re.fullmatch("[0-9]{1,4}", top) or not 1 <= int(top) <= MAX_TOP:
            raise Refusal(f"'top' is {top[:20]!r}; it must be a number from 1 to {MAX_TOP}.")
        compare = query.get("compare", "0") not in {"0", "false", ""}
        with self.service.held.hold() as take_bytes, served.queue.hold() as take_images:
            image = await self._body(request, take_bytes)
            take_images(1)
            kind = request.headers.get("content-type", "")
            if kind.lower().startswith("multipart/form-data"):
                image = file_of_form(image, kind)
            if not image:
                raise Refusal("The request has no image: send an image file as its body.")
            return Response.of(await self.service.look(served, image, int(top), compare=compare))

    async def _body(self, request: Request, take: Callable[[int], None]) -> bytes:
        settings, workers = self.service.settings, self.service.workers
        if self.service.draining:
            raise Refusal("The server is shutting down.", status=503)
        limits = (settings.max_body_bytes, settings.read_timeout_s)
        return await read_body(request.receive, request.headers, *limits, take, workers)

    def _served(self, request: Request, name: str | None, version: str | None) -> Served:
        models = self.service.models
        wanted = name or next(iter(models))
        if wanted not in models or version not in (None, "1"):
            text = f"There is no model {wanted[:99]!r}"
            text += f" version {version[:20]!r}" if version else ""
            raise Refusal(f"{text}; this server has {', '.join(models)}, version 1.", status=404)
        request.model = wanted
        return models[wanted]

    # --- what is there -----------------------------------------------------------------------

    async def _show_page(self, _: Request) -> Response:
        return self._page

    async def _live(self, request: Request, **names: Any) -> Response:
        if names:
            self._served(request, **names)
        return Response()

    async def _ready(self, _: Request) -> Response:
        return Response(status=503 if self.service.draining else 200)

    async def _models(self, _: Request) -> Response:
        """Return what the page shows of the bundle."""
        manifest, settings = self.service.bundle.manifest, self.service.settings
        models = [
            {"name": s.name, "artefact": s.network.name, "runner": s.network.runner}
            for s in self.service.models.values()
        ]
        return Response.of(
            {
                "bundle": self.service.bundle.name,
                "preprocessing": manifest["preprocessing"],
                "classes": manifest["architecture"]["num_classes"],
                "parameters": manifest["parameters"],
                "compare": settings.compare,
                "max_body_bytes": settings.max_body_bytes,
                "models": models,
            }
        )

    async def _metrics(self, _: Request) -> Response:
        text, kind = self.service.metrics.text()
        return Response(text, headers={"content-type": kind})

    async def _server(self, _: Request) -> Response:
        known = {"name": "van-deploy", "version": __version__, "extensions": EXTENSIONS}
        return Response.of(known)

    async def _index(self, _: Request) -> Response:
        names = self.service.models
        return Response.of([{"name": n, "version": "1", "state": "READY"} for n in names])

    async def _config(self, request: Request, model: str, version: str | None) -> Response:
        return Response.of(self._served(request, model, version).config)

    async def _metadata(self, request: Request, model: str, version: str | None) -> Response:
        config = self._served(request, model, version).config
        platforms = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
        sides = {f"{side}s": [_metadata_of(t) for t in config[side]] for side in ("input", "output")}
        names = {"name": config["name"], "versions": ["1"]}
        return Response.of({**names, "platform": platforms[config["backend"]], **sides})

    async def _statistics(self, request: Request, **names: Any) -> Response:
        """Return the protocol's statistics; times are in nanoseconds."""
        models = self.service.models.values()
        chosen = [self._served(request, **names)] if names else models
        return Response.of({"model_stats": [_counts(served) for served in chosen]})


def _refused(refusal: Refusal | ImageError | UsageError) -> Response:
    """Return what a client is told that is not answered."""
    status = refusal.status if isinstance(refusal, Refusal) else 422
    if isinstance(refusal, UsageError):
        status = 400
    headers = {"retry-after": "1"} if status in {429, 503} else {}
    if status in {408, 413, 503}:
        headers["connection"] = "close"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response.of({"error": str(refusal)}, status, **headers)


def _json_length(request: Request) -> int | None:
    text = request.headers.get("inference-header-content-length")
    if text is not None and not re.fullmatch("[0-9]{1,18}", text):
        raise Refusal(f"Inference-Header-Content-Length is {text[:20]!r}, not a number of bytes.")
    return None if text is None else int(text)


def _metadata_of(tensor: Mapping[str, Any]) -> dict[str, Any]:
    datatype = tensor["data_type"].removeprefix("TYPE_")
    return {"name": tensor["name"], "datatype": datatype, "shape": [-1, *tensor["dims"]]}


def _counts(served: Served) -> dict[str, Any]:
    counts = served.counts
    durations = {
        "success": ("requests", counts["queue_s"] + counts["infer_s"]),
        "fail": ("failures", 0.0),
        "queue": ("requests", counts["queue_s"]),
        "compute_infer": ("requests", counts["infer_s"]),
    }
    return {
        "name": served.name,
        "version": "1",
        "last_inference": counts["last_ms"],
        "inference_count": counts["rows"],
        "execution_count": counts["batches"],
        "inference_stats": {
            name: {"count": counts[key], "ns": round(1e9 * seconds)}
            for name, (key, seconds) in durations.items()
        },
    }


def _page_headers(page: str) -> dict[str, str]:
    """Return headers that let the page run its own script and talk to its own server only."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        "default-src 'none'; connect-src 'self'; img-src blob: data:; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; "
        f"script-src {hashes('script')}; style-src {hashes('style')}"
    )
    return {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
