"""The public Python API: export networks, and work with bundles.

Functions and methods have the options of the command of the same name as keyword arguments.
``docs/api.md`` has examples.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from van_deploy import bundle as disk
from van_deploy import config, schema
from van_deploy.bench.benchmark import benchmark_bundle
from van_deploy.bench.document import BenchReport, save_to_bundle
from van_deploy.checks import regression
from van_deploy.checks.drift import DriftReport, drift_of_bundle
from van_deploy.checks.evaluate import EvaluateReport, evaluate_bundle
from van_deploy.checks.golden import GOLDEN_IMAGES, Samples, samples_for
from van_deploy.checks.outputs import shared_settings
from van_deploy.checks.verify import DEFAULT_GATES, VerifyReport, record_check, verify_bundle
from van_deploy.config import Recipe
from van_deploy.config.named_options import EXPORT, Change, parse_changes, parse_settings
from van_deploy.documents import Verdict
from van_deploy.errors import InputError, UsageError
from van_deploy.recipe import load_recipe, resolve_recipe
from van_deploy.report.files import document_of_bundle, write_report, write_text
from van_deploy.runners.network import Network, original_network, require_classifier
from van_deploy.serve.package import PackageReport, package
from van_deploy.serve.predict import Image, Prediction, find_sources, predict
from van_deploy.signing import open_signed_bundle
from van_deploy.stopwatch import Progress, no_progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from van_deploy import option_types as kw
    from van_deploy.building import BuildReport
    from van_deploy.model.checkpoint import LoadedVan
    from van_deploy.pipeline import ExportReport, RunResult
    from van_deploy.precision.pipeline import QuantizeResult

Result = TypeVar("Result")


@dataclass(frozen=True)
class Predictions(Verdict):
    """Predictions of several images.

    Attributes:
        bundle: path of the bundle.
        artifact: name of the artifact.
        images_per_s: over the whole call.
        predictions: one per image, in order.
    """

    bundle: Path
    artifact: str
    images_per_s: float
    predictions: tuple[Prediction, ...]

    @property
    def unreadable(self) -> int:
        """Number of images that could not be read."""
        return sum(prediction.error is not None for prediction in self.predictions)

    @property
    def passed(self) -> bool:
        """Whether there are images, and every one could be read."""
        return bool(self.predictions) and not self.unreadable

    def __len__(self) -> int:
        """Return the number of predictions."""
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        """Iterate over the predictions."""
        return iter(self.predictions)


@dataclass(frozen=True)
class WrittenReport(Verdict):
    """The files of a bundle's report.

    Attributes:
        verdict: ``PASS``, ``FAIL``, ``INCONCLUSIVE`` or ``SKIPPED``, of all checks.
        checks: number of checks with each verdict.
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
    """A bundle on disk. Each method reads its manifest again, and sees changes by others.

    Args:
        path: its folder.
        require_signature: a public key (a PEM file); a bundle that is not signed with this key
            or incomplete is refused, and results are not saved in the bundle.
        progress: receives the progress of the methods.

    Attributes:
        path: its folder.
        remarks: messages of the methods that are not part of a result.

    Raises:
        BundleError: there is no bundle.
        SignatureError: it is not signed, is signed with another key, or was changed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        require_signature: str | Path | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.path, self.progress = schema.path_argument("path", path), progress
        self.remarks = list[str]()
        self._key = schema.optional_path("require_signature", require_signature)
        self.path = self.load().path

    def load(self) -> disk.Bundle:
        """Return the bundle with its current manifest.

        Raises:
            BundleError: there is no bundle, or its manifest cannot be read.
            SignatureError: a signature is required, and is missing or not valid.
        """
        if self._key is None:
            return disk.Bundle.open(self.path)
        return open_signed_bundle(self.path, self._key)[0]

    @property
    def name(self) -> str:
        """The model's name, such as ``van_b1``."""
        return self.load().name

    @property
    def manifest(self) -> disk.Manifest:
        """The current manifest."""
        return self.load().manifest

    @property
    def artifacts(self) -> list[str]:
        """Names of the artifacts, in the order they were made."""
        return list(self.load().artifacts)

    def __repr__(self) -> str:
        """Return the class and the folder."""
        return f"{type(self).__name__}({str(self.path)!r})"

    def quantize(
        self, *, force: bool = False, **options: Unpack[kw.QuantizeOptions]
    ) -> QuantizeResult:
        """Add an FP16, BF16 or INT8 graph, compared with FP32; ``passed`` if it passes its gate.

        Raises:
            VanDeployError: as :func:`~van_deploy.precision.pipeline.quantize_bundle`.
        """
        from van_deploy.precision.pipeline import quantize_bundle

        settings = parse_settings(config.QuantizeSettings, options)
        force = schema.bool_argument("force", force)
        return quantize_bundle(self.load().path, settings, force=force, progress=self.progress)

    def build(self, *, force: bool = False, **options: Unpack[kw.BuildOptions]) -> BuildReport:
        """Build engines: TensorRT plans, or Inductor packages (``backend="inductor"``).

        TensorRT for RTX, and packages for a CPU, do not need a GPU.

        Raises:
            UsageError: no backend supports the request.
            MissingDependency: a package is not installed, or the backend needs a GPU.
            BundleError: a graph to build from is missing, and there are no images to make it.
            ConversionError: an engine cannot be built.
        """
        from van_deploy.building import build_bundle

        settings = parse_settings(config.BuildSettings, options)
        force = schema.bool_argument("force", force)
        report = build_bundle(self.load(), settings, force=force, progress=self.progress)
        if self._key is not None and any(o.outcome == "built" for o in report.outcomes):
            self.remarks.append(
                "The bundle has new engines that its signature does not cover: sign it again."
            )
        return report

    def verify(self, **options: Unpack[kw.VerifyOptions]) -> VerifyReport:
        """Compare every artifact with PyTorch: logits, batch sizes, label flips, modules.

        Raises:
            VanDeployError: as :func:`~van_deploy.checks.verify.verify_bundle`.
        """
        bundle, settings = self.load(), parse_settings(config.VerifySettings, options)
        gates = _load_gates(settings.recipe)
        loaded, samples = self._load_reference(bundle, settings)
        report = verify_bundle(bundle, samples, settings, loaded, gates, self.progress)
        return self._record(bundle, "verify", report)

    def evaluate(
        self, images: str | Path | None = None, /, **options: Unpack[kw.EvaluationOptions]
    ) -> EvaluateReport:
        """Measure top-1 and top-5 of PyTorch and every artifact on a folder of labelled images.

        Raises:
            VanDeployError: as :func:`~van_deploy.checks.evaluate.evaluate_bundle`.
        """
        if images is not None and "images" in options:
            raise UsageError("'images=' is given twice.", "Give one folder.")
        bundle, folder = self.load(), {} if images is None else {"images": images}
        settings = parse_settings(config.EvaluationSettings, {**options, **folder})
        gates, loaded = _load_gates(settings.recipe), self._load_original(bundle, settings.weights)
        report = evaluate_bundle(bundle, loaded, settings, gates, self.progress)
        return self._record(bundle, "evaluate", report)

    def drift(self, **options: Unpack[kw.DriftOptions]) -> DriftReport:
        """Measure the error of each stage, block or module of each ONNX artifact.

        Raises:
            VanDeployError: as :func:`~van_deploy.checks.drift.drift_of_bundle`.
        """
        bundle, settings = self.load(), parse_settings(config.DriftSettings, options)
        loaded, samples = self._load_reference(bundle, settings)
        samples = samples.first(settings.count)
        report = drift_of_bundle(bundle, samples, settings, loaded, self.progress)
        return self._record(bundle, "drift", report)

    def check(
        self, baseline: str | Path, *, update: bool = False, **options: Unpack[kw.CheckOptions]
    ) -> regression.CheckReport:
        """Compare the bundle with its gates and a committed baseline.

        With ``update`` the measured values become the baseline, if the gates pass.

        Raises:
            InputError: the baseline cannot be read, or is from another bundle.
            VanDeployError: as :meth:`verify` and :meth:`evaluate`.
        """
        bundle, settings = self.load(), parse_settings(config.CheckSettings, options)
        file, progress = schema.path_argument("baseline", baseline), self.progress
        gates, saved = _load_gates(settings.recipe), None
        if not schema.bool_argument("update", update):
            remedy = regression.UPDATE_REMEDY
            saved = schema.read_document(regression.Baseline, file, "baseline", InputError, remedy)
        loaded, samples = self._load_reference(bundle, settings)
        shared = shared_settings(settings)
        verification = config.VerifySettings(**shared)
        verified = verify_bundle(bundle, samples, verification, loaded, gates, progress)
        evaluated, ratios = None, {}
        if settings.evaluate is not None or settings.speed:
            loaded = loaded or self._load_original(bundle, settings.weights)
        if settings.evaluate is not None and loaded is not None:
            shared |= {"labels": settings.labels, "class_order": settings.class_order}
            evaluation = config.EvaluationSettings(images=settings.evaluate, **shared)
            evaluated = evaluate_bundle(bundle, loaded, evaluation, gates, progress)
        if settings.speed and loaded is not None:
            progress("Measuring speed ratios")
            ratios = regression.speed_ratios(bundle, loaded, samples, settings)
        measured = regression.baseline_from(bundle, samples, verified, evaluated, ratios)
        report = regression.compare_with_baseline(measured, saved, verified, evaluated)
        if update and report:
            write_text(file, report.measured.text())  # one value per line: a short diff
        return report

    def benchmark(self, *, save: bool = True, **options: Unpack[kw.BenchOptions]) -> BenchReport:
        """Time every artifact in every available runtime, each in its own process.

        Args:
            save: save the result in the bundle (``bench.json``), unless a signature is required.
            options: those of the command.

        Raises:
            VanDeployError: as :func:`~van_deploy.bench.benchmark.benchmark_bundle`.
        """
        bundle, settings = self.load(), parse_settings(config.BenchSettings, options)
        save = schema.bool_argument("save", save)
        report = benchmark_bundle(bundle, settings, progress=self.progress)
        if save and self._key is None:
            save_to_bundle(report, bundle)
        return report

    def predict(
        self, images: Image | Iterable[Image], **options: Unpack[kw.PredictOptions]
    ) -> Predictions:
        """Return the classes of images: files, folders, or the bytes of a file.

        ``passed`` if there are images, and every one could be read.

        Raises:
            UsageError: an image is neither a path nor bytes.
            ImageError: a file does not exist, or a folder has no images.
            BundleError: the artifact does not exist, or its files were changed.
        """
        settings, start = parse_settings(config.PredictSettings, options), time.perf_counter()
        predictions = tuple(self.stream(images, **options))
        rate = len(predictions) / (time.perf_counter() - start)
        return Predictions(self.path, settings.artifact, rate, predictions)

    def stream(
        self, images: Image | Iterable[Image], **options: Unpack[kw.PredictOptions]
    ) -> Iterator[Prediction]:
        """Yield predictions one by one.

        Raises:
            VanDeployError: as :meth:`predict`.
        """
        settings = parse_settings(config.PredictSettings, options)
        bundle = self.load()
        require_classifier(bundle, "predict")
        sources = find_sources(images)
        with Network(bundle, settings.artifact, settings, threads=settings.threads) as network:
            predictions = predict(network, sources, settings.top_k, settings.batch)
            for done, prediction in enumerate(predictions, 1):
                self.progress("Predicting", done, len(sources))
                yield prediction

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
            only_check: check the existing package, and write nothing.
            options: those of the command.

        Raises:
            InputError: there is no package to check, or Triton cannot load an artifact.
            MissingDependency: ``only_check``, and Triton's schema is not installed.
            UsageError: ``output`` contains something else.
        """
        settings = parse_settings(config.PackageSettings, options)
        only_check = schema.bool_argument("only_check", only_check)
        return package(self.load(), schema.optional_path("output", output), settings, only_check)

    def report(self, output: str | Path | None = None) -> WrittenReport:
        """Write a report of the bundle as one HTML file, and as Markdown next to it.

        Args:
            output: the HTML file; ``report.html`` in the bundle by default.

        Raises:
            InputError: ``output`` cannot be written.
        """
        bundle, file = self.load(), schema.optional_path("output", output)
        document = document_of_bundle(bundle)
        files = write_report(document, bundle, file)
        return WrittenReport(document.state, document.note, tuple(files))

    def _load_reference(
        self,
        bundle: disk.Bundle,
        settings: config.VerifySettings | config.DriftSettings | config.CheckSettings,
    ) -> tuple[LoadedVan | None, Samples]:
        """Return the original network, if it is the reference, and the samples to compare on."""
        loaded = None
        if settings.against == "weights":
            loaded = self._load_original(bundle, settings.weights)
        return loaded, samples_for(bundle, loaded, settings.images, settings.count or GOLDEN_IMAGES)

    def _load_original(self, bundle: disk.Bundle, weights: Path | None) -> LoadedVan:
        self.progress("Loading the original network")
        return original_network(bundle, weights)

    def _record(self, bundle: disk.Bundle, name: str, result: Result) -> Result:
        """Save a result in the manifest, unless that would invalidate a signature."""
        if self._key is None:
            self.remarks += filter(None, [record_check(bundle, name, result)])
        return result


class Exported(Bundle, Verdict):
    """A bundle that was just exported.

    Attributes:
        done: the results of all precisions, and the manifest.
        result: the result of FP32: whether and why it was built, and the time of each stage.
    """

    def __init__(self, done: ExportReport) -> None:
        super().__init__(done.export.bundle.path)
        self.done, self.result = done, done.export

    @property
    def passed(self) -> bool:
        """Whether every precision passes its gate; an FP32 graph that fails is never written."""
        return self.done.passed


def export(
    model: str | Path | Recipe,
    output: str | Path | None = None,
    *,
    images: str | Path | None = None,
    offline: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    **options: Unpack[kw.ExportOptions],
) -> Exported:
    """Export a VAN to ONNX in a bundle, checked against PyTorch at every batch size.

    Args:
        model: a variant (``van_b1``), ``van_digits``, a checkpoint's path, a repository
            (``owner/name``), a recipe's path, or a recipe.
        output: the bundle's folder; ``dist/NAME`` by default.
        images: folder of images to check on; sample photographs by default.
        offline: never use the network.
        force: rebuild everything.
        progress: receives the current step.
        options: keys of the recipe to change.

    Raises:
        UsageError: an option is unknown, has the wrong type, or conflicts with another.
        InputError: the weights, the recipe or the images cannot be used.
        GateFailed: the graph differs from the network; nothing was written.

    >>> bool(export("van_digits", output=getfixture("tmp_path") / "digits"))
    True
    """
    from van_deploy import exporting, pipeline

    recipe = resolve_recipe(model, parse_changes(EXPORT, options))
    images, folder = schema.optional_path("images", images), schema.optional_path("output", output)
    settings = config.RunSettings(images=images, offline=offline, force=force)
    loaded = exporting.load_model(recipe, offline=settings.offline, progress=progress)
    folder = folder or Path("dist") / loaded.name
    return Exported(pipeline.export_recipe(loaded, recipe, folder, settings, progress))


def run_recipe(
    recipe: str | Path | Recipe,
    output: str | Path | None = None,
    *,
    changes: Mapping[str, object] | None = None,
    progress: Progress = no_progress,
    **options: Unpack[kw.RunOptions],
) -> RunResult:
    """Run a recipe: export, quantise, build engines, verify and evaluate.

    Args:
        recipe: its name or path, or a model as in :func:`export`.
        output: the bundle's folder; ``dist/NAME`` by default.
        changes: new values of keys of the recipe, such as ``{"engines.tf32": False}``.
        progress: receives the current step.
        options: those of the command.

    Raises:
        VanDeployError: as :func:`~van_deploy.pipeline.run_recipe`.
    """
    from van_deploy import exporting, pipeline

    settings = parse_settings(config.RunSettings, options)
    values = {} if changes is None else changes
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"'changes=' is {values!r}: it should be a table.", schema.VALUE_REMEDY)
    new = {tuple(key.split(".")): Change(value, key) for key, value in values.items()}
    recipe = resolve_recipe(recipe, new)
    folder = schema.optional_path("output", output)
    loaded = exporting.load_model(recipe, offline=settings.offline, progress=progress)
    folder = folder or Path("dist") / loaded.name
    return pipeline.run_recipe(loaded, recipe, folder, settings, progress)


open_bundle = Bundle
"""Return the bundle at a path. Arguments and errors are those of :class:`Bundle`."""


def _load_gates(recipe: str) -> config.GateSettings:
    """Return the gates of a recipe, or the defaults without one."""
    return load_recipe(recipe).gates if recipe else DEFAULT_GATES
