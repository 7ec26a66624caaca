"""The chain from PyTorch to the last artefact, each link measured on the logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
from van_deploy.checks.isolate import run_taps
from van_deploy.checks.parts import IMAGES_AT_ONCE, quiet_session
from van_deploy.checks.reference import Power, Reference, unit_powers
from van_deploy.graph.names import INPUT_NAME, OUTPUT_NAME
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.runners.base import Images

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Step", "artefact_step", "export_steps", "pytorch_steps"]


@dataclass(frozen=True)
class Step:
    """One link of the chain from PyTorch to the last artefact.

    Attributes:
        name: what it is.
        sqnr_db: of its logits against the original network in float64; None if skipped.
        reason: why it was skipped, or what it says.
    """

    name: str
    sqnr_db: float | None
    reason: str = ""


def pytorch_steps(reference: Reference, loaded: LoadedVan, images: Images) -> Iterator[Step]:
    """Yield PyTorch's own links: its float32, and the rewritten network in both types."""
    import torch

    powers = {"float32": Power(), "rewritten": Power(), "rewritten float32": Power()}
    single = copy.deepcopy(reference.rewritten).float()
    worst = ("", math.inf)
    with torch.inference_mode():
        for start in range(0, len(images), IMAGES_AT_ONCE):
            batch = images[start : start + IMAGES_AT_ONCE]
            tensor = torch.from_numpy(batch)
            expected = reference.original(tensor.double()).numpy()
            powers["float32"].add(expected, loaded.model(tensor).double().numpy())
            powers["rewritten"].add(expected, reference.rewritten(tensor.double()).numpy())
            powers["rewritten float32"].add(expected, single(tensor).double().numpy())
            units = unit_powers(reference, batch)
            name = min(units, key=lambda unit: units[unit].sqnr_db)
            if units[name].sqnr_db < worst[1]:
                worst = (name, units[name].sqnr_db)
    yield Step("PyTorch float32", powers["float32"].sqnr_db, "the noise of float32 itself")
    yield Step(
        "rewritten, float64",
        powers["rewritten"].sqnr_db,
        f"folded weights stored in float32; worst part {worst[0]} at {worst[1]:.1f} dB; "
        f"folding itself is exact to {reference.fold.relative_error:.0e}",
    )
    yield Step("rewritten, float32", powers["rewritten float32"].sqnr_db)


def export_steps(bundle: Bundle, reference: Reference, images: Images) -> Iterator[Step]:
    """Yield the graph before simplification, measured if simplification changed it."""
    simplify = bundle.manifest.checks.get("simplify")
    if simplify is None or not simplify["changed"]:
        reason = "not asked for" if simplify is None else simplify["reason"]
        yield Step("ONNX before simplification", None, f"the same graph as 'fp32': {reason}")
        return
    from van_deploy.graph.export import DEFAULT_OPSET, onnx_from_van

    graph = bundle.artefact("fp32").graph
    opset = graph.opset if graph else DEFAULT_OPSET
    model = onnx_from_van(reference.fold.model, images.shape[-1], images.shape[1], opset=opset)
    yield artefact_step("ONNX before simplification", model, reference, images)


def artefact_step(name: str, model: ModelProto, reference: Reference, images: Images) -> Step:
    """Return one graph's link: its logits in ONNX Runtime, or why there are none."""
    import torch

    power = Power()
    try:
        session = quiet_session(model)
        with torch.inference_mode():
            for start in range(0, len(images), IMAGES_AT_ONCE):
                batch = images[start : start + IMAGES_AT_ONCE]
                expected = reference.original(torch.from_numpy(batch).double()).numpy()
                found = dict(run_taps(session, {INPUT_NAME: batch}))
                power.add(expected, found[OUTPUT_NAME])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return Step(name, -math.inf, f"does not run at batch {IMAGES_AT_ONCE}: {reason}")
    return Step(name, power.sqnr_db)
