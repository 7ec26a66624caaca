"""How a bundle is judged: the options of verify, evaluate, drift and check."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pydantic
from typing_extensions import Self

from van_deploy.config.fields import given_of, option
from van_deploy.config.network import ClassOrder, EvaluateSettings, class_order_option
from van_deploy.schema import Contradiction, Settings

WHAT = "What is measured"
HOW = "How it is done"


class RunnerSettings(Settings):
    """What runs the artefacts of a bundle."""

    PANEL: ClassVar[str] = HOW

    runner: Literal["ort-cpu", "ort-cuda"] = option(
        "ort-cpu", "What runs ONNX artefacts; engines are run by TensorRT, packages by PyTorch."
    )
    device: str = option(
        "cuda:0",
        "Which GPU, where something runs on one.",
        metavar="cuda:N",
        pattern=r"^cuda(:\d+)?$",
    )
    trust_engine: bool = option(
        False,
        "Run an engine whose sidecar is gone. An engine is code: only one you built yourself.",
    )


class _Original(Settings):
    PANEL: ClassVar[str] = HOW

    weights: Path | None = option(None, "Where the original weights are now, if they have moved.")


class _Judged(_Original, RunnerSettings):
    PANEL: ClassVar[str] = HOW

    recipe: str = option(
        "", "Recipe whose [gates] apply; the defaults without one.", metavar="RECIPE"
    )


class _Allowed(Settings):
    allow_skip: tuple[Literal["engines", "runtimes", "accuracy", "speed"], ...] = option(
        (),
        "Let a kind of skip pass: engines (their GPU is not here), runtimes (not installed), "
        "accuracy or speed (in the baseline, not measured now).",
        metavar="KIND",
    )
    allow_inconclusive: bool = option(False, "Let pass what the data cannot decide.")


class _Artefacts(Settings):
    artefacts: tuple[str, ...] = option(
        (), "Which to judge.", flags=["--artefact"], shown_default="all"
    )


class _Samples(Settings):
    PANEL: ClassVar[str] = WHAT

    against: Literal["golden", "weights"] = option(
        "golden",
        "What to compare with: the golden samples in the bundle, or the original network "
        "(PyTorch and the weights).",
    )
    images: Path | None = option(
        None,
        "Folder or .npz of images to compare on, with --against weights.",
        shown_default="the golden samples",
    )
    count: int | None = option(None, "How many of these images.", shown_default="16", ge=1)

    @pydantic.model_validator(mode="after")
    def _images_need_weights(self) -> Self:
        given = given_of(self, "images", "count")
        if given and self.against != "weights":
            raise Contradiction(
                f"{given} is given, and other images than the golden samples can only be "
                "compared with the original network.",
                "Add {against} weights.",
            )
        return self


class VerifySettings(_Judged, _Artefacts, _Samples, _Allowed):
    """The options of ``van-deploy verify``."""

    PANEL: ClassVar[str] = WHAT

    modules: bool = option(True, "Also judge each module by itself.")


class EvaluationSettings(EvaluateSettings, _Judged, _Artefacts, _Allowed):
    """The options of ``van-deploy evaluate``."""

    PANEL: ClassVar[str] = HOW

    images: Path = option(
        ..., "Labelled images: one folder a class, ImageNet's own layout, or an .npz.", panel=""
    )
    batch: int = option(32, "Images a batch.", ge=1)
    workers: int = option(0, "Threads that decode; 0 for one a core.", ge=0)
    on: Literal["here", "ray"] = option("here", "This machine, or a Ray cluster.")
    ray_address: str = option("", "Of the Ray cluster.", shown_default="the local one")


class DriftSettings(_Original, _Artefacts):
    """The options of ``van-deploy drift``."""

    PANEL: ClassVar[str] = WHAT

    against: Literal["weights", "golden"] = option(
        "weights",
        "What to compare parts with: the original network (PyTorch and the weights), or "
        "model.onnx once that holds on the golden samples.",
    )
    level: Literal["stage", "block", "module"] = option(
        "block", "How finely the network is cut.", panel=""
    )
    images: Path | None = option(
        None,
        "Folder or .npz of images to compare on, with --against weights.",
        shown_default="the golden samples",
    )
    count: int = option(4, "How many images.", ge=1)


class CheckSettings(_Judged, _Samples, _Allowed):
    """The options of ``van-deploy check``."""

    PANEL: ClassVar[str] = WHAT

    evaluate: Path | None = option(None, "Folder of labelled images to evaluate on.")
    labels: Path | None = option(None, "Labels file for the labelled images.")
    class_order: ClassOrder | None = class_order_option(WHAT)
    speed: bool = option(False, "Also compare speed, as ratios only.")

    @pydantic.model_validator(mode="after")
    def _labels_of_images(self) -> CheckSettings:
        if self.labels is not None and self.evaluate is None:
            raise Contradiction(
                "{labels} is given, and {evaluate} is not.", "Name the folder of images, too."
            )
        return self


class RunSettings(RunnerSettings, _Allowed):
    """How a run is done; *what* is done stands in the recipe."""

    images: Path | None = option(
        None, "Folder of images to check on.", shown_default="sample photographs"
    )
    offline: bool = option(False, "Never use the network.")
    force: bool = option(False, "Make everything anew even if nothing changed.")
