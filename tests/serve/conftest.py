"""A bundle of the embedded network, what passes for plans, and servers in threads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.artifacts import Copy
from tests.manifest_parts import artifact_entry
from van_deploy.bundle import Bundle, Origin, edit_bundle
from van_deploy.checks.golden import golden_samples
from van_deploy.config import BatchRange, BuildOptions, ServiceSettings
from van_deploy.data.images import open_image
from van_deploy.engine.sidecar import Sidecar, Tensor, sidecar_path, write_sidecar
from van_deploy.manifest import EngineInfo
from van_deploy.metrics import softmax
from van_deploy.model.preprocess import pixels_from_image
from van_deploy.runners.network import NamedClass
from van_deploy.serve.app import App, listen, run_server
from van_deploy.serve.models import Service

PlanMaker = Callable[..., Bundle]


@pytest.fixture(scope="session")
def digits(uint8_bundle: Bundle) -> Bundle:
    """Return a bundle of ``van_digits`` with every output of the byte graph; not to be changed."""
    return uint8_bundle


@pytest.fixture
def with_plans(uint8_bundle: Bundle, copy_bundle: Copy) -> PlanMaker:
    """Return a function that gives a copy of the digits files that pass for TensorRT's plans.

    Nobody here can build a plan for Triton: that takes ``tensorrt`` and a GPU. What is tested
    reads the sidecars only.
    """
    numbers = itertools.count()

    def made(
        profiles: str = "1:2:8", *targets: str, other: dict[str, Any] | None = None, **changes: Any
    ) -> Bundle:
        bundle = Bundle.open(copy_bundle(uint8_bundle, f"with-plans-{next(numbers)}"))
        with edit_bundle(bundle.path) as draft:
            for index, target in enumerate(targets or ("sm_89",)):
                changes = {**changes, **(other or {})} if index else changes
                plan = draft.file(f"engines/plan-{target}.plan")
                plan.write_bytes(f"plan for {target}".encode())
                sidecar = _sidecar(bundle, plan, target, profiles, changes)
                write_sidecar(plan, sidecar)
                files = {f"engines/{p.name}": "" for p in (plan, sidecar_path(plan))}
                facts = EngineInfo(
                    backend=f"{sidecar.backend} {sidecar.backend_version}",
                    targets=sidecar.targets,
                    profiles=sidecar.profiles,
                    parser_layers=1,
                )
                origin = Origin(name="fp32", sha256=bundle.artifact("fp32").sha256)
                what = (sidecar.name, "engine", "fp32", next(iter(files)), files)
                draft.record(artifact_entry(*what, made_from=origin, engine=facts))
        return Bundle.open(bundle.path)

    return made


def _sidecar(
    bundle: Bundle, plan: Path, target: str, profiles: str, changes: dict[str, Any]
) -> Sidecar:
    ranges = tuple(BatchRange.model_validate(text) for text in profiles.split(","))
    graph = bundle.artifact("fp32")
    fields: dict[str, Any] = {
        **dict.fromkeys(("parse_seconds", "build_seconds", "peak_memory_bytes"), 0),
        "device_memory": {},
        "warnings": {},
        "schema": "van-deploy/engine/2",
        "name": plan.stem,
        "onnx_file": "model.onnx",
        "onnx_sha256": graph.sha256,
        "backend": "tensorrt",
        "backend_version": "10.9.0.34",
        "cuda": 12,
        "precision": "fp32",
        "targets": (target,),
        "built_on": "a GPU",
        "parser_layers": 1,
        "fixed_addresses": True,
        "plan_sha256": hashlib.sha256(plan.read_bytes()).hexdigest(),
        "plan_bytes": plan.stat().st_size,
        "options": BuildOptions(profiles=ranges, targets=(target,)),
        "inputs": (Tensor(name="images", shape=(-1, 3, 64, 64), dtype="float"),),
        "outputs": (Tensor(name="logits", shape=(-1, 10), dtype="float"),),
    }
    return Sidecar(**{**fields, **changes})


class Running(NamedTuple):
    """A server that answers, in a thread of its own; ``address`` is host and port."""

    service: Service
    address: str
    stop: Callable[[], Any]


@contextlib.contextmanager
def serving(
    bundle: Bundle, *, slow: threading.Event | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve ``bundle`` on a free port until the block ends.

    Args:
        bundle: what to serve.
        slow: where given, every batch waits for it before it runs.
        settings: of :class:`ServiceSettings`.
    """
    service = Service(bundle, ServiceSettings(**settings))
    for served in service.models.values() if slow else ():
        held = functools.partial(_after, slow, served.network.run)
        served.network.run = held  # type: ignore[method-assign]
    app, (bound, url) = App(service), listen(port=0)
    ready, ends = threading.Event(), list[Callable[[], Any]]()

    def on_ready(end: Callable[[], Any]) -> None:
        ends.append(end)
        ready.set()

    thread = threading.Thread(target=run_server, args=(app, bound, on_ready))
    thread.start()
    try:
        assert ready.wait(30)
        yield Running(service, url.removeprefix("http://"), ends[0])
    finally:
        ends[0]()
        if slow is not None:
            slow.set()
        thread.join(30)
        assert not thread.is_alive()


def _after(gate: Any, run: Callable[[Any], Any], batch: Any) -> Any:
    gate.wait(30)
    return run(batch)


@pytest.fixture(scope="session")
def server(digits: Bundle) -> Iterator[Running]:
    """Serve the bytes graph and the plain one for the whole session."""
    pytest.importorskip("uvicorn")
    with serving(digits, artifacts=("fp32-uint8", "fp32"), max_body_mib=4) as running:
        yield running


@pytest.fixture
def original(digits: Bundle) -> Path:
    """Return the bundle's first golden original."""
    return digits.path / "golden/0.png"


def top5_of(bundle: Bundle) -> list[NamedClass]:
    """Return PyTorch's first five classes of the bundle's first golden original."""
    shares = softmax(golden_samples(bundle).logits[:1])[0]
    order = np.argsort(-shares, kind="stable")[:5]
    return [NamedClass(int(i), str(i), float(shares[i])) for i in order]


def tensor_of(client: Any, values: Any, name: str = "pixels", **how: Any) -> Any:
    """Return an input for a module of ``tritonclient``: ``http`` or ``grpc``."""
    kind = {"uint8": "UINT8", "float32": "FP32"}[str(values.dtype)]
    given = client.InferInput(name, list(values.shape), kind)
    given.set_data_from_numpy(values, **how)
    return given


def pixels_of(bundle: Bundle, images: Iterable[Path | Image.Image]) -> Any:
    """Return images as the bundle's network sees them, ``(N, S, S, C)`` uint8."""
    opened = (i if isinstance(i, Image.Image) else open_image(i) for i in images)
    return np.stack([pixels_from_image(i, bundle.manifest.preprocessing) for i in opened])
