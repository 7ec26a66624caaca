"""What each part of one graph adds to the error, fed the reference's own tensors.

Two graphs are made of an artefact's (:mod:`van_deploy.checks.isolate`): one with
every part's result as an output, one cut there. Both answer the same images, and
both are compared with the rewritten network in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Artefact
from van_deploy.checks.coordinates import Coordinates
from van_deploy.checks.isolate import FED, Cut, isolated, part_of, run_taps, with_taps
from van_deploy.checks.reference import Power, Reference
from van_deploy.graph.names import INPUT_NAME, OUTPUT_NAME
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import require_onnxruntime

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["IMAGES_AT_ONCE", "DriftRow", "drift_of_graph", "is_equalized", "quiet_session"]

IMAGES_AT_ONCE = 2  # more than one, so that a batch frozen at one shows

Array = npt.NDArray[np.float64]
Maps = Mapping[str, Coordinates]
Fed = tuple[Mapping[str, Array], dict[str, npt.NDArray[Any]]]
"""The reference's tensors by module, and what a graph may be fed by input name."""


@dataclass(frozen=True)
class DriftRow:
    """One part of one artefact.

    Attributes:
        name: PyTorch path, such as ``block3.4.attn.proj_2``, or ``stage2``.
        sqnr_db: so far; None where the artefact has no such tensor.
        added_db: what the part itself adds; None likewise.
        note: why the part does not run, if it does not.
        fault: what is wrong inside it beside the error: an INT8 step, an FP16 overflow.
    """

    name: str
    sqnr_db: float | None
    added_db: float | None
    note: str = ""
    fault: str = ""

    @property
    def added_relative(self) -> float | None:
        """RMS of the added error over RMS of the part's result."""
        return None if self.added_db is None else 10 ** (-self.added_db / 20)


def is_equalized(artefact: Artefact) -> bool:
    """Return whether the channels of an artefact's tensors were re-scaled or shifted."""
    return bool((artefact.quantization.get("equalize") or {}).get("tensors"))


def drift_of_graph(
    model: ModelProto,
    reference: Reference,
    images: Images,
    cuts: Sequence[Cut],
    *,
    equalized: bool = False,
) -> tuple[DriftRow, ...]:
    """Return the drift of each part of one graph, in the order of ``cuts``.

    Args:
        model: an artefact's graph, with the module names of the FP32 graph.
        reference: the network in float64.
        images: ``(N, C, S, S)`` normalised.
        cuts: from :func:`~van_deploy.checks.isolate.cuts_of`, of the FP32 graph.
        equalized: the graph's tensors are the network's but for a factor and a shift a
            channel (:mod:`van_deploy.checks.coordinates`).
    """
    made = {output for node in model.graph.node for output in node.output}
    tensors = [cut.tensor for cut in cuts if cut.tensor in made]
    whole, alone = with_taps(model, tensors), isolated(model, tensors)
    maps = _coordinates(whole, tensors, reference, images) if equalized else {}
    found = _compared([whole, alone], tensors, reference, images, maps)
    if found is None:
        fed = list(_batches(reference, images, maps))
        found = [
            _piecewise(whole, tensors, fed, maps, chained=True),
            _piecewise(alone, tensors, fed, maps, chained=False),
        ]
    so_far, added = found
    rows = []
    for cut in cuts:
        if cut.tensor not in made:
            rows.append(DriftRow(cut.name, None, None, "not in this graph"))
            continue
        (before_db, before), (added_db, note) = so_far[cut.tensor], added[cut.tensor]
        rows.append(DriftRow(cut.name, before_db, added_db, note or before))
    return tuple(rows)


def quiet_session(model: ModelProto) -> Any:
    """Return an ONNX Runtime session on the CPU that prints nothing of its failures."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures are reported here, not on the screen
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _coordinates(
    whole: ModelProto, tensors: Sequence[str], reference: Reference, images: Images
) -> Maps:
    """Return how an equalised graph's tensors stand for the network's; none if it does not run."""
    maps = {name: Coordinates() for name in tensors if name != OUTPUT_NAME}
    try:
        session = quiet_session(whole)
        for expected, feeds in _batches(reference, images, {}):
            for name, value in run_taps(session, feeds):
                if name in maps and value.ndim > 1:
                    maps[name].add(expected[name], value)
    except Exception:  # ONNX Runtime raises its own bare types; the graph's failure is told below
        return {}
    return maps


def _compared(
    graphs: Sequence[ModelProto],
    tensors: Sequence[str],
    reference: Reference,
    images: Images,
    maps: Maps,
) -> list[dict[str, tuple[float, str]]] | None:
    """Return SQNR and note of each tensor of each graph; None where one does not run."""
    powers = [{name: Power() for name in tensors} for _ in graphs]
    try:
        sessions = [quiet_session(graph) for graph in graphs]
        for expected, feeds in _batches(reference, images, maps):
            for session, sums in zip(sessions, powers, strict=True):
                for name, value in run_taps(session, feeds):
                    sums[name].add(expected[_module(name)], _back(maps, name, value))
    except Exception:  # ONNX Runtime raises its own bare types; each part is then tried alone
        return None
    return [{name: (power.sqnr_db, "") for name, power in sums.items()} for sums in powers]


def _piecewise(
    model: ModelProto, tensors: Sequence[str], fed: Sequence[Fed], maps: Maps, *, chained: bool
) -> dict[str, tuple[float, str]]:
    """Return SQNR and note of each tensor of a graph that does not run as a whole.

    Args:
        model: the graph.
        tensors: in the network's order.
        fed: from :func:`_batches`.
        maps: likewise.
        chained: nothing behind a part that does not run does.
    """
    powers = {name: Power() for name in tensors}
    try:
        session = quiet_session(part_of(model, tensors))
        for expected, feeds in fed:
            for name, value in run_taps(session, feeds):
                powers[name].add(expected[_module(name)], _back(maps, name, value))
    except Exception as error:
        if len(tensors) > 1:
            middle = len(tensors) // 2
            first = _piecewise(model, tensors[:middle], fed, maps, chained=chained)
            stopped = next((name for name in first if first[name][1]), "")
            if chained and stopped:
                note = f"behind {stopped}, which does not run"
                return {**first, **dict.fromkeys(tensors[middle:], (-math.inf, note))}
            return {**first, **_piecewise(model, tensors[middle:], fed, maps, chained=chained)}
        reason = " ".join(str(error).split())[:200]
        return {
            tensors[0]: (-math.inf, f"does not run at batch {IMAGES_AT_ONCE}: {reason}"),
        }
    return {name: (power.sqnr_db, "") for name, power in powers.items()}


def _back(maps: Maps, name: str, value: Array) -> Array:
    if name not in maps or not np.isfinite(value).all():
        return value
    return maps[name].back(value)


def _batches(reference: Reference, images: Images, maps: Maps) -> Iterator[Fed]:
    for start in range(0, len(images), IMAGES_AT_ONCE):
        batch = images[start : start + IMAGES_AT_ONCE]
        expected = reference.outputs(batch)
        feeds: dict[str, npt.NDArray[Any]] = {
            f"{name}{FED}": maps[name].forward(value) if name in maps else value
            for name, value in expected.items()
        }
        feeds[INPUT_NAME] = batch
        yield expected, feeds


def _module(tensor: str) -> str:
    return "head" if tensor == OUTPUT_NAME else tensor
