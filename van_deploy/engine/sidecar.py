"""The sidecar: a JSON file beside a plan that says what the plan is.

The plan itself stays as TensorRT wrote it, so that trtexec and Triton load it. The
sidecar carries the plan's SHA-256, which is checked before anything is
deserialised, and a digest of its own, so that an edit shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from van_deploy.config import BatchRange, BuildOptions
from van_deploy.documents import plain
from van_deploy.errors import InputError
from van_deploy.fields import Count, FileName, Kept, Text
from van_deploy.files import content_key, file_sha256, write_atomic
from van_deploy.manifest import Precision
from van_deploy.model.preprocess import Preprocessing
from van_deploy.schema import Schema
from van_deploy.versioned import Versioned, read_versioned

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

SCHEMA: Final = "van-deploy/engine/2"
REBUILD = "Build the engine again with `van-deploy build`."


class Tensor(Schema):
    """One input or output of an engine.

    Attributes:
        name: as in the ONNX file.
        shape: -1 for the batch.
        dtype: TensorRT's name in lower case: ``float``, ``half``, ``int8``.
    """

    name: Text
    shape: tuple[Annotated[int, Field(ge=-1, lt=2**31)], ...]
    dtype: Text


class Sidecar(Versioned):
    """Everything there is to know about a plan without loading it.

    Attributes:
        name: the engine's.
        plan_sha256: digest of the plan.
        plan_bytes: its size.
        onnx_file: the file it was built from.
        onnx_sha256: that file's digest.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        backend_version: all four numbers.
        cuda: major version of CUDA the backend was made for, or None if unknown.
        precision: of the ONNX file.
        targets: compute capabilities it serves, such as ``sm_89``.
        built_on: the GPU it was built on; None for TensorRT for RTX, which uses none.
        options: what was asked of the build.
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
        reproducible: whether a second build gave the same bytes; None where none was made.
        preprocessing: of the model; None where nobody said.
        sidecar_sha256: digest of all the rest.
    """

    schema_: Literal["van-deploy/engine/2"] = Field(alias="schema")
    name: FileName
    plan_sha256: Text
    plan_bytes: Count
    onnx_file: Text
    onnx_sha256: Text
    backend: Literal["tensorrt", "tensorrt-rtx"]
    backend_version: Text
    cuda: Count | None
    precision: Precision
    targets: tuple[Text, ...]
    built_on: Text | None
    options: BuildOptions
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parser_layers: Count
    parse_seconds: float
    build_seconds: float
    peak_memory_bytes: Count
    workspace_bytes: Count
    device_memory: dict[Text, Count]
    warnings: dict[str, Count]
    fixed_addresses: bool
    reproducible: bool | None = None
    preprocessing: Annotated[Preprocessing, Kept] | None = None
    sidecar_sha256: Text = ""

    @property
    def profiles(self) -> tuple[BatchRange, ...]:
        """The batch sizes it serves."""
        return self.options.profiles

    def digest(self) -> str:
        """Return what :attr:`sidecar_sha256` has to be."""
        return content_key(plain(self.model_copy(update={"sidecar_sha256": ""})))


def sidecar_path(plan: Path) -> Path:
    """Return where the sidecar of ``plan`` is."""
    return _beside(plan, ".json")


def log_path(plan: Path) -> Path:
    """Return where the build log of ``plan`` is."""
    return _beside(plan, ".log")


def write_sidecar(plan: Path, sidecar: Sidecar) -> Sidecar:
    """Write the sidecar of ``plan``, all of it or nothing, and return it with its digest."""
    complete = sidecar.model_copy(update={"sidecar_sha256": sidecar.digest()})
    write_atomic(sidecar_path(plan), complete.text())
    return complete


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
    sidecar = read_versioned(
        Sidecar, path, "sidecar", InputError, damaged=REBUILD, outdated=REBUILD
    )
    if sidecar.sidecar_sha256 != sidecar.digest():
        raise InputError(
            f"'{path}' was edited after it was written: its digest does not match.", REBUILD
        )
    return sidecar


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
