"""The public API: networks in, bundles out, and everything that is done with a bundle.

Functions and methods take the options of the command of their name as keyword arguments.
``docs/api.md`` shows them at work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from van_deploy import bundle as on_disk
from van_deploy import config
from van_deploy.bench.benchmark import benchmark_bundle
from van_deploy.bench.document import BenchReport, save_to_bundle
from van_deploy.checks import regression
from van_deploy.checks.drift import DriftReport, drift_of_bundle
from van_deploy.checks.evaluate import EvaluateReport, evaluate_bundle
from van_deploy.checks.golden import GOLDEN_IMAGES, Samples, samples_for
from van_deploy.checks.outputs import shared_settings
from van_deploy.checks.verify import DEFAULT_GATES, VerifyReport, record_check, verify_bundle
from van_deploy.config.named_options import (
    EXPORT,
    Change,
    changes_from_kwargs,
    settings_from_kwargs,
)
from van_deploy.documents import Verdict
from van_deploy.files import write_atomic
from van_deploy.recipe import load_recipe, resolve_recipe
from van_deploy.report.files import document_of_bundle, write_report
from van_deploy.runners.network import Network, original_network, require_classifier
from van_deploy.serve.package import PackageReport, package
from van_deploy.serve.predict import Prediction, find_sources, predict
from van_deploy.signing import open_signed_bundle
from van_deploy.stopwatch import Progress, no_progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from van_deploy import option_types as kw
    from van_deploy.building import BuildReport
    from van_deploy.model.checkpoint import LoadedVan
    from van_deploy.pipeline import ExportReport, RunResult
    from van_deploy.precision.pipeline import QuantizeResult

Image = str | Path | bytes
Result = TypeVar("Result")


@dataclass(frozen=True)
class Predictions(Verdict):
    """The predictions for some images.

    Attributes:
        bundle: whose network answered.
        artifact: which of its artifacts.
        images_per_s: answered, over the whole call.
        predictions: one an image, in order.
    """

    bundle: Path
    artifact: str
    images_per_s: float
    predictions: tuple[Prediction, ...]

    @property
    def unreadable(self) -> int:
        """How many images could not be read."""
        return sum(answer.error is not None for answer in self.predictions)

    @property
    def passed(self) -> bool:
        """Whether every image could be read."""
        return not self.unreadable

    def __len__(self) -> int:
        """Return how many predictions there are."""
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        """Iterate over the predictions."""
        return iter(self.predictions)


@dataclass(frozen=True)
class WrittenReport(Verdict):
    """A bundle's report, as files.

    Attributes:
        verdict: ``PASS``, ``FAIL``, ``INCONCLUSIVE`` or ``SKIPPED``, for all checks together.
        checks: how many of each.
        files: the HTML, then the Markdown.
    """

    JSON_PROPERTIES: ClassVar = ("sizes",)

    verdict: str
    checks: str
    files: tuple[Path, ...]

    @property
    def passed(self) -> bool:
        """Whether the verdict is ``PASS``."""
        return self.verdict == "PASS"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path."""
        return {str(path): path.stat().st_size for path in self.files}


class Bundle:
    """A bundle on disk. Each method opens it anew, so that it sees what another one wrote.

    Args:
        path: its folder.
        require_signature: a public key (a PEM file); the bundle is refused unless it is whole
            and signed with that key, and nothing is recorded in it.
        progress: told what the methods do.

    Attributes:
        path: its folder.
        remarks: what the methods had to say that belongs to no result.

    Raises:
        BundleError: there is no bundle.
        SignatureError: it has no signature, one of another key, or was changed since.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        require_signature: str | Path | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.path, self.progress, self.remarks = Path(path), progress, list[str]()
        self._key = Path(require_signature) if require_signature else None
        self.path = self.opened().path

    def opened(self) -> on_disk.Bundle:
        """Return the bundle as its manifest describes it now.

        Raises:
            BundleError: there is no bundle, or its manifest cannot be read.
            SignatureError: a signature is required, and this is not what was signed.
        """
        if self._key is None:
            return on_disk.Bundle.open(self.path)
        return open_signed_bundle(self.path, self._key)[0]

    @property
    def name(self) -> str:
        """The model's name, such as ``van_b1``."""
        return self.opened().name

    @property
    def manifest(self) -> on_disk.Manifest:
        """What its manifest says now."""
        return self.opened().manifest

    @property
    def artifacts(self) -> list[str]:
        """The names of everything in it that can be run, in the order they were made."""
        return list(self.opened().artifacts)

    def __repr__(self) -> str:
        """Return the class and the folder."""
        return f"{type(self).__name__}({str(self.path)!r})"

    def quantize(
        self, *, force: bool = False, **options: Unpack[kw.QuantizeOptions]
    ) -> QuantizeResult:
        """Add an FP16 or INT8 graph, judged beside FP32; ``passed`` if it holds its gate.

        Raises:
            VanDeployError: as :func:`~van_deploy.precision.pipeline.quantize_bundle`.
        """
        from van_deploy.precision.pipeline import quantize_bundle

        asked = settings_from_kwargs(config.QuantizeSettings, options)
        return quantize_bundle(self.opened().path, asked, force=force, progress=self.progress)

    def build(self, *, force: bool = False, **options: Unpack[kw.BuildOptions]) -> BuildReport:
        """Build engines: TensorRT plans, or packages of Inductor (``backend="inductor"``).

        TensorRT for RTX needs no GPU for it, nor does a package for a CPU.

        Raises:
            UsageError: nothing builds what is asked.
            MissingDependency: what builds it is not installed, or wants a GPU.
            BundleError: a graph to build from is missing, and there are no images to make it.
            ConversionError: an engine cannot be built.
        """
        from van_deploy.building import build_bundle

        asked = settings_from_kwargs(config.BuildSettings, options)
        report = build_bundle(self.opened(), asked, force=force, progress=self.progress)
        if self._key is not None and any(o.outcome == "built" for o in report.outcomes):
            self.remarks.append(
                "The bundle has new engines, which its signature does not cover: sign it again."
            )
        return report

    def verify(self, **options: Unpack[kw.VerifyOptions]) -> VerifyReport:
        """Compare every artifact with PyTorch: logits, batch sizes, flips, modules.

        Raises:
            VanDeployError: as :func:`~van_deploy.checks.verify.verify_bundle`.
        """
        opened, asked = self.opened(), settings_from_kwargs(config.VerifySettings, options)
        gates = _gates(asked.recipe)
        loaded, samples = self._compared(opened, asked)
        report = verify_bundle(opened, samples, asked, loaded, gates, self.progress)
        return self._recorded(opened, "verify", report)

    def evaluate(
        self, images: str | Path | None = None, /, **options: Unpack[kw.EvaluationOptions]
    ) -> EvaluateReport:
        """Measure top-1 and top-5 of PyTorch and every artifact on a folder of labelled images.

        Raises:
            VanDeployError: as :func:`~van_deploy.checks.evaluate.evaluate_bundle`.
        """
        opened, folder = self.opened(), {"images": images} if images else {}
        asked = settings_from_kwargs(config.EvaluationSettings, {**options, **folder})
        gates, loaded = _gates(asked.recipe), self._original(opened, asked.weights)
        report = evaluate_bundle(opened, loaded, asked, gates, self.progress)
        return self._recorded(opened, "evaluate", report)

    def drift(self, **options: Unpack[kw.DriftOptions]) -> DriftReport:
        """Measure what each stage, block or module of each ONNX artifact adds to the error.

        Raises:
            VanDeployError: as :func:`~van_deploy.checks.drift.drift_of_bundle`.
        """
        opened, asked = self.opened(), settings_from_kwargs(config.DriftSettings, options)
        loaded, samples = self._compared(opened, asked)
        report = drift_of_bundle(opened, samples.first(asked.count), asked, loaded, self.progress)
        return self._recorded(opened, "drift", report)

    def check(
        self, baseline: str | Path, *, update: bool = False, **options: Unpack[kw.CheckOptions]
    ) -> regression.CheckReport:
        """Hold the bundle against its gates and a committed baseline.

        With ``update`` the baseline is written from what is measured, if the gates hold.

        Raises:
            InputError: the baseline cannot be read, or is not this bundle's.
            VanDeployError: as :meth:`verify` and :meth:`evaluate`.
        """
        opened, asked = self.opened(), settings_from_kwargs(config.CheckSettings, options)
        gates, file, say = _gates(asked.recipe), Path(baseline), self.progress
        known = None if update else regression.read_baseline(file)
        loaded, samples = self._compared(opened, asked)
        same = config.VerifySettings(**shared_settings(asked))
        verified = verify_bundle(opened, samples, same, loaded, gates, say)
        evaluated, ratios = None, {}
        if asked.evaluate is not None or asked.speed:
            loaded = loaded or self._original(opened, asked.weights)
        if asked.evaluate is not None and loaded is not None:
            table = {"images": asked.evaluate, "labels": asked.labels, **shared_settings(asked)}
            settings = config.EvaluationSettings(**table, class_order=asked.class_order)
            evaluated = evaluate_bundle(opened, loaded, settings, gates, say)
        if asked.speed and loaded is not None:
            say("Measuring ratios of speed")
            ratios = regression.speed_ratios(opened, loaded, samples, asked)
        measured = regression.baseline_from(opened, samples, verified, evaluated, ratios)
        report = regression.compare_with_baseline(measured, known, verified, evaluated)
        if update and report:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, report.measured.text())  # one figure a line: a change is one line
        return report

    def benchmark(self, *, save: bool = True, **options: Unpack[kw.BenchOptions]) -> BenchReport:
        """Time every artifact in every runtime that is here, each in a process of its own.

        Args:
            save: keep the result in the bundle (``bench.json``).
            options: those of the command.

        Raises:
            VanDeployError: as :func:`~van_deploy.bench.benchmark.benchmark_bundle`.
        """
        opened, asked = self.opened(), settings_from_kwargs(config.BenchSettings, options)
        report = benchmark_bundle(opened, asked, progress=self.progress)
        if save:
            save_to_bundle(report, opened)
        return report

    def predict(
        self, images: Image | Sequence[Image], **options: Unpack[kw.PredictOptions]
    ) -> Predictions:
        """Return the classes of images: files, folders, or the bytes of a file.

        ``passed`` if every image could be read.

        Raises:
            ImageError: there is no such file, or a folder holds no image.
            BundleError: there is no such artifact, or its files are not the manifest's.
        """
        asked, start = settings_from_kwargs(config.PredictSettings, options), time.perf_counter()
        answers = tuple(self.stream(images, **options))
        rate = len(answers) / (time.perf_counter() - start)
        return Predictions(self.path, asked.artifact, rate, answers)

    def stream(
        self, images: Image | Sequence[Image], **options: Unpack[kw.PredictOptions]
    ) -> Iterator[Prediction]:
        """Yield what :meth:`predict` returns, one image after the other.

        Raises what :meth:`predict` raises.
        """
        asked = settings_from_kwargs(config.PredictSettings, options)
        opened = self.opened()
        require_classifier(opened, "predict")
        sources = find_sources([images] if isinstance(images, Image) else images)
        batch = asked.batch or min(opened.manifest.batch.opt, len(sources))
        with Network(opened, asked.artifact, asked, threads=asked.threads) as network:
            answers = predict(network, sources, top=asked.top_k, batch=batch)
            for done, answer in enumerate(answers, 1):
                self.progress("Looking at images", done, len(sources))
                yield answer

    def package(
        self,
        output: str | Path | None = None,
        *,
        only_check: bool = False,
        **options: Unpack[kw.PackageOptions],
    ) -> PackageReport:
        """Write a Triton model repository, and check it against the bundle.

        Args:
            output: its folder; ``BUNDLE-triton`` by default.
            only_check: write nothing; check the package that is there.
            options: those of the command.

        Raises:
            InputError: there is no package to check, or Triton cannot load an artifact.
            MissingDependency: ``only_check``, and what holds Triton's schema is not installed.
            UsageError: ``output`` holds something else.
        """
        asked = settings_from_kwargs(config.PackageSettings, options)
        return package(self.opened(), Path(output) if output else None, asked, only_check)

    def report(self, output: str | Path | None = None) -> WrittenReport:
        """Write everything known of the bundle as one HTML file, and as Markdown beside it.

        Args:
            output: the HTML file; ``report.html`` in the bundle by default.

        Raises:
            InputError: ``output`` cannot be written.
        """
        opened = self.opened()
        document = document_of_bundle(opened)
        files = write_report(document, opened, Path(output) if output else None)
        return WrittenReport(document.state, document.note, tuple(files))

    def _compared(
        self,
        opened: on_disk.Bundle,
        asked: config.VerifySettings | config.DriftSettings | config.CheckSettings,
    ) -> tuple[LoadedVan | None, Samples]:
        """Return the original network, where it is asked for, and what is judged on."""
        from_weights = asked.against == "weights"
        loaded = self._original(opened, asked.weights) if from_weights else None
        return loaded, samples_for(opened, loaded, asked.images, asked.count or GOLDEN_IMAGES)

    def _original(self, opened: on_disk.Bundle, weights: Path | None) -> LoadedVan:
        self.progress("Loading the original network")
        return original_network(opened, weights)

    def _recorded(self, opened: on_disk.Bundle, name: str, result: Result) -> Result:
        """Keep a result in the manifest; what was signed stays as it was signed."""
        if self._key is None:
            self.remarks += filter(None, [record_check(opened, name, result)])
        return result


class Exported(Bundle):
    """A bundle that was just exported.

    Attributes:
        done: what exporting did in every precision, and the manifest.
        result: what it did in FP32: whether and why it was made anew, and how long it took.
    """

    def __init__(self, done: ExportReport) -> None:
        super().__init__(done.export.bundle.path)
        self.done, self.result = done, done.export

    @property
    def passed(self) -> bool:
        """Whether every precision holds its gate; an FP32 graph that does not is never written."""
        return self.done.passed

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def export(
    model: str | Path | config.Recipe,
    output: str | Path | None = None,
    *,
    images: str | Path | None = None,
    offline: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    **options: Unpack[kw.ExportOptions],
) -> Exported:
    """Return a bundle with a VAN as ONNX, checked against PyTorch at every batch size.

    Args:
        model: a variant (``van_b1``), ``van_digits``, a checkpoint's path, a repository
            (``owner/name``), a recipe's path, or a recipe.
        output: the bundle's folder; ``dist/NAME`` by default.
        images: folder of images to check on; sample photographs by default.
        offline: never use the network.
        force: make everything anew.
        progress: told what is done.
        options: keys of the recipe to change.

    Raises:
        UsageError: an option is unknown, is not of its kind, or contradicts another.
        InputError: the weights, the recipe or the images cannot be used.
        GateFailed: the graph is not the network; nothing was written.

    >>> bool(export("van_digits", output=getfixture("tmp_path") / "digits"))
    True
    """
    from van_deploy import exporting, pipeline

    recipe = resolve_recipe(model, changes_from_kwargs(EXPORT, options))
    loaded = exporting.load_model(recipe, offline=offline, progress=progress)
    folder = Path(output) if output else Path("dist") / loaded.name
    how = config.RunSettings(images=Path(images) if images else None, force=force)
    return Exported(pipeline.export_recipe(loaded, recipe, folder, how, progress))


def run_recipe(
    recipe: str | Path | config.Recipe,
    output: str | Path | None = None,
    *,
    changes: Mapping[str, object] | None = None,
    progress: Progress = no_progress,
    **options: Unpack[kw.RunOptions],
) -> RunResult:
    """Do all that a recipe asks for: export, quantise, build engines, verify and evaluate.

    Args:
        recipe: its name or path, or anything that :func:`export` takes.
        output: the bundle's folder; ``dist/NAME`` by default.
        changes: keys of the recipe with other values, such as ``{"engines.tf32": False}``.
        progress: told what is done.
        options: those of the command.

    Raises:
        VanDeployError: as :func:`~van_deploy.pipeline.run_recipe`.
    """
    from van_deploy import exporting, pipeline

    how = settings_from_kwargs(config.RunSettings, options)
    values = {tuple(key.split(".")): Change(one, key) for key, one in (changes or {}).items()}
    wanted = resolve_recipe(recipe, values)
    loaded = exporting.load_model(wanted, offline=how.offline, progress=progress)
    folder = Path(output) if output else Path("dist") / loaded.name
    return pipeline.run_recipe(loaded, wanted, folder, how, progress)


open_bundle = Bundle
"""Return the bundle at a path. Arguments and errors are those of :class:`Bundle`."""


def _gates(recipe: str) -> config.GateSettings:
    """Return the gates of the recipe called that, or the defaults."""
    return load_recipe(recipe).gates if recipe else DEFAULT_GATES
