"""Artifacts with embedded preprocessing, created from the plain artifacts of a bundle.

The plain graph stays: quantization, engines and checks use it. ``fp32`` gets ``fp32-uint8``,
``int8`` gets ``int8-uint8``: the same graph with nodes before and after it, compared with the
plain graph on images before it is written.
"""

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
from van_deploy.provenance import ONNXRUNTIMES, code_digest, tool_versions
from van_deploy.runners.network import network_input, task_of
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

# Largest relative difference between a plain graph and its embedded form. Both compute from the
# same bits, but a runtime may choose other kernels. The limit is that of simplification.
SAME_GRAPH = 1e-5


@dataclass(frozen=True)
class EmbedResult:
    """Result of embedding the preprocessing into one artifact.

    Attributes:
        name: name of the new artifact.
        base: name of the plain artifact.
        reused: whether the artifact already exists unchanged.
        agreement: comparison with the plain artifact on the same images; None if reused.
    """

    name: str
    base: str
    reused: bool
    agreement: Mapping[str, Any] | None


def embed_artifacts(
    bundle: Bundle, settings: ExportSettings, images: Sequence[Pixels]
) -> list[EmbedResult]:
    """Create and check the embedded form of every plain graph of a bundle, where it is missing.

    Args:
        bundle: the bundle to read and change.
        settings: the preprocessing to embed, and the outputs.
        images: batches for the comparison, ``(N, S, S, C)`` uint8, all different.

    Raises:
        GateFailed: an embedded graph differs from its plain graph; nothing was written.
    """
    preprocessing, results = bundle.manifest.preprocessing, list[EmbedResult]()
    kind, embedding, outputs = settings.embeds, settings.embed_preprocess, list(settings.outputs)
    inside = {"embedding": embedding, "outputs": outputs, "preprocessing": asdict(preprocessing)}
    code = code_digest(".", "graph", "model", "runners", "serve")
    versions = tool_versions("onnx", *ONNXRUNTIMES, "numpy")
    made_with: dict[str, Any] = {**inside, "code": code, "versions": versions}
    with edit_bundle(bundle.path) as draft:
        for base, source in bundle.artifacts.items():
            if source.kind != "onnx":
                continue
            path, made_with = bundle.verified_path(base), {**made_with, "base": source.sha256}
            name = f"{base}-{kind}"
            if not bundle.rebuild_reason(name, made_with):
                results.append(EmbedResult(name, base, reused=True, agreement=None))
                continue
            plain, task = onnx.load(path), task_of(bundle)
            model = embed_preprocessing(plain, preprocessing, embedding, outputs, task)
            files = save_onnx(model, draft.file(f"{path.stem}.{kind}.onnx"))
            batches = _compare_outputs(bundle, path, draft.file(files[0]), embedding, images)
            report = {"base": base, "runner": "ort-cpu", "limit": SAME_GRAPH, "batches": batches}
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
            results.append(EmbedResult(name, base, reused=False, agreement=report))
    return results


def _compare_outputs(
    bundle: Bundle, plain: Path, embedded: Path, embedding: str, images: Sequence[Pixels]
) -> list[dict[str, Any]]:
    """Return the largest difference at each batch size, relative to the output's largest value.

    The expected outputs are computed from the logits of the plain graph.

    Raises:
        GateFailed: a difference exceeds :data:`SAME_GRAPH`.
    """
    preprocessing, rows = bundle.manifest.preprocessing, list[dict[str, Any]]()
    with OnnxRuntimeRunner(plain) as runner, OnnxRuntimeRunner(embedded) as embedded_runner:
        for pixels in images:
            logits = runner.run(normalise(pixels, preprocessing))
            actual = embedded_runner.run_all(network_input(pixels, embedding, preprocessing))
            shares = probabilities(logits.astype(np.float64), task_of(bundle))
            expected = {OUTPUT_NAME: logits, "probabilities": shares}
            pairs = [(value, actual[name]) for name, value in expected.items() if name in actual]
            if TOP_CLASSES in actual:  # the correct classes in the correct order
                selected = np.take_along_axis(shares, actual[TOP_CLASSES], axis=1)
                best = -np.sort(-shares, axis=1)[:, : selected.shape[1]]
                pairs += [(best, selected), (best, actual[TOP_PROBABILITIES])]
            # A NaN stays a NaN and fails the comparison.
            difference = float(np.max([np.abs(a - b).max() / np.abs(a).max() for a, b in pairs]))
            if not difference <= SAME_GRAPH:
                raise GateFailed(
                    f"At batch {len(pixels)} '{embedded.name}' differs from '{plain.name}' by "
                    f"{difference:.1e} of the largest value; {SAME_GRAPH:g} is allowed.",
                    "Nothing was written. Please report it.",
                )
            rows.append({"batch": len(pixels), "difference": difference})
    return rows
