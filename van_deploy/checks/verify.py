"""Verification of every artifact of a bundle against the original network's outputs.

The checks of each artifact: SQNR against the floor of its class and its own record at every batch
size, batch invariance, label flips, isolated SQNR of every module, INT8 scales, and FP16 overflows.
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
from van_deploy.checks.gates import Finding, Limit, numeric_class, pass_or_fail
from van_deploy.checks.golden import Samples, check_originals
from van_deploy.checks.graphs import one_line
from van_deploy.checks.outputs import NetworkVerdict
from van_deploy.config import GateSettings, VerifySettings
from van_deploy.documents import limit_lines, plain
from van_deploy.errors import ConversionError, VanDeployError
from van_deploy.runners.base import Images
from van_deploy.runners.network import Network
from van_deploy.stopwatch import Progress, no_progress

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

MAX_MODULES = 10
MODULE_IMAGES = 4
READ_ONLY_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)
DEFAULT_SETTINGS, DEFAULT_GATES = VerifySettings(), GateSettings()


@dataclass(frozen=True, kw_only=True)
class ArtifactVerdict(NetworkVerdict):
    """Verdict on one artifact.

    Attributes:
        artifact: name of the artifact.
        precision: precision of the artifact.
        numeric: numeric class of the artifact.
        runner: description of the runner, or "".
        worst_modules: the modules with the lowest isolated SQNR, worst first.
    """

    JSON_PROPERTIES: ClassVar = ("outcome", "reason", "limit", "margin_db")

    artifact: str
    precision: str
    numeric: str
    runner: str
    worst_modules: tuple[DriftRow, ...] = ()

    @property
    def limit(self) -> Limit | None:
        """Limit of the SQNR: the floor or the record, whichever is higher."""
        limits = [f.limit for f in self.findings if f.rule == "SQNR" and f.limit]
        return max(limits, default=None)

    @property
    def margin_db(self) -> float | None:
        """Margin of the SQNR above its limit, in dB."""
        comparison, limit = self.comparison, self.limit
        return comparison.sqnr_db - limit.value if comparison and limit else None


@dataclass(frozen=True)
class VerifyReport(gates.GateReport):
    """Result of the verification of a bundle.

    Attributes:
        against: the reference.
        images: description of the images.
        names: name of each image.
        noise_db: SQNR of PyTorch in float32 against its float64, on these images.
        modules: reference of the modules, or "".
        findings: findings on the decoding of images on this machine.
        artifacts: verdict on each artifact, by name.
        allowed: the user's allow options.
        schema: schema of the document.
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
        """Return every finding with its subject: ``images`` or an artifact."""
        images = [("images", finding) for finding in self.findings]
        return images + [(v.artifact, f) for v in self.artifacts.values() for f in v.findings]


def verify_bundle(
    bundle: Bundle,
    samples: Samples,
    settings: VerifySettings = DEFAULT_SETTINGS,
    loaded: LoadedVan | None = None,
    rules: GateSettings = DEFAULT_GATES,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Verify the artifacts of ``bundle``.

    Args:
        bundle: the bundle.
        samples: its golden samples, or others with the original network's outputs.
        settings: artifacts, runner, allow options, and whether to check modules.
        loaded: the original network, for the modules; None compares them with ``model.onnx``.
        rules: limits of the recipe, which take precedence.
        progress: called with the current step.

    Raises:
        BundleError: an artifact is missing, or does not match the manifest.
    """
    verdicts = dict[str, ArtifactVerdict]()
    reference: Reference | str = ""
    for name in outputs.select_artifacts(bundle, settings.artifacts):
        artifact, network = bundle.artifact(name), outputs.open_artifact(bundle, name, settings)
        numeric, runner = str(artifact.precision), ""
        if isinstance(network, Finding):
            verdict = NetworkVerdict((network,))
        else:
            progress(f"'{name}' at every batch size")
            numeric, verdict = _run_checks(network, artifact, samples, rules)
            runner = network.runner_description
        findings, modules = [*verdict.findings], tuple[DriftRow, ...]()
        if verdict.comparison is not None and name in outputs.plain_onnx_artifacts(bundle):
            progress(f"'{name}', tensors")
            method = str(artifact.quantization.get("method", "mse"))
            model, profile = onnx.load(bundle.verified_path(name)), rules.of(numeric)
            floor = samples.sqnr_floor(numeric, profile)
            findings += outputs.check_graph(model, numeric, samples, floor, method)[0]
            if settings.modules and (loaded is not None or name != "fp32"):
                progress(f"'{name}', modules")
                reference = reference or module_reference(bundle, samples, loaded, rules.fp32)
                limit, inputs = gates.module_floor(numeric, profile), samples.inputs
                modules, finding = _check_modules(bundle, artifact, reference, inputs, limit)
                findings.append(finding)
        fields = {**vars(verdict), "findings": tuple(findings), "precision": artifact.precision}
        verdicts[name] = ArtifactVerdict(
            **fields, artifact=name, numeric=numeric, runner=runner, worst_modules=modules
        )
    return VerifyReport(
        against="the golden samples" if loaded is None else "the original network",
        images=samples.description,
        names=samples.names,
        noise_db=samples.noise_db,
        modules=reference.description if isinstance(reference, Reference) else "",
        findings=tuple(check_originals(bundle, samples)) if samples.golden else (),
        artifacts=verdicts,
        allowed=gates.AllowOptions(settings.allow_skip, settings.allow_inconclusive),
    )


def _run_checks(
    network: Network, artifact: Artifact, samples: Samples, rules: GateSettings
) -> tuple[str, NetworkVerdict]:
    """Run an artifact and return its numeric class and the verdict on its outputs."""
    numeric, golden = str(artifact.precision), network.bundle.manifest.golden
    same = samples.golden and golden is not None and len(samples) == golden.count
    records = artifact.golden_sqnr_db if same else {}
    first, *more = outputs.batch_sizes(network.bundle.manifest.batch)
    sizes = [other for other in samples.others if network.supports_size(other.inputs.shape[2:])]
    try:
        with network:
            numeric = numeric_class(artifact.precision, tf32=network.tf32)
            return numeric, outputs.check_outputs(
                lambda of, rows: network.run(outputs.inputs_for(network, of, rows)),
                replace(samples, others=tuple(sizes)),
                [first, *(size for size in more if network.supports_batch(size))],
                samples.sqnr_floor(numeric, rules.of(numeric)),
                records.get(outputs.record_key(network.runner, numeric)),
            )
    except Exception as error:  # the runtimes raise bare exception types
        if isinstance(error, VanDeployError) and not isinstance(error, ConversionError):
            raise
        step = "load" if isinstance(error, ConversionError) else f"run at batch {first}"
        finding = pass_or_fail("runs", f"it does not {step}: {one_line(error)}")
        return numeric, NetworkVerdict((finding,))


def _check_modules(
    bundle: Bundle, artifact: Artifact, reference: Reference | str, images: Images, limit: Limit
) -> tuple[tuple[DriftRow, ...], Finding]:
    """Return the modules with the lowest isolated SQNR, and the finding on the lowest."""
    if isinstance(reference, str):
        return (), gates.skipped_finding("modules", reference)
    rows = drift_of_artifact(bundle, artifact, reference, images[:MODULE_IMAGES], "module")
    worst = sorted((r for r in rows if r.isolated_db is not None), key=lambda row: row.level)
    if not worst:
        return (), pass_or_fail("modules", f"modules cannot be compared: {rows[0].note}")
    bad = [f"{row.name} {row.level:.1f} dB" for row in worst if row.level < limit.value]
    shown = ", ".join(limit_lines(bad, 4))
    fault = f"modules below {limit.value:g} dB ({limit.origin}): {shown}" * bool(bad)
    evidence = f"the worst module is {worst[0].name}"
    finding = pass_or_fail("modules", fault, worst[0].level, limit, evidence)
    return tuple(worst[:MAX_MODULES]), replace(finding, unit="dB")


def record_check(bundle: Bundle, name: str, result: object) -> str:
    """Write the result of a check into the manifest, with the digests of the artifacts.

    In a read-only bundle nothing is recorded; the result is valid nevertheless.

    Args:
        bundle: the checked bundle.
        name: name of the check, such as ``verify``.
        result: the report.

    Returns:
        A sentence that says why nothing was recorded, or "".

    Raises:
        BundleError: the bundle was changed while it was checked.
    """
    digests = {key: artifact.sha256 for key, artifact in bundle.artifacts.items()}
    try:
        with edit_bundle(bundle.path) as draft:
            draft.checks[name] = {**plain(result), "artifacts_sha256": digests}
    except OSError as error:
        if error.errno not in READ_ONLY_ERRORS:
            raise
        return f"'{bundle.path}' is read-only, so the result of '{name}' was not recorded in it."
    return ""
