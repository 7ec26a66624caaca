"""Where an artifact leaves the network it was made from.

Two figures for each part (stage, block or module) of each plain ONNX artifact:

* ``sqnr_db``: the part's result in the running artifact against the reference,
  so with the error of everything before it;
* ``isolated_db``: the same when the part is fed the *reference's* tensors, so only
  the error it adds itself. Parts are ranked by this one: an error is named
  where it arises, not where it is first seen or grows.

Parts with a fault that the error does not show are ranked before the others: an INT8 scale
out of its bounds, and a tensor that overflows FP16, which a CPU does not notice.

Parts are compared with the *rewritten* network's: an artifact's residual stream is re-scaled
by the rewrites, so its blocks can be compared with no other. Where PyTorch is not,
``model.onnx`` stands in for it once it holds on the golden samples. Tensors are named after
PyTorch modules (:mod:`van_deploy.graph.export`), and the precision passes keep those names,
so the same cuts fit every artifact.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from van_deploy.bundle import Artifact, Bundle
from van_deploy.checks.gates import DEFAULT_PROFILE, Outcome, sqnr_floor
from van_deploy.checks.golden import Samples
from van_deploy.checks.graphs import FED, isolated, one_line, quiet_session, run_taps, with_taps
from van_deploy.checks.outputs import check_graph, check_new_graph, plain_onnx_artifacts
from van_deploy.config import DriftSettings, GateProfile
from van_deploy.errors import BundleError, GateFailed
from van_deploy.graph.names import INPUT_NAME, module_of
from van_deploy.metrics import decibels, signal_and_noise
from van_deploy.runners.base import Images
from van_deploy.runners.network import Network
from van_deploy.stopwatch import Progress

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

NOT_OPENED = (
    "extra outputs would keep its runtime from fusing: see its logits in `van-deploy verify`"
)
IMAGES_AT_ONCE = 2  # more than one, so that a batch frozen at one shows
SHOWN_ROWS = 10

Array = npt.NDArray[np.float64]
Level = Literal["stage", "block", "module"]

_UNIT = re.compile(r"(patch_embed(?P<embed>\d)|block(?P<block>\d)\.\d+|norm(?P<norm>\d)|head)\b")


# --- what modules are compared with ----------------------------------------------------------


class Reference(NamedTuple):
    """What modules are compared with.

    Attributes:
        described: what it is.
        modules: paths of the modules whose results are known.
        outputs: from images ``(N, C, S, S)`` to every module's result, float64, by path.
        folding: relative error of the rewrites that PyTorch's network got; None without it.
    """

    described: str
    modules: list[str]
    outputs: Callable[[Images], Mapping[str, Array]]
    folding: float | None = None


def module_reference(
    bundle: Bundle,
    samples: Samples,
    loaded: LoadedVan | None,
    profile: GateProfile = DEFAULT_PROFILE,
) -> Reference | str:
    """Return what modules are compared with: the original network, else ``model.onnx``.

    Or why there is nothing: no original network, and a ``model.onnx`` that does not hold.

    Args:
        bundle: the bundle; it says which rewrites were made.
        samples: what it is judged on; the rewriting is proved on the first of them.
        loaded: the original network, or None.
        profile: what a recipe sets otherwise for FP32.

    Raises:
        BundleError: the manifest does not say how the network was rewritten.
    """
    if loaded is not None:
        return _rewritten(bundle, samples, loaded)
    model = onnx.load(bundle.verified_path("fp32"))
    judged, _ = check_new_graph(model, "fp32", samples, profile=profile)
    if judged.outcome is not Outcome.PASS:
        lacks = "model.onnx does not hold on the golden samples, so nothing can be compared with it"
        return f"{lacks}: {judged.reason}"
    made = [name for node in model.graph.node for name in node.output if name]
    session = quiet_session(with_taps(model, made))

    def outputs(images: Images) -> Mapping[str, Array]:
        return {module_of(name): v for name, v in run_taps(session, {INPUT_NAME: images})}

    described = "model.onnx in ONNX Runtime, which holds on the golden samples"
    return Reference(described, [module_of(name) for name in made], outputs)


def _rewritten(bundle: Bundle, samples: Samples, loaded: LoadedVan) -> Reference:
    """Return the original network, rewritten as the bundle's export was, in float64."""
    import torch

    from van_deploy.graph.fold import Rewrites, fold_van

    names = bundle.manifest.checks.get("fold", {}).get("rewrites")
    if not isinstance(names, list | tuple):
        raise BundleError(
            f"The bundle '{bundle.path}' does not say how its network was rewritten.",
            "Export the model again.",
        )
    rewrites = Rewrites(**{field: field in names for field in Rewrites.__dataclass_fields__})
    fold = fold_van(loaded.model, torch.from_numpy(samples.inputs[:1]), rewrites)
    # Folded in float64 and stored in float32: these are the weights the artifacts hold.
    network, found = copy.deepcopy(fold.model).double().eval(), dict[str, Array]()
    modules = {name: module for name, module in network.named_modules() if name}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda *call, name=name: found.__setitem__(name, call[-1].numpy())
        )

    def outputs(images: Images) -> Mapping[str, Array]:
        with torch.inference_mode():
            network(torch.from_numpy(images).double())
        return dict(found)

    described = "PyTorch, the rewritten network in float64"
    return Reference(described, list(modules), outputs, fold.relative_error)


# --- the parts of one artifact ---------------------------------------------------------------


@dataclass(frozen=True)
class DriftRow:
    """One part of one artifact.

    Attributes:
        name: PyTorch path, such as ``block3.4.attn.proj_2``, or ``stage2``; of the chain, the
            artifact.
        sqnr_db: so far; None where the artifact has no such tensor.
        isolated_db: of what the part adds by itself; None likewise.
        note: why there are no figures.
        fault: what is wrong inside it beside the error: an INT8 scale, an FP16 overflow.
    """

    name: str
    sqnr_db: float | None = None
    isolated_db: float | None = None
    note: str = ""
    fault: str = ""

    @property
    def level(self) -> float:
        """The isolated SQNR in dB; infinite where there is none."""
        return math.inf if self.isolated_db is None else self.isolated_db


def drift_of_artifact(
    bundle: Bundle, artifact: Artifact, reference: Reference, images: Images, level: Level
) -> tuple[DriftRow, ...]:
    """Return the drift of each part of one plain ONNX artifact, in the order of the network.

    Args:
        bundle: of the artifact.
        artifact: with the module names of the FP32 graph.
        reference: gives the tensors to compare with and to feed.
        images: ``(N, C, S, S)`` normalised.
        level: how fine the parts are.
    """
    model, last = onnx.load(bundle.verified_path(artifact.name)), dict[str, str]()
    for node in onnx.load(bundle.verified_path("fp32")).graph.node:
        module = module_of(node.output[0])
        name = module if level == "module" else part_name(node.name or module, level)
        if name and module in reference.modules:
            last.pop(name, None)  # the order is that of the last tensors
            last[name] = node.output[0]
    made = {output for node in model.graph.node for output in node.output}
    tensors = [tensor for tensor in last.values() if tensor in made]
    sums = [{name: np.zeros(2) for name in tensors} for _ in range(2)]

    def equalised(name: str, like: Array) -> list[Any]:
        """Return factor and shift: a tensor of the artifact is ``(reference - shift) / factor``."""
        if f"{name}.factor" not in channels:
            return [1.0, 0.0]
        shape = (1, -1, *(1,) * (like.ndim - 2))
        return [channels[f"{name}.{what}"].reshape(shape) for what in ("factor", "shift")]

    try:
        channels: dict[str, Array] = {}  # as the quantiser recorded it
        if place := artifact.quantization.get("channels"):
            with np.load(bundle.path / str(place), allow_pickle=False) as arrays:
                channels = {name: arrays[name].astype(np.float64) for name in arrays.files}
        sessions = [quiet_session(make(model, tensors)) for make in (with_taps, isolated)]
        for start in range(0, len(images), IMAGES_AT_ONCE):
            batch = images[start : start + IMAGES_AT_ONCE]
            results, feeds = reference.outputs(batch), {INPUT_NAME: batch}
            expected = {name: results[module_of(name)] for name in tensors}
            for name, exact in expected.items():
                factor, shift = equalised(name, exact)
                feeds[f"{name}{FED}"] = (exact - shift) / factor
            for session, found in zip(sessions, sums, strict=True):
                for name, value in run_taps(session, feeds):
                    factor, shift = equalised(name, value)
                    found[name] += signal_and_noise(expected[name], value * factor + shift)
    except Exception as error:  # ONNX Runtime raises its own bare types
        note = f"does not run at batch {IMAGES_AT_ONCE}: {one_line(error)[:200]}"
        return tuple(DriftRow(name, note=note) for name in last)
    return tuple(
        DriftRow(name, decibels(*sums[0][tensor]), decibels(*sums[1][tensor]))
        if tensor in made
        else DriftRow(name, note="not in this graph")
        for name, tensor in last.items()
    )


def part_name(node: str, level: Level, modules: Iterable[str] = ()) -> str:
    """Return the stage, the block or the innermost of the modules that a node is in, or "".

    >>> levels = ("stage", "block", "module")
    >>> [part_name("block1.0.mlp.fc2", level, ["block1.0.mlp"]) for level in levels]
    ['stage1', 'block1.0', 'block1.0.mlp']
    """
    if level == "module":
        return max((m for m in modules if f"{node}.".startswith(f"{m}.")), key=len, default="")
    unit = _UNIT.match(node)
    if unit is None:
        return ""
    stage = unit["embed"] or unit["block"] or unit["norm"]
    return f"stage{stage}" if level == "stage" and stage else unit[0]


# --- the whole bundle ------------------------------------------------------------------------


@dataclass(frozen=True)
class ArtifactDrift:
    """Every part of one artifact.

    Attributes:
        artifact: its name.
        rows: the parts, in the order of the network.
    """

    JSON_PROPERTIES: ClassVar = ("worst_names",)

    artifact: str
    rows: tuple[DriftRow, ...]

    @property
    def worst_names(self) -> list[str]:
        """The parts with a fault first, then by the error they add, the largest first."""
        placed = [row for row in self.rows if row.isolated_db is not None]
        worst = sorted(placed, key=lambda row: (not row.fault, row.level))
        return [row.name for row in worst[:SHOWN_ROWS]]


@dataclass(frozen=True)
class DriftReport:
    """Where each artifact of a bundle drifts.

    Attributes:
        level: how fine the parts are.
        images: what was fed.
        reference: what the parts were compared with.
        chain: the logits against the original network in float64, from float32 itself to the last
            artifact.
        artifacts: the parts of each plain ONNX artifact, by name.
        schema: of the document.
    """

    level: Level
    images: str
    reference: str
    chain: tuple[DriftRow, ...]
    artifacts: Mapping[str, ArtifactDrift]
    schema: Literal["van-deploy/drift/3"] = "van-deploy/drift/3"


def drift_of_bundle(
    bundle: Bundle, samples: Samples, asked: DriftSettings, loaded: LoadedVan | None, say: Progress
) -> DriftReport:
    """Return where each plain ONNX artifact of ``bundle`` leaves the network.

    Args:
        bundle: the bundle.
        samples: images with the original network's answers.
        asked: how fine, and which artifacts; by default all plain ONNX ones.
        loaded: the original network; None compares with ``model.onnx`` once that holds.
        say: told what is measured.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
        GateFailed: there is no original network, and ``model.onnx`` does not hold.
    """
    noise_db, outputs = samples.noise_db, samples.outputs
    chain = [DriftRow("PyTorch float32", noise_db, note="the noise of float32 itself")]
    say("What parts are compared with")
    reference = module_reference(bundle, samples, loaded)
    if isinstance(reference, str):
        original = "Compare with the original network, where PyTorch and the weights are."
        raise GateFailed(f"{reference}.", original)
    if reference.folding is not None:
        found = reference.outputs(samples.inputs)
        rows = outputs.rows({name: found[module_of(name)] for name in outputs.names})
        note = f"folded weights in float32; folding itself is exact to {reference.folding:.0e}"
        level = outputs.sqnr_db(samples.logits, rows)
        chain.append(DriftRow("rewritten, float64", level, note=note))
    plain, entries = plain_onnx_artifacts(bundle), {}
    for name in asked.artifacts or [n for n in plain if loaded is not None or n != "fp32"]:
        say(f"Every {asked.level} of '{name}', alone and in the whole")
        artifact = bundle.artifact(name)
        parts = drift_of_artifact(bundle, artifact, reference, samples.inputs, asked.level)
        method = str(artifact.quantization.get("method", "mse"))
        model, inside = onnx.load(bundle.verified_path(name)), dict[str, list[str]]()
        floor = sqnr_floor(artifact.precision, noise_db)
        for module, fault in check_graph(model, artifact.precision, samples, floor, method)[1]:
            part = part_name(module, asked.level, (part.name for part in parts))
            inside.setdefault(part, []).append(fault)
        told = (replace(one, fault="; ".join(inside.get(one.name, ()))) for one in parts)
        entries[name] = ArtifactDrift(name, tuple(told))
    for name in bundle.artifacts:
        link = DriftRow(name, note=NOT_OPENED)
        if name in plain:
            try:
                with Network(bundle, name) as network:
                    rows = outputs.rows(network.run(samples.inputs))
                link = DriftRow(name, outputs.sqnr_db(samples.logits, rows))
            except Exception as error:  # ONNX Runtime raises its own bare types
                link = DriftRow(name, note=f"does not run: {one_line(error)[:200]}")
        chain.append(link)
    described = samples.description, reference.described
    return DriftReport(asked.level, *described, tuple(chain), entries)
