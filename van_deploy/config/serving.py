"""How a bundle is used: the options of predict, serve and package."""

from __future__ import annotations

from van_deploy.config.fields import option
from van_deploy.config.judging import RunnerSettings
from van_deploy.schema import Settings

__all__ = [
    "DEFAULT_TRITON",
    "PackageSettings",
    "PredictSettings",
    "ServeSettings",
    "ServiceSettings",
    "TritonSettings",
]

DEFAULT_TRITON = "25.08"
"""Triton's release, as in the image's tag ``25.08-py3``. A TensorRT plan needs the
release whose TensorRT is the one that built it."""
BY_DEFAULT = "fp32-uint8 where the bundle has it, else fp32"
LIMITS = "Limits"
QUEUE = "Queue"


class _Threads(RunnerSettings):
    threads: int | None = option(
        None, "Processor threads.", shown_default="the runtime's own choice", ge=1
    )


class PredictSettings(_Threads):
    """The options of ``van-deploy predict``."""

    artefact: str = option("fp32", "Which one: fp32, int8, fp32-uint8, pytorch, ...")
    top_k: int = option(5, "Classes an image.", ge=1)
    batch: int | None = option(None, "Images a batch.", shown_default="the bundle's optimum", ge=1)


class ServiceSettings(_Threads):
    """How a bundle is served."""

    artefacts: tuple[str, ...] = option(
        (),
        "Which to serve; the first answers the page.",
        flags=["--artefact"],
        shown_default=BY_DEFAULT,
    )
    instances: int = option(1, "Batches at the same time, a model.", ge=1)
    max_delay_ms: float = option(1.0, "How long a lone request waits for others.", ge=0)
    queue_limit: int = option(256, "Images waiting, a model; more get 429.", panel=LIMITS, ge=1)
    max_body_mib: float = option(32.0, "Largest request.", panel=LIMITS, ge=0.001)
    read_timeout_s: float = option(
        30.0, "Longest a request may take to come.", panel=LIMITS, ge=0.1
    )
    max_pixels: int = option(50_000_000, "Largest image.", panel=LIMITS, ge=1)
    compare: bool = option(True, "Let the page ask PyTorch too.")

    @property
    def max_body_bytes(self) -> int:
        """Largest request, in bytes."""
        return round(self.max_body_mib * 2**20)


class ServeSettings(ServiceSettings):
    """The options of ``van-deploy serve``."""

    host: str = option("127.0.0.1", "Address to listen on. There is no authentication.")
    port: int = option(8000, "Port; 0 takes a free one.", ge=0, le=65535)
    max_connections: int = option(512, "More get 503.", panel=LIMITS, ge=1)


class TritonSettings(Settings):
    """How Triton is to run the models: options of ``van-deploy package triton``."""

    queue_delay_us: int = option(1000, "Longest wait for other requests.", panel=QUEUE, ge=0)
    queue_limit: int = option(256, "Requests waiting, at most.", panel=QUEUE, ge=1)
    queue_timeout_ms: int = option(0, "Refuse what waited longer; 0 for never.", panel=QUEUE, ge=0)
    instances: int = option(1, "Copies of each model.", ge=1)
    gpu: bool = option(False, "Run ONNX models on a GPU; plans always are.")
    triton: str = option(
        DEFAULT_TRITON, "Of the container image.", key="triton_release", min_length=1
    )


class PackageSettings(TritonSettings):
    """The options of ``van-deploy package``."""

    artefacts: tuple[str, ...] = option(
        (), "Which to package.", flags=["--artefact"], shown_default=BY_DEFAULT
    )
