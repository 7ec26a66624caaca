"""``quantize``: its calibration and held-out images, files, cache, gates and rejected options."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import load

import van_deploy as vd
from tests.artifacts import BATCHES, Copy
from tests.conftest import Cli
from tests.each import each
from tests.precision.test_int8 import parts
from van_deploy import errors
from van_deploy.bundle import MANIFEST, Bundle, edit_bundle
from van_deploy.config import GateProfile, GateSettings, QuantizeSettings
from van_deploy.data.images import ImageSet, image_set
from van_deploy.files import file_sha256
from van_deploy.intervals import wilson_interval
from van_deploy.model.embedded import write_digits_folder
from van_deploy.precision import pipeline
from van_deploy.precision.images import choose_images, select_images, split
from van_deploy.precision.pipeline import QuantizeResult, quantize_bundle
from van_deploy.recipe import CALIBRATION_SETS, ImageSelection, builtin_files, load_calibration_set
from van_deploy.stopwatch import Stopwatch

SET = '[images]\nsource = "digits"\ncount = 60\n'
PLAIN = QuantizeSettings(equalize=False, bias_correction=False, threads=1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> QuantizeSettings:
    """Return settings with a calibration set of 60 digits."""
    path = tmp_path_factory.mktemp("sets") / "calibration.toml"
    path.write_text(SET)
    return PLAIN.with_changes(calibration=str(path))


@pytest.fixture(scope="module")
def half(settings: QuantizeSettings) -> QuantizeSettings:
    """Return settings of FP16."""
    return settings.with_changes(precision="fp16", equalize=True, bias_correction=True)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "heldout", "heldout", 40)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "train", "train", 60)


@pytest.fixture
def bundle(digits_bundle: Bundle, copy_bundle: Copy) -> Path:
    return copy_bundle(digits_bundle)


@pytest.fixture(scope="module")
def results(
    digits_bundle: Bundle,
    settings: QuantizeSettings,
    half: QuantizeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, QuantizeResult]:
    """Return the results of all precisions of one bundle; tests must not change them."""
    path = Path(shutil.copytree(digits_bundle.path, tmp_path_factory.mktemp("results") / "b"))
    every = [
        half,
        half.with_changes(precision="bf16"),
        settings.with_changes(equalize=True, bias_correction=True),
        settings.with_changes(target="cpu"),
    ]
    return {one.artifact: quantize_bundle(path, one) for one in every}


def lines(result: QuantizeResult) -> dict[str, Any]:
    return {row["name"]: row for row in result.facts["comparison"]}


# --- results ---------------------------------------------------------------------------------


def test_all_precisions_are_saved_and_pass(results: dict[str, QuantizeResult]) -> None:
    bundle = results["int8-cpu"].bundle
    assert bundle.problems() == []
    assert list(bundle.artifacts) == ["fp32", "fp16", "bf16", "int8", "int8-cpu"]
    rows = {"fp16": "fp16", "bf16": "BF16 emulated", "int8": "int8", "int8-cpu": "int8"}
    for (name, result), least in zip(results.items(), (60, 50, 36, 25), strict=True):
        assert result, name
        assert result.facts["golden_check"]["outcome"] == "pass"
        assert lines(result)[rows[name]]["sqnr_db"] > least
        if name != "int8-cpu":
            assert result.facts["recommended"] is None
            assert result.facts["recommendation_reason"].startswith("speed not measured")
            assert set(result.facts["fp32_nodes"].values()) == {
                f"'{kept}' is kept" for kept in ("norm1", "norm2", "norm3", "norm4", "head")
            }
    assert results["fp16"].facts["audit"]["problems"] == []
    assert "audit" not in results["bf16"].facts
    timed = results["int8-cpu"]  # for a CPU the time decides
    assert lines(timed)["int8"]["ms_per_image"] > 0
    assert timed.facts["recommended"] in {"fp32", "int8"}


@each("wrong", [False, True], fresh="bundle")
def test_no_recommendation_beside_a_failed_golden_check(
    bundle: Path, half: QuantizeSettings, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    monkeypatch.setattr(pipeline, "recommend", lambda _, chosen: (chosen["name"], "faster"))
    file, manifest = bundle / "golden.npz", bundle / MANIFEST
    if wrong:
        digest, arrays = file_sha256(file), dict(np.load(file))
        np.savez(file, **arrays | {"logits": -arrays["logits"]})
        manifest.write_text(manifest.read_text().replace(digest, file_sha256(file)))
    result = quantize_bundle(bundle, half)
    assert result.passed is not wrong
    assert result.facts["recommended"] == (None if wrong else "fp16")


def test_techniques_and_files_match_the_facts(results: dict[str, QuantizeResult]) -> None:
    result, path = results["int8"], results["int8"].bundle.path
    kept = [gain["after_db"] for gain in result.facts["techniques"] if gain["used"]]
    assert len(kept) > 1
    assert kept == sorted(kept)
    sizes = [lines(result)[name]["size_bytes"] for name in ("int8", "fp16", "fp32")]
    assert sizes == sorted(sizes)
    assert 0.5 < result.facts["int8_share"] < 0.6
    with np.load(path / result.facts["channels"]) as channels:
        for part in ("factor", "shift"):
            assert channels[f"block1.0.attn.spatial_gating_unit.{part}"].shape == (16,)
    assert json.loads((path / "ranges.int8.json").read_text())["scales"] == result.facts["scales"]
    values, makers = parts(load(path / "model.int8.onnx"))
    pairs = [node.input for node in makers.values() if node.op_type == "QuantizeLinear"]
    written = {tensor: float(values[scale]) for tensor, scale, _ in pairs}
    assert result.facts["scales"] == pytest.approx(written, rel=1e-5)


def test_bf16_runs_emulated_and_can_be_verified_and_built(
    results: dict[str, QuantizeResult], copy_bundle: Copy, cli: Cli
) -> None:
    bundle = results["int8-cpu"].bundle
    assert bundle.artifact("bf16").golden_sqnr_db["ort-cpu/bf16"] > 50
    path = copy_bundle(bundle)
    assert "BF16 emulated" in cli.passes("verify --artifact bf16", path)
    cli.passes("drift --artifact bf16 --against golden", path)
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    cli.passes("build --precision bf16 --target sm_89", path)
    [engine] = [a for a in Bundle.open(path).artifacts.values() if a.kind == "engine"]
    assert engine.precision == "bf16"


@pytest.mark.slow
def test_scope_auto_selects_the_fastest_passing_scope(
    bundle: Path, settings: QuantizeSettings
) -> None:
    settings = settings.with_changes(scope=("auto",))
    with pytest.raises(errors.MissingDependency, match="--scope auto measures latency on a GPU"):
        quantize_bundle(bundle, settings)
    found = lines(quantize_bundle(bundle, settings.with_changes(target="cpu")))
    assert list(found) == ["fp32", "int8 pointwise", "int8 deep", "int8 all"]
    times = {n: row["ms_per_image"] for n, row in found.items() if row["passed"]}
    chosen = [name for name, row in found.items() if row["requested"]]
    assert chosen == [min(times, key=lambda name: times[name])]


def test_budget_search_does_not_use_evaluation_images(
    bundle: Path, settings: QuantizeSettings, heldout: Path
) -> None:
    settings = settings.with_changes(method="minmax", max_drop=0.0, evaluations=3)
    result = quantize_bundle(bundle, settings.with_changes(evaluate=heldout))
    assert lines(result)["int8"]["sqnr_db"] > 20
    search = result.facts["search"]
    assert (search["images"], search["metric"]) == (60, "top-1")
    assert len(search["trials"]) <= 3
    assert result.facts["evaluated_on"]["images"] == 40
    assert result.facts["quantized"] == 45 - len(search["excluded"])
    own = quantize_bundle(bundle, settings, force=True)
    assert own.facts["search"]["images"] == 48  # the other 12 judge


def test_unchanged_result_is_reused_and_changes_are_reported(
    bundle: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    settings = settings.with_changes(method="percentile", keep=("block4",))
    first = quantize_bundle(bundle, settings)
    assert (first.reused, first.reason) == (False, "new")
    assert (first.facts["method"], first.facts["quantized"]) == ("percentile", 35)
    assert lines(first)["int8"]["sqnr_db"] > 20
    second = quantize_bundle(bundle, settings.with_changes(threads=2))
    assert (second.reused, second.facts) == (True, first.facts)
    (tmp_path / "other.toml").write_text(f"{SET}seed = 5\n")
    third = quantize_bundle(bundle, settings.with_changes(calibration=str(tmp_path / "other.toml")))
    reason = "changed since: calibration images, held-out images, evaluation images, labels"
    assert third.reason == reason
    with edit_bundle(bundle) as draft:
        assert draft.description is not None
        draft.description = draft.description.model_copy(update={"golden": None})
    assert "golden samples" in quantize_bundle(bundle, settings).reason
    (bundle / "model.int8.onnx").write_bytes(b"rubbish")
    result = quantize_bundle(bundle, settings)
    assert not result.reused
    assert "model.int8.onnx" in result.reason
    load(bundle / "model.int8.onnx")


@each(
    "changes",
    [{"num_classes": 5}, {"problem_type": "regression"}, {"num_classes": 0, "out_indices": (1,)}],
)
def test_labels_that_the_network_does_not_predict_are_dropped(
    digits_bundle: Bundle, settings: QuantizeSettings, changes: dict[str, Any]
) -> None:
    manifest = digits_bundle.manifest
    other = manifest.model_copy(update={"architecture": replace(manifest.architecture, **changes)})
    bundles = [Bundle(digits_bundle.path, one) for one in (manifest, other)]
    labels = [select_images(b, settings, Stopwatch()).evaluation.labels for b in bundles]
    assert [one is None for one in labels] == [False, True]


def test_labels_and_what_latency_depends_on_are_inputs(
    bundle: Path, settings: QuantizeSettings, heldout: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(heldout, tmp_path / "val"))
    settings = settings.with_changes(target="cpu", scope=("pointwise",), evaluate=folder)
    first = quantize_bundle(bundle, settings)
    assert quantize_bundle(bundle, settings).reused
    (folder / "9").rename(folder / "9th")  # the same images in the same order
    second = quantize_bundle(bundle, settings)
    assert second.reason == "changed since: labels"
    assert [lines(one)["int8"]["correct"] is None for one in (first, second)] == [False, True]
    third = quantize_bundle(bundle, settings.with_changes(threads=2))
    assert third.reason == "changed since: threads"


def test_gates_of_int8_do_not_rebuild_and_new_golden_samples_drop_the_old_results(
    results: dict[str, QuantizeResult], half: QuantizeSettings, copy_bundle: Copy, heldout: Path
) -> None:
    path = copy_bundle(results["fp16"].bundle)
    assert quantize_bundle(path, half, rules=GateSettings(int8=GateProfile(top1_loss=9))).reused
    assert Bundle.open(path).artifact("fp16").golden_sqnr_db
    for batch in (str(BATCHES), "1:2:9"):  # new samples; then only new batches
        vd.open_bundle(path).verify(modules=False)
        exported = vd.export("van_digits", path, images=heldout, batch=batch)
        assert not exported.result.reused
        assert "verify" not in exported.manifest.checks
        assert Bundle.open(path).artifact("fp16").golden_sqnr_db == {}
        assert Bundle.open(path).artifact("fp32").golden_sqnr_db


def test_noise_is_labelled_and_inconclusive_results_do_not_pass(
    bundle: Path, settings: QuantizeSettings, heldout: Path, tmp_path: Path
) -> None:
    noise = quantize_bundle(bundle, PLAIN.with_changes(noise=True, evaluate=heldout))
    assert noise.facts["calibration"]["noise"] is True
    assert "NOISE" in noise.facts["calibration"]["description"]
    (tmp_path / "noise.toml").write_text('[images]\nsource = "noise"')
    named = PLAIN.with_changes(calibration=str(tmp_path / "noise.toml"))
    assert select_images(Bundle.open(bundle), named, Stopwatch()).calibration.noise
    settings = settings.with_changes(evaluate=heldout)
    result = quantize_bundle(bundle, settings)
    (row,) = [row for row in result.facts["comparison"] if row["requested"]]
    assert row["passed"]
    intervals = {"agreement": round(40 * row["agreement"]), "top1": row["correct"]}
    for name, hits in intervals.items():
        assert tuple(row[f"{name}_interval"]) == wilson_interval(hits, 40)
    assert "would decide at this rate" in row["inconclusive"][0]
    assert row["inconclusive"][0].endswith("allow more with --max-drop")
    assert (result.passed, result.facts["recommendation_reason"]) == (False, "INT8 is undecided")
    again = quantize_bundle(bundle, settings.with_changes(allow_inconclusive=True))
    assert (again.reused, again.passed) == (True, True)
    for digit in range(10):  # labels of another order are no evidence for a small loss
        shutil.copytree(heldout / str(digit), tmp_path / "other" / str((digit + 1) % 10))
    other = quantize_bundle(bundle, settings.with_changes(evaluate=tmp_path / "other"))
    (row,) = [row for row in other.facts["comparison"] if row["requested"]]
    assert "PyTorch's top-1 is not shown to be above chance" in row["inconclusive"][0]


def test_one_unreadable_image_is_listed_and_more_are_rejected(
    bundle: Path, digits: Path, heldout: Path, tmp_path: Path
) -> None:
    """Also the first one of the evaluation set, of which latency needs one image."""
    folder = Path(shutil.copytree(digits, tmp_path / "train"))
    val = Path(shutil.copytree(heldout, tmp_path / "val"))
    for path in (folder / "0" / "bad.png", val / "0" / "!bad.png"):
        path.write_bytes(path.parent.parent.name.encode())
    settings = PLAIN.with_changes(images=folder, target="cpu", evaluate=val)
    facts = quantize_bundle(bundle, settings).facts["calibration"]
    assert ["bad.png" in reason for reason in facts["unreadable"]] == [True, True]
    for digit in range(1, 10):
        (folder / str(digit) / "bad.png").write_bytes(b"no image %d" % digit)
    with pytest.raises(errors.ImageError, match="images could not be read, more than 1 %"):
        quantize_bundle(bundle, PLAIN.with_changes(images=folder))


# --- rejected requests -----------------------------------------------------------------------


def test_failed_quantisation_does_not_change_the_bundle(
    bundle: Path, half: QuantizeSettings, heldout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.BundleError):
        quantize_bundle(bundle / "none", PLAIN)
    with pytest.raises(errors.ImageError, match="40 calibration image"):
        quantize_bundle(bundle, PLAIN.with_changes(images=heldout, evaluate=heldout))
    monkeypatch.setattr("van_deploy.precision.pipeline.opset_of", lambda _: 17)
    for precision, oldest in (("bf16", 18), ("int8", 19)):
        with pytest.raises(
            errors.ConversionError, match=f"17; {precision} needs {oldest} or newer"
        ):
            quantize_bundle(bundle, half.with_changes(precision=precision))
    monkeypatch.setattr("van_deploy.precision.fp16.FP16_LARGEST", 50.0)
    with pytest.raises(errors.GateFailed, match="FP16 cannot represent every tensor"):
        quantize_bundle(bundle, half.with_changes(strict=True))
    assert list(Bundle.open(bundle).artifacts) == ["fp32"]


@each("other", [{"precision": "bf16"}, {"target": "cpu"}, {"rest": "fp32"}])
def test_strict_is_for_fp16(other: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError, match="strict= is for FP16, and"):
        QuantizeSettings(strict=True, **other)


# --- calibration and held-out images ----------------------------------------------------------


def groups(images: ImageSet) -> Counter[str]:
    return Counter(item.group for item in images.items)


def test_selection_is_balanced_and_depends_on_its_seed(digits: Path, tmp_path: Path) -> None:
    chosen = choose_images(ImageSelection(count=30), digits)
    assert groups(chosen) == {str(digit): 3 for digit in range(10)}
    assert chosen.description == f"30 of 60 images of '{digits}'"
    assert choose_images(ImageSelection(count=30), digits).items == chosen.items
    assert choose_images(ImageSelection(count=30, seed=1), digits).digest != chosen.digest
    assert [item.name for item in chosen.items] == sorted(item.name for item in chosen.items)
    few = groups(choose_images(ImageSelection(count=4), digits))  # spread over random classes
    assert set(few.values()) == {1}
    assert list(few) != ["0", "1", "2", "3"]
    loose = choose_images(ImageSelection(count=30, balanced=False), digits)
    assert len(loose) == 30
    assert set(groups(loose).values()) != {3}
    for path in sorted(digits.glob("[0-2]/*.png"))[4:]:  # a class with few gives all of them
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    assert groups(choose_images(ImageSelection(count=12), tmp_path)) == {"0": 2, "1": 5, "2": 5}


def test_split_has_all_classes_in_both_parts_and_shares_no_image(
    digits: Path, tmp_path: Path
) -> None:
    chosen = choose_images(ImageSelection(count=50), digits)
    kept, aside = split(chosen, 0.2)
    assert (len(kept), groups(aside)) == (40, {str(digit): 1 for digit in range(10)})
    assert aside.description == f"10 held-out images of 50 of 60 images of '{digits}'"
    assert split(chosen, 0.2)[1].items == aside.items
    copied = Path(shutil.copytree(digits, tmp_path / "copied"))
    for path in sorted(copied.rglob("*.png")):  # no copy of a held-out image is calibrated on
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    kept, aside = split(image_set(copied), 0.2)
    assert len(aside) == 24
    assert len(kept) < 96
    assert not {item.digest for item in kept.items} & {item.digest for item in aside.items}
    for count in (1, 3):  # of one image
        with pytest.raises(errors.ImageError, match="be split into calibration and held-out"):
            split(chosen.take([0] * count), 0.2)


def test_builtin_sets_have_descriptions_and_the_digits_match_their_digest(digits: Path) -> None:
    assert all(load_calibration_set(name).description for name in builtin_files(CALIBRATION_SETS))
    selection = load_calibration_set("digits").images
    chosen = choose_images(selection)
    assert (chosen.digest, len(chosen)) == (selection.digest, 512)
    for own, given in ((str(digits), None), ("", digits)):
        with pytest.raises(errors.ImageError, match="The images do not match the calibration set"):
            choose_images(ImageSelection(path=own, count=10, digest="0" * 64), given)


def test_a_set_of_ones_own_is_relative_to_itself_and_none_is_said(digits: Path) -> None:
    manifest = digits.parent / "mine.toml"
    manifest.write_text(f'[images]\npath = "{digits.name}"\ncount = 20\n')
    assert len(choose_images(load_calibration_set(str(manifest)).images)) == 20
    with pytest.raises(errors.ImageError, match="none were given") as caught:
        choose_images(ImageSelection())
    assert "--calibrate-on-noise" in caught.value.remedy
    manifest.write_text('[images]\nsource = "web"')
    for name, message in (("digit", "no calibration set called"), (manifest, "mine.*'web'")):
        with pytest.raises(errors.RecipeError, match=message):
            load_calibration_set(str(name))
