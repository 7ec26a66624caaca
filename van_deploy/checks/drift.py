"""Where an artefact leaves the network it was made from.

Two figures for each part (stage, block or module) of each ONNX artefact:

* ``sqnr_db``: the part's result in the running artefact against the reference,
  so with the error of everything before it;
* ``added_db``: the same when the part is fed the *reference's* tensors, so only
  the error it adds itself. Parts are ranked by this one: an error is named
  where it arises, not where it is first seen or grows.

The reference is the rewritten network in float64; the chain from the original
PyTorch network to the last artefact is measured on the logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Artefact, Bundle
from van_deploy.checks.coordinates import Coordinates
from van_deploy.checks.isolate import (
    FED,
    Cut,
    Level,
    cuts_of,
    isolated,
    part_of,
    run_taps,
    with_taps,
)
from van_deploy.checks.opened import plain_onnx
from van_deploy.checks.reference import Power, Reference, reference_of, unit_powers
from van_deploy.graph.names import INPUT_NAME, OUTPUT_NAME
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.runners.base import Images
from van_deploy.runners.onnxruntime import require_onnxruntime

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "FUSION_NOTE",
    "SCHEMA",
    "ArtefactDrift",
    "DriftReport",
    "DriftRow",
    "Step",
    "drift_of_bundle",
    "drift_of_graph",
    "is_equalized",
]

SCHEMA = "van-deploy/drift/1"
IMAGES_AT_ONCE = 2  # more than one, so that a batch frozen at one shows

FUSION_NOTE = (
    "Extra outputs keep a run time from fusing across them, so inside an engine the parts "
    "would run as other kernels than in use: engines are compared by their logits only."
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class DriftRow:
    """One part of one artefact.

    Attributes:
        name: PyTorch path, such as ``block3.4.attn.proj_2``, or ``stage2``.
        sqnr_db: so far; None where the artefact has no such tensor.
        added_db: what the part itself adds; None likewise.
        note: why the part does not run, if it does not.
    """

    name: str
    sqnr_db: float | None
    added_db: float | None
    note: str = ""

    @property
    def added_relative(self) -> float | None:
        """RMS of the added error over RMS of the part's result."""
        return None if self.added_db is None else 10 ** (-self.added_db / 20)


@dataclass(frozen=True)
class ArtefactDrift:
    """Every part of one artefact, in the order of the network."""

    artefact: str
    rows: tuple[DriftRow, ...]

    @property
    def worst(self) -> list[DriftRow]:
        """The parts by the error they add, the largest first."""
        placed = [row for row in self.rows if row.added_db is not None]
        return sorted(placed, key=lambda row: float(row.added_db or 0.0))


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


@dataclass(frozen=True)
class DriftReport:
    """Where each artefact of a bundle drifts.

    Attributes:
        level: how fine the parts are.
        images: what was fed.
        count: how many images.
        chain: the links in order.
        artefacts: the parts of each ONNX artefact.
    """

    level: Level
    images: str
    count: int
    chain: tuple[Step, ...]
    artefacts: tuple[ArtefactDrift, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report, ready for JSON."""
        return {
            "schema": SCHEMA,
            "level": self.level,
            "images": self.images,
            "count": self.count,
            "reference": "the network in float64: the chain against the original, "
            "the parts against the rewritten",
            "chain": [
                {"status": "skipped" if step.sqnr_db is None else "measured", **asdict(step)}
                for step in self.chain
            ],
            "artefacts": {
                entry.artefact: {
                    "rows": [
                        {**asdict(row), "added_relative": row.added_relative} for row in entry.rows
                    ],
                    "worst": [row.name for row in entry.worst[:10]],
                }
                for entry in self.artefacts
            },
            "notes": [FUSION_NOTE],
        }


def drift_of_bundle(
    bundle: Bundle,
    loaded: LoadedVan,
    images: Images,
    *,
    level: Level = "block",
    described: str = "",
    artefacts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> DriftReport:
    """Return where each plain ONNX artefact of ``bundle`` leaves the network.

    Args:
        bundle: the bundle.
        loaded: its original network.
        images: ``(N, C, S, S)`` normalised.
        level: ``stage``, ``block`` or ``module``.
        described: what the images are.
        artefacts: names of ONNX artefacts; None takes all plain ones.
        progress: told what is measured.

    Raises:
        BundleError: an artefact is not there, or is not the manifest's.
        UsageError: the graphs carry no module names.
    """
    import onnx

    say = progress or (lambda _: None)
    say("PyTorch in float64, original and rewritten")
    reference = reference_of(bundle, loaded, images)
    names = plain_onnx(bundle) if artefacts is None else list(artefacts)
    base = onnx.load(bundle.verified("fp32"))
    cuts = cuts_of(base, level, reference.modules)
    chain = [*_pytorch_steps(reference, loaded, images), *_export_steps(bundle, reference, images)]
    entries = []
    for name in names:
        say(f"Every {level} of '{name}', alone and in the whole")
        model = base if name == "fp32" else onnx.load(bundle.verified(name))
        equalized = is_equalized(bundle.artefact(name))
        rows = drift_of_graph(model, reference, images, cuts, equalized=equalized)
        entries.append(ArtefactDrift(name, rows))
        chain.append(_artefact_step(name, model, reference, images))
    chain += [
        Step(name, None, "engines run on their GPU only; see `van-deploy verify`")
        for name, artefact in bundle.artefacts.items()
        if artefact.kind == "engine"
    ]
    return DriftReport(level, described, len(images), tuple(chain), tuple(entries))


def is_equalized(artefact: Artefact) -> bool:
    """Return whether the channels of an artefact's tensors were re-scaled or shifted."""
    return bool((artefact.facts.get("equalize") or {}).get("tensors"))


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
    present = [cut for cut in cuts if cut.tensor in made]
    tensors = [cut.tensor for cut in present]
    whole, alone = with_taps(model, tensors), isolated(model, tensors)
    maps = _coordinates(whole, tensors, reference, images) if equalized else {}
    so_far = _powers(whole, tensors, reference, images, maps)
    added = _powers(alone, tensors, reference, images, maps)
    rows = []
    for cut in cuts:
        if cut.tensor not in made:
            rows.append(DriftRow(cut.name, None, None, "not in this graph"))
            continue
        rows.append(
            DriftRow(
                cut.name,
                so_far[cut.tensor][0],
                added[cut.tensor][0],
                added[cut.tensor][1] or so_far[cut.tensor][1],
            )
        )
    return tuple(rows)


Maps = Mapping[str, Coordinates]


def _coordinates(
    whole: ModelProto, tensors: Sequence[str], reference: Reference, images: Images
) -> Maps:
    """Return how an equalised graph's tensors stand for the network's; none if it does not run."""
    maps = {name: Coordinates() for name in tensors if name != OUTPUT_NAME}
    try:
        session = _session(whole)
        for expected, feeds in _batches(reference, images, {}):
            for name, value in run_taps(session, feeds):
                if name in maps and value.ndim > 1:
                    maps[name].add(expected[name], value)
    except Exception:  # ONNX Runtime raises its own bare types; the graph's failure is told below
        return {}
    return maps


def _powers(
    model: ModelProto, tensors: Sequence[str], reference: Reference, images: Images, maps: Maps
) -> dict[str, tuple[float, str]]:
    """Return SQNR and note of each tensor; where the graph does not run, part by part."""
    powers = {name: Power() for name in tensors}
    try:
        session = _session(model)
        for expected, feeds in _batches(reference, images, maps):
            for name, value in run_taps(session, feeds):
                powers[name].add(expected[_module(name)], _back(maps, name, value))
    except Exception:  # ONNX Runtime raises its own bare types
        return {name: _part_power(model, name, reference, images, maps) for name in tensors}
    return {name: (power.sqnr_db, "") for name, power in powers.items()}


def _part_power(
    model: ModelProto, tensor: str, reference: Reference, images: Images, maps: Maps
) -> tuple[float, str]:
    """Return one part's SQNR, by itself, in a graph that does not run as a whole."""
    part, power = part_of(model, tensor), Power()
    try:
        session = _session(part)
        for expected, feeds in _batches(reference, images, maps):
            for _, value in run_taps(session, feeds):
                power.add(expected[_module(tensor)], _back(maps, tensor, value))
    except Exception as error:
        return -math.inf, f"does not run at batch {IMAGES_AT_ONCE}: {_one_line(error)}"
    return power.sqnr_db, ""


def _back(maps: Maps, name: str, value: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if name not in maps or not np.isfinite(value).all():
        return value
    return maps[name].back(value)


def _batches(
    reference: Reference, images: Images, maps: Maps
) -> Iterator[tuple[Mapping[str, npt.NDArray[np.float64]], dict[str, npt.NDArray[Any]]]]:
    """Yield the reference's tensors by module, and what a graph may be fed by input name."""
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


def _session(model: ModelProto) -> Any:
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures are reported here, not on the screen
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _pytorch_steps(reference: Reference, loaded: LoadedVan, images: Images) -> Iterator[Step]:
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


def _export_steps(bundle: Bundle, reference: Reference, images: Images) -> Iterator[Step]:
    """Measure the graph before simplification, if simplification changed it."""
    simplify = bundle.manifest["checks"].get("simplify")
    if simplify is None or not simplify["changed"]:
        reason = "not asked for" if simplify is None else simplify["reason"]
        yield Step("ONNX before simplification", None, f"the same graph as 'fp32': {reason}")
        return
    from van_deploy.graph.export import onnx_from_van

    facts = bundle.artefact("fp32").facts
    model = onnx_from_van(
        reference.fold.model, images.shape[-1], images.shape[1], opset=int(facts["opset"])
    )
    yield _artefact_step("ONNX before simplification", model, reference, images)


def _artefact_step(name: str, model: ModelProto, reference: Reference, images: Images) -> Step:
    import torch

    power = Power()
    try:
        session = _session(model)
        with torch.inference_mode():
            for start in range(0, len(images), IMAGES_AT_ONCE):
                batch = images[start : start + IMAGES_AT_ONCE]
                expected = reference.original(torch.from_numpy(batch).double()).numpy()
                found = dict(run_taps(session, {INPUT_NAME: batch}))
                power.add(expected, found[OUTPUT_NAME])
    except Exception as error:
        return Step(name, -math.inf, f"does not run at batch {IMAGES_AT_ONCE}: {_one_line(error)}")
    return Step(name, power.sqnr_db)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
