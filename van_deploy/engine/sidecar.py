"""The sidecar: a JSON file next to a plan or an Inductor package that describes it.

Plans and packages are native code. They stay as TensorRT or PyTorch wrote them, so that trtexec
and Triton load them. The sidecar contains the SHA-256 of the file, which is verified before the
file is loaded, and a digest of itself, which reveals edits.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, TypeVar

from packaging.version import Version
from pydantic import AfterValidator, Field
from typing_extensions import Self

from van_deploy import schema
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.documents import plain
from van_deploy.errors import InputError
from van_deploy.files import content_key, file_sha256, write_atomic
from van_deploy.manifest import Precision
from van_deploy.model.preprocess import Preprocessing
from van_deploy.schema import Count, FileName, SafeDataclass, Schema, Text, VersionedSchema

SCHEMA: Final = "van-deploy/engine/2"
PACKAGE_SCHEMA: Final = "van-deploy/inductor/1"
REBUILD = "Build the engine again with `van-deploy build`."


def _check_version(value: str) -> str:
    Version(value)  # InvalidVersion is a ValueError
    return value


class Tensor(Schema):
    """One input or output of an engine.

    Attributes:
        name: name in the ONNX file.
        shape: dimensions; the batch is -1.
        dtype: TensorRT's data type in lower case: ``float``, ``half``, ``int8``.
    """

    name: Text
    shape: tuple[Annotated[int, Field(ge=-1, lt=2**31)], ...]
    dtype: Text


class SidecarBase(VersionedSchema):
    """Common fields of the sidecars of plans and packages.

    ``FILE_KIND`` names the file in messages; ``DIGEST_FIELD`` is the field with its SHA-256.
    """

    FILE_KIND: ClassVar[str]
    DIGEST_FIELD: ClassVar[str]
    name: FileName
    onnx_file: Text
    onnx_sha256: Text
    precision: Precision
    targets: tuple[Text, ...]
    build_seconds: float
    sidecar_sha256: Text = ""

    def digest(self) -> str:
        """Return the correct value of :attr:`sidecar_sha256`."""
        return content_key(plain(self.model_copy(update={"sidecar_sha256": ""})))

    @classmethod
    def load(cls, file: Path) -> Self:
        """Return the sidecar of a plan or a package after verifying both digests.

        Raises:
            InputError: the file or its sidecar is missing, damaged, edited or swapped.
        """
        path = sidecar_path(file)
        if not file.is_file():
            raise InputError(f"There is no engine '{file}'.", REBUILD)
        if not path.is_file():
            raise InputError(
                f"'{file}' has no sidecar '{path.name}' in the same folder. Loading an engine runs "
                "the code in it, and without a sidecar its origin is unknown.",
                "Copy the sidecar to the same folder, or build the engine again."
                + " Only for a plan you built yourself: --trust-engine, in Python "
                "`TensorRtRunner(plan, trust_engine=True)`." * (cls is Sidecar),
            )
        sidecar = schema.read_document(cls, path, "sidecar", InputError, REBUILD)
        if sidecar.sidecar_sha256 != sidecar.digest():
            raise InputError(
                f"'{path}' was edited after it was written: its digest does not match.", REBUILD
            )
        actual, expected = file_sha256(file), str(getattr(sidecar, cls.DIGEST_FIELD))
        if actual != expected:
            raise InputError(
                f"'{file}' is not the {cls.FILE_KIND} of its sidecar: its SHA-256 is "
                f"{actual[:12]}..., the sidecar has {expected[:12]}.... It was damaged or swapped.",
                REBUILD,
            )
        return sidecar


SidecarT = TypeVar("SidecarT", bound=SidecarBase)


class Sidecar(SidecarBase):
    """Description of a TensorRT plan, which does not have to be loaded.

    Attributes:
        name: name of the engine.
        plan_sha256: SHA-256 of the plan.
        plan_bytes: size of the plan.
        onnx_file: name of the ONNX file it was built from.
        onnx_sha256: SHA-256 of that file.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        backend_version: version of the backend, four numbers.
        cuda: major version of CUDA the backend was built for, or None if unknown.
        precision: precision of the ONNX file.
        targets: compute capabilities it runs on, such as ``sm_89``.
        built_on: the GPU it was built on; None for TensorRT for RTX, which uses none.
        options: the build options.
        inputs: the input tensors.
        outputs: the output tensors.
        parser_layers: number of layers after TensorRT's parser.
        parse_seconds: time to parse.
        build_seconds: time to build.
        peak_memory_bytes: peak main memory of the build process.
        device_memory: bytes of weights, activations and scratch on the GPU at the largest batch,
            from the builder's log.
        warnings: the builder's warnings, and how often each occurred.
        fixed_addresses: whether the build ran without address space randomisation; with it, two
            builds differ in a few bytes (see :mod:`van_deploy.engine.build`).
        preprocessing: preprocessing of the model; None if unknown.
        sidecar_sha256: digest of all other fields.
    """

    FILE_KIND = "plan"
    DIGEST_FIELD = "plan_sha256"
    schema_: Literal["van-deploy/engine/2"] = Field(alias="schema")
    plan_sha256: Text
    plan_bytes: Count
    backend: Literal["tensorrt", "tensorrt-rtx"]
    backend_version: Annotated[Text, AfterValidator(_check_version)]
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
        """The supported batch ranges."""
        return self.options.profiles

    @property
    def backend_label(self) -> str:
        """Backend and version."""
        return f"{self.backend} {self.backend_version}"


class PackageSidecar(SidecarBase):
    """Description of an Inductor package (``.pt2``), which does not have to be loaded.

    Attributes:
        name: name of the package.
        file_sha256: SHA-256 of the package.
        file_bytes: size of the package.
        onnx_file: the FP32 graph from which the network was read.
        onnx_sha256: SHA-256 of that file.
        torch: version of the PyTorch that compiled it, without the local part. The code in the
            package calls libraries of that version.
        device: ``cpu`` or ``cuda``.
        targets: the compute capability it runs on, such as ``sm_90``, or the CPU architecture,
            such as ``x86_64``.
        cpu_features: instruction sets of the CPU it was compiled on, all of which its code may
            use. Empty on a GPU.
        built_on: name of the GPU or the CPU.
        precision: precision of the computation.
        tf32: whether FP32 convolutions may use TF32.
        max_autotune: whether kernels were selected by timing them.
        batch: the supported batch range.
        input_shape: shape of the input; the batch is -1.
        build_seconds: time to export and compile.
        sidecar_sha256: digest of all other fields.
    """

    FILE_KIND = "package"
    DIGEST_FIELD = "file_sha256"
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
        """The supported batch ranges."""
        return (self.batch,)

    @property
    def backend_label(self) -> str:
        """Backend and version."""
        return f"inductor {self.torch}"


def load_sidecar(plan: Path, *, trust_engine: bool) -> Sidecar | None:
    """Return the verified sidecar of a plan; None for a trusted plan without one.

    Raises:
        InputError: the plan is missing, its sidecar is missing and the plan is not trusted, or the
            sidecar is damaged, edited or of another plan.
    """
    has_none = plan.is_file() and not sidecar_path(plan).exists()
    return None if trust_engine and has_none else Sidecar.load(plan)


def sidecar_path(plan: Path) -> Path:
    """Return the path of the sidecar of ``plan``."""
    # Not with_suffix, because the names contain dots.
    return plan.with_name(plan.name.removesuffix(".plan").removesuffix(".pt2") + ".json")


def log_path(plan: Path) -> Path:
    """Return the path of the build log of ``plan``."""
    return sidecar_path(plan).with_suffix(".log")


def write_sidecar(plan: Path, sidecar: SidecarT) -> SidecarT:
    """Write the sidecar of ``plan`` atomically, and return it with its digest."""
    complete = sidecar.model_copy(update={"sidecar_sha256": sidecar.digest()})
    write_atomic(sidecar_path(plan), complete.text())
    return complete
