"""Every artifact of a bundle against the original network's own answers.

Asked of each: does it hold its class's SQNR floor and its own record at every batch size,
does an image come out of a batch as it does alone, did a clear decision change, does any
module add more error than its class explains, do INT8 scales suit what they round, does FP16
hold every tensor, and is its preprocessing the weights'?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from van_deploy.bundle import Artefact, Bundle
from van_deploy.checks.gates import (
    Allowed,
    Finding,
    held,
    module_floor,
    numeric_class,
    skipped,
    sqnr_floor,
)
from van_deploy.checks.golden import judge_originals
from van_deploy.checks.graphs import one_line
from van_deploy.checks.judging import (
    Judgement,
    batch_sizes,
    judge_answers,
    judge_graph,
    record_key,
)
from van_deploy.checks.layers import DriftRow, drift_of_artefact
from van_deploy.checks.opened import NotRun, chosen_artefacts, given_to, open_artefact, plain_onnx
from van_deploy.checks.reference import OnnxModules, TorchModules, module_reference
from van_deploy.checks.samples import Samples
from van_deploy.checks.verdicts import ArtefactVerdict, VerifyReport
from van_deploy.config import GateSettings, VerifySettings
from van_deploy.documents import json_from, plain
from van_deploy.errors import ConversionError, GateFailed, VanDeployError
from van_deploy.runners.network import Network

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

MODULE_IMAGES = 4


def verify_bundle(
    bundle: Bundle,
    samples: Samples,
    asked: VerifySettings | None = None,
    *,
    loaded: LoadedVan | None = None,
    gates: GateSettings | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> VerifyReport:
    """Return what is found of each artifact of ``bundle``.

    Args:
        bundle: the bundle.
        samples: its golden samples, or others with the original network's answers.
        asked: which artifacts, whether by module, what runs them, and what may pass.
        loaded: the original network, for the modules; None compares them with ``model.onnx``.
        gates: limits a recipe sets otherwise.
        progress: told what is checked.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
    """
    asked = asked or VerifySettings()
    work = _Verifying(bundle, samples, asked, loaded, gates or GateSettings(), progress)
    verdicts = {name: work.verdict(name) for name in chosen_artefacts(bundle, asked.artefacts)}
    return VerifyReport(
        against="the golden samples" if loaded is None else "the original network",
        images=samples.description,
        names=samples.names,
        noise_db=samples.noise_db,
        modules=getattr(vars(work).get("reference"), "described", ""),
        findings=tuple(judge_originals(bundle, samples)) if samples.golden else (),
        artefacts=verdicts,
        allowed=Allowed(asked.allow_skip, asked.allow_inconclusive),
    )


@dataclass(frozen=True)
class _Verifying:
    """What every artifact of a bundle is verified with."""

    bundle: Bundle
    samples: Samples
    asked: VerifySettings
    loaded: LoadedVan | None
    gates: GateSettings
    progress: Callable[[str], None]

    @cached_property
    def reference(self) -> TorchModules | OnnxModules | Finding:
        """What modules are compared with, or why they are not."""
        try:
            return module_reference(self.bundle, self.samples, self.loaded, self.gates.fp32)
        except GateFailed as error:
            return skipped("modules", error.message.rstrip("."))

    def verdict(self, name: str) -> ArtefactVerdict:
        """Return what is found of one artifact."""
        artefact, opened = self.bundle.artefact(name), open_artefact(self.bundle, name, self.asked)
        numeric, modules = numeric_class(artefact.precision), tuple[DriftRow, ...]()
        if isinstance(opened, NotRun):
            runner, said = opened.runner, Judgement((skipped("runs", opened.reason, opened.kind),))
        else:
            self.progress(f"'{name}' at every batch size")
            numeric, said = self.answers(opened, artefact)
            contract = contract_failures(self.bundle, name)
            findings = [*said.findings, *(held("contract", fault) for fault in contract or [""])]
            said, runner = replace(said, findings=tuple(findings)), opened.described
            if said.comparison is not None and name in plain_onnx(self.bundle):
                said, modules = self.inside(said, artefact, numeric)
        return ArtefactVerdict(
            **vars(said),
            artefact=name,
            precision=artefact.precision,
            numeric=numeric,
            runner=runner,
            modules=modules,
        )

    def inside(
        self, said: Judgement, artefact: Artefact, numeric: str
    ) -> tuple[Judgement, tuple[DriftRow, ...]]:
        """Return what is said of an artifact and of its graph's tensors, and each module."""
        import onnx

        name, modules = artefact.name, tuple[DriftRow, ...]()
        self.progress(f"'{name}', its tensors")
        method = str(artefact.quantization.get("method", "mse"))
        model, profile = onnx.load(self.bundle.verified(name)), self.gates.of(numeric)
        findings, scales = judge_graph(model, numeric, self.samples, method, profile)
        if self.asked.modules and (self.loaded is not None or name != "fp32"):
            self.progress(f"'{name}', module by module")
            modules, finding = self.modules(artefact, numeric)
            findings.append(finding)
        return replace(said, findings=(*said.findings, *findings), scales=scales), modules

    def answers(self, opened: Network, artefact: Artefact) -> tuple[str, Judgement]:
        """Return the numeric class of an artifact that is run here, and what its answers say."""
        numeric, samples = numeric_class(artefact.precision), self.samples
        records = artefact.golden_sqnr_db if samples.golden else {}
        sizes = batch_sizes(self.bundle.manifest.batch)
        others = (one for one in samples.others if opened.serves_size(one.inputs.shape[2:]))
        try:
            with opened:
                numeric = numeric_class(artefact.precision, tf32=opened.tf32)
                return numeric, judge_answers(
                    opened.run,
                    lambda given: given_to(opened, given.inputs, given.pixels),
                    replace(samples, others=tuple(others)),
                    [sizes[0], *(size for size in sizes[1:] if opened.serves(size))],
                    sqnr_floor(numeric, samples.noise_db, self.gates.of(numeric)),
                    records.get(record_key(opened.runner, numeric)),
                )
        except ConversionError as error:
            fault = held("loads", f"it does not load: {one_line(error)}")
        except VanDeployError:
            raise
        except Exception as error:  # the runtimes raise their own bare types
            fault = held("runs", f"it does not run at batch 1: {one_line(error)}")
        return numeric, Judgement((fault,))

    def modules(self, artefact: Artefact, numeric: str) -> tuple[tuple[DriftRow, ...], Finding]:
        """Return what each module adds, most first, and whether any adds too much."""
        if isinstance(self.reference, Finding):
            return (), self.reference
        images = self.samples.inputs[:MODULE_IMAGES]
        rows = drift_of_artefact(self.bundle, artefact, self.reference, images, "module")
        placed = sorted(
            (row for row in rows if row.isolated_db is not None), key=lambda row: row.level
        )
        if not placed:
            return (), held("modules", f"they cannot be compared: {rows[0].note}")
        limit = module_floor(numeric, self.gates.of(numeric))
        bad = [f"{row.name} {row.level:.1f} dB" for row in placed if row.level < limit.value]
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        fault = f"modules below {limit.value:g} dB ({limit.origin}): {', '.join(bad[:4])}{more}"
        shown = f"{placed[0].name} adds most"
        worst = placed[0].level
        return tuple(placed), held("modules", fault * bool(bad), worst, limit, "dB", shown)


def contract_failures(bundle: Bundle, name: str) -> list[str]:
    """Return what an artifact's ONNX file says of itself that the manifest contradicts."""
    import onnx

    path, manifest = bundle.verified(name), bundle.manifest
    if path.suffix != ".onnx":
        return []
    model = onnx.load(path, load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    written, expected = said.get("van_deploy.preprocessing"), plain(manifest.preprocessing)
    made_for = expected if written is None else json_from(written)
    faults = [
        f"the file was made for {key} {made_for.get(key)}, the manifest says {value}"
        for key, value in expected.items()
        if key != "source" and made_for.get(key) != value
    ]
    weights = manifest.weights.sha256
    if said.get("van_deploy.weights_sha256", weights) != weights:
        faults.append("the file was made from other weights than the manifest names")
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if batch and batch != manifest.batch.fixed:
        faults.append(f"its batch is frozen at {batch}")
    return faults
