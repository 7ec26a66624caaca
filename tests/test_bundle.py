"""A bundle is written whole or not at all, and believes only its digests."""

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


def test_what_was_written_is_read_back_and_verified(bundle: Path) -> None:
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
    assert caught.value.remedy == f"Make it with `van-deploy quantize {bundle} --precision int8`."
    (bundle / "fp32.onnx").write_text("changed")
    with pytest.raises(BundleError, match=r"fp32.onnx' was changed after the manifest was written"):
        opened.verified_path("fp32")
    (bundle / "fp32.onnx").unlink()
    assert opened.problems() == [f"'{bundle}/fp32.onnx' is named in the manifest and missing."]


def test_an_error_half_way_leaves_the_old_bundle_or_none(bundle: Path, tmp_path: Path) -> None:
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
    """Stands for the process ending at once."""


@pytest.mark.parametrize("moves", range(4))
def test_killed_while_committing_the_next_reader_sees_the_whole_new_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    # Three files are moved (two artifacts and the manifest) and then the folder goes.
    real, done, before = Path.replace, 0, (bundle / MANIFEST).read_text()

    def dies(self: Path, target: Path) -> Path:
        nonlocal done
        if ".pending" in self.parts:
            if done == moves:
                raise Killed
            done += 1
        return real(self, target)

    monkeypatch.setattr(Path, "replace", dies)
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


def test_what_was_made_from_an_older_artifact_goes_with_it(bundle: Path) -> None:
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


def fp32_file(file: str) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["artifacts"]["fp32"].update(file=file, files={file: "0" * 64})


def entry_of(section: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m[section].update(values)


CHANGED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    *(
        (fp32_file(name), "is outside the b")
        for name in ("../x", "/etc/passwd", "a/../../b", "a\\b")
    ),
    *(
        (lambda m, k=k: m.pop(k), f"damaged: '{k}' is missing.")
        for k in ("written", "weights", "checks")
    ),
    (
        lambda m: m.update(artefacts={}),
        "the key 'artefacts' is unknown.\nDid you mean 'artifacts'?",
    ),
    (
        lambda m: m["artifacts"]["fp32"].update(precison="fp32"),
        "'artifacts.fp32.precison' is unknown.\nDid you mean 'artifacts.fp32.precision'?",
    ),
    (
        entry_of("preprocessing", crop=0.9),
        "'preprocessing.crop' is unknown.\nDid you mean 'preprocessing.crop_pct'?",
    ),
    (lambda m: m["files"].update({"a" * 300: ""}), "is no name of a file"),
    (lambda m: m["files"].update({"a\x1b": ""}), "is no name of a file"),
    (lambda m: m["files"].update({"": ""}), "is outside the bundle"),
    (lambda m: m.update(name='x" } backend: "python'), "it is not a name"),
    (
        lambda m: m["artifacts"].update({"x/../../y": m["artifacts"].pop("fp32")}),
        "'artifacts.x/../../y' is 'x/../../y': it is not a name",
    ),
    (lambda m: m.update(written="a" * 5000), "it has 5,000 characters"),
    (lambda m: m.update(x=nested(50)), "nested more than 40 deep"),
    (lambda m: m.update(name=float("nan")), "damaged: 'name' is nan"),
    (entry_of("batch", max="4"), "'batch.max' is '4': it should be a whole number"),
    (entry_of("batch", max=True), "'batch.max' is True: it should be a whole nu"),
    (entry_of("batch", max=0), "'batch.max' is 0: it should be greater"),
    (entry_of("preprocessing", image_size=3), "'preprocessing.image_size' is 3: it"),
    (entry_of("architecture", out_indices=[9]), "out_indices"),
    (entry_of("preprocessing", std=[0, 1, 1]), "greater than 0"),
    (entry_of("preprocessing", mean=[10**400] * 3), "'preprocessing.mean.0' is"),
    (entry_of("architecture", depths=[-1, 2, 2, 2]), "depths that no network has"),
    (entry_of("architecture", num_classes=0), "num_classes that no network has"),
    (lambda m: m.update(class_names=["a"]), "damaged: it has 1 class names for 1000 classes"),
    (entry_of("architecture", in_chans=4), "it prepares 3 channels for a network"),
    (entry_of("weights", spec="a\x1b[2J"), "control characters"),
    (lambda m: m["artifacts"]["fp32"].update(files={}), "no digest of 'fp32.onnx'"),
    (lambda m: m.update(checks={"x": "\ud800"}), "unpaired surrogate"),
    (lambda m: m["artifacts"]["fp32"].update(kind="engines"), "it should be 'onnx', 'serving'"),
]


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
        '{"schema": "van-deploy/bundle/1", "name": "m"}',
        f"manifest.json' has schema 'van-deploy/bundle/1'; this version reads '{SCHEMA}'.\n"
        "Make the bundle anew: `van-deploy export MODEL",
    ),
]


@each(("change", "message"), [*CHANGED, *TEXTS], fresh="bundle")
def test_what_no_manifest_of_ours_says_is_refused(
    bundle: Path, change: str | Callable[[dict[str, Any]], object], message: str
) -> None:
    text = change if isinstance(change, str) else (bundle / MANIFEST).read_text()
    if not isinstance(change, str):
        manifest = json.loads(text)
        change(manifest)
        text = json.dumps(manifest)
    (bundle / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert message in str(caught.value)


def test_what_is_written_again_is_the_same_but_for_its_date(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        ("thesis", "m", "thesis' holds something else (thesis.tex) and no bundle."),
        ("b", "other", "holds the bundle of 'm', not of 'other'"),
        ("thesis/thesis.tex", "m", "is a file, not a folder"),
        (os.fsdecode(b"b\xff"), "m", "is not UTF-8"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(
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


def test_two_processes_on_one_bundle_lose_nothing(bundle: Path) -> None:
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


# --- folders that no command of ours makes ---------------------------------------------------


def pending(name: str, text: str) -> Callable[[Path, Path], None]:
    """Return what leaves a file of an interrupted commit; ``engines`` is a link that leads out."""

    def left(bundle: Path, outside: Path) -> None:
        (bundle / "sub").mkdir()
        (bundle / "engines").symlink_to(outside)
        (bundle / ".pending" / name).parent.mkdir(parents=True)
        (bundle / ".pending" / name).write_text(text)

    return left


def gone(*names: str) -> Callable[[Path, Path], None]:
    return pending(".gone", json.dumps(names))


def pipe(name: str) -> Callable[[Path, Path], None]:
    def made(bundle: Path, outside: Path) -> None:
        (bundle / name).unlink(missing_ok=True)
        (bundle / name).parent.mkdir(exist_ok=True)
        os.mkfifo(bundle / name)

    return made


@each(
    ("leave", "message"),
    [
        (pending("engines/mine", "theirs"), r"engines' is a link"),
        (gone("engines/mine"), r"engines' is a link"),
        (lambda b, outside: (b / ".pending").symlink_to(outside), r"\.pending' is a link"),
        *((pending(".gone", text), "interrupted comm.*damaged") for text in ("", "{", "3", "null")),
        (gone("sub"), "does not fit the bundle: .*Is a directory"),
        (gone("fp32.onnx/x"), "does not fit the bundle: .*Not a directory"),
        (gone("a" * 300), "is no name of a file"),
        (gone("a\nb"), "is no name of a file"),
        (pending("sub", "a file where a folder is"), r"\.pending' does not fit the bundle"),
        (pipe(MANIFEST), "damaged: .*not a regular file"),
        (lambda b, _: (b / MANIFEST).rename(b / "x") and (b / MANIFEST).mkdir(), "Is a directory"),
        (pipe(".pending/.gone"), "damaged: .*not a regular file"),
    ],
    fresh="bundle",
)
def test_what_lies_in_a_bundle_from_elsewhere_does_no_harm(
    bundle: Path, tmp_path: Path, leave: Callable[[Path, Path], object], message: str
) -> None:
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    leave(bundle, outside)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)
    assert (outside / "mine").read_text() == "mine"


def test_a_lock_that_is_held_a_link_or_a_folder_is_said(
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


def test_a_pipe_that_looks_like_a_dead_command_s_folder_is_let_alone(bundle: Path) -> None:
    os.mkfifo(bundle / ".staging-x")
    (bundle / ".staging-y").mkdir()
    (bundle / ".staging-y/fp32.onnx").write_text("half written")
    put(bundle, "fp16", "x")
    assert (bundle / ".staging-x").is_fifo()
    assert not (bundle / ".staging-y").exists()
    assert Bundle.open(bundle).verified_path("fp32").read_text() == "weights"


def test_a_first_writer_that_fails_takes_nothing_from_the_second(tmp_path: Path) -> None:
    """The first made the folder, so it removes it; the second was waiting for its lock."""
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
