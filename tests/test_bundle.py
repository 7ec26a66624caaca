"""Bundles: atomic writes, strict reading, digests, and weights only in the graph's folder."""

import errno
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from filelock import FileLock
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.artifacts import Copy
from tests.each import each
from tests.json_documents import edit_json
from tests.manifest_parts import WEIGHTS, artifact_entry, network_info
from van_deploy.bundle import MANIFEST, Bundle, Origin, edit_bundle
from van_deploy.checks.verify import record_check
from van_deploy.config import BuildOptions
from van_deploy.describe import describe_model
from van_deploy.engine.build import has_external_weights
from van_deploy.errors import BundleError, InputError, UsageError
from van_deploy.files import external_files, external_files_in
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
    put(bundle, "fp32", "new")  # by another command
    assert opened.problems()[0].endswith("was changed while this command was using it.")
    opened = Bundle.open(bundle)
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
    real, left, before = Path.replace, moves, (bundle / MANIFEST).read_text()

    def replace(self: Path, target: Path) -> Path:
        nonlocal left
        if ".pending" in self.parts:
            if left == 0:
                raise Killed
            left -= 1
        return real(self, target)

    with monkeypatch.context() as patch, suppress(Killed), edit_bundle(bundle) as draft:
        patch.setattr(Path, "replace", replace)
        for name, text in (("fp32", "new weights"), ("fp16", "half")):
            draft.file(f"{name}.onnx").write_text(text)
            draft.record(artifact_entry(name, "onnx", name, f"{name}.onnx"))
    assert ((bundle / MANIFEST).read_text() == before) is (moves < 3), "it is the last to be moved"
    opened = Bundle.open(bundle)
    assert opened.verified_path("fp32").read_text() == "new weights"
    assert opened.verified_path("fp16").read_text() == "half"
    assert set(contents(bundle)) == {MANIFEST, "fp32.onnx", "fp16.onnx"}


def test_first_commit_is_completed_after_a_kill(bundle: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    bundle.rename(new / ".pending")
    assert describe_model(str(new)).kind == "bundle"
    assert set(contents(new)) == {MANIFEST, "fp32.onnx"}


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_checks_of_a_read_only_bundle_are_not_recorded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=OSError(number, "no")))
    assert "is read-only, so the result" in record_check(Bundle.open(bundle), "verify", {})


def test_artifacts_of_a_replaced_source_are_removed(bundle: Path) -> None:
    origin = Origin(name="fp32", sha256=Bundle.open(bundle).artifact("fp32").sha256)
    put(bundle, "fp16", "half", origin)
    put(bundle, "engine", "plan", Origin(name="fp16", sha256="0" * 64))
    put(bundle, "fp32", "weights")  # the same again: nothing goes
    assert set(Bundle.open(bundle).artifacts) == {"fp32", "fp16", "engine"}
    with edit_bundle(bundle) as draft:
        draft.checks |= {"embedded fp16": {}, "verify": {}}
    put(bundle, "fp32", "other weights")
    assert set(Bundle.open(bundle).artifacts) == {"fp32"}
    assert set(Bundle.open(bundle).manifest.checks) == {"verify"}
    assert set(contents(bundle)) == {MANIFEST, "fp32.onnx"}


FP32 = "artifacts fp32"
GOLDEN = {"file": "../x", "count": 1, "images": "", "originals": [], "licence": ""}
VALUES: list[tuple[tuple[str, object], str]] = [
    *(
        ((f"{FP32} files", {name: "0" * 64}), "is outside the bundle")
        for name in ("../x", "/etc/passwd", "a/../../b", "a\\b", "")
    ),
    *((("files", {name: ""}), "is not a file name") for name in ("a" * 300, "a\x1b")),
    (("golden", GOLDEN), "is outside the bundle"),
    ((f"{FP32} files", {}), "no digest of 'fp32.onnx'"),
    ((f"{FP32} kind", "engines"), "it should be 'onnx', 'serving'"),
    (("artifact", {}), "the key 'artifact' is unknown.\nDid you mean 'artifacts'?"),
    ((f"{FP32} precison", "fp32"), "unknown.\nDid you mean 'artifacts.fp32.precision'?"),
    (("preprocessing crop", 0.9), "unknown.\nDid you mean 'preprocessing.crop_pct'?"),
    (("name", 'x" } backend: "python'), "it is not a name"),
    (("artifacts", {"x/../../y": {}}), "'artifacts.x/../../y' is 'x/../../y': it is not a name"),
    (("written", "a" * 5000), "it has 5,000 characters"),
    (("name", float("nan")), "damaged: 'name' is nan"),
    (("batch max", "4"), "'batch.max' is '4': it should be a whole number"),
    (("batch max", 0), "'batch.max' is 0: it should be greater"),
    (("preprocessing image_size", 3), "'preprocessing.image_size' is 3: it"),
    (("preprocessing std", [0, 1, 1]), "greater than 0"),
    (("preprocessing mean", [10**400] * 3), "'preprocessing.mean.0' is"),
    (("architecture out_indices", [9]), "out_indices"),
    (("architecture depths", [-1, 2, 2, 2]), "invalid depths"),
    (("architecture depths", [2, 2, 2]), "3 depths, not 4"),
    (("architecture strides", [4, 0, 2, 2]), "invalid strides"),
    (("architecture num_classes", 10**400), "it has a number beyond 4.6e+18"),
    (("architecture num_classes", 0), "invalid num_classes"),
    (("architecture in_chans", 4), "it has preprocessing to 3 channels for a network"),
    (("class_names", ["a"]), "damaged: it has 1 class names for 1000 classes"),
    (("weights spec", "a\x1b[2J"), "control characters"),
    (("checks", {"x": "\ud800"}), "unpaired surrogate"),
]


def test_graphs_and_classes_that_artifacts_do_not_have_are_refused(
    digits_bundle: Bundle, copy_bundle: Copy
) -> None:
    logits = "artifacts fp32 graph outputs logits shape"
    for keys, value, message in (
        ("class_names", [*"9876543210"], "has other class names than those 'fp32' was made with"),
        (logits, ["batch", 11], "has 10 classes; the logits of 'fp32' have 11"),
        ("artifacts fp32 graph inputs", {}, "graph 'fp32' without outputs or with no single input"),
        ("artifacts fp32 graph outputs", {}, "graph 'fp32' without outputs"),
    ):
        path = copy_bundle(digits_bundle, f"{keys}{value}")
        edit_json(path / MANIFEST, keys, value)
        with pytest.raises(BundleError, match=message):
            Bundle.open(path)


TEXTS = [
    *((text, "is damaged: ") for text in ("", "{", "[]", "null", '"x"', "\x00")),
    (f'{{"schema": "{SCHEMA}", "artifacts": 2}}', "is damaged: "),
    (f'{{"schema": "{SCHEMA}"}}', "is damaged: 'name' is missing."),
    ('{"name": "a", "name": "b"}', "damaged: it has the key 'name' twice"),
    *(
        (text, "is nested more than 40 deep")
        for text in ("[" * 200_000, "[" * 42 + "]" * 42, '{"a": [' * 30 + "1" + "]}" * 30)
    ),
    ("[" * 41 + "]" * 41, "it should be a table"),
    ("\udcff", "it is not UTF-8"),
    (" " * (64 * 2**20 + 1), "it has more than 67,108,864 bytes"),
    ('{"schema": "van-deploy/bundle/10"}', "A newer van-deploy wrote it: upgrade"),
    ('{"schema": "bundle"}', "Create the bundle again in another folder"),
    ('{"schema": "van-deploy/bundle/1"}', f"this version reads '{SCHEMA}'.\nCreate the bundle"),
]


@each(("change", "message"), [*VALUES, *TEXTS], fresh="bundle")
def test_invalid_manifests_are_refused(
    bundle: Path, change: str | tuple[str, object], message: str
) -> None:
    if isinstance(change, str):
        (bundle / MANIFEST).write_bytes(change.encode(errors="surrogateescape"))
    else:
        edit_json(bundle / MANIFEST, *change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert message in str(caught.value)


def test_only_changes_are_written(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Bundle.open(bundle).manifest
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for checks in dict[str, Any](), {"verify": {"passed": True}}:
        with edit_bundle(bundle) as draft:
            draft.checks |= checks
        after = Bundle.open(bundle).manifest
        date = "2023-11-14T22:13:20+00:00" if checks else before.written
        assert after == before.model_copy(update={"written": date, "checks": checks})
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
    names = [f"a{i}" for i in range(6)]
    with ProcessPoolExecutor(6, multiprocessing.get_context("fork")) as pool:
        list(pool.map(put, [bundle] * 6, names, names))
    opened = Bundle.open(bundle)
    assert set(opened.artifacts) == {"fp32", *names}
    assert opened.problems() == []


# --- untrusted folders --------------------------------------------------------------------------


GONE = ".pending/.gone"  # names of the files that an interrupted commit removes


@each(
    ("file", "content", "message"),
    [
        (".pending/engines/mine", "theirs", r"engines' is a link"),
        (GONE, '["engines/mine"]', r"engines' is a link"),
        (".pending", lambda path: path.symlink_to("engines"), r"\.pending' is a link"),
        *((GONE, text, "interrupted comm.*damaged") for text in ("", "{", "3", "null")),
        (GONE, '["sub"]', "do not fit the bundle: .*Is a directory"),
        (GONE, '["fp32.onnx/x"]', "do not fit the bundle: .*Not a directory"),
        (GONE, json.dumps(["a" * 300]), "is not a file name"),
        (GONE, '["a\\nb"]', "is not a file name"),
        (".pending/sub", "a file where a folder is", r"\.pending' do not fit the bundle"),
        *((name, os.mkfifo, "damaged: .*not a regular file") for name in (MANIFEST, GONE)),
        (MANIFEST, Path.mkdir, "Is a directory"),
    ],
    fresh="bundle",
)
def test_links_and_pipes_in_a_bundle_are_refused(
    bundle: Path, tmp_path: Path, file: str, content: Any, message: str
) -> None:
    outside, path = tmp_path / "home", bundle / file
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (bundle / "engines").symlink_to(outside)
    (bundle / "sub").mkdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        content(path)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)
    assert (outside / "mine").read_text() == "mine"


def test_invalid_locks_are_reported(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.bundle.folder.LOCK_WAIT_S", 0.1)
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
    with pytest.raises(IsADirectoryError):
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
        with suppress(ZeroDivisionError), edit_bundle(folder, name="m"):
            begun.set()
            time.sleep(0.3)
            raise ZeroDivisionError

    first = threading.Thread(target=fails)
    first.start()
    begun.wait(10)
    put(folder, "fp32", "weights")
    first.join()
    assert Bundle.open(folder).verified_path("fp32").read_text() == "weights"


# --- external weights of a graph ---------------------------------------------------------------

WEIGHT_VALUES = np.arange(12, dtype=np.float32)


def graph_with(location: str, where: str) -> ModelProto:
    """Return a graph with an external initializer, constant, or constant in a branch."""
    tensor = numpy_helper.from_array(WEIGHT_VALUES, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    initializers, nodes = [tensor], []
    if where != "initializer":
        initializers, nodes = [], [helper.make_node("Constant", [], ["w"], value=tensor)]
    if where == "branch":
        result = helper.make_tensor_value_info("w", TensorProto.FLOAT, [12])
        branch = helper.make_graph(nodes, "branch", [], [result])
        initializers = [numpy_helper.from_array(np.array(True), "yes")]
        nodes = [helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 12]) for n in "xy")
    nodes.append(helper.make_node("Add", ["x", "w"], ["y"]))
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_external_files_are_found_at_any_depth(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    for where in ("initializer", "constant", "branch"):
        model = graph_with("there.bin", where)
        assert external_files_in(model) == ("there.bin",)
        file.write_bytes(model.SerializeToString())
        assert external_files(file) == ("there.bin",)
    for content in (b"", b"no graph", b"no graph, with a location"):
        file.write_bytes(content)
        assert external_files(file) == ()


@each(
    ("location", "message"),
    [
        *((name, "outside its") for name in ("/etc/passwd", "../outside.bin", "..\\x", "a\x00b")),
        *((name, "a link or in a linked") for name in ("link.bin", "up/outside.bin")),
        *((name, "not a file in its folder") for name in ("pipe.bin", "")),
    ],
)
def test_weights_outside_the_folder_are_refused(
    location: str, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(WEIGHT_VALUES.tobytes())
    (folder / "link.bin").symlink_to("../outside.bin")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.bin")
    (folder / "m.onnx").write_bytes(graph_with(location, "initializer").SerializeToString())
    with pytest.raises(InputError, match=message):
        has_external_weights(folder / "m.onnx", BuildOptions())


@pytest.mark.parametrize("kind", ["onnx", "serving"])
def test_external_weights_must_be_in_the_manifest(tmp_path: Path, kind: str) -> None:
    folder, model = tmp_path / "b", graph_with("w.bin", "constant")
    for files in (["m.onnx", "w.bin"], ["m.onnx"]):
        with edit_bundle(folder, name="m") as draft:
            draft.file("m.onnx").write_bytes(model.SerializeToString())
            draft.file("w.bin").write_bytes(WEIGHT_VALUES.tobytes())
            draft.description = network_info()
            draft.record(artifact_entry("fp32", kind, "fp32", "m.onnx", files))
        if "w.bin" in files:
            assert onnx.load(Bundle.open(folder).verified_path("fp32")).graph.node
    with pytest.raises(InputError, match=r"'w\.bin', which is not in the manifest"):
        Bundle.open(folder).verified_path("fp32")
