# Written by `python -m supply_chain.reference` from van_deploy/config.
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

class BenchOptions(TypedDict, total=False):
    device: str | None
    batches: Sequence[int]
    runners: Sequence[str]
    reference: str
    threads: int | None
    streams: int
    image_sizes: Sequence[int | str]
    p99_ms: float | None
    roofline: bool
    profile: bool
    tf32: bool
    conv_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"]
    fuse_conv_bias: bool
    seconds: float
    calls: int
    limit: float
    rounds: int
    tolerance: float
    warmup: float

class BuildOptions(TypedDict, total=False):
    batch: Sequence[str]
    dynamic_size: str | None
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"]
    version_compatible: bool
    workspace: int | str | None
    optimization_level: int | None
    tiling: Literal["none", "fast", "moderate", "full"]
    tf32: bool
    profiling: Literal["none", "layer-names-only", "detailed"]
    precisions: Sequence[str]
    targets: Sequence[str]
    backend: Literal["auto", "tensorrt", "tensorrt-rtx", "inductor"]
    timing_cache: str | Path | None
    device: str | None
    max_autotune: bool
    fused_kernels: bool
    tune: bool
    images: str | Path | None

class CheckOptions(TypedDict, total=False):
    allow_skip: Sequence[Literal["engines", "runtimes", "accuracy", "speed"]]
    allow_inconclusive: bool
    against: Literal["golden", "weights"]
    images: str | Path | None
    count: int | None
    runner: Literal["ort-cpu", "ort-cuda"]
    device: str
    trust_engine: bool
    weights: str | Path | None
    recipe: str
    evaluate: str | Path | None
    labels: str | Path | None
    class_order: Literal["strings", "natural", "index", "names"] | None
    speed: bool

class DriftOptions(TypedDict, total=False):
    artifacts: Sequence[str]
    weights: str | Path | None
    against: Literal["weights", "golden"]
    level: Literal["stage", "block", "module"]
    images: str | Path | None
    count: int

class EvaluationOptions(TypedDict, total=False):
    allow_skip: Sequence[Literal["engines", "runtimes", "accuracy", "speed"]]
    allow_inconclusive: bool
    artifacts: Sequence[str]
    runner: Literal["ort-cpu", "ort-cuda"]
    device: str
    trust_engine: bool
    weights: str | Path | None
    recipe: str
    images: str | Path
    labels: str | Path | None
    class_order: Literal["strings", "natural", "index", "names"] | None
    label_files: bool
    limit: int | None
    on: Literal["here", "ray"]
    ray_address: str
    batch: int
    workers: int

class ExportOptions(TypedDict, total=False):
    name: str
    weights: str
    sha256: str
    container: str
    layer_norm_eps: float | None
    head: Sequence[str]
    labels: str | Path | None
    seed: int
    image_size: int | str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None
    crop_pct: float | None
    crop_mode: Literal["center", "squash", "border"] | None
    opset: int
    fold: bool
    simplify: bool
    embed_preprocess: Literal["none", "normalize", "uint8"]
    outputs: Sequence[Literal["logits", "probabilities", "top5"]]
    features: bool
    out_indices: Sequence[int]
    dynamic_size: str | None
    golden: Literal["images", "samples", "none"]
    batch: str
    precision: Sequence[Literal["fp16", "bf16", "int8"]]
    calibration: str

class PackageOptions(TypedDict, total=False):
    backend: Literal["onnxruntime", "python"]
    instances: int
    threads: int
    gpu: bool
    model_version: int
    triton_release: str
    triton_python: str
    queue_delay_us: int
    queue_limit: int
    queue_timeout_ms: int
    artifacts: Sequence[str]

class PredictOptions(TypedDict, total=False):
    runner: Literal["ort-cpu", "ort-cuda"]
    device: str
    trust_engine: bool
    threads: int | None
    artifact: str
    top_k: int
    batch: int | None

class QuantizeOptions(TypedDict, total=False):
    precision: Literal["fp16", "bf16", "int8"]
    target: Literal["tensorrt", "cpu"]
    images: str | Path | None
    calibration: str
    evaluate: str | Path | None
    class_order: Literal["strings", "natural", "index", "names"] | None
    calibrate_on_noise: bool
    method: Literal["mse", "percentile", "minmax"]
    scope: Sequence[str]
    rest: Literal["fp16", "fp32"] | None
    equalize: bool
    bias_correction: bool
    max_drop: float | None
    evaluations: int
    keep: Sequence[str]
    keep_defaults: bool
    strict: bool
    allow_inconclusive: bool
    threads: int | None

class RunOptions(TypedDict, total=False):
    allow_skip: Sequence[Literal["engines", "runtimes", "accuracy", "speed"]]
    allow_inconclusive: bool
    runner: Literal["ort-cpu", "ort-cuda"]
    device: str
    trust_engine: bool
    images: str | Path | None
    offline: bool
    force: bool

class VerifyOptions(TypedDict, total=False):
    allow_skip: Sequence[Literal["engines", "runtimes", "accuracy", "speed"]]
    allow_inconclusive: bool
    against: Literal["golden", "weights"]
    images: str | Path | None
    count: int | None
    artifacts: Sequence[str]
    runner: Literal["ort-cpu", "ort-cuda"]
    device: str
    trust_engine: bool
    weights: str | Path | None
    recipe: str
    modules: bool
