"""What each part of one graph adds to the error, fed the reference's own tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Artefact, Bundle
from van_deploy.checks.graphs import (
    FED,
    Cut,
    isolated,
    quiet_session,
    run_taps,
    tensor_types,
    with_taps,
)
from van_deploy.checks.reference import ModuleReference, NoiseSum
from van_deploy.graph.names import INPUT_NAME, module_of
from van_deploy.runners.base import Images

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Channels", "DriftRow", "channels_of", "drift_of_graph", "overflows_of_graph"]

IMAGES_AT_ONCE = 2  # more than one, so that a batch frozen at one shows
LARGEST_FP16 = 65504

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DriftRow:
    """One part of one artifact.

    Attributes:
        name: PyTorch path, such as ``block3.4.attn.proj_2``, or ``stage2``.
        sqnr_db: so far; None where the artifact has no such tensor.
        isolated_db: of what the part adds by itself; None likewise.
        note: why there are no figures.
        fault: what is wrong inside it beside the error: an INT8 scale, an FP16 overflow.
    """

    name: str
    sqnr_db: float | None
    isolated_db: float | None
    note: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Channels:
    """What equalisation did to the channels of one tensor, as its maker recorded it.

    The artifact's tensor is ``(reference - shift) / factor``.

    Attributes:
        factor: ``(C,)``.
        shift: ``(C,)``.
    """

    factor: Array
    shift: Array

    def forward(self, reference: Array) -> Array:
        """Return the reference's tensor ``(N, C, ...)`` as the artifact has it."""
        return (reference - _wide(self.shift, reference)) / _wide(self.factor, reference)

    def back(self, found: Array) -> Array:
        """Return the artifact's tensor ``(N, C, ...)`` as the reference has it."""
        return found * _wide(self.factor, found) + _wide(self.shift, found)


def _wide(values: Array, like: Array) -> Array:
    return values.reshape(1, -1, *(1,) * (like.ndim - 2))


def channels_of(bundle: Bundle, artefact: Artefact) -> dict[str, Channels] | None:
    """Return what equalisation did to an artifact's tensors; empty where nothing was done.

    None where something was done and not recorded: then modules cannot be compared.
    """
    place = artefact.quantization.get("channels")
    if place is None:
        equalised = artefact.quantization.get("equalize") or {}
        return None if equalised.get("tensors") else {}
    with np.load(bundle.path / str(place), allow_pickle=False) as arrays:
        names = {name.rpartition(".")[0] for name in arrays.files}
        return {
            name: Channels(
                arrays[f"{name}.factor"].astype(np.float64),
                arrays[f"{name}.shift"].astype(np.float64),
            )
            for name in names
        }


def drift_of_graph(
    model: ModelProto,
    reference: ModuleReference,
    images: Images,
    cuts: Sequence[Cut],
    channels: Mapping[str, Channels] | None,
) -> tuple[DriftRow, ...]:
    """Return the drift of each part of one graph, in the order of ``cuts``.

    Args:
        model: an artifact's graph, with the module names of the FP32 graph.
        reference: gives the tensors to compare with and to feed.
        images: ``(N, C, S, S)`` normalised.
        cuts: from :func:`~van_deploy.checks.graphs.cuts_of`, of the FP32 graph.
        channels: from :func:`channels_of`.
    """
    if channels is None:
        note = "its channels were re-scaled, and by what was not recorded"
        return tuple(DriftRow(cut.name, None, None, note) for cut in cuts)
    made = {output for node in model.graph.node for output in node.output}
    tensors = [cut.tensor for cut in cuts if cut.tensor in made]
    try:
        graphs = (with_taps(model, tensors), isolated(model, tensors))
        so_far, alone = _noise(graphs, tensors, reference, images, channels)
    except Exception as error:  # ONNX Runtime raises its own bare types
        note = f"does not run at batch {IMAGES_AT_ONCE}: {' '.join(str(error).split())[:200]}"
        return tuple(DriftRow(cut.name, None, None, note) for cut in cuts)
    return tuple(
        DriftRow(cut.name, so_far[cut.tensor].sqnr_db, alone[cut.tensor].sqnr_db)
        if cut.tensor in made
        else DriftRow(cut.name, None, None, "not in this graph")
        for cut in cuts
    )


def _noise(
    graphs: Sequence[ModelProto],
    tensors: Sequence[str],
    reference: ModuleReference,
    images: Images,
    maps: Mapping[str, Channels],
) -> list[dict[str, NoiseSum]]:
    """Return signal and noise of each tensor of each graph."""
    sums = [{name: NoiseSum() for name in tensors} for _ in graphs]
    sessions = [quiet_session(graph) for graph in graphs]
    for start in range(0, len(images), IMAGES_AT_ONCE):
        batch = images[start : start + IMAGES_AT_ONCE]
        expected = reference.outputs(batch)
        feeds: dict[str, npt.NDArray[Any]] = {}
        for name in tensors:
            value = expected[module_of(name)]
            feeds[f"{name}{FED}"] = maps[name].forward(value) if name in maps else value
        feeds[INPUT_NAME] = batch
        for session, found in zip(sessions, sums, strict=True):
            for name, value in run_taps(session, feeds):
                back = maps[name].back(value) if name in maps else value
                found[name].add(expected[module_of(name)], back)
    return sums


def overflows_of_graph(model: ModelProto, images: Images) -> dict[str, str]:
    """Return what passes FP16's largest number, by the node that makes it; only where it begins.

    A runtime may hide it: ONNX Runtime's CPU kernels compute FP16 in FP32 and drop the casts
    between two operators, so the same file is right there and wrong on a GPU. Here every FP16
    tensor is asked for as an output, which no runtime can skip.

    Args:
        model: a graph that takes normalised images.
        images: ``(N, C, S, S)`` normalised; one at a time is fed.

    Raises:
        Exception: ONNX Runtime's own, where the graph does not run.
    """
    from onnx import TensorProto

    types = tensor_types(model)
    made = [name for node in model.graph.node for name in node.output if name]
    halves = [name for name in made if types.get(name) == TensorProto.FLOAT16]
    if not halves:
        return {}
    session, bad = quiet_session(with_taps(model, halves)), set[str]()
    for index in range(len(images)):
        taps = run_taps(session, {session.get_inputs()[0].name: images[index : index + 1]})
        bad |= {name for name, value in taps if not np.isfinite(value).all()}
    return {
        node.name: f"'{node.name}' passes {LARGEST_FP16}, the largest number of FP16"
        for node in model.graph.node
        if bad.intersection(node.output) and not bad.intersection(node.input)
    }
