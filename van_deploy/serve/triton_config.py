"""Triton's description of a model, as plain data and as ``config.pbtxt``.

The data is what the protobuf message ``inference.ModelConfig`` holds, by field
name; the server gives it out as JSON and the packager writes it as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from van_deploy.runners.network import TensorSpec

__all__ = ["PLATFORMS", "TRITON_TYPES", "EnumWord", "model_config", "pbtxt"]

TRITON_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int64": "TYPE_INT64",
}
PLATFORMS = {"onnx": ("onnxruntime", "model.onnx"), "engine": ("tensorrt", "model.plan")}
"""Back end and file name for each kind of artefact."""

LABELLED = ("logits", "probabilities")


class EnumWord(str):
    """An enum's value."""

    __slots__ = ()


def model_config(
    name: str,
    kind: str,
    given: TensorSpec,
    outputs: Sequence[TensorSpec],
    max_batch: int,
    *,
    preferred: Sequence[int] = (),
    queue_delay_us: int = 1000,
    queue_limit: int = 256,
    queue_timeout_us: int = 0,
    instances: int = 1,
    gpu: bool = False,
    labels_file: str = "",
) -> dict[str, Any]:
    """Return the configuration of one model.

    Args:
        name: of the model.
        kind: ``onnx`` or ``engine``.
        given: its input.
        outputs: what it gives.
        max_batch: rows a batch, as the artefact was built for.
        preferred: batch sizes worth waiting for.
        queue_delay_us: longest wait for other requests.
        queue_limit: requests waiting, at most; more are refused.
        queue_timeout_us: a request that waited longer is refused; 0 for never.
        instances: copies that run at the same time.
        gpu: whether they run on a GPU.
        labels_file: names of the classes, beside the configuration; "" for none.
    """
    backend, file = PLATFORMS[kind]
    policy: dict[str, Any] = {"max_queue_size": queue_limit, "timeout_action": EnumWord("REJECT")}
    if queue_timeout_us:
        policy["default_timeout_microseconds"] = queue_timeout_us
    batching: dict[str, Any] = {
        "max_queue_delay_microseconds": queue_delay_us,
        "default_queue_policy": policy,
    }
    if preferred:
        batching = {"preferred_batch_size": sorted(preferred), **batching}
    return {
        "name": name,
        "backend": backend,
        "max_batch_size": max_batch,
        "input": [_tensor(given)],
        "output": [
            {
                **_tensor(spec),
                **(
                    {"label_filename": labels_file} if labels_file and spec.name in LABELLED else {}
                ),
            }
            for spec in outputs
        ],
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [
            {"count": instances, "kind": EnumWord("KIND_GPU" if gpu else "KIND_CPU")}
        ],
        "default_model_filename": file,
        "dynamic_batching": batching,
        "model_warmup": [_warmup(given, rows) for rows in sorted({1, max_batch})],
        "response_cache": {"enable": False},
    }


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """Return a message in protobuf's text form."""
    lines = []
    for key, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{key} {{\n{pbtxt(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, EnumWord):
        return json.dumps(value)
    return str(value)


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": EnumWord(TRITON_TYPES[spec.dtype]),
        "dims": list(spec.shape),
    }


def _warmup(given: TensorSpec, rows: int) -> dict[str, Any]:
    """Return a request of zeros that Triton runs before it says it is ready."""
    values = {
        "data_type": EnumWord(TRITON_TYPES[given.dtype]),
        "dims": list(given.shape),
        "zero_data": True,
    }
    return {
        "name": f"batch of {rows}",
        "batch_size": rows,
        "inputs": {"key": given.name, "value": values},
    }
