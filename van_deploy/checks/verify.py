"""Every artifact of a bundle against the original network's own answers.

Asked of each: does it hold its class's SQNR floor and its own record at every batch size,
does an image come out of a batch as it does alone, did a clear decision change, does any
module add more error than its class explains, do INT8 scales suit what they round, does FP16
hold every tensor, and is its preprocessing the weights'?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
from van_deploy.checks.contract import contract_failures
from van_deploy.checks.gates import (
    Allowed,
    Finding,
    Outcome,
    Profile,
    failed,
    module_floor,
    numeric_class,
    skipped,
    sqnr_floor,
)
from van_deploy.checks.golden import judge_originals
from van_deploy.checks.graphs import cuts_of
from van_deploy.checks.judging import (
    Judged,
    batch_sizes,
    judge_answers,
    judge_graph,
    judge_new,
    record_key,
)
from van_deploy.checks.layers import channels_of, drift_of_graph
from van_deploy.checks.opened import (
    ON_CPU,
    Execution,
    NotRun,
    chosen_artefacts,
    given_to,
    open_artefact,
    plain_onnx,
)
from van_deploy.checks.reference import ModuleReference, OnnxModules, TorchModules
from van_deploy.checks.samples import Samples
from van_deploy.checks.verdicts import ArtefactVerdict, VerifyReport
from van_deploy.config import GateSettings
from van_deploy.errors import ConversionError, VanDeployError
from van_deploy.runners.network import Network

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

__all__ = ["AGAINST", "verify_bundle"]

AGAINST = ("golden", "weights")
"""``--against``: the golden samples of the bundle, or the original network."""

MODULE_IMAGES = 4

Progress = Callable[[str], None]


def verify_bundle(
    bundle: Bundle,
    samples: Samples,
    *,
    loaded: LoadedVan | None = None,
    gates: GateSettings | None = None,
    artefacts: Sequence[str] = (),
    execution: Execution = ON_CPU,
    modules: bool = True,
    allowed: Allowed | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Return what is found of each artifact of ``bundle``.

    Args:
        bundle: the bundle.
        samples: its golden samples, or others with the original network's answers.
        loaded: the original network, for the modules; None compares them with ``model.onnx``.
        gates: limits a recipe sets otherwise.
        artefacts: which ones; by default all.
        execution: what runs them.
        modules: look into plain ONNX graphs as well, module by module.
        allowed: what the user lets pass.
        progress: told what is checked.

    Raises:
        BundleError: an artifact is not there, or is not the manifest's.
        UsageError: there is no such runner.
    """
    say = progress or (lambda _: None)
    settings = gates or GateSettings()
    reference: ModuleReference | Finding | None = None
    verdicts = {}
    for name in chosen_artefacts(bundle, artefacts):
        say(f"'{name}' at every batch size")
        verdict = _answers(bundle, name, samples, settings, execution)
        if verdict.comparison is not None and name in plain_onnx(bundle):
            profile = settings.of(verdict.numeric)
            say(f"'{name}', its tensors")
            verdict = _with_graph(bundle, verdict, samples, profile)
            if modules and (loaded is not None or name != "fp32"):
                say(f"'{name}', module by module")
                reference = reference or _modules(bundle, samples, loaded, settings)
                verdict = _with_modules(bundle, verdict, samples, reference, profile)
        verdicts[name] = verdict
    return VerifyReport(
        against="the golden samples" if loaded is None else "the original network",
        images=samples.description,
        names=samples.names,
        noise_db=samples.noise_db,
        modules=reference.described if isinstance(reference, ModuleReference) else "",
        findings=tuple(judge_originals(bundle, samples)) if samples.golden else (),
        artefacts=verdicts,
        allowed=allowed or Allowed(),
    )


def _answers(
    bundle: Bundle, name: str, samples: Samples, gates: GateSettings, execution: Execution
) -> ArtefactVerdict:
    """Return what one artifact's answers and its file say."""
    artefact = bundle.artefact(name)
    numeric = numeric_class(artefact.precision)
    opened = open_artefact(bundle, name, execution)
    if isinstance(opened, NotRun):
        found = (skipped("runs", opened.reason, opened.kind),)
        return ArtefactVerdict(name, artefact.precision, numeric, opened.runner, found)
    try:
        with opened:
            numeric = numeric_class(artefact.precision, tf32=opened.tf32)
            judged = _judge_opened(bundle, opened, numeric, samples, gates)
    except ConversionError as error:
        judged = Judged((failed("loads", f"it does not load: {_line(error)}"),))
    except VanDeployError:
        raise
    except Exception as error:  # the runtimes raise their own bare types
        judged = Judged((failed("runs", f"it does not run at batch 1: {_line(error)}"),))
    said = [failed("contract", text) for text in contract_failures(bundle, name)]
    return ArtefactVerdict(
        name,
        artefact.precision,
        numeric,
        opened.described,
        (*judged.findings, *(said or [Finding("contract", Outcome.PASS)])),
        judged.comparison,
        judged.flips,
        judged.batches,
    )


def _judge_opened(
    bundle: Bundle, opened: Network, numeric: str, samples: Samples, gates: GateSettings
) -> Judged:
    recorded = None
    if samples.golden:
        records = bundle.artefact(opened.name).golden_sqnr_db
        recorded = records.get(record_key(opened.runner, numeric))
    served = tuple(other for other in samples.others if opened.serves_size(other.inputs.shape[2:]))
    sizes = batch_sizes(bundle.manifest.batch)
    return judge_answers(
        opened.run,
        lambda given: given_to(opened, given.inputs, given.pixels),
        replace(samples, others=served),
        [sizes[0], *(size for size in sizes[1:] if opened.serves(size))],
        sqnr_floor(numeric, samples.noise_db, gates.of(numeric)),
        recorded,
    )


def _with_graph(
    bundle: Bundle, verdict: ArtefactVerdict, samples: Samples, profile: Profile
) -> ArtefactVerdict:
    """Return the verdict with what the graph's tensors say."""
    import onnx

    method = str(bundle.artefact(verdict.artefact).quantization.get("method", "mse"))
    model = onnx.load(bundle.verified(verdict.artefact))
    judged = judge_graph(model, verdict.numeric, samples, method, profile)
    findings = (*verdict.findings, *judged.findings)
    return replace(verdict, findings=findings, scales=judged.scales)


def _modules(
    bundle: Bundle, samples: Samples, loaded: LoadedVan | None, gates: GateSettings
) -> ModuleReference | Finding:
    """Return what modules are compared with, or why they are not."""
    if loaded is not None:
        return TorchModules(bundle, loaded, samples.inputs)
    import onnx

    path = bundle.verified("fp32")
    held, _ = judge_new(path, "fp32", samples, profile=gates.of("fp32"))
    if held.outcome is not Outcome.PASS:
        why = "model.onnx, which modules are compared with, does not hold on the golden samples"
        return skipped("modules", why)
    return OnnxModules(onnx.load(path))


def _with_modules(
    bundle: Bundle,
    verdict: ArtefactVerdict,
    samples: Samples,
    reference: ModuleReference | Finding,
    profile: Profile,
) -> ArtefactVerdict:
    """Return the verdict with what each module adds, and the modules that add too much."""
    import onnx

    if isinstance(reference, Finding):
        return replace(verdict, findings=(*verdict.findings, reference))
    channels = channels_of(bundle, bundle.artefact(verdict.artefact))
    if channels is None:  # what is not recorded cannot be undone
        return verdict
    cuts = cuts_of(onnx.load(bundle.verified("fp32")), "module", reference.modules)
    rows = drift_of_graph(
        onnx.load(bundle.verified(verdict.artefact)),
        reference,
        samples.inputs[:MODULE_IMAGES],
        cuts,
        channels,
    )
    placed = [(row.isolated_db, row) for row in rows if row.isolated_db is not None]
    if not placed:
        found = failed("modules", f"they cannot be compared: {rows[0].note}")
        return replace(verdict, findings=(*verdict.findings, found))
    placed.sort(key=lambda pair: pair[0])
    limit = module_floor(verdict.numeric, profile)
    bad = [f"{row.name} {value:.1f} dB" for value, row in placed if not value >= limit.value]
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    message = f"modules below {limit.value:g} dB ({limit.origin}): {', '.join(bad[:4])}{more}"
    found = Finding(
        "modules",
        Outcome.FAIL if bad else Outcome.PASS,
        message if bad else f"{placed[0][1].name} adds most",
        placed[0][0],
        limit,
        "dB",
    )
    ordered = tuple(row for _, row in placed)
    return replace(verdict, findings=(*verdict.findings, found), modules=ordered)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:600]
