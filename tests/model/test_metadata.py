"""Every field beside the tensors is used, or refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.each import each
from van_deploy.errors import CheckpointError
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.metadata import described
from van_deploy.model.random_weights import random_van
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

NAMES = ["ant", "bee", "cat", "dog", "emu"]
PROCESSOR = {"size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
REMEDY = "Correct it, or move the weights out of its folder to do without it."
OPTIONS = "--image-size --mean --std --interpolation --crop-pct"
GIVEN = {"image_size": 64, "mean": 0.5, "std": 0.5, "interpolation": "bicubic", "crop_pct": 1.0}

Made = Callable[..., LoadedVan]


@pytest.fixture
def made(tmp_path: Path, tiny: VAN) -> Made:
    """Return a function that loads the tiny network with things in and beside its file."""

    def load(
        *,
        config: object = None,
        processor: object = None,
        preprocessing: dict[str, Any] | None = None,
        **inside: Any,
    ) -> LoadedVan:
        torch.save({"state_dict": tiny.state_dict(), **inside}, tmp_path / "w.pth")
        for name, value in (("config.json", config), ("preprocessor_config.json", processor)):
            (tmp_path / name).unlink(missing_ok=True)
            if value is not None:
                (tmp_path / name).write_text(json.dumps(value))
        return load_van(str(tmp_path), preprocessing=preprocessing)

    return load


def refused(made: Made, **things: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        made(**things)
    return error.value


# --- the network -----------------------------------------------------------------------------


def test_strides_change_the_network(made: Made, tiny_config: VanConfig) -> None:
    loaded = made(config={"model_type": "van", "strides": [4, 2, 1, 1]})
    assert loaded.config.strides == (4, 2, 1, 1)
    assert loaded.model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (8, 8)
    assert "strides (4, 2, 1, 1)" in loaded.source.notes[0]
    assert loaded.config.mac_count(64) > tiny_config.mac_count(64)


@each(
    ("config", "message"),
    [
        ({"strides": [4, 2, 2]}, "'strides' is [4, 2, 2]: it should have at least 4 items"),
        ({"strides": [4, 2, 0, 2]}, "'strides.2' is 0: it should be greater than or equal to 1"),
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu': it should be 'gelu' or 'gelu_python'"),
        ({"layer_norm_eps": "x"}, "'layer_norm_eps' is 'x': it should be a number"),
        ({"layer_norm_eps": 0}, "'layer_norm_eps' is 0: it should be greater than 0"),
        ({"problem_type": "ranking"}, "'problem_type' is 'ranking': it should be"),
        ({"model_type": "vit"}, "'model_type' is 'vit': it should be 'van'"),
        ({"hidden_sizes": [8, 12, 16, 32]}, "says hidden_sizes (8, 12, 16, 32); the tensors have"),
        ({"depths": [1, 1, 1, 1]}, "says depths (1, 1, 1, 1); the tensors have (1, 2, 1, 1)"),
        ({"patch_sizes": [7, 7, 3, 3]}, "says patch_sizes (7, 7, 3, 3); the tensors have"),
        ({"num_channels": 4}, "says num_channels 4; the tensors have 3"),
        ({"mlp_ratios": [8, 8, 4, 4]}, "says mlp_ratios (8, 8, 4, 4); the tensors have"),
        ({"dilation": 4}, "says dilation 4; the tensors have 3"),
    ],
)
def test_what_contradicts_the_tensors_is_refused(
    made: Made, config: dict[str, Any], message: str
) -> None:
    error = refused(made, config={"model_type": "van", **config})
    assert error.message.startswith("The config.json beside the weights")
    assert message in error.message
    assert error.remedy == REMEDY
    sound = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "mlp_ratios": [4, 4, 2, 2]}
    assert made(config={"model_type": "van", **sound, "drop_path_rate": 0.1, "dilation": 3})
    assert made()  # without it, as the remedy says


@each(
    ("config", "message"),
    [
        ({"architecture": "van_b0"}, "says architecture van_b0; the tensors have None"),
        ({"architecture": "resnet50"}, "says architecture resnet50; the tensors have"),
        ({"num_classes": 7}, "says num_classes 7; the tensors have 5"),
        ({"num_features": 7}, "says num_features 7; the tensors have 24"),
        ({"global_pool": "max"}, "'global_pool' is 'max': it should be 'avg'"),
        ({"model_args": {"depths": [1, 1, 1, 1]}}, "says depths (1, 1, 1, 1); the tensors have"),
        ({"model_args": {"act_layer": "relu"}}, "has act_layer in model_args: not supported"),
        ({"pretrained_cfg": {"input_size": [1, 64, 64]}}, "says in_chans 1; the tensors have 3"),
    ],
)
def test_what_contradicts_timms_configuration(
    made: Made, config: dict[str, Any], message: str
) -> None:
    assert message in refused(made, config={"architecture": "van_mine", **config}).message
    cfg = {"input_size": [3, 64, 64], "num_classes": 5}
    sound = {"num_classes": 5, "num_features": 24, "global_pool": "avg", "pretrained_cfg": cfg}
    arguments = {"drop_rate": 0.1, "img_size": 64}
    assert made(config={"architecture": "van_mine", "model_args": arguments, **sound})


@each("arguments", [{"bn_eps": 1e-3}, {"gp": "max"}, {"bn_tf": True}, {"model_kwargs": {"a": 1}}])
def test_arguments_that_change_the_network(made: Made, arguments: dict[str, Any]) -> None:
    error = refused(made, args=arguments)
    key, value = next(iter(arguments.items()))
    assert error.message == (
        f"The checkpoint's own arguments say {key} {value}, which changes the network and is not "
        "supported."
    )
    assert error.remedy == f"If the network does without, take '{key}' out of the file."
    assert made(args={})


def test_fields_nobody_knows_are_named(made: Made) -> None:
    notes = made(config={"model_type": "van", "se_ratio": 4, "torch_dtype": "float32"}).source.notes
    assert notes == ("not known here, in the config.json beside the weights: se_ratio",)
    notes = made(config={"compilerOptions": {}}).source.notes
    assert notes == ("the config.json beside the weights is of no network: not used",)


def test_arguments_that_say_otherwise_are_noted(made: Made) -> None:
    arguments = {"num_classes": 1000, "bce_loss": True, "class_map": "map.txt", "in_chans": 3}
    assert made(args=arguments).source.notes == (
        "the checkpoint's own arguments say num_classes 1000; the tensors have 5",
        "trained with --bce-loss: each logit is a class's own odds, not softmax's",
        "trained with --class-map map.txt, which orders the classes: give --labels",
    )


def test_what_the_logits_mean(made: Made) -> None:
    kind = "multi_label_classification"
    assert made().config.problem_type == "single_label_classification"
    assert made(config={"model_type": "van", "problem_type": kind}).config.problem_type == kind
    text = "model = dict(head=dict(type='MultiLabelLinearClsHead'))"
    assert made(meta={"cfg": text}).config.problem_type == kind


@each("key", ["cfg", "config"])
def test_mmpretrains_configuration(made: Made, key: str) -> None:
    text = "model = dict(backbone=dict(type='VAN', norm_cfg=dict(type='LN', eps=1e-3)))"
    assert made(meta={key: text}).config.layer_norm_eps == 1e-3
    blocks = "model = dict(backbone=dict(type='VAN', block_cfgs=dict(act_cfg=dict(type='ReLU'))))"
    assert "has block_cfgs, which are not supported" in refused(made, meta={key: blocks}).message


# --- the preprocessing -----------------------------------------------------------------------


@each(
    ("arguments", "text"),
    [
        ({"img_size": 96}, "96x96 bicubic, crop 0.9, mean 0.5"),
        ({"img_size": 96, "input_size": [3, 64, 64]}, "64x64 bicubic, crop 0.9"),
        ({"input_size": [3, 224, 320]}, "224x320 bicubic, crop 0.9"),
        (
            {"mean": [0.4], "crop_mode": "squash"},
            "224x224 bicubic, crop 0.9, squash, mean 0.4/0.4/",
        ),
        ({"crop_mode": "border", "crop_pct": 1.0}, "224x224 bicubic, crop 1, border"),
        (
            {"val_crop_size": 64, "val_resize_size": 72, "interpolation": "bilinear"},
            "64x64 bilinear",
        ),
    ],
)
def test_training_arguments(made: Made, arguments: dict[str, Any], text: str) -> None:
    for name in ("args", "hyper_parameters"):
        loaded = made(**{name: arguments})
        assert str(loaded.preprocessing).startswith(text)
        assert loaded.preprocessing.source.startswith("the checkpoint's own training arguments")


def test_torchvisions_sides_are_pixels(made: Made) -> None:
    found = made(args={"val_crop_size": 224, "val_resize_size": 232}).preprocessing
    assert (found.image_size, found.resize_size, found.mean[0]) == (224, 232, 0.485)


@each(
    ("arguments", "message"),
    [
        ({"input_size": [3, 64, 96, 9]}, "The image_size [64, 96, 9] should be a valid integer."),
        ({"img_size": [64, 96, 3]}, "The image_size"),
        ({"interpolation": "random"}, "The interpolation 'random' should be 'nearest'"),
        ({"crop_mode": "fit"}, "The crop_mode 'fit' should be 'center', 'squash' or 'border'."),
        ({"mean": [0.5, 0.5]}, "The mean has 2 values, but the network takes 3 channels."),
        ({"std": 0}, "The std (0, 0, 0) is not positive"),
        (
            {"val_crop_size": 64, "val_resize_size": 32},
            "The preprocessing cuts 64 pixels out of an",
        ),
        ({"val_crop_size": 64, "backend": "tensor"}, "backend is 'tensor'"),
    ],
)
def test_arguments_that_cannot_be_followed(
    made: Made, arguments: dict[str, Any], message: str
) -> None:
    error = refused(made, args=arguments)
    where = "The checkpoint's own training arguments cannot be followed: "
    assert error.message.startswith(where + message)
    assert error.remedy == f"Say yourself what the weights want: {OPTIONS}."
    assert made(args=arguments, preprocessing=GIVEN).preprocessing.image_size == 64


def lists_in_lists(levels: int) -> Any:
    """Return 2**levels strings in the memory of a few: what a pickle's memo can spell."""
    value: Any = ("x",)
    for _ in range(levels):
        value = (value, value)
    return value


@each("name", ["img_size", "input_size", "mean", "std", "crop_pct", "classes"])
def test_lists_that_take_for_ever_to_look_through(tiny_config: VanConfig, name: str) -> None:
    begun = time.monotonic()
    for inside in ({name: lists_in_lists(60)}, {"preprocessing": {name: lists_in_lists(60)}}):
        if name != "classes" or "classes" in inside:
            with pytest.raises(CheckpointError):
                described(tiny_config, "official", inside, {})
    assert time.monotonic() - begun < 10


@each(
    ("processor", "text"),
    [
        ({}, "64x64 bicubic, crop 0.875, mean 0.5"),
        ({"crop_pct": 0.9}, "64x64 bicubic, crop 0.9,"),
        ({"size": {"shortest_edge": 384}}, "384x384 bicubic, crop 1, squash,"),
        ({"size": 383}, "383x383 bicubic, crop 0.875,"),
        ({"image_processor_type": "ViTImageProcessorFast"}, "64x64 bicubic, crop 1, squash,"),
        (
            {"image_processor_type": "BitImageProcessor", "size": 72, "crop_size": 64},
            "64x64 bicubic, resize 72,",
        ),
        ({"do_normalize": False}, "64x64 bicubic, crop 0.875, mean 0/0/0, std 1/1/1"),
        ({"do_center_crop": None, "crop_size": None}, "64x64 bicubic"),
    ],
)
def test_processors(made: Made, processor: dict[str, Any], text: str) -> None:
    found = made(processor={**PROCESSOR, **processor}).preprocessing
    assert str(found).startswith(text)
    assert found.source == "the preprocessor_config.json beside the weights"


@each(
    ("processor", "reason"),
    [
        ({"image_processor_type": "SegformerImageProcessor"}, "is none of the processors known"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is not known here"),
        (
            {"size": {"height": 64, "width": 64}},
            "size is {'height': 64, 'width': 64}, not shortest_",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 64}},
            "not height",
        ),
        (
            {
                "image_processor_type": "ViTImageProcessor",
                "size": {"height": 64, "width": 32},
            },
            "only squares are supported",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "do_center_crop": True},
            "do_center_crop is",
        ),
        ({"image_processor_type": "BitImageProcessor", "do_center_crop": False}, "do_center_crop"),
        ({"image_processor_type": "BitImageProcessor"}, "cuts 224 pixels out of an image resized"),
        ({"size": 0}, "image_size 0"),
        ({"size": "big"}, "cannot be followed"),
        ({"size": 10**400}, "image_size"),
        ({"resample": 77}, "resample is 77, none of Pillow's filters"),
        ({"resample": "x"}, "resample is 'x'"),
        ({"do_resize": False}, "do_resize is false"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, not 1/255"),
        ({"image_mean": [0.5, 0.5]}, "The mean has 2 values"),
        ({"image_mean": "x"}, "The mean 'x' should be a valid number"),
        ({"image_std": [0]}, "is not positive"),
        ({"crop_pct": 2}, "crop_pct is 2, not in (0, 1]"),
        ({"crop_pct": {}}, "crop_pct is {}"),
    ],
)
def test_processors_that_cannot_be_followed(
    made: Made, processor: dict[str, Any], reason: str
) -> None:
    error = refused(made, processor={**PROCESSOR, **processor})
    where = "The preprocessor_config.json beside the weights cannot be followed: "
    assert error.message.startswith(where)
    assert reason in error.message
    assert error.remedy == f"Say yourself what the weights want: {OPTIONS}."
    assert made(processor={**PROCESSOR, **processor}, preprocessing=GIVEN)


@each(
    ("config", "text"),
    [
        ({"input_size": [3, 64, 64], "crop_pct": 1.0}, "64x64 bicubic, crop 1, mean 0.485/0.456"),
        (
            {"interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]},
            "224x224 bilinear, crop 0.875, mea",
        ),
        ({"crop_mode": "squash"}, "224x224 bicubic, crop 0.875, squash"),
    ],
)
def test_timms_configuration(made: Made, config: dict[str, Any], text: str) -> None:
    nested = made(config={"architecture": "van_mine", "pretrained_cfg": config})
    assert str(nested.preprocessing).startswith(text)
    assert nested.preprocessing.source == "the config.json beside the weights"
    before = made(config={"architecture": "van_mine", **config})  # as timm wrote it until 2023
    assert before.preprocessing == nested.preprocessing


def test_timms_offsets_are_refused(made: Made) -> None:
    for key in ("crop_border_pixels", "label_offset"):
        config = {"architecture": "van_mine", "pretrained_cfg": {key: 1}}
        assert f"{key} is 1, which is not supported" in refused(made, config=config).message
    config = {"architecture": "van_mine", "pretrained_cfg": {"pad_mode": "edge", "url": "x"}}
    assert "pretrained_cfg has pad_mode: not known here" in refused(made, config=config).message


@each(
    ("steps", "message"),
    [
        ("dict(type='ResizeEdge', scale=73)", "ResizeEdge's backend is not pillow"),
        ("dict(type='Rotate')", "the test pipeline has 'Rotate'"),
        ("dict(type='ResizeEdge', scale=73, edge='long', backend='pillow')", "edge is 'long'"),
        ("dict(type='CenterCrop', crop_size=64)", "the resized side is None"),
    ],
)
def test_pipelines_that_cannot_be_followed(made: Made, steps: str, message: str) -> None:
    text = f"model = dict()\ntest_pipeline = [{steps}]"
    assert message in refused(made, meta={"cfg": text}).message
    assert made(meta={"cfg": text}, preprocessing=GIVEN)


def test_mmclassifications_pipeline(made: Made) -> None:
    text = """
img_norm_cfg = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
model = dict(backbone=dict(type='VAN'))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', size=(73, -1), backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='Normalize', mean=[127.5, 127.5, 127.5], std=[63.75, 63.75, 63.75], to_rgb=True),
    dict(type='Collect', keys=['img'])
]"""
    found = made(meta={"config": text}).preprocessing
    assert (found.resize_size, found.crop_mode) == (73, "center")
    assert str(found).endswith("mean 0.5/0.5/0.5, std 0.25/0.25/0.25")
    bgr = text.replace("to_rgb=True", "to_rgb=False")
    assert "the network takes BGR" in refused(made, meta={"config": bgr}).message


def test_the_nearest_to_the_weights_is_taken_and_the_others_are_named(made: Made) -> None:
    loaded = made(args={"img_size": 96}, processor=PROCESSOR)
    assert loaded.preprocessing.image_size == 96
    assert loaded.source.notes[0].endswith(
        "; not from the preprocessor_config.json beside the weights"
    )
    alone = made(config={"model_type": "van", "image_size": 96})
    assert alone.preprocessing.image_size == 96
    assert alone.preprocessing.source.startswith("the config.json beside the weights (mean, std")


# --- the classes -----------------------------------------------------------------------------


@each(
    "inside",
    [
        {"class_to_idx": {name: index for index, name in reversed(list(enumerate(NAMES)))}},
        {"idx_to_class": dict(enumerate(NAMES))},
        {"classes": NAMES},
        {"class_names": tuple(NAMES)},
        {"hyper_parameters": {"class_names": NAMES}},
        {"meta": {"CLASSES": NAMES}},
        {"meta": {"dataset_meta": {"classes": NAMES}}},
        {"config": {"model_type": "van", "id2label": dict(enumerate(NAMES))}},
        {"config": {"architecture": "van_x", "label_names": NAMES}},
        {"config": {"architecture": "van_x", "labels": NAMES}},
        {"config": {"architecture": "van_x", "pretrained_cfg": {"label_names": NAMES}}},
    ],
)
def test_class_names(made: Made, inside: dict[str, Any]) -> None:
    loaded = made(**inside)
    assert loaded.class_names == tuple(NAMES)
    assert loaded.source.notes[-1].startswith("class names from ")


def test_what_names_no_class(made: Made) -> None:
    labels = {str(index): f"LABEL_{index}" for index in range(5)}
    assert made(config={"model_type": "van", "id2label": labels}).class_names is None
    assert made(classes=5, class_names=None).class_names is None
    assert made(classes=[1, 2, 3, 4, 5]).class_names == ("1", "2", "3", "4", "5")


@each(
    ("inside", "message"),
    [
        ({"classes": NAMES[:4]}, "classes in the file names 4 classes; the network has 5."),
        ({"classes": [*NAMES[:4], None]}, "classes in the file does not name one class a logit."),
        ({"class_to_idx": {"a": 0, "b": 2}}, "class_to_idx in the file does not name one class a"),
        ({"class_to_idx": {"a": "x"}}, "class_to_idx in the file does not name one class a logit."),
        (
            {"classes": NAMES, "class_to_idx": {name: 4 - i for i, name in enumerate(NAMES)}},
            "The class names contradict each other: class 0 is 'emu' by class_to_idx in the file, "
            "and 'ant' by classes in the file.",
        ),
    ],
)
def test_class_names_that_make_no_sense(made: Made, inside: dict[str, Any], message: str) -> None:
    error = refused(made, **inside)
    assert error.message.startswith(message)
    assert error.remedy == (
        "Give the names yourself, one a line in the logits' order: --labels FILE."
    )


def test_one_logit_is_the_second_class(tmp_path: Path, tiny_config: VanConfig) -> None:
    from dataclasses import replace

    state = random_van(replace(tiny_config, num_classes=1), seed=1).state_dict()
    torch.save({"state_dict": state, "classes": ["cat", "dog"]}, tmp_path / "w.pth")
    assert load_van(str(tmp_path / "w.pth")).class_names == ("dog",)
