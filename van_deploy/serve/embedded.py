"""Artifacts with their preprocessing inside, made from the plain ones of a bundle.

The plain graph stays: quantization, engines and checks work on it. Beside it,
``fp32`` gets ``fp32-uint8``, ``int8`` gets ``int8-uint8``: the same graph with
nodes before and behind it, proved on images before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from van_deploy.bundle import Artefact, Bundle, Draft, Origin, writing
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
from van_deploy.manifest import Embedding
from van_deploy.metrics import Task, probabilities
from van_deploy.model.pixels import Pixels, normalised
from van_deploy.provenance import code_digest
from van_deploy.runners.answers import network_input
from van_deploy.runners.base import Logits
from van_deploy.runners.network import Outputs, task_of
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

__all__ = ["Embedded", "embed_artefacts"]

SAME_GRAPH = 1e-5
"""Largest relative difference between a plain graph and its embedded form.

Both get the same bits, so the difference should be none; a runtime may still
choose other kernels. The limit is that of simplification.
"""


@dataclass(frozen=True)
class Embedded:
    """One artifact that has its preprocessing inside.

    Attributes:
        name: of the new artifact.
        base: of the plain one.
        reused: whether it was there already.
        agreement: with the plain artifact on the same images; None if reused.
    """

    name: str
    base: str
    reused: bool
    agreement: Mapping[str, Any] | None


def embed_artefacts(
    bundle: Bundle,
    pixels: Pixels,
    embedding: str,
    outputs: Sequence[str] = (OUTPUT_NAME,),
    *,
    batches: Sequence[int] = (1, 2, 3),
) -> list[Embedded]:
    """Return the embedded form of every plain graph of ``bundle``, made and proved where missing.

    Args:
        bundle: where they are and go.
        pixels: ``(N, S, S, C)`` uint8 images to prove them on, all different.
        embedding: see :mod:`van_deploy.graph.embed`.
        outputs: likewise.
        batches: batch sizes to prove, each at most N.

    Raises:
        UsageError: the embedding or an output is unknown, or there is nothing to embed.
        GateFailed: an embedded graph does not answer as its plain one; nothing was written.
    """
    check_embedding(embedding, outputs)
    if embedding == "none" and tuple(outputs) == (OUTPUT_NAME,):
        raise UsageError(
            "There is nothing to embed: no preprocessing and only the logits.",
            "Give --embed-preprocess uint8, or more --outputs.",
        )
    plain = [name for name, artefact in bundle.artefacts.items() if artefact.kind == "onnx"]
    with writing(bundle.path) as draft:
        return [_embed(draft, bundle, n, embedding, outputs, pixels, batches) for n in plain]


def _embed(
    draft: Draft,
    bundle: Bundle,
    base: str,
    embedding: str,
    outputs: Sequence[str],
    pixels: Pixels,
    batches: Sequence[int],
) -> Embedded:
    import onnx

    kind, source = "outputs" if embedding == "none" else embedding, bundle.artefact(base)
    name, path, preprocessing = (
        f"{base}-{kind}",
        bundle.verified(base),
        bundle.manifest.preprocessing,
    )
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
    files = save_onnx(model, draft.file(f"{path.name.removesuffix('.onnx')}.{kind}.onnx"))
    inputs = network_input(pixels, embedding, preprocessing)
    rows = []
    with OnnxRuntimeRunner(path) as plain, OnnxRuntimeRunner(draft.file(files[0])) as embedded:
        for batch in batches:
            logits = plain.run(normalised(pixels[:batch], preprocessing))
            difference = _difference(logits, embedded.run_all(inputs[:batch]), task)
            if not difference <= SAME_GRAPH:
                raise GateFailed(
                    f"At batch {batch} '{name}' differs from '{base}' by {difference:.1e} of the "
                    f"largest value; {SAME_GRAPH:g} is allowed.",
                    "Nothing was written. Please report it.",
                )
            rows.append({"batch": batch, "difference": difference})
    report = {"base": base, "runner": "ort-cpu", "limit": SAME_GRAPH, "batches": rows}
    draft.checks[f"embedded {name}"] = report
    draft.record(
        Artefact(
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
    )
    return Embedded(name, base, reused=False, agreement=report)


def _difference(logits: Logits, found: Outputs, task: Task) -> float:
    """Return the largest relative difference of any output from what ``logits`` mean."""
    shares = probabilities(logits.astype(np.float64), task)
    wanted = {OUTPUT_NAME: logits, "probabilities": shares}
    pairs = [(value, found[name]) for name, value in wanted.items() if name in found]
    if TOP_CLASSES in found:
        chosen = np.take_along_axis(shares, found[TOP_CLASSES], axis=1)
        best = -np.sort(-shares, axis=1)[:, : chosen.shape[1]]
        pairs += [(best, chosen), (best, found[TOP_PROBABILITIES])]  # the right ones, in order
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
