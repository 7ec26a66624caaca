"""Bundles: atomic writes, strict reading, and digests."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.artifacts import Copy
from tests.each import each
from tests.manifest_parts import WEIGHTS, artifact_entry, network_info
from van_deploy.bundle import MANIFEST, Bundle, Origin, edit_bundle
from van_deploy.errors import BundleError, UsageError
from van_deploy.manifest import SCHEMA


def put(folder: Path, name: str, text: str, made_from: Origin = WEIGHTS) -> None:
    """Write one artifact into the bundle ``m`` at ``folder``."""
    with edit_bundle(folder, name="m") as draft:
        draft.description = network_info()
        draft.file(f"{name}.onnx").write_text(text)
        draft.record(artifact_entry(name, "onnx", "fp32", f"{name}.onnx", made_from=made_from))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    put(tmp_path / "b", "fp32", "weights")
    return tmp_path / "b"


def test_write_and_read(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.name == "m"
    assert opened.verified_path("fp32").read_text() == "weights"
    assert opened.problems() == []
    assert opened.sizes() == {"fp32": 7}
    assert opened.manifest.files == {}, "an artifact's own file is not named twice"
    assert set(contents(bundle)) == {MANIFEST, "fp32.onnx"}
    assert Bundle.open(bundle / MANIFEST).path == bundle
    with pytest.raises(BundleError, match="has no artifact 'int8'; it has: fp32") as caught:
        opened.artifact("int8")
    assert caught.value.remedy == f"Create it with `van-deploy quantize {bundle} --precision int8`."
    (bundle / "fp32.onnx").write_text("changed")
    with pytest.raises(BundleError, match=r"fp32.onnx' was changed after the manifest was written"):
        opened.verified_path("fp32")
    (bundle / "fp32.onnx").unlink()
    assert opened.problems() == [
        f"'{bundle}/fp32.onnx' is in the manifest, but the file is missing."
    ]


def test_error_while_writing_keeps_the_old_bundle(bundle: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)

    def fails(folder: Path, name: str | None) -> None:
        with edit_bundle(folder, name=name) as draft:
            draft.file("fp32.onnx").write_text("new")
            draft.description = network_info("other")
            raise ZeroDivisionError

    for folder, name in ((bundle, None), (tmp_path / "new", "m")):
        with pytest.raises(ZeroDivisionError):
            fails(folder, name)
    with (
        pytest.raises(ValueError, match="needs a description"),
        edit_bundle(tmp_path / "c", name="m"),
    ):
        pass
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["b"]


class Killed(BaseException):
    """Simulates a killed process."""


@pytest.mark.parametrize("moves", range(4))
def test_commit_is_completed_after_a_kill(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    # Three files are moved (two artifacts and the manifest) and then the folder goes.
    real, done, before = Path.replace, 0, (bundle / MANIFEST).read_text()

    def kill(self: Path, target: Path) -> Path:
        nonlocal done
        if ".pending" in self.parts:
            if done == moves:
                raise Killed
            done += 1
        return real(self, target)

    monkeypatch.setattr(Path, "replace", kill)
    try:
        with edit_bundle(bundle) as draft:
            for name, text in (("fp32", "new weights"), ("fp16", "half")):
                draft.file(f"{name}.onnx").write_text(text)
                draft.record(artifact_entry(name, "onnx", name, f"{name}.onnx"))
    except Killed:
        assert moves < 3
        assert (bundle / MANIFEST).read_text() == before, "it is the last to be moved"
    monkeypatch.setattr(Path, "replace", real)
    opened = Bundle.open(bundle)
    assert opened.verified_path("fp32").read_text() == "new weights"
    assert opened.verified_path("fp16").read_text() == "half"
    assert set(contents(bundle)) == {MANIFEST, "fp32.onnx", "fp16.onnx"}


def test_artifacts_of_a_replaced_source_are_removed(bundle: Path) -> None:
    origin = Origin(name="fp32", sha256=Bundle.open(bundle).artifact("fp32").sha256)
    put(bundle, "fp16", "half", origin)
    put(bundle, "engine", "plan", Origin(name="fp16", sha256="0" * 64))
    put(bundle, "fp32", "weights")  # the same again: nothing goes
    assert set(Bundle.open(bundle).artifacts) == {"fp32", "fp16", "engine"}
    put(bundle, "fp32", "other weights")
    assert set(Bundle.open(bundle).artifacts) == {"fp32"}
    assert set(contents(bundle)) == {MANIFEST, "fp32.onnx"}


def nested(levels: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(levels):
        inner = [inner]
    return inner


Edit = Callable[[dict[str, Any]], object]


def fp32_file(file: str) -> Edit:
    return lambda m: m["artifacts"]["fp32"].update(file=file, files={file: "0" * 64})


def section(name: str, **values: Any) -> Edit:
    return lambda m: m[name].update(values)


def file_table(file: str) -> Edit:
    return lambda m: m["files"].update({file: ""})


def top(**values: Any) -> Edit:
    return lambda m: m.update(values)


INVALID: list[tuple[Edit, str]] = [
    *((fp32_file(n), "is outside the b") for n in ("../x", "/etc/passwd", "a/../../b", "a\\b")),
    (lambda m: m.pop("written"), "damaged: 'written' is missing."),
    (top(artifact={}), "the key 'artifact' is unknown.\nDid you mean 'artifacts'?"),
    (
        lambda m: m["artifacts"]["fp32"].update(precison="fp32"),
        "'artifacts.fp32.precison' is unknown.\nDid you mean 'artifacts.fp32.precision'?",
    ),
    (
        section("preprocessing", crop=0.9),
        "'preprocessing.crop' is unknown.\nDid you mean 'preprocessing.crop_pct'?",
    ),
    *((file_table(file), "is not a file name") for file in ("a" * 300, "a\x1b")),
    (file_table(""), "is outside the bundle"),
    (top(name='x" } backend: "python'), "it is not a name"),
    (
        lambda m: m["artifacts"].update({"x/../../y": m["artifacts"].pop("fp32")}),
        "'artifacts.x/../../y' is 'x/../../y': it is not a name",
    ),
    (top(written="a" * 5000), "it has 5,000 characters"),
    (top(x=nested(50)), "nested more than 40 deep"),
    (top(name=float("nan")), "damaged: 'name' is nan"),
    (section("batch", max="4"), "'batch.max' is '4': it should be a whole number"),
    (section("batch", max=True), "'batch.max' is True: it should be a whole nu"),
    (section("batch", max=0), "'batch.max' is 0: it should be greater"),
    (section("preprocessing", image_size=3), "'preprocessing.image_size' is 3: it"),
    (section("architecture", out_indices=[9]), "out_indices"),
    (section("preprocessing", std=[0, 1, 1]), "greater than 0"),
    (section("preprocessing", mean=[10**400] * 3), "'preprocessing.mean.0' is"),
    (section("architecture", depths=[-1, 2, 2, 2]), "invalid depths"),
    (section("architecture", num_classes=0), "invalid num_classes"),
    (top(class_names=["a"]), "damaged: it has 1 class names for 1000 classes"),
    (section("architecture", in_chans=4), "it has preprocessing to 3 channels for a network"),
    (section("weights", spec="a\x1b[2J"), "control characters"),
    (lambda m: m["artifacts"]["fp32"].update(files={}), "no digest of 'fp32.onnx'"),
    (top(checks={"x": "\ud800"}), "unpaired surrogate"),
    (lambda m: m["artifacts"]["fp32"].update(kind="engines"), "it should be 'onnx', 'serving'"),
]


def test_classes_that_artifacts_were_not_made_with_are_refused(
    digits_bundle: Bundle, copy_bundle: Copy
) -> None:
    path = copy_bundle(digits_bundle) / MANIFEST
    text = path.read_text()
    swapped, wider = json.loads(text), json.loads(text)
    swapped["class_names"].reverse()
    wider["artifacts"]["fp32"]["graph"]["outputs"]["logits"]["shape"][-1] = 11
    for manifest, message in (
        (swapped, "has other class names than those 'fp32' was made with"),
        (wider, "has 10 classes; the logits of 'fp32' have 11"),
    ):
        path.write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match=message):
            Bundle.open(path.parent)


TEXTS = [
    *((text, "is damaged: ") for text in ("", "{", "[]", "null", '"x"', "\x00")),
    (f'{{"schema": "{SCHEMA}", "artifacts": 2}}', "is damaged: "),
    ('{"name": "a", "name": "b"}', "damaged: it has the key 'name' twice"),
    *((text, "is nested more than 40 deep") for text in ("[" * 200_000, "[" * 42 + "]" * 42)),
    ('{"a": [' * 30 + "1" + "]}" * 30, "is nested more than 40 deep"),
    ("[" * 41 + "]" * 41, "it should be a table"),
    ("\udcff", "it is not UTF-8"),
    (" " * (64 * 2**20 + 1), "it has more than 67,108,864 bytes"),
    (
        '{"schema": "van-deploy/bundle/9", "name": "m"}',
        f"this version reads '{SCHEMA}'.\nA newer van-deploy wrote it: upgrade",
    ),
    (
        '{"schema": "van-deploy/bundle/1", "name": "m"}',
        f"manifest.json' has schema 'van-deploy/bundle/1'; this version reads '{SCHEMA}'.\n"
        "Create the bundle again in another folder with `van-deploy export`",
    ),
]


@each(("change", "message"), [*INVALID, *TEXTS], fresh="bundle")
def test_invalid_manifests_are_refused(bundle: Path, change: str | Edit, message: str) -> None:
    text = change if isinstance(change, str) else (bundle / MANIFEST).read_text()
    if not isinstance(change, str):
        manifest = json.loads(text)
        change(manifest)
        text = json.dumps(manifest)
    (bundle / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert message in str(caught.value)


def test_rewriting_changes_only_the_date(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Bundle.open(bundle).manifest
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with edit_bundle(bundle):
        pass
    after = Bundle.open(bundle).manifest
    assert after.written == "2023-11-14T22:13:20+00:00"
    assert after.model_copy(update={"written": before.written}) == before
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH is 'yesterday'"), edit_bundle(bundle):
        pass


@each(
    ("folder", "name", "message"),
    [
        ("thesis", "m", "thesis' is not a bundle and contains thesis.tex."),
        ("b", "other", "contains the bundle of 'm', not of 'other'"),
        ("thesis/thesis.tex", "m", "is a file, not a folder"),
        (os.fsdecode(b"b\xff"), "m", "is not UTF-8"),
    ],
)
def test_other_folders_are_not_changed(
    tmp_path: Path, folder: str, name: str, message: str
) -> None:
    put(tmp_path / "b", "fp32", "weights")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(BundleError) as caught, edit_bundle(tmp_path / folder, name=name):
        pass
    assert message in caught.value.message
    assert contents(tmp_path) == before
    assert len(os.listdir(tmp_path)) == 2


def test_concurrent_writers_lose_nothing(bundle: Path) -> None:
    context = multiprocessing.get_context("fork")
    names = [f"a{i}" for i in range(6)]
    workers = [context.Process(target=put, args=(bundle, name, name)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    opened = Bundle.open(bundle)
    assert set(opened.artifacts) == {"fp32", *names}
    assert opened.problems() == []


# --- untrusted folders --------------------------------------------------------------------------


def pending(name: str, text: str) -> Callable[[Path, Path], None]:
    """Return a function that adds an interrupted commit; ``engines`` is a link elsewhere."""

    def add(bundle: Path, outside: Path) -> None:
        (bundle / "sub").mkdir()
        (bundle / "engines").symlink_to(outside)
        (bundle / ".pending" / name).parent.mkdir(parents=True)
        (bundle / ".pending" / name).write_text(text)

    return add


def gone(*names: str) -> Callable[[Path, Path], None]:
    return pending(".gone", json.dumps(names))


def pipe(name: str) -> Callable[[Path, Path], None]:
    def add(bundle: Path, outside: Path) -> None:
        (bundle / name).unlink(missing_ok=True)
        (bundle / name).parent.mkdir(exist_ok=True)
        os.mkfifo(bundle / name)

    return add


@each(
    ("add", "message"),
    [
        (pending("engines/mine", "theirs"), r"engines' is a link"),
        (gone("engines/mine"), r"engines' is a link"),
        (lambda b, outside: (b / ".pending").symlink_to(outside), r"\.pending' is a link"),
        *((pending(".gone", text), "interrupted comm.*damaged") for text in ("", "{", "3", "null")),
        (gone("sub"), "do not fit the bundle: .*Is a directory"),
        (gone("fp32.onnx/x"), "do not fit the bundle: .*Not a directory"),
        (gone("a" * 300), "is not a file name"),
        (gone("a\nb"), "is not a file name"),
        (pending("sub", "a file where a folder is"), r"\.pending' do not fit the bundle"),
        (pipe(MANIFEST), "damaged: .*not a regular file"),
        (lambda b, _: (b / MANIFEST).rename(b / "x") and (b / MANIFEST).mkdir(), "Is a directory"),
        (pipe(".pending/.gone"), "damaged: .*not a regular file"),
    ],
    fresh="bundle",
)
def test_links_and_pipes_in_a_bundle_are_refused(
    bundle: Path, tmp_path: Path, add: Callable[[Path, Path], object], message: str
) -> None:
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    add(bundle, outside)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)
    assert (outside / "mine").read_text() == "mine"


def test_invalid_locks_are_reported(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.bundle.commit.LOCK_WAIT_S", 0.1)
    lock, mine = bundle / ".lock", tmp_path / "mine"
    with FileLock(lock), pytest.raises(BundleError, match="has been writing"):
        put(bundle, "fp16", "x")
    mine.write_text("mine")
    lock.unlink(missing_ok=True)
    lock.symlink_to(mine)
    with pytest.raises(BundleError, match=r"\.lock' is a link"):
        put(bundle, "fp16", "x")
    assert mine.read_text() == "mine"
    lock.unlink()
    lock.mkdir()
    with pytest.raises(BundleError, match="cannot be written: Is a directory"):
        put(bundle, "fp16", "x")


def test_only_stale_staging_folders_are_removed(bundle: Path) -> None:
    os.mkfifo(bundle / ".staging-x")
    (bundle / ".staging-y").mkdir()
    (bundle / ".staging-y/fp32.onnx").write_text("half written")
    put(bundle, "fp16", "x")
    assert (bundle / ".staging-x").is_fifo()
    assert not (bundle / ".staging-y").exists()
    assert Bundle.open(bundle).verified_path("fp32").read_text() == "weights"


def test_failed_first_writer_keeps_the_second_one_s_bundle(tmp_path: Path) -> None:
    """The first writer created the folder and removes it while the second waits for the lock."""
    folder, begun = tmp_path / "new", threading.Event()

    def fails() -> None:
        with contextlib.suppress(ZeroDivisionError), edit_bundle(folder, name="m"):
            begun.set()
            time.sleep(0.3)
            raise ZeroDivisionError

    first = threading.Thread(target=fails)
    first.start()
    begun.wait(10)
    put(folder, "fp32", "weights")
    first.join()
    assert Bundle.open(folder).verified_path("fp32").read_text() == "weights"
