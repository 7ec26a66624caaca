"""Where an artifact leaves the network it was made from.

Two figures for each part (stage, block or module) of each plain ONNX artifact:

* ``sqnr_db``: the part's result in the running artifact against the reference,
  so with the error of everything before it;
* ``isolated_db``: the same when the part is fed the *reference's* tensors, so only
  the error it adds itself. Parts are ranked by this one: an error is named
  where it arises, not where it is first seen or grows.

Parts with a fault that the error does not show are ranked before the others: an INT8 scale
out of its bounds (:mod:`van_deploy.checks.scales`), and a tensor that overflows FP16, which a
CPU does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from van_deploy.bundle import Bundle
from van_deploy.checks.gates import sqnr_floor
from van_deploy.checks.graphs import Level, cuts_of, part_name
from van_deploy.checks.judging import judge_new
from van_deploy.checks.layers import DriftRow, channels_of, drift_of_graph, overflows_of_graph
from van_deploy.checks.opened import plain_onnx
from van_deploy.checks.reference import NoiseSum, OnnxModules, TorchModules
from van_deploy.checks.samples import Samples
from van_deploy.checks.scales import judge_scales, scale_faults
from van_deploy.errors import GateFailed
from van_deploy.graph.names import module_of
from van_deploy.metrics import sqnr_db
from van_deploy.runners.network import Network

if TYPE_CHECKING:
    from onnx import ModelProto

    from van_deploy.model.checkpoint import LoadedVan

__all__ = ["ArtefactDrift", "DriftReport", "Link", "drift_of_bundle"]

SCHEMA: Final = "van-deploy/drift/2"

FUSION_NOTE = (
    "Extra outputs keep a runtime from fusing across them, so inside an engine the parts "
    "would run as other kernels than in use: engines are compared by their logits only."
)

SHOWN_ROWS = 10

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Link:
    """One link of the chain from the original network to the last artifact.

    Attributes:
        name: what it is.
        sqnr_db: of its logits against the original network in float64; None if skipped.
        reason: why it was skipped, or what it says.
    """

    name: str
    sqnr_db: float | None
    reason: str = ""


@dataclass(frozen=True)
class ArtefactDrift:
    """Every part of one artifact.

    Attributes:
        artefact: its name.
        rows: the parts, in the order of the network.
    """

    JSON_PROPERTIES: ClassVar = ("worst_names",)

    artefact: str
    rows: tuple[DriftRow, ...]

    @property
    def worst_names(self) -> list[str]:
        """The names of the first of :attr:`worst`."""
        return [row.name for row in self.worst[:SHOWN_ROWS]]

    @property
    def worst(self) -> list[DriftRow]:
        """The parts with a fault first, then by the error they add, the largest first."""
        placed = [row for row in self.rows if row.isolated_db is not None]
        return sorted(placed, key=lambda row: (not row.fault, float(row.isolated_db or 0.0)))


@dataclass(frozen=True)
class DriftReport:
    """Where each artifact of a bundle drifts.

    Attributes:
        level: how fine the parts are.
        images: what was fed.
        count: how many images.
        reference: what the parts were compared with.
        chain: the links in order.
        artefacts: the parts of each plain ONNX artifact, by name.
        notes: what is to be known of such figures.
        schema: of the document.
    """

    level: Level
    images: str
    count: int
    reference: str
    chain: tuple[Link, ...]
    artefacts: Mapping[str, ArtefactDrift]
    notes: tuple[str, ...] = (FUSION_NOTE,)
    schema: Literal["van-deploy/drift/2"] = SCHEMA


def drift_of_bundle(
    bundle: Bundle,
    samples: Samples,
    *,
    loaded: LoadedVan | None = None,
    level: Level = "block",
    artefacts: Sequence[str] = (),
    progress: Progress | None = None,
) -> DriftReport:
    """Return where each plain ONNX artifact of ``bundle`` leaves the network.

    Args:
        bundle: the bundle.
        samples: images with the original network's answers.
        loaded: the original network; None compares with ``model.onnx`` once that holds.
        level: ``stage``, ``block`` or ``module``.
        artefacts: names of ONNX artifacts; by default all plain ones.
        progress: told what is measured.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
        UsageError: the graphs carry no module names.
        GateFailed: there is no original network, and ``model.onnx`` does not hold.
    """
    import onnx

    say = progress or (lambda _: None)
    base = onnx.load(bundle.verified("fp32"))
    chain = [Link("PyTorch float32", samples.noise_db, "the noise of float32 itself")]
    reference: TorchModules | OnnxModules
    if loaded is not None:
        say("PyTorch in float64, rewritten")
        reference = TorchModules(bundle, loaded, samples.inputs)
        chain.append(_rewritten(reference, samples))
    else:
        reference = OnnxModules(_held(base, samples))
    cuts = cuts_of(base, level, reference.modules)
    names = list(artefacts) or [
        name for name in plain_onnx(bundle) if loaded is not None or name != "fp32"
    ]
    entries = {}
    for name in names:
        say(f"Every {level} of '{name}', alone and in the whole")
        model = onnx.load(bundle.verified(name))
        channels = channels_of(bundle, bundle.artefact(name))
        rows = drift_of_graph(model, reference, samples.inputs, cuts, channels)
        faults = _faults(bundle, name, model, samples)
        entries[name] = ArtefactDrift(name, _with_faults(rows, faults, level))
    chain += [_link(bundle, name, samples) for name in bundle.artefacts]
    return DriftReport(
        level, samples.description, len(samples), reference.described, tuple(chain), entries
    )


def _rewritten(reference: TorchModules, samples: Samples) -> Link:
    found = reference.outputs(samples.inputs)
    outputs = {name: found[module_of(name)] for name in samples.outputs.names}
    noise = NoiseSum()
    noise.add(samples.logits, samples.outputs.rows(outputs))
    folding = f"folding itself is exact to {reference.fold.relative_error:.0e}"
    return Link("rewritten, float64", noise.sqnr_db, f"folded weights stored in float32; {folding}")


def _held(model: ModelProto, samples: Samples) -> ModelProto:
    judged, _ = judge_new(model, "fp32", samples)
    reasons = [f.message for f in judged.findings if f.outcome.value == "fail"]
    if reasons:
        raise GateFailed(
            f"model.onnx does not hold on the golden samples, so nothing can be compared with "
            f"it: {reasons[0]}.",
            "Compare with the original network, on a machine that has PyTorch and the weights.",
        )
    return model


def _link(bundle: Bundle, name: str, samples: Samples) -> Link:
    """Return an artifact's link: its logits in ONNX Runtime, or why there are none."""
    if name not in plain_onnx(bundle):
        return Link(name, None, "see `van-deploy verify`: only plain ONNX graphs are opened here")
    try:
        with Network(bundle, name) as network:
            found = samples.outputs.rows(network.run(samples.inputs))
            return Link(name, sqnr_db(samples.logits, found))
    except Exception as error:  # ONNX Runtime raises its own bare types
        return Link(name, None, f"does not run: {' '.join(str(error).split())[:200]}")


def _faults(bundle: Bundle, name: str, model: ModelProto, samples: Samples) -> dict[str, str]:
    """Return what is wrong in a graph beside its error, by module or node."""
    artefact = bundle.artefact(name)
    try:
        faults = overflows_of_graph(model, samples.inputs)
        if artefact.precision == "int8":
            method = str(artefact.quantization.get("method", "mse"))
            floor = sqnr_floor("int8", samples.noise_db)
            faults |= scale_faults(judge_scales(model, samples, floor, method)[1])
    except Exception as error:  # ONNX Runtime raises its own bare types
        return {"": f"its tensors cannot be looked at: {' '.join(str(error).split())[:200]}"}
    return faults


def _with_faults(
    rows: Sequence[DriftRow], faults: Mapping[str, str], level: Level
) -> tuple[DriftRow, ...]:
    """Return the rows with what is wrong inside each beside the error."""
    by_part: dict[str, list[str]] = {}
    names = {row.name for row in rows}
    for module, fault in faults.items():
        by_part.setdefault(part_name(module, level, names), []).append(fault)
    return tuple(replace(row, fault="; ".join(by_part.get(row.name, ()))) for row in rows)
