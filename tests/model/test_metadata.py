"""Metadata of checkpoints: every field is used, or is an error that names it."""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.each import each
from tests.errors import error_of
from tests.model.conftest import has_equal_outputs, rename, save_weights
from van_deploy.errors import CheckpointError
from van_deploy.model.checkpoint import LoadedVan, load_van
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

    def load(content: Content, form: str = "official", **options: Any) -> LoadedVan:
        state = rename(tiny.state_dict(), form)
        return load_van(save_weights(tmp_path / "van", state, **content), **options)

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


def pipeline(*steps: str, **tables: str) -> Content:
    lines = [f"{name} = {value}" for name, value in tables.items()]
    return {"meta": {"cfg": "\n".join([*lines, f"test_pipeline = [{', '.join(steps)}]"])}}


# --- the network -----------------------------------------------------------------------------


def test_valid_metadata(load: Load, tiny_config: VanConfig) -> None:
    tensors = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "mlp_ratios": [4, 4, 2, 2]}
    more = {"strides": [4, 2, 1, 1], "drop_path_rate": 0.1, "dilation": 3, "se_ratio": 4}
    loaded = load(hf(**tensors, **more))
    assert loaded.model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (8, 8)
    assert loaded.config == replace(tiny_config, strides=(4, 2, 1, 1))
    assert loaded.config.mac_count(64) > tiny_config.mac_count(64)
    assert loaded.source.notes == (
        "from the config.json beside the weights: strides (4, 2, 1, 1)",
        "unknown keys in the config.json beside the weights: se_ratio",
    )
    stated = {"input_size": [3, 64, 64], "num_classes": 1000, "tag": "in1k", "pad_mode": None}
    timms = {"num_classes": 5, "num_features": 24, "global_pool": "avg", "pretrained_cfg": stated}
    loaded = load(timm(model_args={"drop_rate": 0.1, "img_size": 64}, **timms))
    assert loaded.config == tiny_config
    kind, text = "multi_label_classification", "model = dict(head=dict(type='MultiLabelClsHead'))"
    for content in (hf(problem_type=kind), {"meta": {"cfg": text}}, {"meta": {"config": text}}):
        assert load(content).config == replace(tiny_config, problem_type=kind)
    (note,) = load({"config": {"compilerOptions": {}}}).source.notes
    assert "the config.json beside the weights does not describe a network" in note
    assert load(args(strides=[4, 2, 1, 1])).config == replace(tiny_config, strides=(4, 2, 1, 1))
    assert load({"hparams": {"layer_norm_eps": 1e-5}}).config.layer_norm_eps == 1e-5
    others: Content = {"strides": [8, 16, 32], "layer_norm_eps": "1e-6", "problem_type": "binary"}
    loaded = load(args(**others))  # anchors, a text, another library's
    assert loaded.config == tiny_config
    assert [note.endswith("it is not used") for note in loaded.source.notes] == [True] * 3
    arguments = {"gp": "avg", "bn_eps": 1e-5, "bn_tf": False, "model_kwargs": {}, "num_classes": 9}
    loaded = load(args(**arguments, bce_loss=True, class_map="map.txt"))
    assert [note[:17] for note in loaded.source.notes] == ["trained with --bc", "trained with --cl"]


EPS = "dict(backbone=dict(type='VAN', norm_cfg=dict(type='LN', eps=1e-06)))"


@each(
    ("content", "form", "eps"),
    [
        ({}, "official", 1e-6),
        ({}, "transformers", 1e-6),
        ({}, "mmpretrain", 1e-5),
        (pipeline(model=EPS), "mmpretrain", 1e-6),
    ],
)
def test_layer_norm_eps(load: Load, tiny: VAN, content: Content, form: str, eps: float) -> None:
    loaded = load(content, form)
    assert loaded.config.layer_norm_eps == loaded.model.get_submodule("norm1").eps == eps
    assert len(loaded.source.notes) == (eps == 1e-5)
    assert all("mmpretrain's default 1e-05; the publ" in note for note in loaded.source.notes)
    chosen = load(content, form, layer_norm_eps=1e-6)
    assert has_equal_outputs(chosen.model, tiny)
    assert chosen.source.notes == ()


# --- the preprocessing -----------------------------------------------------------------------

COLOUR = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
ARRAYS = {"mean": np.full(3, 0.1), "std": torch.full((1, 3, 1, 1), 0.2), "args": {"mean": None}}
LOAD, CROP = "dict(type='LoadImageFromFile')", "dict(type='CenterCrop', crop_size=64)"
HALF, QUARTER = "[127.5, 127.5, 127.5]", "[63.75, 63.75, 63.75]"
PREPROCESSOR = f"data_preprocessor=dict(mean={HALF}, std={QUARTER}, to_rgb=True)"
PREPROCESSORS = pipeline(model=f"dict({PREPROCESSOR})", data_preprocessor="dict(mean=[1, 2, 3])")
TABLES = ("hyper_parameters", "datamodule_hyper_parameters", "cfg")
MMCLS = pipeline(
    *(LOAD, "dict(type='Resize', size=(73, -1), backend='pillow', interpolation='bicubic')"),
    *(CROP, f"dict(type='Normalize', mean={HALF}, std={QUARTER})"),  # to RGB by default
    "dict(type='Collect', keys=['img'])",
    img_norm_cfg=f"dict(mean={HALF}, std={HALF}, to_rgb=True)",
)

MMPRETRAIN = pipeline(
    *(LOAD, "dict(type='ResizeEdge', scale=73, backend='pillow', interpolation='bicubic')"),
    *(CROP, "dict(type='PackInputs')"),
    data_preprocessor=f"dict(mean={HALF}, std={QUARTER}, to_rgb=True)",
)


@each(
    ("content", "text"),
    [
        ({"args": argparse.Namespace(img_size=96)}, "96x96 bicubic, crop 0.9, mean 0.5"),
        *(({name: {"image_size": 96}}, "96x96 bicubic, crop 0.9") for name in TABLES),
        (ARRAYS, "224x224 bicubic, crop 0.9, mean 0.1/0.1/0.1, std 0.2/0.2/0.2"),
        (args(img_size=np.int64(96), crop_pct=torch.tensor(0.5)), "96x96 bicubic, crop 0.5"),
        (args(img_size=96, input_size=[3, 64, 64]), "64x64 bicubic, crop 0.9"),
        *((args(input_size=size), "224x320 bicubic") for size in ([3, 224, 320], [224, 320])),
        (args(mean=[0.4], crop_mode="squash"), "224x224 bicubic, crop 0.9, squash, mean 0.4/0.4"),
        (args(crop_mode="border", crop_pct=1.0), "224x224 bicubic, crop 1, border"),
        (args(val_crop_size=224, val_resize_size=232), "224x224 bicubic, crop 0.965517"),
        (processor(size={"shortest_edge": 384}), "384x384 bicubic, crop 1, squash,"),
        (processor(size=383), "383x383 bicubic, crop 0.875,"),
        ({"processor": {"feature_extractor_type": "ConvNextFeatureExtractor"}}, "384x384 bilinear"),
        (processor("ViT"), "64x64 bicubic, crop 1, squash"),
        (processor("Bit", size=72, crop_size=64), "64x64 bicubic, resize 72,"),
        (processor(do_normalize=False), "64x64 bicubic, crop 0.875, mean 0/0/0, std 1/1/1"),
        (processor(do_center_crop=None, crop_size=None), "64x64 bicubic, crop 0.875, mean 0.5"),
        (cfg(input_size=[3, 64, 64], crop_pct=1.0), "64x64 bicubic, crop 1, mean 0.485/"),
        (timm(input_size=[3, 64, 64], crop_pct=1.0), "64x64 bicubic, crop 1, mean 0.485/"),
        (cfg(interpolation="bilinear", mean=[0.1] * 3), "224x224 bilinear, crop 0.875, mean 0.1"),
        (PREPROCESSORS, "224x224 bicubic, crop 0.9, mean 0.5/0.5/0.5, std 0.25/0.25/0.25"),
        (hf(image_size=96), "96x96 bicubic, crop 0.9, mean 0.5"),
        (MMCLS, "64x64 bicubic, crop 0.876712, mean 0.5/0.5/0.5, std 0.25/0.25"),
        (MMPRETRAIN, "64x64 bicubic, crop 0.876712, mean 0.5/0.5/0.5, std 0.25/0.25"),
        ({"mean": [0.1] * 3, "std": 0.2}, "224x224 bicubic, crop 0.9, mean 0.1/0.1/0.1, std 0.2"),
        ({"preprocessing": COLOUR}, "224x224 bicubic, crop 0.9, mean 0.485/0.456/0.406, std 0.229"),
    ],
)
def test_preprocessing_sources(load: Load, content: Content, text: str) -> None:
    actual = load(content).preprocessing
    assert str(actual).startswith(text)
    places = {"processor": "the preprocessor_config.json beside", "config": "the config.json"}
    places |= {"meta": "the checkpoint's own configuration", "preprocessing": "the weights file"}
    (kind, *_) = content
    assert actual.source.startswith(places.get(kind, "the checkpoint's own training arguments"))


@each("name", ["img_size", "input_size", "mean", "std", "crop_pct", "classes", "gp"])
def test_exponentially_nested_lists(load: Load, name: str) -> None:
    start = time.monotonic()
    value: Any = ["x"]
    for _ in range(60):
        value = [value, value]  # 2**60 strings that share their memory, as a pickle can contain
    error_of(CheckpointError, load, {name: value})
    if name not in ("classes", "gp"):
        error_of(CheckpointError, load, {"preprocessing": {name: value}})
    assert time.monotonic() - start < 10


def test_preprocessing_in_several_places(load: Load) -> None:
    loaded = load({**args(img_size=96), **processor()})
    assert loaded.preprocessing.image_size == 96
    (note,) = loaded.source.notes
    assert note.endswith("; not from the preprocessor_config.json beside the weights")
    loaded = load({"img_size": 64, **args(img_size=96, gp="avg"), "opt": {"gp": "fast"}})
    assert loaded.preprocessing.image_size == 96
    assert loaded.source.notes == (
        "img_size is 64 in the file, 96 in the file's args: the last one has priority",
        "gp is 'avg' in the file's args, 'fast' in the file's opt: the last one has priority",
    )
    sizes = {"input_size": [3, 64, 96, 9], "interpolation": "random", "crop_pct": 0.9}
    content = args(**sizes, classes=["a"])
    message = error_of(CheckpointError, load, content, own_labels=True).message
    assert "image_size [64, 96, 9]" in message
    overrides = {"image_size": 64, "interpolation": "bilinear", "mean": None}
    loaded = load(content, preprocessing=overrides, own_labels=True)
    assert str(loaded.preprocessing).startswith("64x64 bilinear, crop 0.9, mean 0.5/0.5/0.5, std")
    assert "arguments (mean, std: assumed, the off" in loaded.preprocessing.source
    assert loaded.preprocessing.source.endswith("except image_size, interpolation as requested")
    message = error_of(CheckpointError, load, content, preprocessing=overrides).message
    assert "classes in the file's args (1 entries: ['a'])" in message


# --- the classes -----------------------------------------------------------------------------


@each(
    ("inside", "names"),
    [
        ({"class_to_idx": dict(reversed(INDEX.items()))}, NAMES),
        ({"idx_to_class": dict(enumerate(NAMES))}, NAMES),
        ({"meta": {"dataset_meta": {"classes": NAMES}}}, NAMES),
        ({"label2idx": INDEX, "idx2label": dict(enumerate(NAMES))}, NAMES),
        (hf(label2id=INDEX), NAMES),
        (hf(id2label=dict(enumerate("aabcd")), label2id={"a": 1, "b": 2}), [*"aabcd"]),
        ({"classes": NAMES, "class_to_idx": INDEX}, NAMES),
        ({"hyper_parameters": {"class_names": tuple(NAMES)}}, NAMES),
        (cfg(label_names=NAMES), NAMES),
        (hf(id2label={i: f"LABEL_{i}" for i in range(5)}), None),
        ({"classes": 5, "class_names": None}, None),
        ({"classes": np.array(NAMES, object), "cfg": {"classes": 5}, **args(classes=None)}, NAMES),
        ({"classes": "names.txt"}, None),
        ({"classes": {*NAMES}}, None),
        ({"classes": [1, 2, 3, 4, 5]}, list("12345")),
    ],
)
def test_class_names(load: Load, inside: Content, names: list[str] | None) -> None:
    loaded = load(inside)
    assert loaded.class_names == (tuple(names) if names else None)
    assert any(note.startswith("class names from ") for note in loaded.source.notes) == bool(names)
    unused = isinstance(inside.get("classes"), str | set)
    assert any("in the file is not a list" in note for note in loaded.source.notes) == unused


def test_one_logit_and_none(tmp_path: Path, tiny_config: VanConfig) -> None:
    state = random_van(replace(tiny_config, num_classes=1), seed=1).state_dict()
    for classes in (["cat", "dog"], np.array(["dog"])):
        loaded = load_van(save_weights(tmp_path / "van", state, classes=classes))
        assert (loaded.config.num_classes, loaded.class_names) == (1, ("dog",))
        note = "one logit: it is unknown whether of two classes or of a regression"
        assert note in loaded.source.notes
    body = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    loaded = load_van(save_weights(tmp_path / "van", body, **args(crop_size=512)))  # a segmenter's
    assert str(loaded.preprocessing).startswith("224x224 bicubic, crop 0.9")


# --- refusals --------------------------------------------------------------------------------

NETWORK: list[tuple[Content, str]] = [
    (hf(strides=[4, 2, 2]), "strides is (4, 2, 2); this"),
    (hf(strides=[4, 2, 0, 2]), "strides is (4, 2, 0, 2); this network needs four numbers"),
    (hf(hidden_act="relu"), "hidden_act is 'relu'; this network needs gelu or gelu_python"),
    (hf(layer_norm_eps=-1.0), "layer_norm_eps is -1.0; this network needs between 0 and 1"),
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
    (cfg(input_size=[1, 64, 64]), "input_size[0] is 1; this network needs 3"),
    (cfg(pad_mode="edge"), "unsupported keys: pad_mode"),
    (cfg(label_offset=1), "label_offset is 1; this network needs 0"),
    (hf(model_args=[1]), "model_args is [1]; this network needs a table"),
    (hf(input_size=5), "input_size[0] is 5; this network needs 3"),
    (args(bn_eps=1e-3), "bn_eps is 0.001; this"),
    (args(gp="max"), "gp is 'max'; this network needs avg or fast or"),
    (args(model_kwargs={"a": 1}), "model_kwargs is {'a': 1}; this"),
    (pipeline(model="dict(backbone=dict(norm_cfg=dict(type='BN', eps=1e-3)))"), "eps is 0.001; t"),
    (pipeline(model="dict(backbone=dict(block_cfgs=dict(a=1)))"), "block_cfgs is {'a': 1}"),
    (pipeline(model="dict(backbone=[1])"), "backbone is [1]; this network needs a table"),
    (pipeline(model="dict(backbone=dict(norm_cfg=dict(eps='x')))"), "eps is 'x'; this"),
]
PREPROCESSING: list[tuple[Content, str]] = [
    (args(mean=[0.5, 0.4]), "The mean has 2 values for 3 channels."),
    (args(val_crop_size=64, backend="tensor"), "backend is 'tensor'"),
    ({"mean": torch.ones(3).to_sparse()}, "mean tensor("),
    (args(input_size=96), "input_size is 96, not channels, height, width"),
    (cfg(crop_border_pixels=1), "crop_border_pixels is 1, not sup"),
    (pipeline("dict(type='ResizeEdge', scale=73)"), "ResizeEdge"),
    (pipeline("dict(type='Rotate')"), "a step of the test pipeline is 'Rotate'"),
    (pipeline("dict(type='ResizeEdge', edge='long', backend='pillow')"), "ResizeEdge"),
    (pipeline("dict(type='CenterCrop', crop_size=64)"), "the resized side is None"),
    (processor("Segformer"), "but these are supported: "),
    (processor(do_pad=True), "do_pad is True, an unknown key"),
    (args(image_size=96, crop_size=64), "crop_size is 64, of which"),
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
]
CLASSES: list[tuple[Content, str]] = [
    ({"classes": NAMES[:4]}, "classes in the file (4 entries: ['ant', 'bee', 'cat', 'dog']) does"),
    ({"classes": [*NAMES[:4], None]}, "classes in the file (5 entries: "),
    ({"class_to_idx": {n: i + 1 for n, i in INDEX.items()}}, "each of the network's 5 classes"),
    (
        {"class_to_idx": {name: 4 - i for name, i in INDEX.items()}, "classes": NAMES},
        "Class 0 is 'emu' in class_to_idx in the file, but 'ant' in classes in the file.",
    ),
    (
        {"meta": {"classes": NAMES[::-1]}, **timm(label_names=NAMES)},
        "Class 0 is 'emu' in classes in the file's meta, but 'ant' in label_names in config.",
    ),
]
BGR = (
    pipeline("dict(type='Normalize', mean=[1, 1, 1], to_rgb=False)"),
    pipeline(data_preprocessor="dict(mean=[1, 1, 1])"),  # not to RGB by default
    processor(do_flip_channel_order=True),
)


@each(
    ("content", "message", "remedy"),
    [
        *((*row, "Correct") for row in NETWORK),
        *((content, "The network takes BGR images, which", "Save its state_") for content in BGR),
        *((*row, "Give all of --image-size --mean --std ") for row in PREPROCESSING),
        *((*row, "Give --labels FILE") for row in CLASSES),
    ],
)
def test_refused_metadata(load: Load, content: Content, message: str, remedy: str) -> None:
    error = error_of(CheckpointError, load, content)
    assert all(part in error.message for part in message.split("; "))
    assert error.remedy.startswith(remedy)
    options = {"preprocessing": OVERRIDES, "own_labels": True}
    if remedy.startswith("Give"):
        assert load(content, **options).config.num_classes == 5
    else:
        assert error_of(CheckpointError, load, content, **options).message == error.message
    if remedy == "Correct":
        assert ("config.json beside the weights" in error.message) == ("config" in content)
        assert ("move the weights out of its folder" in error.remedy) == ("config" in content)
