"""What an ONNX file says of itself, held against the manifest that vouches for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.documents import json_from, plain

__all__ = ["contract_failures"]


def contract_failures(bundle: Bundle, name: str) -> list[str]:
    """Return what the ONNX file says of itself that the manifest contradicts."""
    import onnx

    path = bundle.verified(name)
    if path.suffix != ".onnx":
        return []
    model = onnx.load(path, load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    failures = []
    written = said.get("van_deploy.preprocessing")
    if written is not None:
        failures += _differences(_table(written), plain(bundle.manifest.preprocessing))
    weights = said.get("van_deploy.weights_sha256")
    if weights is not None and weights != bundle.manifest.weights.sha256:
        failures.append("the file was made from other weights than the manifest names")
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    if batch.dim_value and batch.dim_value != bundle.manifest.batch.fixed:
        failures.append(f"its batch is frozen at {batch.dim_value}")
    return failures


def _table(text: str) -> Mapping[str, Any]:
    """Return the JSON object in ``text``; an empty one where there is none, which differs."""
    try:
        value = json_from(text)
    except ValueError:
        return {}
    return value if isinstance(value, Mapping) else {}


def _differences(said: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    return [
        f"the file was made for {key} {said.get(key)}, the manifest says {value}"
        for key, value in manifest.items()
        if key != "source" and said.get(key) != value
    ]
