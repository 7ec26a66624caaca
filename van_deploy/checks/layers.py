"""What each part of one graph adds to the error, fed the reference's own tensors.

Tensors are named after PyTorch modules (:mod:`van_deploy.graph.export`), and the precision
passes keep those names, so the same cuts fit every artifact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Artefact, Bundle
from van_deploy.checks.graphs import (
    FED,
    isolated,
    one_line,
    quiet_session,
    run_taps,
    tensor_types,
    with_taps,
)
from van_deploy.errors import UsageError
from van_deploy.graph.names import INPUT_NAME, module_of
from van_deploy.metrics import decibels, signal_and_noise
from van_deploy.runners.base import Images

if TYPE_CHECKING:
    from onnx import ModelProto

    from van_deploy.checks.reference import OnnxModules, TorchModules


IMAGES_AT_ONCE = 2  # more than one, so that a batch frozen at one shows
LARGEST_FP16 = 65504

Array = npt.NDArray[np.float64]
Level = Literal["stage", "block", "module"]

_UNIT = re.compile(r"(patch_embed(?P<embed>\d)|block(?P<block>\d)\.\d+|norm(?P<norm>\d)|head)\b")


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

    @property
    def level(self) -> float:
        """The isolated SQNR in dB; infinite where there is none."""
        return math.inf if self.isolated_db is None else self.isolated_db


class _Channels(NamedTuple):
    """What equalisation did to the channels of one tensor, as its maker recorded it.

    The artifact's tensor is ``(reference - shift) / factor``, both ``(C,)``.
    """

    factor: Array
    shift: Array

    def forward(self, reference: Array) -> Array:
        """Return the reference's tensor ``(N, C, ...)`` as the artifact has it."""
        factor, shift = self._wide(reference)
        return (reference - shift) / factor

    def back(self, found: Array) -> Array:
        """Return the artifact's tensor ``(N, C, ...)`` as the reference has it."""
        factor, shift = self._wide(found)
        return found * factor + shift

    def _wide(self, like: Array) -> list[Array]:
        return [values.reshape(1, -1, *(1,) * (like.ndim - 2)) for values in self]


SAME = _Channels(np.ones(1), np.zeros(1))


def _cuts_of(model: ModelProto, level: Level, modules: Iterable[str]) -> dict[str, str]:
    """Return where to open a graph, in order, so that each part is a stage, block or module.

    Args:
        model: the FP32 graph, whose nodes are named after modules.
        level: how fine.
        modules: paths of the modules whose reference result is known.

    Returns:
        The last tensor of each part, by its name.

    Raises:
        UsageError: the graph's nodes carry no module names.
    """
    known = set(modules)
    last: dict[str, str] = {}
    for node in model.graph.node:
        module = module_of(node.output[0])
        name = module if level == "module" else _unit(node.name or module, level)
        if name and module in known:
            last.pop(name, None)  # the order is that of the last tensors
            last[name] = node.output[0]
    if not last:
        raise UsageError(
            "The graph's nodes are not named after PyTorch modules, so drift cannot be placed.",
            "Export the network with van-deploy, which names them.",
        )
    return last


def _unit(node: str, level: Level) -> str:
    """Return the block or stage that a node belongs to ("" for none)."""
    unit = _UNIT.match(node)
    if unit is None:
        return ""
    stage = unit["embed"] or unit["block"] or unit["norm"]
    return f"stage{stage}" if level == "stage" and stage else unit[0]


def part_name(module: str, level: Level, parts: Iterable[str]) -> str:
    """Return the part that a module is in: the longest of the names it begins with, or "".

    >>> part_name("block1.0.mlp.fc2", "block", ["block1.0", "block1.1"])
    'block1.0'
    >>> part_name("block1.0.mlp.fc2", "stage", ["stage1"])
    'stage1'
    """
    if level == "stage":
        return _unit(module, level)
    around = [part for part in parts if f"{module}.".startswith(f"{part}.")]
    return max(around, key=len, default="")


def drift_of_artefact(
    bundle: Bundle,
    artefact: Artefact,
    reference: TorchModules | OnnxModules,
    images: Images,
    level: Level,
) -> tuple[DriftRow, ...]:
    """Return the drift of each part of one plain ONNX artifact, in the order of the network.

    Args:
        bundle: of the artifact.
        artefact: with the module names of the FP32 graph.
        reference: gives the tensors to compare with and to feed.
        images: ``(N, C, S, S)`` normalised.
        level: how fine the parts are.

    Raises:
        UsageError: the FP32 graph carries no module names.
    """
    import onnx

    model = onnx.load(bundle.verified(artefact.name))
    cuts = _cuts_of(onnx.load(bundle.verified("fp32")), level, reference.modules)
    made = {output for node in model.graph.node for output in node.output}
    tensors = [tensor for tensor in cuts.values() if tensor in made]
    try:
        graphs = (with_taps(model, tensors), isolated(model, tensors))
        so_far, alone = _levels(graphs, tensors, reference, images, _channels(bundle, artefact))
    except Exception as error:  # ONNX Runtime raises its own bare types
        note = f"does not run at batch {IMAGES_AT_ONCE}: {one_line(error)[:200]}"
        return tuple(DriftRow(name, None, None, note) for name in cuts)
    return tuple(
        DriftRow(name, so_far[tensor], alone[tensor])
        if tensor in made
        else DriftRow(name, None, None, "not in this graph")
        for name, tensor in cuts.items()
    )


def _channels(bundle: Bundle, artefact: Artefact) -> dict[str, _Channels]:
    """Return what equalisation did to an artifact's tensors; empty where nothing was done."""
    place = artefact.quantization.get("channels")
    if place is None:
        return {}
    with np.load(bundle.path / str(place), allow_pickle=False) as arrays:
        found = {name: arrays[name].astype(np.float64) for name in arrays.files}
    names = {name.rpartition(".")[0] for name in found}
    return {name: _Channels(found[f"{name}.factor"], found[f"{name}.shift"]) for name in names}


def _levels(
    graphs: Sequence[ModelProto],
    tensors: Sequence[str],
    reference: TorchModules | OnnxModules,
    images: Images,
    channels: Mapping[str, _Channels],
) -> list[dict[str, float]]:
    """Return the SQNR of each tensor of each graph."""
    sums = [{name: np.zeros(2) for name in tensors} for _ in graphs]
    sessions = [quiet_session(graph) for graph in graphs]
    for start in range(0, len(images), IMAGES_AT_ONCE):
        batch = images[start : start + IMAGES_AT_ONCE]
        expected = reference.outputs(batch)
        feeds: dict[str, npt.NDArray[Any]] = {INPUT_NAME: batch}
        for name in tensors:
            feeds[f"{name}{FED}"] = channels.get(name, SAME).forward(expected[module_of(name)])
        for session, found in zip(sessions, sums, strict=True):
            for name, value in run_taps(session, feeds):
                back = channels.get(name, SAME).back(value)
                found[name] += signal_and_noise(expected[module_of(name)], back)
    return [{name: decibels(*both) for name, both in found.items()} for found in sums]


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
