"""The sidecar and what it protects from; and what is told of an engine without running it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.each import each
from tests.engine.conftest import Plan
from van_deploy.engine.host import host_here
from van_deploy.engine.inspect import Layer, layers_from_json
from van_deploy.engine.sidecar import log_path, sidecar_path, verified_sidecar
from van_deploy.errors import InputError

Spoil = Callable[[Path], object]


def edited(key: str, value: object) -> Spoil:
    def edit(plan: Path) -> None:
        document = json.loads(sidecar_path(plan).read_text())
        document[key] = value
        sidecar_path(plan).write_text(json.dumps(document))

    return edit


def written(text: str) -> Spoil:
    return lambda plan: sidecar_path(plan).write_text(text, encoding="latin-1")


def test_it_reads_what_it_wrote_under_a_name_with_dots(plan: Plan) -> None:
    assert sidecar_path(plan.path).name == "van_digits-fp32-sm89-rtx1.7.1.json"
    assert log_path(plan.path).name == "van_digits-fp32-sm89-rtx1.7.1.log"
    read = verified_sidecar(plan.path)
    assert read == plan.sidecar
    assert read.sidecar_sha256 == read.digest()


@each(
    ("spoil", "message"),
    [
        (lambda plan: sidecar_path(plan).unlink(), "has no sidecar"),
        (Path.unlink, "There is no engine"),
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), "damaged or swapped"),
        (lambda plan: plan.write_bytes(b"another plan"), "is not the plan its sidecar speaks of"),
        (edited("targets", ["sm_90"]), "was edited after it was written"),
        (edited("plan_sha256", "0" * 64), "was edited after it was written"),
        (edited("cuda", 12), "was edited after it was written"),
        (edited("schema", "van-deploy/engine/1"), "has schema 'van-deploy/engine/1'"),
        *((written(text), "is damaged") for text in ("", "[]", "{}", "\xff")),
        (written('{"schema": "van-deploy/engine/2"}'), "is damaged"),
    ],
)
def test_what_is_not_vouched_for(plan: Plan, tmp_path: Path, spoil: Spoil, message: str) -> None:
    copy = shutil.copytree(plan.path.parent, tmp_path / "copy") / plan.path.name
    spoil(copy)
    with pytest.raises(InputError, match=message) as caught:
        verified_sidecar(copy)
    assert "no sidecar" not in message or "trust_engine=True" in caught.value.remedy
    assert caught.value.exit_code == 5


def test_inspect_tells_what_sidecar_and_log_know(cli: Cli, plan: Plan) -> None:
    if host_here().gpu:
        pytest.skip("this machine has a GPU, on which the plan may load")
    sidecar, text = plan.sidecar, " ".join(cli("inspect", plan.path).stdout.split())
    for words in (
        f"sha256 {sidecar.plan_sha256}",
        f"backend tensorrt-rtx version {sidecar.backend_version}",
        "GPUs sm_89",
        "input images float N 3 32 32",
        "output logits float N 10",
        f"parser's layers {sidecar.parser_layers}",
        "this machine has no NVIDIA GPU that answers",
        "SKIPPED layers: only the engine's own GPU can load it",
        f"After dead-layer removal: {sidecar.parser_layers} layers",
        "Total Weights Memory",
    ):
        assert words in text, words
    (document,) = json.loads(cli("inspect", plan.path, "--json").stdout)
    assert document["plan_sha256"] == sidecar.plan_sha256
    assert document["plan_is_sound"] is True
    assert document["layers"] == []
    assert document["layers_skipped"].endswith("this machine has no NVIDIA GPU that answers")
    assert document["sidecar"]["inputs"] == [
        {"name": "images", "shape": [-1, 3, 32, 32], "dtype": "float"}
    ]


def test_trust_is_for_a_plan_without_a_sidecar_only(cli: Cli, plan: Plan, tmp_path: Path) -> None:
    copy = Path(shutil.copy(plan.path, tmp_path))
    refused = cli("inspect", copy)
    assert refused.exit_code == 5
    assert "has no sidecar" in refused.stderr
    assert "--trust-engine" in refused.stderr
    trusted = cli("inspect", copy, "--trust-engine")
    assert trusted.exit_code == 0
    assert "nothing says where this plan comes from" in trusted.stdout
    assert plan.sidecar.plan_sha256 in trusted.stdout
    shutil.copy(sidecar_path(plan.path), tmp_path)
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    swapped = cli("inspect", copy, "--trust-engine")
    assert (swapped.exit_code, swapped.stdout) == (5, "")
    assert "SHA-256" in swapped.stderr


def test_layers_of_any_version() -> None:
    name = "stem.proj + stem.act"
    fused = {
        "Name": name,
        "LayerType": "gemm",
        "Outputs": [{"Name": "x", "Format/Datatype": "Half"}],
        "Metadata": "[ONNX Layer: stem.proj][ONNX Layer: stem.act]",
    }
    new = {"Name": "new", "Outputs": [{"Datatype": "FP8"}]}
    layers = layers_from_json(json.dumps({"Layers": ["plain", fused, new, {"Name": "bare"}]}))
    assert layers == (
        Layer("plain", "", "", ()),
        Layer(name, "gemm", "Half", ("stem.proj", "stem.act")),
        Layer("new", "", "FP8", ()),
        Layer("bare", "", "", ()),
    )
    assert layers_from_json("{}") == ()
