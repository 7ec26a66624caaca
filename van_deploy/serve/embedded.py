"""Artifacts with their preprocessing inside, made from the plain ones of a bundle.

The plain graph stays: quantization, engines and checks work on it. Beside it,
``fp32`` gets ``fp32-uint8``, ``int8`` gets ``int8-uint8``: the same graph with
nodes before and behind it, proved on images before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Artefact, Bundle, Origin, writing
from van_deploy.errors import GateFailed
from van_deploy.files import content_key
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES, embed_preprocessing
from van_deploy.graph.files import graph_facts, save_onnx
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.manifest import Embedding
from van_deploy.metrics import Task, probabilities
from van_deploy.model.preprocess import Pixels, normalised
from van_deploy.provenance import code_digest
from van_deploy.runners.base import Images
from van_deploy.runners.network import network_input, task_of
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

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
    bundle: Bundle, pixels: Pixels, embedding: str, outputs: Sequence[str], batches: Sequence[int]
) -> list[Embedded]:
    """Return the embedded form of every plain graph of ``bundle``, made and proved where missing.

    Args:
        bundle: where they are and go.
        pixels: ``(N, S, S, C)`` uint8 images to prove them on, all different.
        embedding: see :mod:`van_deploy.graph.embed`.
        outputs: likewise.
        batches: batch sizes to prove, each at most N.

    Raises:
        GateFailed: an embedded graph does not answer as its plain one; nothing was written.
    """
    import onnx

    preprocessing, made, task = bundle.manifest.preprocessing, list[Embedded](), task_of(bundle)
    pairs = [
        (normalised(some, preprocessing), network_input(some, embedding, preprocessing))
        for some in (pixels[:batch] for batch in batches)
    ]
    how = {
        "embedding": embedding,
        "outputs": list(outputs),
        "preprocessing": asdict(preprocessing),
        "code": code_digest("graph"),
    }
    with writing(bundle.path) as draft:
        for base, source in bundle.artefacts.items():
            if source.kind != "onnx":
                continue
            kind, path = "outputs" if embedding == "none" else embedding, bundle.verified(base)
            name, made_with = f"{base}-{kind}", {**how, "base": source.sha256}
            there = bundle.artefacts.get(name)
            if there is not None and there.key == content_key(made_with):
                bundle.verified(name)
                made.append(Embedded(name, base, reused=True, agreement=None))
                continue
            model = embed_preprocessing(onnx.load(path), preprocessing, embedding, outputs, task)
            files = save_onnx(model, draft.file(f"{path.stem}.{kind}.onnx"))
            rows = _proof(path, draft.file(files[0]), pairs, task)
            for row in rows:
                if not row["difference"] <= SAME_GRAPH:
                    raise GateFailed(
                        f"At batch {row['batch']} '{name}' differs from '{base}' by "
                        f"{row['difference']:.1e} of the largest value; {SAME_GRAPH:g} is allowed.",
                        "Nothing was written. Please report it.",
                    )
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
                    graph=graph_facts(model),
                    embedded=cast("Embedding", embedding),
                )
            )
            made.append(Embedded(name, base, reused=False, agreement=report))
    return made


def _proof(
    plain: Path, embedded: Path, pairs: Sequence[tuple[Images, npt.NDArray[Any]]], task: Task
) -> list[dict[str, Any]]:
    """Return at each batch size how far any output is from what the plain graph's logits mean.

    The difference is that of the largest value. Each pair holds what either graph takes.
    """
    rows = []
    with OnnxRuntimeRunner(plain) as old, OnnxRuntimeRunner(embedded) as new:
        for images, given in pairs:
            logits, found = old.run(images), new.run_all(given)
            shares = probabilities(logits.astype(np.float64), task)
            wanted = {OUTPUT_NAME: logits, "probabilities": shares}
            compared = [(value, found[name]) for name, value in wanted.items() if name in found]
            if TOP_CLASSES in found:  # the right ones, in order
                chosen = np.take_along_axis(shares, found[TOP_CLASSES], axis=1)
                best = -np.sort(-shares, axis=1)[:, : chosen.shape[1]]
                compared += [(best, chosen), (best, found[TOP_PROBABILITIES])]
            difference = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in compared)
            rows.append({"batch": len(images), "difference": difference})
    return rows
