"""Metadata of checkpoints: every field is used, or is an error that names it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.each import each
from van_deploy.errors import CheckpointError
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.files import WeightsFile
from van_deploy.model.keys import Checkpoint
from van_deploy.model.metadata import read_metadata
from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VanConfig

NAMES = ["ant", "bee", "cat", "dog", "emu"]
INDEX = {name: index for index, name in enumerate(NAMES)}
OVERRIDES = {"image_size": 64, "mean": 0.5, "std": 0.5, "interpolation": "bicubic", "crop_pct": 1.0}

Load = Callable[..., LoadedVan]
Content = dict[str, Any]


@pytest.fixture
def load(tmp_path: Path, tiny: VAN) -> Load:
    """Return a function that loads the tiny network with metadata in and beside its file."""

    def load(
        *,
        config: object = None,
        processor: object = None,
        overrides: Content | None = None,
        **inside: Any,
    ) -> LoadedVan:
        torch.save({"state_dict": tiny.state_dict(), **inside}, tmp_path / "w.pth")
        for name, value in (("config.json", config), ("preprocessor_config.json", processor)):
            (tmp_path / name).unlink(missing_ok=True)
            if value is not None:
                (tmp_path / name).write_text(json.dumps(value))
        return load_van(str(tmp_path), preprocessing=overrides)

    return load


def args(**arguments: Any) -> Content:
    return {"args": arguments}


def hf(**fields: Any) -> Content:
    return {"config": {"model_type": "van", **fields}}


def timm(**fields: Any) -> Content:
    return {"config": {"architecture": "van_x", **fields}}


def cfg(**fields: Any) -> Content:
    return timm(pretrained_cfg=fields)


def processor(kind: str | None = None, **fields: Any) -> Content:
    usual = {"size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    type_field = {"image_processor_type": f"{kind}ImageProcessor"} if kind else {}
    return {"processor": {**usual, **type_field, **fields}}


def pipeline(*steps: str, model: str = "dict()") -> Content:
    return {"meta": {"cfg": f"model = {model}\ntest_pipeline = [{', '.join(steps)}]"}}


def load_error(load: Load, content: Content) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        load(**content)
    return error.value


# --- the network -----------------------------------------------------------------------------


@each(
    ("content", "message"),
    [
        (hf(strides=[4, 2, 2]), "strides is (4, 2, 2); this network needs four numbers"),
        (hf(strides=[4, 2, 0, 2]), "strides is (4, 2, 0, 2); this network needs four numbers"),
        (hf(hidden_act="relu"), "hidden_act is 'relu'; this network needs gelu or gelu_python"),
        (hf(layer_norm_eps=0), "layer_norm_eps is 0; this network needs between 0 and 1"),
        (hf(layer_norm_eps=1.0), "layer_norm_eps is 1.0; this"),
        (hf(problem_type="ranking"), "problem_type is 'ranking'; this"),
        (hf(model_type="vit"), "model_type is 'vit'; this network needs van"),
        (hf(hidden_sizes=[8, 12, 16, 32]), "hidden_sizes is (8, 12, 16, 32); this"),
        (hf(depths=[1, 1, 1, 1]), "depths is (1, 1, 1, 1); this network needs (1, 2, 1, 1)"),
        (hf(num_channels=4), "num_channels is 4; this network needs 3"),
        (hf(dilation=4), "dilation is 4; this network needs 3"),
        (timm(architecture="van_b0"), "architecture is 'van_b0'; this network needs None"),
        (timm(num_classes=7), "num_classes is 7; this network needs 5"),
        (timm(num_features=7), "num_features is 7; this network needs 24"),
        (timm(model_args={"depths": [1, 1, 1, 1]}), "depths is (1, 1, 1, 1); this"),
        (timm(model_args={"act_layer": "relu"}), "unsupported keys: act_layer"),
        (cfg(input_size=[1, 64, 64]), "in_chans is 1; this network needs 3"),
        (cfg(pad_mode="edge"), "unsupported keys: pad_mode"),
        (hf(model_args=[1]), "model_args is [1]; this network needs a table"),
        (hf(pretrained_cfg="a"), "pretrained_cfg is 'a'; this network needs a table"),
        (hf(input_size=5), "in_chans is 5; this network needs 3"),
        (args(bn_eps=1e-3), "bn_eps is 0.001; this"),
        (args(gp="max"), "gp is 'max'; this network needs avg or fast or"),
        (args(model_kwargs={"a": 1}), "model_kwargs is {'a': 1}; this"),
        (pipeline(model="dict(backbone=dict(block_cfgs=dict(a=1)))"), "block_cfgs is {'a': 1}"),
        (pipeline(model="dict(backbone=[1])"), "backbone is [1]; this network needs a table"),
        (pipeline(model="dict(backbone=dict(norm_cfg=dict(eps=-1.0)))"), "eps is -1.0; this"),
        (pipeline(model="dict(backbone=dict(norm_cfg=dict(eps='x')))"), "eps is 'x'; this"),
    ],
)
def test_contradictory_metadata(load: Load, content: Content, message: str) -> None:
    error = load_error(load, content)
    assert all(part in error.message for part in message.split("; "))
    assert ("config.json beside the weights" in error.message) == ("config" in content)
    assert "move the weights out of its folder" in error.remedy or "config" not in content


def test_valid_metadata(load: Load, tiny_config: VanConfig) -> None:
    tensors = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "mlp_ratios": [4, 4, 2, 2]}
    more = {"strides": [4, 2, 1, 1], "drop_path_rate": 0.1, "dilation": 3, "se_ratio": 4}
    loaded = load(**hf(**tensors, **more))
    assert loaded.model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (8, 8)
    assert loaded.config == replace(tiny_config, strides=(4, 2, 1, 1))
    assert loaded.config.mac_count(64) > tiny_config.mac_count(64)
    assert loaded.source.notes == (
        "from the config.json beside the weights: strides (4, 2, 1, 1)",
        "unknown keys in the config.json beside the weights: se_ratio",
    )
    stated = {"input_size": [3, 64, 64], "num_classes": 1000, "tag": "in1k", "pad_mode": None}
    timms = {"num_classes": 5, "num_features": 24, "global_pool": "avg", "pretrained_cfg": stated}
    loaded = load(**timm(model_args={"drop_rate": 0.1, "img_size": 64}, **timms))
    assert loaded.config == tiny_config
    (note,) = load(config={"compilerOptions": {}}).source.notes
    assert "the config.json beside the weights does not describe a network" in note
    arguments = {"gp": "avg", "bn_eps": 1e-5, "bn_tf": False, "model_kwargs": {}, "num_classes": 9}
    loaded = load(args={**arguments, "bce_loss": True, "class_map": "map.txt"})
    assert [note[:20] for note in loaded.source.notes] == [
        "trained with --bce-l",
        "trained with --class",
    ]


@each("key", ["cfg", "config"])
def test_problem_type_and_mmpretrain_config(load: Load, key: str) -> None:
    kind = "multi_label_classification"
    assert load().config.problem_type == "single_label_classification"
    assert load(**hf(problem_type=kind)).config.problem_type == kind
    text = "model = dict(head=dict(type='MultiLabelLinearClsHead'))"
    assert load(meta={key: text}).config.problem_type == kind
    text = "model = dict(backbone=dict(type='VAN', norm_cfg=dict(type='LN', eps=1e-3)))"
    assert load(meta={key: text}).config.layer_norm_eps == 1e-3


# --- the preprocessing -----------------------------------------------------------------------

MMCLS = """
img_norm_cfg = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
model = dict(backbone=dict(type='VAN'))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', size=(73, -1), backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='Normalize', mean=[127.5, 127.5, 127.5], std=[63.75, 63.75, 63.75], to_rgb=True),
    dict(type='Collect', keys=['img'])
]"""


@each(
    ("content", "text"),
    [
        (args(img_size=96), "96x96 bicubic, crop 0.9, mean 0.5"),
        ({"hyper_parameters": {"img_size": 96}}, "96x96 bicubic, crop 0.9, mean 0.5"),
        (args(img_size=96, input_size=[3, 64, 64]), "64x64 bicubic, crop 0.9"),
        (args(input_size=[3, 224, 320]), "224x320 bicubic, crop 0.9"),
        (args(mean=[0.4], crop_mode="squash"), "224x224 bicubic, crop 0.9, squash, mean 0.4/0.4"),
        (args(crop_mode="border", crop_pct=1.0), "224x224 bicubic, crop 1, border"),
        (args(val_crop_size=224, val_resize_size=232), "224x224 bicubic, crop 0.965517"),
        (processor(), "64x64 bicubic, crop 0.875, mean 0.5"),
        (processor(size={"shortest_edge": 384}), "384x384 bicubic, crop 1, squash,"),
        (processor(size=383), "383x383 bicubic, crop 0.875,"),
        ({"processor": {"feature_extractor_type": "ConvNextFeatureExtractor"}}, "384x384 bilinear"),
        (processor("ViT"), "64x64 bicubic, crop 1, squash"),
        (processor("Bit", size=72, crop_size=64), "64x64 bicubic, resize 72,"),
        (processor(do_normalize=False), "64x64 bicubic, crop 0.875, mean 0/0/0, std 1/1/1"),
        (processor(do_center_crop=None, crop_size=None), "64x64 bicubic"),
        (cfg(input_size=[3, 64, 64], crop_pct=1.0), "64x64 bicubic, crop 1, mean 0.485/"),
        (timm(input_size=[3, 64, 64], crop_pct=1.0), "64x64 bicubic, crop 1, mean 0.485/"),
        (cfg(interpolation="bilinear", mean=[0.1] * 3), "224x224 bilinear, crop 0.875, mean 0.1"),
        (hf(image_size=96), "96x96 bicubic, crop 0.9, mean 0.5"),
        (
            {"meta": {"config": MMCLS}},
            "64x64 bicubic, crop 0.876712, mean 0.5/0.5/0.5, std 0.25/0.25",
        ),
    ],
)
def test_preprocessing_sources(load: Load, content: Content, text: str) -> None:
    actual = load(**content).preprocessing
    assert str(actual).startswith(text)
    places = {"processor": "the preprocessor_config.json beside", "config": "the config.json"}
    places["meta"] = "the checkpoint's own configuration"
    (kind,) = content
    assert actual.source.startswith(places.get(kind, "the checkpoint's own training arguments"))


@each(
    ("content", "message"),
    [
        (args(input_size=[3, 64, 96, 9]), "image_size [64, 96, 9]: Input should be a valid int"),
        (args(interpolation="random"), "interpolation 'random': Input should be 'nearest'"),
        (args(mean=[0.5, 0.5]), "The mean has 2 values for 3 channels."),
        (args(std=0), "std 0: Input should be greater than 0"),
        (args(val_crop_size=64, val_resize_size=32), "has image_size 64 > resize_size 32"),
        (args(val_crop_size=64, backend="tensor"), "backend is 'tensor'"),
        (cfg(crop_border_pixels=1), "crop_border_pixels is 1, not sup"),
        (cfg(label_offset=1), "label_offset is 1, not sup"),
        (pipeline("dict(type='ResizeEdge', scale=73)"), "ResizeEdge"),
        (pipeline("dict(type='Rotate')"), "a step of the test pipeline is 'Rotate'"),
        (pipeline("dict(type='ResizeEdge', edge='long', backend='pillow')"), "ResizeEdge"),
        (pipeline("dict(type='CenterCrop', crop_size=64)"), "the resized side is None"),
        (pipeline("dict(type='Normalize', mean=[1, 1, 1], to_rgb=False)"), "takes BGR"),
        (processor("Segformer"), "but these are supported: "),
        (processor(do_flip_channel_order=True), "do_flip_channel_order is True, an unknown key"),
        (processor(size={"height": 64, "width": 64}), "not shortest_edge"),
        (processor("ViT", size={"shortest_edge": 64}), "not height"),
        (processor(size=[64, 32]), "only squares are supported"),
        (processor("ViT", do_center_crop=True), "do_center_crop is"),
        (processor("Bit", do_center_crop=False), "do_center_crop"),
        (processor("Bit"), "has image_size 224 > resize_size 64"),
        (processor(size=0), "image_size 0"),
        (processor(size="big"), "cannot be used"),
        (processor(resample=77), "resample is 77, not a filter of Pillow"),
        (processor(do_resize=False), "do_resize is False"),
        (processor(rescale_factor=1.0), "rescale_factor is 1.0, not 1/255"),
        (processor(crop_pct=2), "crop_pct is 2, not in (0, 1]"),
    ],
)
def test_unsupported_preprocessing(load: Load, content: Content, message: str) -> None:
    error = load_error(load, content)
    assert message in error.message
    assert "--image-size --mean --std" in error.remedy
    assert load(**content, overrides=OVERRIDES).preprocessing.image_size == 64


def nested_lists(levels: int) -> Any:
    """Return 2**levels nested strings that share their memory, as a pickle can contain."""
    value: Any = ("x",)
    for _ in range(levels):
        value = (value, value)
    return value


@each("name", ["img_size", "input_size", "mean", "std", "crop_pct", "classes", "gp"])
def test_exponentially_nested_lists(tiny_config: VanConfig, name: str) -> None:
    start, file = time.monotonic(), WeightsFile("van", Path(), "", {})
    for inside in ({name: nested_lists(60)}, {"preprocessing": {name: nested_lists(60)}}):
        if name not in ("classes", "gp") or name in inside:
            with pytest.raises(CheckpointError):
                read_metadata(tiny_config, Checkpoint({}, "official", "", inside, ()), file, {})
    assert time.monotonic() - start < 10


def test_unused_sources_are_listed(load: Load) -> None:
    loaded = load(args={"img_size": 96}, **processor())
    assert loaded.preprocessing.image_size == 96
    (note,) = loaded.source.notes
    assert note.endswith("; not from the preprocessor_config.json beside the weights")


# --- the classes -----------------------------------------------------------------------------


@each(
    ("inside", "names"),
    [
        ({"class_to_idx": dict(reversed(INDEX.items()))}, NAMES),
        ({"idx_to_class": dict(enumerate(NAMES))}, NAMES),
        ({"classes": NAMES, "class_to_idx": INDEX}, NAMES),
        ({"hyper_parameters": {"class_names": tuple(NAMES)}}, NAMES),
        ({"meta": {"dataset_meta": {"classes": NAMES}}}, NAMES),
        (hf(id2label=dict(enumerate(NAMES))), NAMES),
        (timm(label_names=NAMES), NAMES),
        (cfg(label_names=NAMES), NAMES),
        (hf(id2label={i: f"LABEL_{i}" for i in range(5)}), None),
        ({"classes": 5, "class_names": None}, None),
        ({"classes": [1, 2, 3, 4, 5]}, list("12345")),
    ],
)
def test_class_names(load: Load, inside: Content, names: list[str] | None) -> None:
    loaded = load(**inside)
    assert loaded.class_names == (tuple(names) if names else None)
    assert any(note.startswith("class names from ") for note in loaded.source.notes) == bool(names)


@each(
    ("inside", "message"),
    [
        (
            {"classes": NAMES[:4]},
            "classes in the file has 4 entries; the network has 5 classes",
        ),
        ({"classes": [*NAMES[:4], None]}, "classes in the file has 5 entries"),
        ({"class_to_idx": {"a": 0, "b": 2}}, "class_to_idx in the file has 2 entries"),
        (
            {"classes": NAMES, "class_to_idx": {name: 4 - i for name, i in INDEX.items()}},
            "Class 0 is 'emu' in class_to_idx in the file, but 'ant' in classes in the file.",
        ),
        (
            {"meta": {"classes": NAMES[::-1]}, **timm(label_names=NAMES)},
            "Class 0 is 'emu' in classes in the file's meta, but 'ant' in label_names in config.",
        ),
    ],
)
def test_contradictory_class_names(load: Load, inside: Content, message: str) -> None:
    error = load_error(load, inside)
    assert message in error.message
    assert "--labels FILE" in error.remedy


def test_class_name_of_one_logit(tmp_path: Path, tiny_config: VanConfig) -> None:
    state = random_van(replace(tiny_config, num_classes=1), seed=1).state_dict()
    torch.save({"state_dict": state, "classes": ["cat", "dog"]}, tmp_path / "w.pth")
    loaded = load_van(str(tmp_path / "w.pth"))
    assert (loaded.config.num_classes, loaded.class_names) == (1, ("dog",))
    note = "one logit: it is unknown whether of two classes or of a regression"
    assert note in loaded.source.notes
