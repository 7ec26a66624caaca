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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from van_deploy.bundle import Bundle
from van_deploy.checks.gates import sqnr_floor
from van_deploy.checks.graphs import one_line
from van_deploy.checks.layers import (
    DriftRow,
    Level,
    drift_of_artefact,
    overflows_of_graph,
    part_name,
)
from van_deploy.checks.opened import plain_onnx
from van_deploy.checks.reference import TorchModules, module_reference
from van_deploy.checks.samples import Samples
from van_deploy.checks.scales import judge_scales
from van_deploy.config import DriftSettings
from van_deploy.graph.names import module_of
from van_deploy.runners.network import Network

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan


SCHEMA: Final = "van-deploy/drift/2"

FUSION_NOTE = (
    "Extra outputs keep a runtime from fusing across them, so inside an engine the parts "
    "would run as other kernels than in use: engines are compared by their logits only."
)

SHOWN_ROWS = 10


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
    def worst(self) -> list[DriftRow]:
        """The parts with a fault first, then by the error they add, the largest first."""
        placed = [row for row in self.rows if row.isolated_db is not None]
        return sorted(placed, key=lambda row: (not row.fault, row.level))

    @property
    def worst_names(self) -> list[str]:
        """The names of the first of :attr:`worst`."""
        return [row.name for row in self.worst[:SHOWN_ROWS]]


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
    asked: DriftSettings | None = None,
    *,
    loaded: LoadedVan | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> DriftReport:
    """Return where each plain ONNX artifact of ``bundle`` leaves the network.

    Args:
        bundle: the bundle.
        samples: images with the original network's answers.
        asked: how fine, and which artifacts; by default all plain ONNX ones.
        loaded: the original network; None compares with ``model.onnx`` once that holds.
        progress: told what is measured.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
        UsageError: the graphs carry no module names.
        GateFailed: there is no original network, and ``model.onnx`` does not hold.
    """
    asked = asked or DriftSettings()
    chain = [Link("PyTorch float32", samples.noise_db, "the noise of float32 itself")]
    progress("What parts are compared with")
    reference = module_reference(bundle, samples, loaded)
    if isinstance(reference, TorchModules):
        chain.append(_rewritten(reference, samples))
    names = asked.artefacts or [n for n in plain_onnx(bundle) if loaded is not None or n != "fp32"]
    entries = {}
    for name in names:
        progress(f"Every {asked.level} of '{name}', alone and in the whole")
        artefact = bundle.artefact(name)
        rows = drift_of_artefact(bundle, artefact, reference, samples.inputs, asked.level)
        inside: dict[str, list[str]] = {}
        for module, fault in _faults(bundle, name, samples):
            part = part_name(module, asked.level, [row.name for row in rows])
            inside.setdefault(part, []).append(fault)
        entries[name] = ArtefactDrift(
            name,
            tuple(replace(row, fault="; ".join(inside.get(row.name, ()))) for row in rows),
        )
    chain += [_link(bundle, name, samples) for name in bundle.artefacts]
    return DriftReport(
        asked.level, samples.description, len(samples), reference.described, tuple(chain), entries
    )


def _rewritten(reference: TorchModules, samples: Samples) -> Link:
    found, outputs = reference.outputs(samples.inputs), samples.outputs
    rows = outputs.rows({name: found[module_of(name)] for name in outputs.names})
    folding = f"folding itself is exact to {reference.fold.relative_error:.0e}"
    return Link(
        "rewritten, float64",
        outputs.sqnr_db(samples.logits, rows),
        f"folded weights stored in float32; {folding}",
    )


def _link(bundle: Bundle, name: str, samples: Samples) -> Link:
    """Return an artifact's link: its logits in ONNX Runtime, or why there are none."""
    if name not in plain_onnx(bundle):
        return Link(name, None, "see `van-deploy verify`: only plain ONNX graphs are opened here")
    try:
        with Network(bundle, name) as network:
            found = samples.outputs.rows(network.run(samples.inputs))
            return Link(name, samples.outputs.sqnr_db(samples.logits, found))
    except Exception as error:  # ONNX Runtime raises its own bare types
        return Link(name, None, f"does not run: {one_line(error)[:200]}")


def _faults(bundle: Bundle, name: str, samples: Samples) -> list[tuple[str, str]]:
    """Return what is wrong in a graph beside its error, each with its module or node."""
    import onnx

    artefact, model = bundle.artefact(name), onnx.load(bundle.verified(name))
    try:
        faults = list(overflows_of_graph(model, samples.inputs).items())
        if artefact.precision == "int8":
            method = str(artefact.quantization.get("method", "mse"))
            floor = sqnr_floor("int8", samples.noise_db)
            rows = judge_scales(model, samples, floor, method)[1]
            faults += [(module, row.fault) for row in rows if row.fault for module in row.modules]
    except Exception as error:  # ONNX Runtime raises its own bare types
        return [("", f"its tensors cannot be looked at: {one_line(error)[:200]}")]
    return faults
