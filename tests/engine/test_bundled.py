"""Engines in a bundle: entered, reused, rebuilt, dropped with what they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.described import entry
from tests.engine.conftest import BundleMaker
from van_deploy.bundle import Bundle, Origin, writing
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.engine.backend import Backend
from van_deploy.engine.build import BuildProgress
from van_deploy.engine.bundled import Built, build_in_bundle, request_for
from van_deploy.engine.host import Host
from van_deploy.engine.inspect import describe_engine, layers_from_json
from van_deploy.errors import BundleError, InputError

SM89 = BuildOptions(targets=("sm_89",), profiles=(BatchRange(1, 2, 4),))


def built(folder: Path, rtx: Backend, options: BuildOptions = SM89, **more: Any) -> Built:
    request = request_for(Bundle.open(folder), "fp32", rtx, options, Host())
    return build_in_bundle(request, rtx, options, host=Host(), **more)


def test_an_engine_in_its_bundle(rtx: Backend, new_bundle: BundleMaker) -> None:
    folder = new_bundle("van_digits")
    made = built(folder, rtx)
    bundle = Bundle.open(folder)
    artefact = bundle.artefact(made.name)
    assert made.name == f"van_digits-fp32-sm89-rtx{rtx.release}"
    assert (artefact.kind, artefact.precision) == ("engine", "fp32")
    assert artefact.made_from == Origin(name="fp32", sha256=bundle.artefact("fp32").sha256)
    assert sorted(Path(file).suffix for file in artefact.files) == [".json", ".log", ".plan"]
    assert bundle.problems() == []
    assert bundle.verified(made.name) == made.path
    assert made.sidecar.preprocessing == bundle.manifest.preprocessing
    assert made.sidecar.reproducible is None

    again = built(folder, rtx)
    assert (again.reused, again.sidecar) == (True, made.sidecar)
    checked = built(folder, rtx, check_reproducible=True)
    assert not checked.reused
    assert checked.sidecar.reproducible in {True, False}
    assert built(folder, rtx, check_reproducible=True).reused
    assert not built(folder, rtx, SM89.changed(tf32=False)).reused
    assert len([a for a in Bundle.open(folder).artefacts.values() if a.kind == "engine"]) == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "engines",
        "manifest.json",
        "model.onnx",
    ]


def test_a_damaged_engine_is_built_again(rtx: Backend, new_bundle: BundleMaker) -> None:
    folder = new_bundle("van_digits")
    made = built(folder, rtx)
    made.path.write_bytes(made.path.read_bytes()[:-1])
    assert not built(folder, rtx).reused
    assert Bundle.open(folder).problems() == []


def test_a_source_replaced_meanwhile(
    rtx: Backend, new_bundle: BundleMaker, digits_onnx: Path
) -> None:
    folder = new_bundle("van_digits")
    request = request_for(Bundle.open(folder), "fp32", rtx, SM89, Host())
    replaced: list[BuildProgress] = []

    def replace_source(event: BuildProgress) -> None:
        if not replaced:
            replaced.append(event)
            with writing(folder) as draft:
                draft.file("model.onnx").write_bytes(digits_onnx.read_bytes() + b"\n")
                draft.record(entry("fp32", "onnx", "fp32", "model.onnx"))

    with pytest.raises(BundleError, match="was replaced while"):
        build_in_bundle(request, rtx, SM89, host=Host(), progress=replace_source)
    assert not (folder / "engines").exists()


def test_a_precision_that_is_not_there(rtx: Backend, new_bundle: BundleMaker) -> None:
    folder = new_bundle("van_digits")
    with pytest.raises(BundleError) as caught:
        request_for(Bundle.open(folder), "fp16", rtx, SM89, Host())
    assert caught.value.remedy == f"Make it with `van-deploy quantize {folder} --precision fp16`."


def test_an_engine_is_no_source(rtx: Backend, new_bundle: BundleMaker) -> None:
    folder = new_bundle("van_digits")
    made = built(folder, rtx)
    with pytest.raises(InputError, match="is of kind 'engine'"):
        request_for(Bundle.open(folder), made.name, rtx, SM89, Host())


def test_a_description_of_an_engine(rtx: Backend, new_bundle: BundleMaker) -> None:
    made = built(new_bundle("van_digits"), rtx)
    found = describe_engine(made.path, Host())
    assert found.obstacles
    assert found.plan_is_sound is True
    assert found.layers == ()
    assert found.layers_skipped.endswith("this machine has no NVIDIA GPU that answers")
    assert found.plan_sha256 == made.sidecar.plan_sha256
    assert any(note.startswith("Total Weights Memory") for note in found.build_notes)


def test_a_description_of_a_damaged_engine(rtx: Backend, new_bundle: BundleMaker) -> None:
    made = built(new_bundle("van_digits"), rtx)
    made.path.write_bytes(b"hello")
    with pytest.raises(InputError, match="damaged or swapped"):
        describe_engine(made.path, Host())


def test_layers_of_both_inspectors() -> None:
    detailed = {
        "Layers": [
            {
                "Name": "block1.0.attn.proj_1 + block1.0.attn.activation",
                "LayerType": "CaskGemmConvolution",
                "Outputs": [{"Name": "x", "Format/Datatype": "Half"}],
                "Metadata": "[ONNX Layer: block1.0.attn.proj_1]"
                "[ONNX Layer: block1.0.attn.activation]",
            },
            "reformat",
            {"Name": "bare"},
        ],
        "I/O Tensors": ["images"],
    }
    first, second, third = layers_from_json(json.dumps(detailed))
    assert (first.kind, first.precision) == ("CaskGemmConvolution", "Half")
    assert first.nodes == ("block1.0.attn.proj_1", "block1.0.attn.activation")
    assert (second.name, second.nodes) == ("reformat", ())
    assert third.kind == ""
    assert layers_from_json("{}") == ()


def test_an_engine_from_a_graph_with_preprocessing(rtx: Backend, new_bundle: BundleMaker) -> None:
    import onnx

    from van_deploy.graph.embed import embed_preprocessing
    from van_deploy.graph.files import graph_facts
    from van_deploy.model.checkpoint import load_van

    folder = new_bundle("van_digits")
    model = onnx.load(folder / "model.onnx")
    preprocessing = load_van("van_digits").preprocessing.override(image_size=32)
    embedded = embed_preprocessing(model, preprocessing, "uint8", ("logits", "top5"))
    with writing(folder) as draft:
        onnx.save(embedded, draft.file("model.uint8.onnx"))
        more: Any = {"graph": graph_facts(embedded), "embedded": "uint8"}
        draft.record(entry("fp32-uint8", "serving", "fp32", "model.uint8.onnx", **more))
    request = request_for(Bundle.open(folder), "fp32-uint8", rtx, SM89, Host())
    made = build_in_bundle(request, rtx, SM89, host=Host())
    artefact = Bundle.open(folder).artefact(made.name)
    assert made.name == f"van_digits-fp32-uint8-sm89-rtx{rtx.release}"
    assert (artefact.precision, artefact.made_from.name) == ("fp32", "fp32-uint8")
    (given,) = made.sidecar.inputs
    assert (given.name, given.shape, given.dtype) == ("pixels", (-1, 32, 32, 3), "uint8")
    assert [output.name for output in made.sidecar.outputs] == [
        *("logits", "top5_classes", "top5_probabilities")
    ]
