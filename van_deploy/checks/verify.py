"""Every artifact of a bundle against the original network's own answers.

Asked of each: does it hold its class's SQNR floor and its own record at every batch size,
does an image come out of a batch as it does alone, did a clear decision change, does any
module add more error than its class explains, do INT8 scales suit what they round, and does
FP16 hold every tensor?
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx

from van_deploy.bundle import Artifact, Bundle, edit_bundle
from van_deploy.checks import gates, outputs
from van_deploy.checks.drift import DriftRow, Reference, drift_of_artifact, module_reference
from van_deploy.checks.gates import (
    Finding,
    Limit,
    Outcome,
    numeric_class,
    pass_or_fail,
    skipped_finding,
)
from van_deploy.checks.golden import Samples, check_originals
from van_deploy.checks.graphs import one_line
from van_deploy.checks.outputs import NetworkVerdict
from van_deploy.config import GateSettings, VerifySettings
from van_deploy.documents import plain
from van_deploy.errors import ConversionError, VanDeployError
from van_deploy.runners.base import Images
from van_deploy.runners.network import Network
from van_deploy.stopwatch import Progress, no_progress

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

SHOWN_ROWS = 10
MODULE_IMAGES = 4
MAY_NOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
ALL, DEFAULT_GATES = VerifySettings(), GateSettings()


@dataclass(frozen=True, kw_only=True)
class ArtifactVerdict(NetworkVerdict):
    """What was found of one artifact.

    Attributes:
        artifact: its name.
        precision: of the artifact.
        numeric: the numeric class it was judged in.
        runner: what ran it, or "".
        worst_modules: the modules that add most error, worst first.
    """

    JSON_PROPERTIES: ClassVar = ("outcome", "reason", "limit", "margin_db")

    artifact: str
    precision: str
    numeric: str
    runner: str
    worst_modules: tuple[DriftRow, ...] = ()

    @property
    def limit(self) -> Limit | None:
        """The limit on the SQNR: the higher of the floor's and the record's."""
        found = [f.limit for f in self.findings if f.rule == "SQNR" and f.limit]
        return max(found, key=lambda limit: limit.value, default=None)

    @property
    def margin_db(self) -> float | None:
        """How far the SQNR is above that limit, in dB."""
        found, limit = self.comparison, self.limit
        return found.sqnr_db - limit.value if found and limit else None


@dataclass(frozen=True)
class VerifyReport(gates.GateReport):
    """What was found of every artifact of a bundle.

    Attributes:
        against: what they were compared with.
        images: what they were compared on.
        names: what each image is called.
        noise_db: SQNR of PyTorch in float32 against its float64, on these images.
        modules: what modules were compared with, or "".
        findings: on what belongs to no artifact: how images are read here.
        artifacts: one verdict each, by name.
        allowed: what the user lets pass.
        schema: of the document.
    """

    against: str
    images: str
    names: tuple[str, ...]
    noise_db: float
    modules: str
    findings: tuple[Finding, ...]
    artifacts: Mapping[str, ArtifactVerdict]
    allowed: gates.AllowOptions
    schema: Literal["van-deploy/verify/3"] = "van-deploy/verify/3"

    def named_findings(self) -> list[tuple[str, Finding]]:
        """Return every finding and what it is about: the images, or an artifact."""
        about = [("images", finding) for finding in self.findings]
        return about + [(v.artifact, f) for v in self.artifacts.values() for f in v.findings]

    @property
    def passed(self) -> bool:
        """Whether an artifact passed, and nothing else stands in the way."""
        shown = any(verdict.outcome is Outcome.PASS for verdict in self.artifacts.values())
        return shown and super().passed


def verify_bundle(
    bundle: Bundle,
    samples: Samples,
    asked: VerifySettings = ALL,
    loaded: LoadedVan | None = None,
    rules: GateSettings = DEFAULT_GATES,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Return what is found of each artifact of ``bundle``.

    Args:
        bundle: the bundle.
        samples: its golden samples, or others with the original network's answers.
        asked: which artifacts, whether by module, what runs them, and what may pass.
        loaded: the original network, for the modules; None compares them with ``model.onnx``.
        rules: what a recipe sets otherwise.
        progress: told what is checked.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
    """
    verdicts = dict[str, ArtifactVerdict]()
    reference: Reference | str = ""
    for name in outputs.select_artifacts(bundle, asked.artifacts):
        artifact, opened = bundle.artifact(name), outputs.open_artifact(bundle, name, asked)
        if isinstance(opened, Finding):
            numeric, runner, said = numeric_class(artifact.precision), "", NetworkVerdict((opened,))
        else:
            progress(f"'{name}' at every batch size")
            numeric, said = _judged(opened, artifact, samples, rules)
            runner = opened.runner_description
        findings, modules = [*said.findings], tuple[DriftRow, ...]()
        if said.comparison is not None and name in outputs.plain_onnx_artifacts(bundle):
            progress(f"'{name}', its tensors")
            method = str(artifact.quantization.get("method", "mse"))
            model, profile = onnx.load(bundle.verified_path(name)), rules.of(numeric)
            floor = gates.sqnr_floor(numeric, samples.noise_db, profile)
            findings += outputs.check_graph(model, numeric, samples, floor, method)[0]
            if asked.modules and (loaded is not None or name != "fp32"):
                progress(f"'{name}', module by module")
                reference = reference or module_reference(bundle, samples, loaded, rules.fp32)
                limit = gates.module_floor(numeric, profile)
                modules, found = _modules(bundle, artifact, reference, samples.inputs, limit)
                findings.append(found)
        what = {**vars(said), "findings": tuple(findings), "precision": artifact.precision}
        verdicts[name] = ArtifactVerdict(
            **what, artifact=name, numeric=numeric, runner=runner, worst_modules=modules
        )
    return VerifyReport(
        against="the golden samples" if loaded is None else "the original network",
        images=samples.description,
        names=samples.names,
        noise_db=samples.noise_db,
        modules=reference.described if isinstance(reference, Reference) else "",
        findings=tuple(check_originals(bundle, samples)) if samples.golden else (),
        artifacts=verdicts,
        allowed=gates.AllowOptions(asked.allow_skip, asked.allow_inconclusive),
    )


def _judged(
    opened: Network, artifact: Artifact, samples: Samples, rules: GateSettings
) -> tuple[str, NetworkVerdict]:
    """Return the numeric class of an artifact that is run here, and what its answers say."""
    numeric, bundle = numeric_class(artifact.precision), opened.bundle
    records = artifact.golden_sqnr_db if samples.golden else {}
    first, *more = outputs.batch_sizes(bundle.manifest.batch)
    served = [one for one in samples.others if opened.supports_size(one.inputs.shape[2:])]
    try:
        with opened:
            numeric = numeric_class(artifact.precision, tf32=opened.tf32)
            return numeric, outputs.check_outputs(
                lambda of, rows: opened.run(outputs.inputs_for(opened, of, rows)),
                replace(samples, others=tuple(served)),
                [first, *(size for size in more if opened.supports_batch(size))],
                gates.sqnr_floor(numeric, samples.noise_db, rules.of(numeric)),
                records.get(outputs.record_key(opened.runner, numeric)),
            )
    except Exception as error:  # the runtimes raise their own bare types
        if isinstance(error, VanDeployError) and not isinstance(error, ConversionError):
            raise
        loads = "load" if isinstance(error, ConversionError) else "run at batch 1"
        return numeric, NetworkVerdict(
            (pass_or_fail("runs", f"it does not {loads}: {one_line(error)}"),)
        )


def _modules(
    bundle: Bundle, artifact: Artifact, reference: Reference | str, images: Images, limit: Limit
) -> tuple[tuple[DriftRow, ...], Finding]:
    """Return the modules that add most error, and whether any adds too much."""
    if isinstance(reference, str):
        return (), skipped_finding("modules", reference)
    rows = drift_of_artifact(bundle, artifact, reference, images[:MODULE_IMAGES], "module")
    placed = sorted((r for r in rows if r.isolated_db is not None), key=lambda row: row.level)
    if not placed:
        return (), pass_or_fail("modules", f"they cannot be compared: {rows[0].note}")
    bad = [f"{row.name} {row.level:.1f} dB" for row in placed if row.level < limit.value]
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    fault = f"modules below {limit.value:g} dB ({limit.origin}): {', '.join(bad[:4])}{more}"
    shown, worst = f"{placed[0].name} adds most", placed[0].level
    found = pass_or_fail("modules", fault * bool(bad), worst, limit, shown)
    return tuple(placed[:SHOWN_ROWS]), replace(found, unit="dB")


def record_check(bundle: Bundle, name: str, result: object) -> str:
    """Write the result of a check into the manifest, with the digests of the artifacts.

    A bundle that may only be read keeps no record; the check is worth no less for it.

    Args:
        bundle: what was checked.
        name: of the check, such as ``verify``.
        result: the report.

    Returns:
        Why nothing was recorded, a sentence, or "".

    Raises:
        BundleError: the bundle was changed while it was checked.
    """
    digests = {key: artifact.sha256 for key, artifact in bundle.artifacts.items()}
    try:
        with edit_bundle(bundle.path) as draft:
            draft.checks[name] = {**plain(result), "artifacts_sha256": digests}
    except OSError as error:
        if error.errno not in MAY_NOT_WRITE:
            raise
        return f"'{bundle.path}' may only be read, so the result of '{name}' is not kept in it."
    return ""
