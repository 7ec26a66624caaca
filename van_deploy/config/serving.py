"""How a bundle is used: the options of predict, serve and package."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import ClassVar, Literal

import pydantic

from van_deploy.config.fields import option
from van_deploy.config.judging import RunnerSettings
from van_deploy.errors import UsageError
from van_deploy.schema import Contradiction, Settings

BY_DEFAULT = "fp32-uint8 where the bundle has it, else fp32"
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


class _RequestLimits(Settings):
    PANEL: ClassVar[str] = "Limits"

    queue_limit: int | None = option(
        None,
        "Images of a model in the server, by whatever route; more get 429.",
        shown_default="256, or two batches an instance",
        ge=1,
    )
    max_body_mib: float = option(32.0, "Largest request.", ge=0.001)
    max_json_mib: float = option(
        1.0, "Largest JSON: numbers as text take thirty times their size to parse.", ge=0.001
    )
    max_held_mib: float = option(256.0, "All requests held at once; more get 503.", ge=1)
    read_timeout_s: float = option(30.0, "Longest a request may take to come.", ge=0.1)
    max_pixels: int = option(50_000_000, "Largest image.", ge=1)
    max_connections: int = option(512, "More get 503.", ge=1)


class ServiceSettings(_RequestLimits, _Threads):
    """How a bundle is served."""

    artefacts: tuple[str, ...] = option(
        (),
        "Which to serve; the first answers the page.",
        flags=["--artefact"],
        shown_default=BY_DEFAULT,
    )
    instances: int = option(1, "Batches at the same time, a model.", ge=1)
    max_delay_ms: float = option(1.0, "How long a lone request waits for others.", ge=0)
    compare: bool = option(True, "Let the page ask PyTorch too.")
    log_requests: bool = option(False, "Log every request, not only faults.")
    api_key_file: Path | None = option(
        None,
        "File with the key that clients must send as 'Authorization: Bearer KEY'.",
        shown_default="VAN_DEPLOY_API_KEY in the environment, else no key",
    )

    def api_key(self) -> str:
        """Return what clients must send; "" for no key.

        Raises:
            UsageError: the key cannot be read, or is none that a header can hold.
        """
        file, name = self.api_key_file, "VAN_DEPLOY_API_KEY"
        try:
            key = os.environ.get(name) if file is None else file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise UsageError(f"The key in '{file}' cannot be read: {error}.", "Check it.") from None
        if key is not None and not re.fullmatch("[!-~]{1,4096}", key):
            raise UsageError(
                f"'{file or name}' holds no key: one word of printable ASCII characters.",
                "Make one: `openssl rand -hex 32`.",
            )
        return key or ""


class ServeSettings(ServiceSettings):
    """The options of ``van-deploy serve``."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port; 0 takes a free one.", ge=0, le=65535)


class TritonSettings(Settings):
    """How Triton is to run the models: options of ``van-deploy package triton``."""

    backend: Literal["onnxruntime", "python"] = option(
        "onnxruntime",
        "What runs ONNX artefacts; python brings an ONNX Runtime of its own.",
    )
    instances: int = option(1, "Batches at the same time, a model.", ge=1)
    threads: int = option(
        2, "Inside one operator on a processor; 0 leaves it to the runtime.", ge=0
    )
    gpu: bool = option(False, "Run ONNX models on a GPU; plans always are.")
    model_version: int = option(1, "Number of the models' version.", ge=1)
    triton_release: str = option(
        "",
        "Of the container image, such as 25.08.",
        shown_default="the newest that is known to load the models",
        pattern=r"^([0-9]{2}\.(0[1-9]|1[0-2]))?$",
    )
    triton_python: str = option(
        "",
        "Python of the Python backend, such as 3.12.",
        shown_default="the release's",
        pattern=r"^(3\.[0-9]+)?$",
    )
    queue_delay_us: int = option(1000, "Longest wait for other requests.", panel=QUEUE, ge=0)
    queue_limit: int = option(256, "Requests waiting, at most.", panel=QUEUE, ge=1)
    queue_timeout_ms: int = option(0, "Refuse what waited longer; 0 for never.", panel=QUEUE, ge=0)

    @pydantic.model_validator(mode="after")
    def _python_has_no_gpu(self) -> TritonSettings:
        if self.gpu and self.backend == "python":
            raise Contradiction(
                "{backend} python brings ONNX Runtime for processors, and {gpu} is given.",
                "Leave one of them out.",
            )
        return self


class PackageSettings(TritonSettings):
    """The options of ``van-deploy package``."""

    artefacts: tuple[str, ...] = option(
        (), "Which to package.", flags=["--artefact"], shown_default=BY_DEFAULT
    )
