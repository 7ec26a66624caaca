"""Every artifact of a bundle against the original network's own answers.

Asked of each: does it hold its class's SQNR floor and its own record at every batch size,
does an image come out of a batch as it does alone, did a clear decision change, does any
module add more error than its class explains, do INT8 scales suit what they round, does FP16
hold every tensor, and is its preprocessing the weights'?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
from van_deploy.checks.gates import (
    Allowed,
    Finding,
    Outcome,
    failed,
    module_floor,
    numeric_class,
    skipped,
    sqnr_floor,
)
from van_deploy.checks.golden import judge_originals
from van_deploy.checks.graphs import one_line
from van_deploy.checks.judging import (
    Judged,
    Judgement,
    batch_sizes,
    judge_answers,
    judge_graph,
    judge_new,
    record_key,
)
from van_deploy.checks.layers import drift_of_artefact
from van_deploy.checks.opened import (
    NotRun,
    chosen_artefacts,
    given_to,
    open_artefact,
    plain_onnx,
)
from van_deploy.checks.reference import OnnxModules, TorchModules
from van_deploy.checks.samples import Samples
from van_deploy.checks.verdicts import ArtefactVerdict, VerifyReport
from van_deploy.config import GateSettings, VerifySettings
from van_deploy.documents import json_from, plain
from van_deploy.errors import ConversionError, VanDeployError
from van_deploy.runners.network import Network

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan


MODULE_IMAGES = 4

ModuleReference = TorchModules | OnnxModules


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
    asked, gates = asked or VerifySettings(), gates or GateSettings()
    reference: ModuleReference | Finding | None = None
    verdicts = {}
    for name in chosen_artefacts(bundle, asked.artefacts):
        progress(f"'{name}' at every batch size")
        verdict = _answers(bundle, name, samples, gates, asked)
        if verdict.comparison is not None and name in plain_onnx(bundle):
            progress(f"'{name}', its tensors")
            verdict = _with_graph(bundle, verdict, samples, gates)
            if asked.modules and (loaded is not None or name != "fp32"):
                progress(f"'{name}', module by module")
                reference = reference or _reference(bundle, samples, loaded, gates)
                verdict = _with_modules(bundle, verdict, samples, reference, gates)
        verdicts[name] = verdict
    return VerifyReport(
        against="the golden samples" if loaded is None else "the original network",
        images=samples.description,
        names=samples.names,
        noise_db=samples.noise_db,
        modules="" if reference is None or isinstance(reference, Finding) else reference.described,
        findings=tuple(judge_originals(bundle, samples)) if samples.golden else (),
        artefacts=verdicts,
        allowed=Allowed(asked.allow_skip, asked.allow_inconclusive),
    )


def _answers(
    bundle: Bundle, name: str, samples: Samples, gates: GateSettings, asked: VerifySettings
) -> ArtefactVerdict:
    """Return what one artifact's answers and its file say."""
    precision = bundle.artefact(name).precision
    numeric, opened = numeric_class(precision), open_artefact(bundle, name, asked)
    if isinstance(opened, NotRun):
        runner, said = opened.runner, Judgement((skipped("runs", opened.reason, opened.kind),))
    else:
        try:
            with opened:
                numeric = numeric_class(precision, tf32=opened.tf32)
                said = _judge_opened(bundle, opened, numeric, samples, gates)
        except ConversionError as error:
            said = Judgement((failed("loads", f"it does not load: {one_line(error)}"),))
        except VanDeployError:
            raise
        except Exception as error:  # the runtimes raise their own bare types
            said = Judgement((failed("runs", f"it does not run at batch 1: {one_line(error)}"),))
        runner, wrong = opened.described, contract_failures(bundle, name)
        contract = [failed("contract", text) for text in wrong]
        contract = contract or [Finding("contract", Outcome.PASS)]
        said = replace(said, findings=(*said.findings, *contract))
    return ArtefactVerdict(
        **vars(said), artefact=name, precision=precision, numeric=numeric, runner=runner
    )


def contract_failures(bundle: Bundle, name: str) -> list[str]:
    """Return what an artifact's ONNX file says of itself that the manifest contradicts."""
    import onnx

    path = bundle.verified(name)
    if path.suffix != ".onnx":
        return []
    model = onnx.load(path, load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    failures = []
    if "van_deploy.preprocessing" in said:
        try:
            written = dict(json_from(said["van_deploy.preprocessing"]))
        except (TypeError, ValueError):
            written = {}  # which differs
        failures += [
            f"the file was made for {key} {written.get(key)}, the manifest says {value}"
            for key, value in plain(bundle.manifest.preprocessing).items()
            if key != "source" and written.get(key) != value
        ]
    weights = bundle.manifest.weights.sha256
    if said.get("van_deploy.weights_sha256", weights) != weights:
        failures.append("the file was made from other weights than the manifest names")
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    if batch.dim_value and batch.dim_value != bundle.manifest.batch.fixed:
        failures.append(f"its batch is frozen at {batch.dim_value}")
    return failures


def _judge_opened(
    bundle: Bundle, opened: Network, numeric: str, samples: Samples, gates: GateSettings
) -> Judged:
    records = bundle.artefact(opened.name).golden_sqnr_db if samples.golden else {}
    served = tuple(other for other in samples.others if opened.serves_size(other.inputs.shape[2:]))
    sizes = batch_sizes(bundle.manifest.batch)
    return judge_answers(
        opened.run,
        lambda given: given_to(opened, given.inputs, given.pixels),
        replace(samples, others=served),
        [sizes[0], *(size for size in sizes[1:] if opened.serves(size))],
        sqnr_floor(numeric, samples.noise_db, gates.of(numeric)),
        records.get(record_key(opened.runner, numeric)),
    )


def _with_graph(
    bundle: Bundle, verdict: ArtefactVerdict, samples: Samples, gates: GateSettings
) -> ArtefactVerdict:
    """Return the verdict with what the graph's tensors say."""
    import onnx

    method = str(bundle.artefact(verdict.artefact).quantization.get("method", "mse"))
    model = onnx.load(bundle.verified(verdict.artefact))
    found, scales = judge_graph(model, verdict.numeric, samples, method, gates.of(verdict.numeric))
    return replace(verdict, findings=(*verdict.findings, *found), scales=scales)


def _reference(
    bundle: Bundle, samples: Samples, loaded: LoadedVan | None, gates: GateSettings
) -> ModuleReference | Finding:
    """Return what modules are compared with, or why they are not."""
    if loaded is not None:
        return TorchModules(bundle, loaded, samples.inputs)
    import onnx

    path = bundle.verified("fp32")
    held, _ = judge_new(path, "fp32", samples, profile=gates.fp32)
    if not held.passed:
        why = "model.onnx, which modules are compared with, does not hold on the golden samples"
        return skipped("modules", why)
    return OnnxModules(onnx.load(path))


def _with_modules(
    bundle: Bundle,
    verdict: ArtefactVerdict,
    samples: Samples,
    reference: ModuleReference | Finding,
    gates: GateSettings,
) -> ArtefactVerdict:
    """Return the verdict with what each module adds, and the modules that add too much."""
    if isinstance(reference, Finding):
        return replace(verdict, findings=(*verdict.findings, reference))
    artefact, images = bundle.artefact(verdict.artefact), samples.inputs[:MODULE_IMAGES]
    rows = drift_of_artefact(bundle, artefact, reference, images, "module")
    placed = sorted((row for row in rows if row.isolated_db is not None), key=lambda row: row.level)
    if not placed:
        found = failed("modules", f"they cannot be compared: {rows[0].note}")
    else:
        limit = module_floor(verdict.numeric, gates.of(verdict.numeric))
        bad = [f"{row.name} {row.level:.1f} dB" for row in placed if row.level < limit.value]
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        message = f"modules below {limit.value:g} dB ({limit.origin}): {', '.join(bad[:4])}{more}"
        found = Finding(
            "modules",
            Outcome.FAIL if bad else Outcome.PASS,
            message if bad else f"{placed[0].name} adds most",
            placed[0].isolated_db,
            limit,
            "dB",
        )
    return replace(verdict, findings=(*verdict.findings, found), modules=tuple(placed))
