"""A model as Triton describes it: the fields of the protobuf message ``inference.ModelConfig``.

The same plain data is written as ``config.pbtxt`` (by Triton's own message class, which
refuses a field or a value it does not know) and given out by ``van-deploy serve``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from van_deploy.config import TritonSettings
from van_deploy.errors import MissingDependency
from van_deploy.runners.network import TensorSpec
from van_deploy.serve.triton_model import TritonModel

__all__ = ["DATATYPES", "LABELS_FILE", "config_text", "model_config"]

DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64"}
"""NumPy's names of types, and the v2 protocol's; ``config.pbtxt`` puts ``TYPE_`` before them."""

LABELS_FILE = "labels.txt"
LABELLED = ("logits", "probabilities")
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
THREADS_KEY = "intra_op_thread_count"  # the ONNX Runtime backend's; model.py reads the same


def model_config(
    model: TritonModel,
    how: TritonSettings,
    *,
    preferred: Sequence[int] = (),
    labels: str = "",
    environment: str = "",
) -> dict[str, Any]:
    """Return the configuration of one model.

    One instance group lists all profiles of a plan: the backend takes the fitting one for each
    batch, where several groups would be scheduled without regard to it. A static profile (one
    batch size) is run as a CUDA graph.

    Args:
        model: names, types, shapes and limits.
        how: it is to be run.
        preferred: batch sizes worth waiting for.
        labels: file with the names of the classes, beside the configuration; "" for none.
        environment: execution environment of the Python backend.
    """
    gpu = how.gpu or model.backend == "tensorrt"
    parameters = {"EXECUTION_ENV_PATH": environment} if environment else {}
    if how.threads and not gpu:
        parameters[THREADS_KEY] = str(how.threads)
    outputs = [_tensor(spec) for spec in model.outputs]
    for output in outputs:
        if labels and output["name"] in LABELLED:
            output["label_filename"] = labels
    ends = {rows for profile in model.profiles for rows in (profile.min, profile.max)}
    given = _tensor(model.input)
    graphs = [
        {"batch_size": p.max, "input": {given["name"]: {"dim": given["dims"]}}}
        for p in model.profiles
        if p.min == p.max
    ]
    return {
        "name": model.name,
        "backend": model.backend,
        "max_batch_size": model.max_batch,
        "input": [given],
        "output": outputs,
        "version_policy": {"specific": {"versions": [how.model_version]}},
        "instance_group": [
            {
                "count": how.instances,
                "kind": "KIND_GPU" if gpu else "KIND_CPU",
                "profile": [str(index) for index in range(len(model.profiles))],
            }
        ],
        "default_model_filename": FILES[model.backend],
        "cc_model_filenames": dict(model.plans),
        "dynamic_batching": {
            "preferred_batch_size": list(preferred),
            "max_queue_delay_microseconds": how.queue_delay_us,
            "default_queue_policy": {
                "max_queue_size": how.queue_limit,
                "timeout_action": "REJECT",
                "default_timeout_microseconds": 1000 * how.queue_timeout_ms,
            },
        },
        "optimization": {"cuda": {"graphs": True, "graph_spec": graphs}} if graphs else {},
        "parameters": {key: {"string_value": text} for key, text in parameters.items()},
        "model_warmup": [_warmup(given, rows) for rows in sorted(ends or {1, model.max_batch})],
        "response_cache": {"enable": False},
    }


def config_text(config: dict[str, Any]) -> str:
    """Return a configuration as ``config.pbtxt``.

    Raises:
        MissingDependency: tritonclient, which holds Triton's schema, is not installed.
    """
    message = _message()
    from google.protobuf import json_format, text_format

    return str(text_format.MessageToString(json_format.ParseDict(config, message)))


def _message() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError) as error:  # tritonclient raises RuntimeError without gRPC
        raise MissingDependency(
            f"Triton's schema is in tritonclient, which is not installed: {error}.",
            "Install it with `pip install 'van-deploy[triton]'`.",
        ) from error
    return model_config_pb2.ModelConfig()


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    kind = f"TYPE_{DATATYPES[spec.dtype]}"
    return {"name": spec.name, "data_type": kind, "dims": list(spec.shape)}


def _warmup(given: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a request of zeros that Triton runs before it says it is ready."""
    values = {"data_type": given["data_type"], "dims": given["dims"], "zero_data": True}
    return {"name": f"batch of {rows}", "batch_size": rows, "inputs": {given["name"]: values}}
