"""The sidecar: a JSON file beside a plan that says what the plan is.

The plan itself stays as TensorRT wrote it, so that trtexec and Triton load it. The
sidecar carries the plan's SHA-256, which is checked before anything is
deserialised, and a digest of its own, so that an edit shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from van_deploy.config import BatchRange, BuildOptions
from van_deploy.documents import json_from, text_from
from van_deploy.errors import InputError
from van_deploy.files import file_sha256, write_atomic
from van_deploy.forms import (
    Form,
    count,
    list_of,
    number,
    one_of,
    optional,
    require_encodable,
    require_form,
    table,
    table_of,
    text,
)

__all__ = [
    "SCHEMA",
    "Sidecar",
    "Tensor",
    "log_path",
    "read_sidecar",
    "sidecar_path",
    "verified_sidecar",
    "write_sidecar",
]

SCHEMA = "van-deploy/engine/1"
REBUILD = "Build the engine again with `van-deploy build`."


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine.

    Attributes:
        name: as in the ONNX file.
        shape: -1 for the batch.
        dtype: TensorRT's name in lower case: ``float``, ``half``, ``int8``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Tensor:
        """Return the tensor that JSON describes."""
        return cls(str(plain["name"]), tuple(int(n) for n in plain["shape"]), str(plain["dtype"]))


@dataclass(frozen=True)
class Sidecar:
    """Everything there is to know about a plan without loading it.

    Attributes:
        name: the engine's.
        plan_sha256: digest of the plan.
        plan_bytes: its size.
        onnx_file: the file it was built from.
        onnx_sha256: that file's digest.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        backend_version: all four numbers.
        cuda: major version of CUDA the back end was made for, or None if unknown.
        precision: ``fp32``, ``fp16`` or ``int8``.
        targets: compute capabilities it serves, such as ``sm_89``.
        built_on: the GPU it was built on; None for TensorRT for RTX, which uses none.
        options: what was asked of the build (:class:`BuildOptions` as JSON).
        inputs: what goes in.
        outputs: what comes out.
        parser_layers: layers TensorRT's parser made of the graph.
        parse_seconds: time to parse.
        build_seconds: time to build.
        peak_memory_bytes: most main memory the build held.
        workspace_bytes: limit on scratch memory that was in force.
        device_memory: bytes of weights, activations and scratch on the GPU at the
            largest batch, as the builder said.
        warnings: what the builder warned of, and how often.
        fixed_addresses: whether the build ran without address randomisation, without
            which two builds differ in a few bytes (see :mod:`van_deploy.engine.isolation`).
        reproducible: whether a second build gave the same bytes, or ``not checked``.
        preprocessing: of the model, as in the bundle's manifest.
    """

    name: str
    plan_sha256: str
    plan_bytes: int
    onnx_file: str
    onnx_sha256: str
    backend: str
    backend_version: str
    cuda: int | None
    precision: str
    targets: tuple[str, ...]
    built_on: str | None
    options: Mapping[str, Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parser_layers: int
    parse_seconds: float
    build_seconds: float
    peak_memory_bytes: int
    workspace_bytes: int
    device_memory: Mapping[str, int]
    warnings: Mapping[str, int]
    fixed_addresses: bool
    reproducible: bool | str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def profiles(self) -> tuple[BatchRange, ...]:
        """The batch sizes it serves."""
        return self.build_options.profiles

    @property
    def build_options(self) -> BuildOptions:
        """What was asked of the build."""
        return BuildOptions.from_dict(self.options)

    def as_dict(self) -> dict[str, Any]:
        """Return the sidecar as JSON has it, without its digest."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Sidecar:
        """Return the sidecar that :meth:`as_dict` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something has the wrong form.
        """
        known = {entry.name: plain[entry.name] for entry in fields(cls)}
        known["targets"] = tuple(plain["targets"])
        known["inputs"] = tuple(Tensor.from_dict(entry) for entry in plain["inputs"])
        known["outputs"] = tuple(Tensor.from_dict(entry) for entry in plain["outputs"])
        sidecar = cls(**known)
        sidecar.build_options  # noqa: B018 - the options must be readable
        return sidecar


_TENSORS = list_of(
    lambda value: (
        table(value)
        and text(value.get("name"))
        and text(value.get("dtype"))
        and list_of(lambda length: length == -1 or count(length))(value.get("shape"))
    )
)

_FORM: Form = {
    **dict.fromkeys(("name", "plan_sha256", "onnx_file", "onnx_sha256", "backend_version"), text),
    "backend": one_of("tensorrt", "tensorrt-rtx"),
    "precision": one_of("fp32", "fp16", "int8"),
    **dict.fromkeys(("plan_bytes", "parser_layers", "peak_memory_bytes", "workspace_bytes"), count),
    **dict.fromkeys(("parse_seconds", "build_seconds"), number),
    "cuda": optional(count),
    "targets": list_of(text),
    "built_on": optional(text),
    "options": table,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "device_memory": table_of(count),
    "warnings": table_of(count),
    "fixed_addresses": lambda value: isinstance(value, bool),
    "reproducible": lambda value: isinstance(value, bool) or text(value),
    "preprocessing": table,
}


def sidecar_path(plan: Path) -> Path:
    """Return where the sidecar of ``plan`` is."""
    return _beside(plan, ".json")


def log_path(plan: Path) -> Path:
    """Return where the build log of ``plan`` is."""
    return _beside(plan, ".log")


def write_sidecar(plan: Path, sidecar: Sidecar) -> None:
    """Write the sidecar of ``plan``, all of it or nothing."""
    body = sidecar.as_dict()
    document = {"schema": SCHEMA, **body, "sidecar_sha256": _digest(body)}
    write_atomic(sidecar_path(plan), json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def read_sidecar(plan: Path) -> Sidecar:
    """Return the sidecar of ``plan``; the plan is not looked at.

    Raises:
        InputError: there is none, it cannot be read, or it was edited.
    """
    path = sidecar_path(plan)
    if not path.is_file():
        raise InputError(
            f"'{plan}' has no sidecar: '{path.name}' is not beside it. Loading a plan runs the "
            "code in it, and nothing says where this one comes from.",
            "Copy the sidecar along with the plan, or build it again. "
            "Only for a plan you made yourself: --trust-engine, in Python "
            "`TensorRtRunner(plan, trust_engine=True)`.",
        )
    try:
        document = json_from(text_from(path))
        schema = document.pop("schema")
        digest = document.pop("sidecar_sha256")
        if schema != SCHEMA:
            raise InputError(
                f"'{path}' has schema '{schema}'; this version reads '{SCHEMA}'.", REBUILD
            )
        if digest != _digest(document):
            raise InputError(
                f"'{path}' was edited after it was written: its digest does not match.", REBUILD
            )
        require_encodable(document)
        require_form(document, _FORM)
        return Sidecar.from_dict(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The sidecar '{path}' is damaged: {type(error).__name__}: {error}.", REBUILD
        ) from error


def verified_sidecar(plan: Path) -> Sidecar:
    """Return the sidecar of ``plan`` after making sure that the plan is the one it speaks of.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
    """
    if not plan.is_file():
        raise InputError(f"There is no engine '{plan}'.", REBUILD)
    sidecar = read_sidecar(plan)
    actual = file_sha256(plan)
    if actual != sidecar.plan_sha256:
        raise InputError(
            f"'{plan}' is not the plan its sidecar speaks of: its SHA-256 is {actual[:12]}..., "
            f"the sidecar says {sidecar.plan_sha256[:12]}.... It was damaged or swapped.",
            REBUILD,
        )
    return sidecar


def _beside(plan: Path, suffix: str) -> Path:
    """Return the file of the plan's stem; names hold dots, so ``with_suffix`` will not do."""
    return plan.with_name(plan.name.removesuffix(".plan") + suffix)


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
