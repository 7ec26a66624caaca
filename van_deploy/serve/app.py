"""The server's addresses: the v2 protocol, the web page, pictures, health, metrics."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

from van_deploy import __version__
from van_deploy.errors import ImageError, UsageError, VanDeployError
from van_deploy.serve.batcher import QueueFull, ShuttingDown
from van_deploy.serve.body import SlowClientError, TooLargeError, file_of_form, read_body
from van_deploy.serve.metrics import serving_package
from van_deploy.serve.protocol import (
    RequestError,
    encode_response,
    parse_request,
    tensor_metadata,
)
from van_deploy.serve.service import Served, Service

__all__ = ["EXTENSIONS", "server_app"]

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "statistics")
STATUS_OF = (
    (RequestError, 400),
    (TooLargeError, 413),
    (SlowClientError, 408),
    (ImageError, 422),
    (UsageError, 400),
)
RETRY_AFTER_S = "1"
MAX_TOP = 1000

Handler = Callable[[Any], Awaitable[Any]]


class _UnknownModelError(VanDeployError):
    """There is no model of that name or version; HTTP status 404."""


def server_app(service: Service) -> Any:
    """Return the ASGI application that answers for ``service``, which is loaded.

    Raises:
        MissingDependency: the server's packages are not installed.
    """
    applications = serving_package("starlette.applications")
    route = serving_package("starlette.routing").Route
    handlers = _Handlers(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    model = "/v2/models/{model}"
    version = model + "/versions/{version}"
    routes = [  # looked through in this order, so the busy ones come first
        route(f"{model}/infer", handlers.infer, methods=["POST"]),
        route(f"{version}/infer", handlers.infer, methods=["POST"]),
        route("/", handlers.page),
        route("/predict", handlers.predict, methods=["POST"]),
        route("/models", handlers.models),
        route("/metrics", handlers.metrics),
        route("/v2", handlers.server_metadata),
        route("/v2/health/live", handlers.live),
        route("/v2/health/ready", handlers.ready),
        route("/v2/repository/index", handlers.index, methods=["POST"]),
        route("/v2/models/stats", handlers.all_statistics),
    ]
    for path in (model, version):
        routes += [
            route(path, handlers.model_metadata),
            route(f"{path}/ready", handlers.model_ready),
            route(f"{path}/config", handlers.model_config),
            route(f"{path}/stats", handlers.statistics),
        ]
    errors = {404: handlers.not_found, 405: handlers.not_allowed, 500: handlers.fault}
    return applications.Starlette(routes=routes, lifespan=lifespan, exception_handlers=errors)


class _Handlers:
    """One method an address."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._responses = serving_package("starlette.responses")
        page = (resources.files("van_deploy.serve") / "page.html").read_text(encoding="utf-8")
        self._page = page.encode()
        self._page_headers = _page_headers(page)

    # --- what is there -----------------------------------------------------------------------

    async def page(self, _: Any) -> Any:
        return self._responses.Response(
            self._page, media_type="text/html", headers=self._page_headers
        )

    async def models(self, _: Any) -> Any:
        """Return what the page shows of the bundle."""
        manifest = self.service.bundle.manifest
        return self._json(
            {
                "bundle": self.service.bundle.name,
                "preprocessing": manifest.preprocessing,
                "classes": manifest.architecture.num_classes,
                "parameters": manifest.parameters,
                "compare": self.service.settings.compare,
                "max_body_bytes": self.service.settings.max_body_bytes,
                "models": [
                    {
                        "name": served.name,
                        "artefact": served.network.name,
                        "runner": served.network.runner,
                    }
                    for served in self.service.models.values()
                ],
            }
        )

    async def server_metadata(self, _: Any) -> Any:
        return self._json(
            {"name": "van-deploy", "version": __version__, "extensions": list(EXTENSIONS)}
        )

    async def live(self, _: Any) -> Any:
        return self._responses.Response(status_code=200)

    async def ready(self, _: Any) -> Any:
        usable = self.service.ready and not self.service.draining
        return self._responses.Response(status_code=200 if usable else 503)

    async def metrics(self, _: Any) -> Any:
        text, kind = self.service.metrics.text()
        return self._responses.Response(text, headers={"content-type": kind})

    async def index(self, _: Any) -> Any:
        return self._json(
            [{"name": name, "version": "1", "state": "READY"} for name in self.service.models]
        )

    async def model_metadata(self, request: Any) -> Any:
        return await self._of_model(request, _metadata)

    async def model_ready(self, request: Any) -> Any:
        return await self._of_model(request, lambda _: None)

    async def model_config(self, request: Any) -> Any:
        return await self._of_model(request, lambda served: served.config())

    async def statistics(self, request: Any) -> Any:
        return await self._of_model(request, lambda served: {"model_stats": [_statistics(served)]})

    async def all_statistics(self, _: Any) -> Any:
        every = [_statistics(served) for served in self.service.models.values()]
        return self._json({"model_stats": every})

    async def _of_model(self, request: Any, describe: Callable[[Served], Any]) -> Any:
        try:
            described = describe(self._served(request))
        except _UnknownModelError as error:
            return self._error(404, str(error))
        return (
            self._responses.Response(status_code=200)
            if described is None
            else self._json(described)
        )

    # --- answers -----------------------------------------------------------------------------

    async def infer(self, request: Any) -> Any:
        return await self._answered("infer", request, self._infer)

    async def predict(self, request: Any) -> Any:
        return await self._answered("predict", request, self._predict)

    async def _infer(self, request: Any) -> Any:
        served = self._served(request)
        body = await self._body(request)
        network = served.network
        parsed = parse_request(
            body, _json_length(request), network.input, network.outputs, network.max_batch
        )
        answer = await self.service.infer(served, parsed.batch)
        content, json_length = encode_response(parsed, answer.outputs, served.name, served.labels)
        if json_length is None:
            return self._responses.Response(content, media_type="application/json")
        headers = {
            "content-type": "application/octet-stream",
            "inference-header-content-length": str(json_length),
        }
        return self._responses.Response(content, headers=headers)

    async def _predict(self, request: Any) -> Any:
        query = request.query_params
        served = self._served(request, query.get("model"))
        top = query.get("top", "5")
        if not top.isdecimal() or not 1 <= int(top[:9]) <= MAX_TOP:
            raise RequestError(f"'top' is {top!r}; it must be a number from 1 to {MAX_TOP}.")
        picture = await self._body(request)
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            picture = await file_of_form(picture, request.headers)
        if not picture:
            raise RequestError("The request has no picture: send an image file as its body.")
        compare = query.get("compare", "0") not in {"0", "false", ""}
        document = await self.service.look(served, picture, int(top), compare=compare)
        return self._json(document)

    async def _body(self, request: Any) -> bytes:
        settings = self.service.settings
        return await read_body(request, settings.max_body_bytes, settings.read_timeout_s)

    def _served(self, request: Any, name: str | None = None) -> Served:
        models = self.service.models
        wanted = request.path_params.get("model") or name or next(iter(models))
        if wanted not in models or request.path_params.get("version", "1") != "1":
            version = request.path_params.get("version")
            raise _UnknownModelError(
                f"There is no model '{wanted}'{f' version {version}' if version else ''}; "
                f"this server has {', '.join(models)}, version 1."
            )
        return models[wanted]

    async def _answered(self, route: str, request: Any, handler: Handler) -> Any:
        """Return the handler's response, or the status its failure means; count it."""
        start = time.perf_counter()
        try:
            response = await handler(request)
        except _UnknownModelError as error:
            response = self._error(404, str(error))
        except QueueFull:
            text = "The queue is full: the server has more requests than it can answer."
            response = self._error(429, text, retry=True)
        except ShuttingDown:
            response = self._error(503, "The server is shutting down.", retry=True)
        except VanDeployError as error:
            status = next((code for kind, code in STATUS_OF if isinstance(error, kind)), 500)
            response = self._error(status, str(error), close=status in {408, 413})
        except serving_package("starlette.requests").ClientDisconnect:
            response = self._responses.Response(status_code=499)  # nobody reads it
        except Exception as error:  # one request's failure must not be the server's
            response = self._error(500, f"The model failed: {type(error).__name__}: {error}")
        model = request.path_params.get("model", "")
        known = model if model in self.service.models else ""  # clients cannot invent series
        self.service.metrics.answered(
            route, known, response.status_code, time.perf_counter() - start
        )
        return response

    # --- errors ------------------------------------------------------------------------------

    async def not_found(self, request: Any, _: Any) -> Any:
        return self._error(404, f"There is nothing at '{request.url.path}' on this server.")

    async def not_allowed(self, request: Any, error: Any) -> Any:
        allowed = (error.headers or {}).get("Allow", "")
        response = self._error(405, f"'{request.url.path}' does not take {request.method}.")
        response.headers["Allow"] = allowed
        return response

    async def fault(self, _: Any, error: Any) -> Any:
        return self._error(500, f"The server failed: {type(error).__name__}.")

    def _error(self, status: int, text: str, *, retry: bool = False, close: bool = False) -> Any:
        headers = {"retry-after": RETRY_AFTER_S} if retry else {}
        if close:
            headers["connection"] = "close"
        return self._json({"error": text}, status, headers)

    def _json(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
        return self._responses.JSONResponse(document, status_code=status, headers=headers)


def _json_length(request: Any) -> int | None:
    text = request.headers.get("inference-header-content-length")
    if text is None:
        return None
    if not text.isdecimal():
        raise RequestError(f"Inference-Header-Content-Length is '{text}', not a number.")
    return int(text)


def _metadata(served: Served) -> dict[str, Any]:
    network = served.network
    return {
        "name": served.name,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [tensor_metadata(network.input)],
        "outputs": [tensor_metadata(spec) for spec in network.outputs],
    }


def _statistics(served: Served) -> dict[str, Any]:
    """Return the protocol's statistics; times are in nanoseconds."""

    def duration(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": round(1e9 * seconds)}

    return {
        "name": served.name,
        "version": "1",
        "last_inference": served.last_ms,
        "inference_count": served.rows,
        "execution_count": served.batches,
        "inference_stats": {
            "success": duration(served.requests, served.queue_s + served.infer_s),
            "fail": duration(served.failures, 0.0),
            "queue": duration(served.requests, served.queue_s),
            "compute_infer": duration(served.requests, served.infer_s),
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
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
