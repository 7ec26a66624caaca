"""The sidecar and what it protects from: swapped, damaged and edited files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.each import each
from van_deploy.config import BuildOptions
from van_deploy.engine.sidecar import (
    SCHEMA,
    Sidecar,
    Tensor,
    log_path,
    read_sidecar,
    sidecar_path,
    verified_sidecar,
    write_sidecar,
)
from van_deploy.errors import InputError
from van_deploy.files import file_sha256
from van_deploy.model.preprocess import OFFICIAL


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "van_b0-fp16-sm89-rtx1.7.1.plan"
    path.write_bytes(b"stands for a plan: nothing here loads it")
    write_sidecar(path, sidecar_for(path))
    return path


def sidecar_for(plan: Path) -> Sidecar:
    return Sidecar(
        schema=SCHEMA,
        name=plan.name.removesuffix(".plan"),
        plan_sha256=file_sha256(plan),
        plan_bytes=plan.stat().st_size,
        onnx_file="model.fp16.onnx",
        onnx_sha256="0" * 64,
        backend="tensorrt-rtx",
        backend_version="1.7.1.116",
        cuda=13,
        precision="fp16",
        targets=("sm_89",),
        built_on=None,
        options=BuildOptions(targets=("sm_89",)),
        inputs=(Tensor(name="images", shape=(-1, 3, 224, 224), dtype="float"),),
        outputs=(Tensor(name="logits", shape=(-1, 1000), dtype="float"),),
        parser_layers=213,
        parse_seconds=0.1,
        build_seconds=1.0,
        peak_memory_bytes=1 << 28,
        workspace_bytes=1 << 30,
        device_memory={"weights_bytes": 1},
        warnings={"odd": 2},
        fixed_addresses=True,
        reproducible=True,
        preprocessing=OFFICIAL,
    )


def test_names_with_dots_keep_their_stem(plan: Path) -> None:
    assert sidecar_path(plan).name == "van_b0-fp16-sm89-rtx1.7.1.json"
    assert log_path(plan).name == "van_b0-fp16-sm89-rtx1.7.1.log"


def test_it_reads_what_it_wrote(plan: Path) -> None:
    written = sidecar_for(plan)
    read = verified_sidecar(plan)
    assert read == written.model_copy(update={"sidecar_sha256": written.digest()})


def test_a_plan_without_a_sidecar(plan: Path) -> None:
    sidecar_path(plan).unlink()
    with pytest.raises(InputError, match="has no sidecar") as caught:
        verified_sidecar(plan)
    assert "trust_engine=True" in caught.value.remedy
    assert caught.value.exit_code == 5


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no engine"):
        verified_sidecar(tmp_path / "none.plan")


def test_a_damaged_plan(plan: Path) -> None:
    data = bytearray(plan.read_bytes())
    data[3] ^= 1
    plan.write_bytes(data)
    with pytest.raises(InputError, match=r"is not the plan its sidecar speaks of: its SHA-256"):
        verified_sidecar(plan)


def test_a_swapped_plan(plan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.plan"
    other.write_bytes(b"another plan")
    write_sidecar(other, sidecar_for(other))
    other.replace(plan)
    with pytest.raises(InputError, match="damaged or swapped"):
        verified_sidecar(plan)


@pytest.mark.parametrize(
    ("key", "value"), [("targets", ["sm_90"]), ("plan_sha256", "0" * 64), ("cuda", 12)]
)
def test_an_edited_sidecar(plan: Path, key: str, value: object) -> None:
    path = sidecar_path(plan)
    document = json.loads(path.read_text())
    document[key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="was edited after it was written"):
        read_sidecar(plan)


@each("text", ["", "[]", "{}", '{"schema": "van-deploy/engine/2"}', "\xff"])
def test_a_damaged_sidecar(plan: Path, text: str) -> None:
    sidecar_path(plan).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="is damaged"):
        read_sidecar(plan)


def test_a_sidecar_of_another_schema(plan: Path) -> None:
    path = sidecar_path(plan)
    path.write_text(path.read_text().replace("engine/2", "engine/1"))
    with pytest.raises(InputError, match="has schema 'van-deploy/engine/1'"):
        read_sidecar(plan)
