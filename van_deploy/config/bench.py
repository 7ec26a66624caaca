"""What a benchmark measures, and for how long: the options of ``van-deploy bench``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pydantic

from van_deploy.config.fields import option
from van_deploy.config.sizes import ImageSizeOption
from van_deploy.schema import Settings

BATCH_LIMIT = 4096
LEAST_ROUNDS = 6
"""Fewer rounds have no 95 % interval of their median (2 x 0.5^5 is more than 5 %)."""

CUDA = "ONNX Runtime on a GPU"
Batch = Annotated[int, pydantic.Field(ge=1, le=BATCH_LIMIT)]


class Budget(Settings):
    """How long to time one contender at one batch size.

    A contender is done when it has been timed for ``seconds`` and ``calls`` and its
    ratio's interval is within ``tolerance_percent``; or when it has been timed for
    ``limit_s`` (no less than ``seconds``), and its row then says that it did not settle.
    """

    PANEL: ClassVar[str] = "How long"

    seconds: float = option(3.0, "Timed at least, a runner and batch.", gt=0)
    calls: int = option(100, "Calls at least.", ge=1)
    limit_s: float = option(
        10.0,
        "Seconds at most, settled or not; one slice in each of six rounds may take longer.",
        key="limit",
        gt=0,
    )
    rounds: int = option(30, "Rounds the seconds are spread over.", ge=1)
    tolerance_percent: float = option(
        2.0,
        "Go on until a ratio's 95 % interval is within this many percent.",
        key="tolerance",
        gt=0,
    )
    warmup_s: float = option(1.0, "Unmeasured seconds before the first round.", key="warmup", ge=0)

    def slice_s(self, reference_call_s: float = 0.0) -> float:
        """Return the seconds of one slice: all of a round are as long as the reference's one call.

        Slices of unequal length would meet unequal shares of what disturbs the machine.

        >>> Budget(seconds=3, rounds=30).slice_s(), Budget(seconds=3, rounds=30).slice_s(0.5)
        (0.1, 0.5)
        """
        return max(self.seconds / self.rounds, reference_call_s)

    def is_over(self, timed_s: float, rounds: int) -> bool:
        """Return whether a contender may not be timed any longer."""
        limit = max(self.limit_s, self.seconds)
        return timed_s >= limit and rounds >= min(LEAST_ROUNDS, self.rounds)

    def is_met(self, timed_s: float, calls: int, rounds: int) -> bool:
        """Return whether a contender was timed for as long as it has to be."""
        return (
            timed_s >= self.seconds
            and calls >= self.calls
            and rounds >= min(LEAST_ROUNDS, self.rounds)
        )


class BenchSettings(Settings):
    """What to measure."""

    PANEL: ClassVar[str] = "What to run"

    device: str | None = option(
        None,
        "Where: cuda:N, or cpu.",
        shown_default="cuda:0; without a GPU, cpu",
        pattern=r"^(cpu|cuda:\d+)$",
    )
    batches: tuple[Batch, ...] = option((1, 8), "Batch sizes.", min_length=1)
    runners: tuple[str, ...] = option(
        (),
        "Only these, such as 'pytorch,ort-cpu,openvino/int8-cpu'; * is any text.",
        shown_default="all that are here",
    )
    reference: str = option(
        "pytorch",
        "What ratios are against; if it does not run, the first that does. On a GPU, pytorch is "
        "the fastest of PyTorch's modes.",
    )
    threads: int | None = option(None, "Threads of each runner.", shown_default="all cores", ge=1)
    streams: int = option(1, "Calls in flight at the same time.", ge=1)
    image_sizes: tuple[ImageSizeOption, ...] = option(
        (),
        "Other sizes of the input, such as 192,224x320.",
        flags=["--image-size"],
        shown_default="the bundle's own",
    )
    p99_ms: float | None = option(None, "Find each runner's best batch with p99 below this.", gt=0)
    roofline: bool = option(True, "Measure the device's limits and compare.")
    profile: bool = option(False, "Add the time by kind of layer.")
    tf32: bool = option(True, "Let FP32 compute in TF32.", panel=CUDA)
    conv_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"] = option(
        "EXHAUSTIVE", "How cuDNN's algorithms are chosen.", panel=CUDA
    )
    fuse_conv_bias: bool = option(False, "Fuse convolution, bias and activation.", panel=CUDA)
    budget: Budget = option(Budget, "How long.", panel="")
