"""Accuracy: the gate of ``van-deploy evaluate``, and quantised graphs next to ONNX Runtime's."""

import itertools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from benchmarks.exporters import quantize_static
from benchmarks.table import Table, run_in_process, run_van_deploy
from van_deploy.bundle import Bundle
from van_deploy.checks.evaluate import ArtifactLoss, GroundTruth, Predictions, compare_predictions
from van_deploy.checks.gates import allowed_loss
from van_deploy.checks.golden import golden_samples
from van_deploy.checks.outputs import Networks
from van_deploy.config import BatchRange, BuildOptions, EvaluationSettings, Profiling
from van_deploy.data.images import ImageSet, decoded_batches, image_set
from van_deploy.data.labels import label_images
from van_deploy.engine.backend import RTX, load_backend
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.sidecar import log_path
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.metrics import Task, compare
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.images import choose_images
from van_deploy.recipe import ImageSelection
from van_deploy.runners.network import PYTORCH, original_network

EVALUATIONS = 220  # of each artifact, on each number of images
SIZES = (5, 50, 500, 2000)
# Shares of the images on which a faulty artifact predicts another class than PyTorch.
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.2)
COLUMNS = (
    *("network", "graph", "calibration images", "evaluation images", "SQNR dB", "agreement %"),
    *("Δtop-1 pp", "INT8 % of ops", "file MB", "s", "peak memory GB"),
)
ALONE = "--no-equalize --no-bias-correction"
ORT_METHODS = ("MinMax", "Entropy", "Percentile")
ADA = BuildOptions(
    targets=("sm_89",), profiles=(BatchRange(1, 2, 4),), profiling=Profiling.DETAILED
)

Array = npt.NDArray[Any]
Fault = Callable[[Array, np.random.Generator], Array]


class Network(NamedTuple):
    """A bundle, its calibration images and its evaluation images."""

    bundle: Path
    calib: Path
    eval: Path


def export_networks(folder: Path, checkpoint: str, calib: str, eval: str) -> Iterator[Network]:
    """Export van_digits, and the network of a checkpoint if one is given.

    Raises:
        ValueError: not all of ``checkpoint``, ``calib`` and ``eval`` are given.
    """
    if any((checkpoint, calib, eval)) and not all((checkpoint, calib, eval)):
        raise ValueError("give all of checkpoint=FILE, calib=FOLDER and eval=FOLDER, or none")
    digits = write_digits_folder(folder / "train", "train", 512)
    networks = [(EMBEDDED_NAME, digits, write_digits_folder(folder / "heldout", "heldout"))]
    if checkpoint:
        networks.append((checkpoint, Path(calib), Path(eval)))
    for spec, *images in networks:
        bundle = folder / Path(spec).name.partition(".")[0]
        run_van_deploy("export", spec, "--output", bundle)
        yield Network(bundle, *images)


def decode(images: Path | ImageSet, bundle: Path) -> Array:
    """Return images as the input ``(N, C, H, W)`` of a bundle."""
    preprocessing, items = Bundle.open(bundle).manifest.preprocessing, image_set(images).items
    return np.concatenate([batch.inputs for batch in decoded_batches(items, preprocessing, 32)])


def gates(checkpoint: str = "", calib: str = "", eval: str = "") -> Table:
    """Gate decisions on correct and faulty artifacts.

    The gate of `van-deploy evaluate` on each artifact as built, and on faulty ones made of its
    logits, on images drawn from the evaluation set with replacement. Correct artifacts should pass;
    no artifact with a loss over the limit should. Every network ran on every image once.
    """
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        *_, network = export_networks(Path(folder), checkpoint, calib, eval)
        for precision in ("fp16", "int8"):
            words = ("--precision", precision, "--images", network.calib)
            run_van_deploy("quantize", network.bundle, *words, codes=(0, 1))
        bundle = Bundle.open(network.bundle)
        loaded = original_network(bundle)
        images = label_images(network.eval, loaded.config.num_classes, loaded.class_names)
        with Networks(bundle, loaded, EvaluationSettings(images=network.eval)) as networks:
            batches = decoded_batches(images.items, loaded.preprocessing, 32)
            parts = [networks.logits(batch) for batch in batches]
        logits = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        noise_db = golden_samples(bundle).noise_db
    return gate_table(logits, np.array([item.label for item in images.items], np.int64), noise_db)


def gate_table(all_logits: Mapping[str, Array], labels: Array, noise_db: float) -> Table:
    """Return the decisions.

    Args:
        all_logits: logits ``(N, K)`` of PyTorch and each artifact by name.
        labels: ``(N,)``.
        noise_db: SQNR of PyTorch's float32 against its float64.
    """
    columns = ("artifact", "images", "evaluations", "PASS", "INCONCLUSIVE", "FAIL")
    table = Table((*columns, "loss over the limit", "of these PASS"))
    reference, rng = all_logits[PYTORCH], np.random.default_rng(0)
    kinds: dict[str, Sequence[Fault]] = {
        "correct": [lambda logits, rng: logits],
        "faulty": list(FAULTS.values()),
    }

    def decide(name: str, logits: Array, rows: Array) -> ArtifactLoss:
        """Return the gate's decision on some of the images."""
        expected = reference[rows]
        before, after = Predictions.of(expected), Predictions.of(logits[rows], reference=expected)
        truth = GroundTruth(labels[rows], expected.shape[1], Task.SINGLE_LABEL, noise_db)
        return compare_predictions(before, after, truth, name)

    sizes = sorted({*(size for size in SIZES if size < len(labels)), len(labels)})
    for name, size, kind in itertools.product(all_logits, sizes, kinds):
        if name == PYTORCH:
            continue
        losses = [
            decide(name, fault(all_logits[name].copy(), rng), rng.integers(0, len(labels), size))
            for fault in kinds[kind]
            for _ in range(EVALUATIONS // len(kinds[kind]))
        ]
        counts = Counter(loss.outcome.value for loss in losses)
        over_limit = [loss for loss in losses if loss.loss.loss > allowed_loss(name).value]
        passed = sum(loss.outcome.value == "pass" for loss in over_limit)
        cells = (counts[outcome] for outcome in ("pass", "inconclusive", "fail"))
        table.row(name, size, f"{len(losses)} {kind}", *cells, len(over_limit), passed)
    table.notes.append(f"Faulty artifacts, equally many of each: {', '.join(FAULTS)}.")
    return table


def _wrong_class(share: float, logits: Array, rng: np.random.Generator) -> Array:
    """Make another class the top-1 class on a share of the images."""
    rows = rng.choice(len(logits), max(1, round(share * len(logits))), replace=False)
    best, worst = logits[rows].argmax(axis=1), logits[rows].argmin(axis=1)
    logits[rows, best], logits[rows, worst] = logits[rows, worst], logits[rows, best]
    return logits


FAULTS: Mapping[str, Fault] = {
    "negated": lambda logits, rng: -logits,
    "zeroed": lambda logits, rng: np.zeros_like(logits),
    "shifted by one image": lambda logits, rng: np.roll(logits, 1, axis=0),
    "two classes swapped": lambda logits, rng: logits[:, [1, 0, *range(2, logits.shape[1])]],
    "as much noise as signal": lambda logits, rng: rng.normal(logits, logits.std()),
    **{
        f"wrong on {100 * share:g} % of the images": partial(_wrong_class, share)
        for share in SHARES
    },
}


def precision(checkpoint: str = "", calib: str = "", eval: str = "") -> Table:
    """Precision.

    Accuracy, size and cost of FP16 and INT8 on labelled images, with different options of
    `van-deploy quantize`, and with each method of ONNX Runtime's quantize_static for the same 1x1
    convolutions (symmetric int8, per-channel weights). Time and peak memory are those of the whole
    quantisation. The last rows are for its cost only: random weights, and few images to evaluate.

    Args:
        checkpoint: trained weights; without them only the network in the package.
        calib: folder of its calibration images.
        eval: folder of its evaluation images.
    """
    table = Table(COLUMNS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        folder = Path(name)
        for network in export_networks(folder, checkpoint, calib, eval):
            for words in ("--precision fp16", "", "--scope all", "--target cpu"):
                add_quantized(table, network, words)
            if network.bundle.name != EMBEDDED_NAME:
                add_quantized(table, network, "--max-drop 0.2")
                add_onnxruntime_rows(table, network, ORT_METHODS, 256)
        bundle, few = folder / "van_b0 at 224", write_digits_folder(folder / "few", "heldout", 64)
        run_van_deploy("export", "van_b0", "--weights", "random", "--output", bundle)
        for count in (80, 512):
            images = write_digits_folder(folder / f"{count}", "train", count)
            add_quantized(table, Network(bundle, images, few), f"--method minmax {ALONE}")
        # ONNX Runtime keeps all activations of all images: 0.09 GB per image at 224 pixels.
        add_onnxruntime_rows(table, Network(bundle, images, few), ("Percentile",), 24)
    return table


def ablation(checkpoint: str = "", calib: str = "", eval: str = "") -> Table:
    """INT8 ablation.

    Effect of the scales, and of each technique on top of the ones above it, on the accuracy of
    INT8. Rows with a number of images are `van-deploy quantize` with these options; rows with a
    `+` are what it reports on its held-out images. Kernels are those in the build log of a plan of
    TensorRT for RTX for an Ada GPU (no GPU is needed).
    """
    table = Table(COLUMNS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        for network in export_networks(Path(name), checkpoint, calib, eval):
            for method in ("minmax", "percentile", "mse"):
                add_quantized(table, network, f"--method {method} {ALONE}")
            facts = add_quantized(table, network, "")
            for technique in facts["techniques"]:
                used = "" if technique["used"] else " (not used)"
                cells = f"+ {technique['name']}{used}", "", "", f"{technique['after_db']:.2f}"
                table.row(network.bundle.name, *cells)
            add_quantized(table, network, "--precision fp16")
        bundle = Bundle.open(network.bundle)
        for artifact in ("fp16", "int8"):
            counts = count_kernels(onnx.load(bundle.verified_path(artifact)))
            table.notes.append(
                f"{bundle.path.name}, {artifact}: {counts['block2.0']} kernels for block2.0, "
                f"{counts['total']} for the plan."
            )
    return table


def add_quantized(table: Table, network: Network, words: str) -> dict[str, Any]:
    """Quantise a bundle with some options, add a row, and return the facts."""
    images = ("--images", network.calib, "--eval", network.eval)
    command = ("quantize", network.bundle, *words.split(), *images, "--force")
    document = run_van_deploy(*command, codes=(0, 1))
    facts: dict[str, Any] = document["facts"]
    reference, row = (
        next(r for r in facts["comparison"] if r["requested"] == requested)
        for requested in (False, True)
    )
    change = 100 * ((row["correct"] or 0) - (reference["correct"] or 0)) / row["images"]
    table.row(
        *(network.bundle.name, f"quantize {words}".strip()),
        *(facts["calibration"]["images"], row["images"]),
        *(f"{row['sqnr_db']:.2f}", f"{100 * row['agreement']:.2f}", f"{change:+.2f}"),
        *(f"{100 * facts.get('int8_share', 0.0):.1f}", f"{row['size_bytes'] / 1e6:.1f}"),
        *(f"{sum(document['seconds'].values()):.0f}", f"{document['peak_bytes'] / 1e9:.2f}"),
    )
    return facts


def add_onnxruntime_rows(
    table: Table, network: Network, methods: Iterable[str], count: int
) -> None:
    """Add a row for each method of ONNX Runtime's quantiser, on ``count`` calibration images."""
    source = Bundle.open(network.bundle).verified_path("fp32")
    inputs = decode(choose_images(ImageSelection(count=count), network.calib), network.bundle)
    images = decode(network.eval, network.bundle)
    expected, target = logits_of(source, images), network.bundle.with_suffix(".onnx")
    for method in methods:
        seconds, peak = run_in_process(quantize_pointwise, source, target, inputs, method)
        metrics = compare(expected, logits_of(target, images))
        table.row(
            *(network.bundle.name, f"ONNX Runtime quantize_static, {method}"),
            *(len(inputs), metrics.images),
            *(f"{metrics.sqnr_db:.2f}", f"{100 * (metrics.top1_agreement or 0):.2f}", "", ""),
            *(f"{target.stat().st_size / 1e6:.1f}", f"{seconds:.0f}", f"{peak:.2f}"),
        )


def quantize_pointwise(
    source: Path, target: Path, images: Array, method: str
) -> tuple[float, float]:
    """Write ONNX Runtime's Q/DQ file of the 1x1 convolutions, as TensorRT requires it.

    Returns:
        The seconds, and the peak memory of this process in GB.
    """
    from onnxruntime.quantization import CalibrationMethod

    convolutions = [node for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    kernel = onnx.helper.get_node_attr_value
    start = time.perf_counter()
    quantize_static(
        *(source, target, images, "QInt8"),
        nodes_to_quantize=[c.name for c in convolutions if kernel(c, "kernel_shape") == [1, 1]],
        calibrate_method=CalibrationMethod[method],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        },
    )
    return time.perf_counter() - start, peak_memory_bytes() / 1e9


def logits_of(path: Path, images: Array) -> Array:
    """Return the logits of a file in ONNX Runtime, with Q/DQ pairs as written."""
    run = logits_session(onnx.load(path), fuse=False)
    return np.concatenate([run(images[i : i + 25]) for i in range(0, len(images), 25)])


def count_kernels(model: onnx.ModelProto) -> Counter[str]:
    """Return the kernels of each block in a plan of TensorRT for RTX, and ``total``."""
    with tempfile.TemporaryDirectory() as folder:
        source, plan = Path(folder) / "model.onnx", Path(folder) / "model.plan"
        onnx.save(model, source)
        backend = load_backend(RTX)
        engine_from_onnx(source, plan, backend=backend, options=ADA, precision="fp32")
        log = log_path(plan).read_text(encoding="utf-8")
    counts: Counter[str] = Counter()
    for line in re.findall(r"(?m)^(?:\[V\] )?Name: \S+, LayerType: .*", log):
        counts.update({*re.findall(r"\[ONNX Layer: (block\d\.\d+)", line), "total"})
    return counts
