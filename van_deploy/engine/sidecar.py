"""The sidecar: a JSON file beside a plan or an Inductor package that says what it is.

Both are native code. The file itself stays as TensorRT or PyTorch wrote it, so that trtexec
and Triton load it. The sidecar carries its SHA-256, which is checked before anything is
loaded, and a digest of its own, so that an edit shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, TypeVar

from pydantic import Field

from van_deploy.config import BatchRange, BuildOptions
from van_deploy.documents import plain
from van_deploy.errors import InputError
from van_deploy.files import content_key, file_sha256, write_atomic
from van_deploy.manifest import Precision
from van_deploy.model.preprocess import Preprocessing
from van_deploy.schema import (
    Count,
    FileName,
    SafeDataclass,
    Schema,
    Text,
    VersionedSchema,
    read_document,
)

SCHEMA: Final = "van-deploy/engine/2"
PACKAGE_SCHEMA: Final = "van-deploy/inductor/1"
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


class _Vouching(VersionedSchema):
    """A sidecar of any kind: what both have, and where the digest of the file it speaks of is."""

    WHAT: ClassVar[str]
    DIGEST: ClassVar[str]
    name: FileName
    onnx_file: Text
    onnx_sha256: Text
    precision: Precision
    targets: tuple[Text, ...]
    build_seconds: float
    sidecar_sha256: Text = ""

    def digest(self) -> str:
        """Return what :attr:`sidecar_sha256` has to be."""
        return content_key(plain(self.model_copy(update={"sidecar_sha256": ""})))


Vouching = TypeVar("Vouching", bound=_Vouching)


class Sidecar(_Vouching):
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
        device_memory: bytes of weights, activations and scratch on the GPU at the
            largest batch, as the builder said.
        warnings: what the builder warned of, and how often.
        fixed_addresses: whether the build ran without address randomisation, without
            which two builds differ in a few bytes (see :mod:`van_deploy.engine.build`).
        preprocessing: of the model; None where nobody said.
        sidecar_sha256: digest of all the rest.
    """

    WHAT = "plan"
    DIGEST = "plan_sha256"
    schema_: Literal["van-deploy/engine/2"] = Field(alias="schema")
    plan_sha256: Text
    plan_bytes: Count
    backend: Literal["tensorrt", "tensorrt-rtx"]
    backend_version: Text
    cuda: Count | None
    built_on: Text | None
    options: BuildOptions
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parser_layers: Count
    parse_seconds: float
    peak_memory_bytes: Count
    device_memory: dict[Text, Count]
    warnings: dict[str, Count]
    fixed_addresses: bool
    preprocessing: Annotated[Preprocessing, SafeDataclass] | None = None

    @property
    def profiles(self) -> tuple[BatchRange, ...]:
        """The batch sizes it serves."""
        return self.options.profiles

    @property
    def made_by(self) -> str:
        """Backend and version."""
        return f"{self.backend} {self.backend_version}"


class PackageSidecar(_Vouching):
    """Everything there is to know about an Inductor package (``.pt2``) without loading it.

    Attributes:
        name: the package's.
        file_sha256: digest of the package.
        file_bytes: its size.
        onnx_file: the FP32 graph that its network was read from.
        onnx_sha256: that file's digest.
        torch: the PyTorch that compiled it, without the local part of the version. Its code
            calls that PyTorch's libraries.
        device: ``cpu`` or ``cuda``.
        targets: the compute capability it serves, such as ``sm_90``, or the processor's
            architecture, such as ``x86_64``.
        cpu_features: instruction sets of the processor it was compiled on: its code may use all
            of them. Empty on a GPU.
        built_on: the GPU or the processor.
        precision: what it computes in.
        tf32: whether FP32 convolutions may compute in TF32.
        max_autotune: whether kernels were chosen by timing them.
        batch: the batch sizes it serves.
        input_shape: -1 for the batch.
        build_seconds: time to export and to compile.
        sidecar_sha256: digest of all the rest.
    """

    WHAT = "package"
    DIGEST = "file_sha256"
    schema_: Literal["van-deploy/inductor/1"] = Field(alias="schema")
    file_sha256: Text
    file_bytes: Count
    torch: Text
    device: Literal["cpu", "cuda"]
    cpu_features: tuple[Text, ...]
    built_on: Text
    tf32: bool
    max_autotune: bool
    batch: BatchRange
    input_shape: tuple[Annotated[int, Field(ge=-1, lt=2**31)], ...]
    parser_layers: ClassVar[int] = 0

    @property
    def profiles(self) -> tuple[BatchRange, ...]:
        """The batch sizes it serves."""
        return (self.batch,)

    @property
    def made_by(self) -> str:
        """Backend and version."""
        return f"inductor {self.torch}"


def sidecar_path(plan: Path) -> Path:
    """Return where the sidecar of ``plan`` is."""
    # Names hold dots, so with_suffix will not do.
    return plan.with_name(plan.name.removesuffix(".plan").removesuffix(".pt2") + ".json")


def log_path(plan: Path) -> Path:
    """Return where the build log of ``plan`` is."""
    return sidecar_path(plan).with_suffix(".log")


def write_sidecar(plan: Path, sidecar: Vouching) -> Vouching:
    """Write the sidecar of ``plan``, all of it or nothing, and return it with its digest."""
    complete = sidecar.model_copy(update={"sidecar_sha256": sidecar.digest()})
    write_atomic(sidecar_path(plan), complete.text())
    return complete


def verified_sidecar(plan: Path) -> Sidecar:
    """Return the sidecar of ``plan`` after making sure that the plan is the one it speaks of.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
    """
    return _verified(plan, Sidecar)


def verified_package(package: Path) -> PackageSidecar:
    """Return the sidecar of a package after making sure that it speaks of this one.

    Raises:
        InputError: package or sidecar is missing, damaged, edited or swapped.
    """
    return _verified(package, PackageSidecar)


def _verified(file: Path, model: type[Vouching]) -> Vouching:
    path = sidecar_path(file)
    if not file.is_file():
        raise InputError(f"There is no engine '{file}'.", REBUILD)
    if not path.is_file():
        raise InputError(
            f"'{file}' has no sidecar: '{path.name}' is not beside it. Loading it runs the "
            "code in it, and nothing says where this one comes from.",
            "Copy the sidecar along with it, or build it again. "
            "Only for a plan you made yourself: --trust-engine, in Python "
            "`TensorRtRunner(plan, trust_engine=True)`.",
        )
    sidecar = read_document(model, path, "sidecar", InputError, REBUILD)
    if sidecar.sidecar_sha256 != sidecar.digest():
        raise InputError(
            f"'{path}' was edited after it was written: its digest does not match.", REBUILD
        )
    actual, expected = file_sha256(file), str(getattr(sidecar, model.DIGEST))
    if actual != expected:
        raise InputError(
            f"'{file}' is not the {model.WHAT} its sidecar speaks of: its SHA-256 is "
            f"{actual[:12]}..., the sidecar says {expected[:12]}.... It was damaged or swapped.",
            REBUILD,
        )
    return sidecar
