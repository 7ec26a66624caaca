"""Artifacts with their preprocessing inside, made from the plain ones of a bundle.

The plain graph stays: quantization, engines and checks work on it. Beside it,
``fp32`` gets ``fp32-uint8``, ``int8`` gets ``int8-uint8``: the same graph with
nodes before and behind it, proved on images before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from van_deploy.bundle import Artifact, Bundle, Origin, edit_bundle
from van_deploy.config import ExportSettings
from van_deploy.errors import GateFailed
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES, embed_preprocessing
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.metrics import probabilities
from van_deploy.model.preprocess import Pixels, normalise
from van_deploy.provenance import code_digest
from van_deploy.runners.network import network_input, task_of
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

SAME_GRAPH = 1e-5
"""Largest relative difference between a plain graph and its embedded form.

Both get the same bits, so the difference should be none; a runtime may still
choose other kernels. The limit is that of simplification.
"""


@dataclass(frozen=True)
class EmbedResult:
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


def embed_artifacts(
    bundle: Bundle, how: ExportSettings, images: Sequence[Pixels]
) -> list[EmbedResult]:
    """Return the embedded form of every plain graph of ``bundle``, made and proved where missing.

    Args:
        bundle: where they are and go.
        how: what is to be inside them, and what they give.
        images: batches to prove them on, ``(N, S, S, C)`` uint8, all different.

    Raises:
        GateFailed: an embedded graph does not answer as its plain one; nothing was written.
    """
    preprocessing, made = bundle.manifest.preprocessing, list[EmbedResult]()
    embedding, outputs = how.embed_preprocess, list(how.outputs)
    inside = {"embedding": embedding, "outputs": outputs, "preprocessing": asdict(preprocessing)}
    made_with: dict[str, Any] = {**inside, "code": code_digest("graph")}
    with edit_bundle(bundle.path) as draft:
        for base, source in bundle.artifacts.items():
            if source.kind != "onnx":
                continue
            kind, path = "outputs" if embedding == "none" else embedding, bundle.verified_path(base)
            name, made_with = f"{base}-{kind}", {**made_with, "base": source.sha256}
            if not bundle.rebuild_reason(name, made_with):
                made.append(EmbedResult(name, base, reused=True, agreement=None))
                continue
            plain, task = onnx.load(path), task_of(bundle)
            model = embed_preprocessing(plain, preprocessing, embedding, outputs, task)
            files = save_onnx(model, draft.file(f"{path.stem}.{kind}.onnx"))
            proof = _proof(bundle, path, draft.file(files[0]), embedding, images)
            report = {"base": base, "runner": "ort-cpu", "limit": SAME_GRAPH, "batches": proof}
            draft.checks[f"embedded {name}"] = report
            draft.record(
                Artifact(
                    name=name,
                    kind="serving",
                    precision=source.precision,
                    file=files[0],
                    files=dict.fromkeys(files, ""),
                    made_from=Origin(name=base, sha256=source.sha256),
                    made_with=made_with,
                    graph=graph_facts(model),
                    embedded=embedding,
                )
            )
            made.append(EmbedResult(name, base, reused=False, agreement=report))
    return made


def _proof(
    bundle: Bundle, plain: Path, embedded: Path, embedding: str, images: Sequence[Pixels]
) -> list[dict[str, Any]]:
    """Return at each batch size how far any output is from what the plain graph's logits mean.

    The difference is that of the largest value.

    Raises:
        GateFailed: it is more than :data:`SAME_GRAPH`.
    """
    preprocessing, rows = bundle.manifest.preprocessing, list[dict[str, Any]]()
    with OnnxRuntimeRunner(plain) as old, OnnxRuntimeRunner(embedded) as new:
        for pixels in images:
            logits = old.run(normalise(pixels, preprocessing))
            found = new.run_all(network_input(pixels, embedding, preprocessing))
            shares = probabilities(logits.astype(np.float64), task_of(bundle))
            wanted = {OUTPUT_NAME: logits, "probabilities": shares}
            compared = [(value, found[name]) for name, value in wanted.items() if name in found]
            if TOP_CLASSES in found:  # the right ones, in order
                chosen = np.take_along_axis(shares, found[TOP_CLASSES], axis=1)
                best = -np.sort(-shares, axis=1)[:, : chosen.shape[1]]
                compared += [(best, chosen), (best, found[TOP_PROBABILITIES])]
            # NaN stays one, and is refused.
            difference = float(np.max([np.abs(a - b).max() / np.abs(a).max() for a, b in compared]))
            if not difference <= SAME_GRAPH:
                raise GateFailed(
                    f"At batch {len(pixels)} '{embedded.name}' differs from '{plain.name}' by "
                    f"{difference:.1e} of the largest value; {SAME_GRAPH:g} is allowed.",
                    "Nothing was written. Please report it.",
                )
            rows.append({"batch": len(pixels), "difference": difference})
    return rows
