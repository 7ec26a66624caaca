"""A bundle of the embedded network, stand-ins for plans, and servers in threads."""

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
    """Return a bundle of ``van_digits`` with all outputs in its uint8 graph; do not change it."""
    return uint8_bundle


@pytest.fixture
def with_plans(uint8_bundle: Bundle, copy_bundle: Copy) -> PlanMaker:
    """Return a function that adds stand-ins for TensorRT plans to a copy of the digits bundle.

    Building a plan for Triton needs ``tensorrt`` and a GPU; the tested code reads only sidecars.
    """
    numbers = itertools.count()

    def add_plans(
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

    return add_plans


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
    """A running server in its own thread; ``address`` is host and port."""

    service: Service
    address: str
    stop: Callable[[], Any]


@contextlib.contextmanager
def serving(
    bundle: Bundle, *, slow: threading.Event | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve ``bundle`` on a free port until the block ends.

    Args:
        bundle: the bundle to serve.
        slow: an event that every batch waits for before it runs.
        settings: fields of :class:`ServiceSettings`.
    """
    service = Service(bundle, ServiceSettings(**settings))
    for served in service.models.values() if slow else ():
        delayed = functools.partial(_run_after, slow, served.network.run)
        served.network.run = delayed  # type: ignore[method-assign]
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


def _run_after(gate: Any, run: Callable[[Any], Any], batch: Any) -> Any:
    gate.wait(30)
    return run(batch)


@pytest.fixture(scope="session")
def server(digits: Bundle) -> Iterator[Running]:
    """Serve the uint8 graph and the plain graph for the whole session."""
    pytest.importorskip("uvicorn")
    with serving(digits, artifacts=("fp32-uint8", "fp32"), max_body_mib=4) as running:
        yield running


@pytest.fixture
def golden_image(digits: Bundle) -> Path:
    """Return the bundle's first golden image."""
    return digits.path / "golden/0.png"


def top5_of(bundle: Bundle) -> list[NamedClass]:
    """Return PyTorch's top five classes of the bundle's first golden image."""
    shares = softmax(golden_samples(bundle).logits[:1])[0]
    order = np.argsort(-shares, kind="stable")[:5]
    return [NamedClass(int(i), str(i), float(shares[i])) for i in order]


def tensor_of(client: Any, values: Any, name: str = "pixels", **options: Any) -> Any:
    """Return an input for a module of ``tritonclient``: ``http`` or ``grpc``."""
    kind = {"uint8": "UINT8", "float32": "FP32"}[str(values.dtype)]
    tensor = client.InferInput(name, list(values.shape), kind)
    tensor.set_data_from_numpy(values, **options)
    return tensor


def pixels_of(bundle: Bundle, images: Iterable[Path | Image.Image]) -> Any:
    """Return images preprocessed for the bundle's network, ``(N, S, S, C)`` uint8."""
    opened = (i if isinstance(i, Image.Image) else open_image(i) for i in images)
    return np.stack([pixels_from_image(i, bundle.manifest.preprocessing) for i in opened])
