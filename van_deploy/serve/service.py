"""What the server does, without HTTP: models behind their queues, images to named classes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.config import ServiceSettings
from van_deploy.data import open_image
from van_deploy.data.images import FORMATS
from van_deploy.errors import VanDeployError
from van_deploy.metrics import probabilities
from van_deploy.model.pixels import Pixels, pixels_from_image
from van_deploy.runners.network import PYTORCH, Network, require_classes
from van_deploy.serve.intake import MIB, Intake
from van_deploy.serve.metrics import ServerMetrics
from van_deploy.serve.predict import named_classes
from van_deploy.serve.served import ServedModel
from van_deploy.serve.triton_model import usual_artefacts

LARGE_IMAGE = 16_000_000  # pixels; larger ones are decoded one at a time, which bounds memory


class Service:
    """The models of one bundle, ready to answer. :meth:`start` and :meth:`close` in one loop.

    Args:
        bundle: what is served.
        settings: how.

    Attributes:
        metrics: what was counted.
        models: by name, in the order asked for.
        intake: of bodies.
    """

    def __init__(self, bundle: Bundle, settings: ServiceSettings) -> None:
        self.bundle, self.settings = bundle, settings
        self.metrics, self.intake = ServerMetrics(), Intake(settings)
        self.models: dict[str, ServedModel] = {}
        self._stack = contextlib.ExitStack()
        self._large = threading.Lock()
        self._torch = ThreadPoolExecutor(1, "van-deploy-pytorch")
        self._original: Network | VanDeployError | None = None

    def load(self) -> None:
        """Open every model and run it once, so that the first client does not wait.

        Raises:
            UsageError: the settings contradict the models.
            VanDeployError: an artefact is missing, was changed or does not run here.
        """
        settings = self.settings
        require_classes(self.bundle, "serve")
        for artefact in settings.artefacts or usual_artefacts(self.bundle):
            network = Network(
                *(self.bundle, artefact),
                runner=settings.runner,
                threads=settings.threads,
                spin=False,
                trust_engine=settings.trust_engine,
                device=settings.device,
            )
            served = ServedModel(network, settings, self.metrics)
            self._stack.enter_context(network)
            for rows in {1, network.max_batch}:
                network.run(np.zeros((rows, *network.input.shape), network.input.dtype))
            self.models[served.name] = served

    def description(self) -> dict[str, Any]:
        """Return what the page shows of the bundle and of this server."""
        manifest, settings = self.bundle.manifest, self.settings
        plain = manifest.model_dump(mode="json", include={"name", "preprocessing", "parameters"})
        networks = ((name, served.network) for name, served in self.models.items())
        return {
            **plain,
            "classes": manifest.architecture.num_classes,
            "compare": settings.compare,
            "max_body_bytes": round(MIB * settings.max_body_mib),
            "models": [{"name": n, "artefact": v.name, "runner": v.runner} for n, v in networks],
        }

    def start(self) -> None:
        """Begin to answer; needs a running event loop."""
        for served in self.models.values():
            served.start()

    async def close(self) -> None:
        """Answer what waits, then release everything."""
        await asyncio.gather(*(served.close() for served in self.models.values()))
        self.intake.close()
        self._torch.shutdown()
        self._stack.close()

    async def look(
        self, served: ServedModel, content: bytes, top: int, *, compare: bool
    ) -> dict[str, Any]:
        """Return what is in an image file's bytes, as the page shows it.

        Raises:
            ImageError: it is no image, or too large.
            UsageError: more classes are asked for than the artefact gives.
        """
        start, network = time.perf_counter(), served.network
        pixels, (width, height) = await asyncio.to_thread(self._pixels, content, network)
        decoded = time.perf_counter()
        answer = await served.infer(network.prepare(pixels))
        ranked = network.top(answer.outputs, top)
        classes = [vars(c) for c in named_classes(ranked, 0, served.labels)]
        document: dict[str, Any] = {"model": served.name, "artefact": network.name, "top": classes}
        document |= {"image": {"width": width, "height": height}, "batch": answer.batch}
        if compare and self.settings.compare:
            ask = asyncio.get_running_loop().run_in_executor
            document["pytorch"] = await ask(self._torch, self._ask_pytorch, pixels, classes)
        times = {"decode": decoded - start, "queue": answer.queue_s, "infer": answer.infer_s}
        times["total"] = time.perf_counter() - start
        return {**document, "milliseconds": {name: _ms(s) for name, s in times.items()}}

    def _pixels(self, content: bytes, network: Network) -> tuple[Pixels, tuple[int, int]]:
        from PIL import Image

        large = False
        # What is no image is told by open_image.
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as it:
            large = it.width * it.height > LARGE_IMAGE
        with self._large if large else contextlib.nullcontext():
            limit, channels = self.settings.max_pixels, network.preprocessing.channels
            image = open_image(content, channels=channels, max_pixels=limit)
            return pixels_from_image(image, network.preprocessing)[None], image.size

    def _ask_pytorch(self, pixels: Pixels, answer: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the original network's answer; it is loaded when it is first asked."""
        if self._original is None:
            try:
                self._original = self._stack.enter_context(Network(self.bundle, PYTORCH))
                self._original.run(self._original.prepare(pixels))  # the first run is slow
            except VanDeployError as error:
                self._original = error
        if isinstance(self._original, VanDeployError):
            return {"skipped": self._original.message}
        start = time.perf_counter()
        outputs = self._original.run(self._original.prepare(pixels))
        seconds = time.perf_counter() - start
        shares = probabilities(outputs["logits"], self._original.task)[0].tolist()
        beside = [shares[c["index"]] for c in answer]
        differences = [abs(c["probability"] - p) for c, p in zip(answer, beside, strict=True)]
        times = {"infer": _ms(seconds)}
        return {"milliseconds": times, "beside": beside, "largest_difference": max(differences)}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
