"""External weights are read only from the folder of the graph."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.each import each
from tests.manifest_parts import artifact_entry, network_info
from van_deploy.bundle import Bundle, edit_bundle
from van_deploy.config import BuildOptions
from van_deploy.engine.build import has_external_weights
from van_deploy.errors import InputError
from van_deploy.files import external_files, external_files_in

VALUES = np.arange(12, dtype=np.float32)


def graph_with(location: str, where: str) -> ModelProto:
    """Return a graph with an external initializer, constant, or constant in a branch."""
    tensor = numpy_helper.from_array(VALUES, "w")
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


@each("where", ["initializer", "constant", "branch"])
def test_external_files_are_found_at_any_depth(where: str, tmp_path: Path) -> None:
    model = graph_with("there.bin", where)
    assert external_files_in(model) == ("there.bin",)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "m.onnx") == ("there.bin",)


@each("content", [b"", b"no graph", b"no graph, with a location"])
def test_invalid_onnx_has_no_external_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert external_files(tmp_path / "m.onnx") == ()


@each("where", ["initializer", "constant"])
@each(
    ("location", "message"),
    [
        *((name, "which is outside its folder") for name in ("/etc/passwd", "../outside.bin")),
        *((name, "which is outside its folder") for name in ("a/../../x", "..\\x", "a\x00b")),
        *(
            (name, "which is a link or in a linked folder")
            for name in ("link.bin", "up/outside.bin")
        ),
        *((name, "which is not a file in its folder") for name in ("pipe.bin", "")),
    ],
)
def test_weights_outside_the_folder_are_refused(
    location: str, message: str, where: str, tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(VALUES.tobytes())
    (folder / "link.bin").symlink_to("../outside.bin")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.bin")
    (folder / "m.onnx").write_bytes(graph_with(location, where).SerializeToString())
    with pytest.raises(InputError, match=message):
        has_external_weights(folder / "m.onnx", BuildOptions())


def test_external_weights_must_be_in_the_manifest(tmp_path: Path) -> None:
    folder, model = tmp_path / "b", graph_with("w.bin", "constant")
    for files in (["m.onnx", "w.bin"], ["m.onnx"]):
        with edit_bundle(folder, name="m") as draft:
            draft.file("m.onnx").write_bytes(model.SerializeToString())
            draft.file("w.bin").write_bytes(VALUES.tobytes())
            draft.description = network_info()
            draft.record(artifact_entry("fp32", "onnx", "fp32", "m.onnx", files))
        if "w.bin" in files:
            assert onnx.load(Bundle.open(folder).verified_path("fp32")).graph.node
    with pytest.raises(InputError, match=r"'w\.bin', which is not in the manifest"):
        Bundle.open(folder).verified_path("fp32")
