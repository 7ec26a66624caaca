"""Artefacts with their preprocessing inside, made from the plain ones of a bundle.

The plain graph stays: quantisation, engines and checks work on it. Beside it,
``fp32`` gets ``fp32-uint8``, ``int8`` gets ``int8-uint8``: the same graph with
nodes before and behind it, proved on pictures before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from van_deploy.bundle import Artefact, Bundle, Draft, Embedding, Origin, writing
from van_deploy.errors import GateFailed, UsageError
from van_deploy.files import content_key
from van_deploy.graph.embed import (
    TOP_CLASSES,
    TOP_PROBABILITIES,
    check_embedding,
    embed_preprocessing,
)
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.metrics import Task, probabilities
from van_deploy.model.pixels import Pixels, normalised
from van_deploy.provenance import code_digest
from van_deploy.runners.base import Logits
from van_deploy.runners.network import Outputs, network_input, task_of
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

__all__ = ["Embedded", "embed_artefacts", "embedded_name", "plain_graphs"]

PLAIN_OUTPUTS = ("logits",)
SAME_GRAPH = 1e-5
"""Largest relative difference between a plain graph and its embedded form.

Both get the same bits, so the difference should be none; a run time may still
choose other kernels. The limit is that of simplification.
"""

SAME_NETWORK = 1e-4
"""Largest relative difference between the original network and an embedded FP32 graph."""


@dataclass(frozen=True)
class Embedded:
    """One artefact that has its preprocessing inside.

    Attributes:
        name: of the new artefact.
        base: of the plain one.
        reused: whether it was there already.
        agreement: with the plain artefact on the same pictures; None if reused.
    """

    name: str
    base: str
    reused: bool
    agreement: Mapping[str, Any] | None


def embedded_name(base: str, embedding: str) -> str:
    """Return what the embedded form of an artefact is called.

    >>> embedded_name("int8", "uint8")
    'int8-uint8'
    """
    return f"{base}-{'outputs' if embedding == 'none' else embedding}"


def plain_graphs(bundle: Bundle) -> list[str]:
    """Return the ONNX artefacts of a bundle that take normalised images and give logits."""
    return [name for name, artefact in bundle.artefacts.items() if artefact.kind == "onnx"]


def embed_artefacts(
    bundle: Bundle,
    pixels: Pixels,
    embedding: str,
    outputs: Sequence[str] = PLAIN_OUTPUTS,
    *,
    bases: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 2, 3),
    expected: Logits | None = None,
) -> list[Embedded]:
    """Return the embedded form of every plain graph of ``bundle``, made and proved where missing.

    Args:
        bundle: where they are and go.
        pixels: ``(N, S, S, C)`` uint8 pictures to prove them on, all different.
        embedding: see :mod:`van_deploy.graph.embed`.
        outputs: likewise.
        bases: which artefacts; by default every plain graph.
        batches: batch sizes to prove, each at most N.
        expected: the original network's logits ``(N, K)`` for the same pictures; the
            embedded ``fp32`` is compared with these too.

    Raises:
        UsageError: the embedding or an output is unknown, or there is nothing to embed.
        GateFailed: an embedded graph does not answer as its plain one; nothing was written.
    """
    check_embedding(embedding, outputs)
    if embedding == "none" and tuple(outputs) == PLAIN_OUTPUTS:
        raise UsageError(
            "There is nothing to embed: no preprocessing and only the logits.",
            "Give --embed-preprocess uint8, or more --outputs.",
        )
    names = plain_graphs(bundle) if bases is None else list(bases)
    made = []
    with writing(bundle.path) as draft:
        for base in names:
            report = _embed(draft, bundle, base, embedding, outputs, pixels, batches, expected)
            made.append(report)
    return made


def _embed(
    draft: Draft,
    bundle: Bundle,
    base: str,
    embedding: str,
    outputs: Sequence[str],
    pixels: Pixels,
    batches: Sequence[int],
    expected: Logits | None,
) -> Embedded:
    import onnx

    name, source = embedded_name(base, embedding), bundle.artefact(base)
    path = bundle.verified(base)
    preprocessing = bundle.manifest.preprocessing
    made_with = {
        "embedding": embedding,
        "outputs": list(outputs),
        "base": source.sha256,
        "preprocessing": asdict(preprocessing),
        "code": code_digest("graph"),
    }
    there = bundle.artefacts.get(name)
    if there is not None and there.key == content_key(made_with):
        bundle.verified(name)
        return Embedded(name, base, reused=True, agreement=None)
    task = task_of(bundle)
    model = embed_preprocessing(onnx.load(path), preprocessing, embedding, outputs, task)
    facts = graph_facts(model)
    suffix = path.name.removesuffix(".onnx")
    files = save_onnx(model, draft.file(f"{suffix}.{name.removeprefix(f'{base}-')}.onnx"))
    reference = expected if source.precision == "fp32" else None
    inputs = network_input(pixels, embedding, preprocessing)
    with OnnxRuntimeRunner(path) as plain, OnnxRuntimeRunner(draft.file(files[0])) as embedded:
        logits = {n: plain.run(normalised(pixels[:n], preprocessing)) for n in batches}
        found = {n: embedded.run_all(inputs[:n]) for n in batches}
    report = _verdict(name, base, logits, found, reference, task)
    draft.checks[f"embedded {name}"] = report
    artefact = Artefact(
        name=name,
        kind="serving",
        precision=source.precision,
        file=files[0],
        files=dict.fromkeys(files, ""),
        made_from=Origin(name=base, sha256=source.sha256),
        made_with=made_with,
        graph=facts,
        embedded=cast("Embedding", embedding),
    )
    draft.record(artefact)
    return Embedded(name, base, reused=False, agreement=report)


def _verdict(
    name: str,
    base: str,
    plain: Mapping[int, Logits],
    found: Mapping[int, Outputs],
    reference: Logits | None,
    task: Task,
) -> dict[str, Any]:
    """Return how an embedded graph compares, by batch size; refuse one that differs."""
    rows = []
    for batch, logits in plain.items():
        differences = {"plain": _difference(logits, found[batch], task)}
        if reference is not None:
            differences["pytorch"] = _difference(reference[:batch], found[batch], task)
        rows.append({"batch": batch, **differences})
    limits = {"plain": SAME_GRAPH, "pytorch": SAME_NETWORK}
    for row in rows:
        for against, limit in limits.items():
            if against in row and not row[against] <= limit:
                other = "PyTorch" if against == "pytorch" else f"'{base}'"
                raise GateFailed(
                    f"At batch {row['batch']} '{name}' differs from {other} by "
                    f"{row[against]:.1e} of the largest value; {limit:g} is allowed.",
                    "Nothing was written. Please report it.",
                )
    return {"base": base, "runner": "ort-cpu", "limits": limits, "batches": rows}


def _difference(logits: Logits, found: Outputs, task: Task) -> float:
    """Return the largest relative difference of any output from what ``logits`` mean."""
    shares = probabilities(logits.astype(np.float64), task)
    pairs = []
    if OUTPUT_NAME in found:
        pairs.append((logits, found[OUTPUT_NAME]))
    if "probabilities" in found:
        pairs.append((shares, found["probabilities"]))
    if TOP_CLASSES in found:
        chosen = np.take_along_axis(shares, found[TOP_CLASSES], axis=1)
        best = -np.sort(-shares, axis=1)[:, : chosen.shape[1]]
        pairs += [(best, chosen), (best, found[TOP_PROBABILITIES])]  # the right ones, in order
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
