"""Where an artefact leaves the network it was made from.

Two figures for each part (stage, block or module) of each ONNX artefact:

* ``sqnr_db``: the part's result in the running artefact against the reference,
  so with the error of everything before it;
* ``added_db``: the same when the part is fed the *reference's* tensors, so only
  the error it adds itself. Parts are ranked by this one: an error is named
  where it arises, not where it is first seen or grows.

Parts with a fault that the error does not show are ranked before the others: a wrong
step of INT8 (:mod:`van_deploy.checks.steps`), whose bit less in a quiet layer is still
less error than a loud layer has, and a tensor that overflows FP16
(:mod:`van_deploy.checks.overflow`), which a CPU does not notice.

The reference is the rewritten network in float64; the chain from the original
PyTorch network to the last artefact is measured on the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.checks.chain import Step, artefact_step, export_steps, pytorch_steps
from van_deploy.checks.isolate import Level, cuts_of, part_name
from van_deploy.checks.opened import plain_onnx
from van_deploy.checks.overflow import overflows_of_graph
from van_deploy.checks.parts import DriftRow, drift_of_graph, is_equalized
from van_deploy.checks.reference import reference_of
from van_deploy.checks.steps import faults_of, steps_of_graph
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.runners.base import Images

__all__ = [
    "FUSION_NOTE",
    "SCHEMA",
    "ArtefactDrift",
    "DriftReport",
    "drift_of_bundle",
    "with_faults",
]

SCHEMA = "van-deploy/drift/1"

FUSION_NOTE = (
    "Extra outputs keep a run time from fusing across them, so inside an engine the parts "
    "would run as other kernels than in use: engines are compared by their logits only."
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ArtefactDrift:
    """Every part of one artefact, in the order of the network."""

    artefact: str
    rows: tuple[DriftRow, ...]

    @property
    def worst(self) -> list[DriftRow]:
        """The parts with a fault first, then by the error they add, the largest first."""
        placed = [row for row in self.rows if row.added_db is not None]
        return sorted(placed, key=lambda row: (not row.fault, float(row.added_db or 0.0)))


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
    chain = [*pytorch_steps(reference, loaded, images), *export_steps(bundle, reference, images)]
    entries = []
    for name in names:
        say(f"Every {level} of '{name}', alone and in the whole")
        model = base if name == "fp32" else onnx.load(bundle.verified(name))
        equalized = is_equalized(bundle.artefact(name))
        rows = drift_of_graph(model, reference, images, cuts, equalized=equalized)
        faults = faults_of(steps_of_graph(model, images, bundle.artefact(name)))
        faults |= overflows_of_graph(model, images)
        entries.append(ArtefactDrift(name, with_faults(rows, faults, level)))
        chain.append(artefact_step(name, model, reference, images))
    chain += [
        Step(name, None, "engines run on their GPU only; see `van-deploy verify`")
        for name, artefact in bundle.artefacts.items()
        if artefact.kind == "engine"
    ]
    return DriftReport(level, described, len(images), tuple(chain), tuple(entries))


def with_faults(
    rows: Sequence[DriftRow], faults: Mapping[str, str], level: Level
) -> tuple[DriftRow, ...]:
    """Return the rows with what is wrong inside each beside the error.

    Args:
        rows: the parts.
        faults: by module or node.
        level: how fine the parts are.
    """
    by_part: dict[str, list[str]] = {}
    names = {row.name for row in rows}
    for module, fault in faults.items():
        by_part.setdefault(part_name(module, level, names), []).append(fault)
    return tuple(replace(row, fault="; ".join(by_part.get(row.name, ()))) for row in rows)
