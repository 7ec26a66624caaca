"""Drift: the error of each part of an artifact against the original network.

Two values for each part (stage, block or module) of each plain ONNX artifact:

* ``sqnr_db``: accumulated SQNR: the part's output in the running artifact against the reference,
  including the error of all parts before it;
* ``isolated_db``: isolated SQNR: the same when the part is fed the *reference's* tensors, so only
  the error of the part itself. Parts are ranked by this value, so an error is reported where it
  arises and not where it becomes visible.

Parts with a fault that the error does not show are ranked first: an INT8 scale out of its bounds,
and a tensor that overflows FP16, which a CPU does not show.

Parts are compared with those of the *rewritten* network, because the rewrites change the scale of
the residual stream. Without PyTorch ``model.onnx`` is the reference, after it has passed its gate
on the golden samples. Tensors are named after PyTorch modules (:mod:`van_deploy.graph.export`) and
keep these names in all precisions.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import onnx

from van_deploy.bundle import Artifact, Bundle
from van_deploy.checks.gates import DEFAULT_PROFILE, Outcome
from van_deploy.checks.golden import Samples
from van_deploy.checks.graphs import FED, isolated, one_line, quiet_session, run_taps, with_taps
from van_deploy.checks.outputs import check_graph, check_new_graph, plain_onnx_artifacts
from van_deploy.config import DriftSettings, GateProfile
from van_deploy.errors import BundleError, GateFailed, UsageError
from van_deploy.graph.names import INPUT_NAME, module_of
from van_deploy.metrics import Array, decibels, signal_and_noise
from van_deploy.runners.base import Images
from van_deploy.runners.network import Network
from van_deploy.stopwatch import Progress

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

NOT_INSTRUMENTED = "only its own outputs are compared: see `van-deploy verify`"
IMAGES_AT_ONCE = 2  # more than one, to detect a graph with a fixed batch of one

Level = Literal["stage", "block", "module"]

_UNIT = re.compile(r"(patch_embed(?P<embed>\d)|block(?P<block>\d)\.\d+|norm(?P<norm>\d)|head)\b")


# --- reference -------------------------------------------------------------------------------


class Reference(NamedTuple):
    """Reference outputs of the modules.

    Attributes:
        description: description of the reference.
        modules: paths of the modules with known outputs.
        outputs: maps images ``(N, C, S, S)`` to every module's output, float64, by path.
        folding: relative error of the rewrites of the PyTorch network; None without PyTorch.
    """

    description: str
    modules: list[str]
    outputs: Callable[[Images], Mapping[str, Array]]
    folding: float | None = None


def module_reference(
    bundle: Bundle, samples: Samples, loaded: LoadedVan | None, profile: GateProfile
) -> Reference | str:
    """Return the reference: the original network, else ``model.onnx``.

    Returns a message if there is none: no original network, and ``model.onnx`` fails its gate.

    Args:
        bundle: the bundle, whose manifest names the rewrites.
        samples: samples; the rewrites are checked on the first.
        loaded: the original network, or None.
        profile: limits of the recipe for FP32, which take precedence.

    Raises:
        BundleError: the manifest does not name the rewrites.
    """
    if loaded is not None:
        return _rewritten_network(bundle, samples, loaded)
    model = onnx.load(bundle.verified_path("fp32"))
    verdict, _ = check_new_graph(model, "fp32", samples, profile=profile)
    if verdict.outcome is not Outcome.PASS:
        problem = "model.onnx fails its gate on the golden samples and cannot be the reference"
        return f"{problem}: {verdict.reason}"
    tensors = [name for node in model.graph.node for name in node.output if name]
    session = quiet_session(with_taps(model, tensors))

    def outputs(images: Images) -> Mapping[str, Array]:
        return {module_of(name): v for name, v in run_taps(session, {INPUT_NAME: images})}

    description = "model.onnx in ONNX Runtime, which passes its gate on the golden samples"
    return Reference(description, [module_of(name) for name in tensors], outputs)


def _rewritten_network(bundle: Bundle, samples: Samples, loaded: LoadedVan) -> Reference:
    """Return the original network, rewritten as the bundle's export was, in float64."""
    import torch

    from van_deploy.graph.fold import fold_van

    names = bundle.manifest.checks.get("fold", {}).get("rewrites")
    if not isinstance(names, list | tuple):
        raise BundleError(
            f"The manifest of '{bundle.path}' does not name the rewrites of its network.",
            "Export the model again with `van-deploy export --force`.",
        )
    fold = fold_van(loaded.model, torch.from_numpy(samples.inputs[:1]), fold=bool(names))
    # Folded in float64 and stored in float32: these are the weights of the artifacts.
    network, results = copy.deepcopy(fold.model).double().eval(), dict[str, Array]()
    modules = {name: module for name, module in network.named_modules() if name}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda *call, name=name: results.__setitem__(name, call[-1].numpy())
        )

    def outputs(images: Images) -> Mapping[str, Array]:
        with torch.inference_mode():
            network(torch.from_numpy(images).double())
        return dict(results)

    description = "PyTorch, the rewritten network in float64"
    return Reference(description, list(modules), outputs, fold.relative_error)


# --- parts of one artifact -------------------------------------------------------------------


@dataclass(frozen=True)
class DriftRow:
    """Drift of one part of an artifact.

    Attributes:
        name: PyTorch path such as ``block3.4.attn.proj_2``, or ``stage2``; in the chain, the
            artifact.
        sqnr_db: accumulated SQNR; None if the artifact has no such tensor.
        isolated_db: isolated SQNR; None if the artifact has no such tensor.
        note: reason for missing values.
        fault: fault inside the part: an INT8 scale out of bounds, an FP16 overflow.
    """

    name: str
    sqnr_db: float | None = None
    isolated_db: float | None = None
    note: str = ""
    fault: str = ""

    @property
    def level(self) -> float:
        """The isolated SQNR in dB; infinite if there is none."""
        return math.inf if self.isolated_db is None else self.isolated_db


def drift_of_artifact(
    bundle: Bundle, artifact: Artifact, reference: Reference, images: Images, level: Level
) -> tuple[DriftRow, ...]:
    """Return the drift of each part of one plain ONNX artifact, in the order of the network.

    Args:
        bundle: bundle of the artifact.
        artifact: the artifact, with the module names of the FP32 graph.
        reference: tensors to compare with and to feed.
        images: ``(N, C, S, S)`` normalised.
        level: granularity of the parts.
    """
    model, last = onnx.load(bundle.verified_path(artifact.name)), dict[str, str]()
    for node in onnx.load(bundle.verified_path("fp32")).graph.node:
        module = module_of(node.output[0])
        name = module if level == "module" else part_name(node.name or module, level)
        if name and module in reference.modules:
            last.pop(name, None)  # order by the last tensor of each part
            last[name] = node.output[0]
    available = {output for node in model.graph.node for output in node.output}
    tensors = [tensor for tensor in last.values() if tensor in available]
    sums = [{name: np.zeros(2) for name in tensors} for _ in range(2)]

    def channel_affine(name: str, ndim: int) -> list[Any]:
        """Return factor and shift: the artifact's tensor is ``(reference - shift) / factor``."""
        shape, no_affine = (1, -1, *(1,) * (ndim - 2)), {"factor": np.ones(1), "shift": np.zeros(1)}
        return [channels.get(f"{name}.{n}", v).reshape(shape) for n, v in no_affine.items()]

    try:
        channels: dict[str, Array] = {}  # recorded by the quantiser
        if file := artifact.quantization.get("channels"):
            with np.load(bundle.path / str(file), allow_pickle=False) as arrays:
                channels = {name: arrays[name].astype(np.float64) for name in arrays.files}
        sessions = [quiet_session(make(model, tensors)) for make in (with_taps, isolated)]
        for start in range(0, len(images), IMAGES_AT_ONCE):
            batch = images[start : start + IMAGES_AT_ONCE]
            results, feeds = reference.outputs(batch), {INPUT_NAME: batch}
            expected = {name: results[module_of(name)] for name in tensors}
            for name, exact in expected.items():
                factor, shift = channel_affine(name, exact.ndim)
                feeds[f"{name}{FED}"] = (exact - shift) / factor
            for session, totals in zip(sessions, sums, strict=True):
                for name, value in run_taps(session, feeds):
                    factor, shift = channel_affine(name, value.ndim)
                    totals[name] += signal_and_noise(expected[name], value * factor + shift)
    except Exception as error:  # ONNX Runtime raises bare exception types
        note = f"does not run at batch {IMAGES_AT_ONCE}: {one_line(error)[:200]}"
        return tuple(DriftRow(name, note=note) for name in last)
    return tuple(
        DriftRow(name, decibels(*sums[0][tensor]), decibels(*sums[1][tensor]))
        if tensor in available
        else DriftRow(name, note="not in this graph")
        for name, tensor in last.items()
    )


def part_name(node: str, level: Level, modules: Iterable[str] = ()) -> str:
    """Return the stage, block or innermost module that contains a node, or "".

    >>> levels = ("stage", "block", "module")
    >>> [part_name("block1.0.mlp.fc2", level, ["block1.0.mlp"]) for level in levels]
    ['stage1', 'block1.0', 'block1.0.mlp']
    """
    if level == "module":
        return max((m for m in modules if f"{node}.".startswith(f"{m}.")), key=len, default="")
    if (unit := _UNIT.match(node)) is None:
        return ""
    stage = unit["embed"] or unit["block"] or unit["norm"]
    return f"stage{stage}" if level == "stage" and stage else unit[0]


# --- bundle ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArtifactDrift:
    """Drift of one artifact.

    Attributes:
        artifact: name of the artifact.
        rows: the parts, in the order of the network.
    """

    JSON_PROPERTIES: ClassVar = ("worst_names",)

    artifact: str
    rows: tuple[DriftRow, ...]

    @property
    def worst_names(self) -> list[str]:
        """Names of the measured parts: those with a fault first, then by isolated SQNR."""
        measured = [row for row in self.rows if row.fault or row.isolated_db is not None]
        return [row.name for row in sorted(measured, key=lambda row: (not row.fault, row.level))]


@dataclass(frozen=True)
class DriftReport:
    """Drift of the artifacts of a bundle.

    Attributes:
        level: granularity of the parts.
        images: description of the images.
        reference: description of the reference.
        chain: the logits against the original network in float64: PyTorch in float32, the
            rewritten network, and each artifact.
        artifacts: drift of each plain ONNX artifact, by name.
        schema: schema of the document.
    """

    level: Level
    images: str
    reference: str
    chain: tuple[DriftRow, ...]
    artifacts: Mapping[str, ArtifactDrift]
    schema: Literal["van-deploy/drift/3"] = "van-deploy/drift/3"


def drift_of_bundle(
    bundle: Bundle,
    samples: Samples,
    settings: DriftSettings,
    loaded: LoadedVan | None,
    progress: Progress,
) -> DriftReport:
    """Return the drift of the plain ONNX artifacts of ``bundle``.

    Args:
        bundle: the bundle.
        samples: images with the original network's outputs.
        settings: granularity, and the artifacts; by default all plain ONNX artifacts.
        loaded: the original network; None compares with ``model.onnx`` if that passes its gate.
        progress: called with the current step.

    Raises:
        BundleError: an artifact is missing, or does not match the manifest.
        GateFailed: there is no original network, and ``model.onnx`` fails its gate.
        UsageError: an artifact in the settings has no modules to compare.
    """
    plain, entries = plain_onnx_artifacts(bundle), dict[str, ArtifactDrift]()
    for name in settings.artifacts:
        if bundle.artifact(name).name not in plain:
            raise UsageError(
                f"The modules of '{name}' cannot be compared; those of {', '.join(plain)} can.",
                "Use one of these names; `van-deploy verify` compares the others' outputs.",
            )
    outputs = samples.outputs
    chain = [DriftRow("PyTorch float32", samples.noise_db, note="float32 noise")]
    progress("Reference outputs")
    reference = module_reference(bundle, samples, loaded, DEFAULT_PROFILE)
    if isinstance(reference, str):
        remedy = "Compare with the original network, on a host with PyTorch: --against weights."
        raise GateFailed(f"{reference}.", remedy)
    if reference.folding is not None:
        results = reference.outputs(samples.inputs)
        rows = outputs.rows({name: results[module_of(name)] for name in outputs.names})
        note = f"folded weights in float32; relative error of folding {reference.folding:.0e}"
        sqnr = outputs.sqnr_db(samples.logits, rows)
        chain.append(DriftRow("rewritten, float64", sqnr, note=note))
    for name in settings.artifacts or [n for n in plain if loaded is not None or n != "fp32"]:
        progress(f"Each {settings.level} of '{name}'")
        artifact = bundle.artifact(name)
        parts = drift_of_artifact(bundle, artifact, reference, samples.inputs, settings.level)
        method = str(artifact.quantization.get("method", "mse"))
        model, faults = onnx.load(bundle.verified_path(name)), dict[str, list[str]]()
        floor = samples.sqnr_floor(artifact.precision)
        for module, fault in check_graph(model, artifact.precision, samples, floor, method)[1]:
            part = part_name(module, settings.level, (part.name for part in parts))
            faults.setdefault(part, []).append(fault)
        rows_with_faults = (replace(r, fault="; ".join(faults.get(r.name, ()))) for r in parts)
        entries[name] = ArtifactDrift(name, tuple(rows_with_faults))
    for name in bundle.artifacts:
        row = DriftRow(name, note=NOT_INSTRUMENTED)
        if name in plain:
            try:
                with Network(bundle, name) as network:
                    rows = outputs.rows(network.run(samples.inputs))
                row = DriftRow(name, outputs.sqnr_db(samples.logits, rows))
            except Exception as error:  # ONNX Runtime raises bare exception types
                row = DriftRow(name, note=f"does not run: {one_line(error)[:200]}")
        chain.append(row)
    descriptions = samples.description, reference.description
    return DriftReport(settings.level, *descriptions, tuple(chain), entries)
