"""Every field beside the tensors is used, or refused by name."""

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
from van_deploy.model.metadata import described
from van_deploy.model.random_weights import random_van
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

NAMES = ["ant", "bee", "cat", "dog", "emu"]
INDEX = {name: index for index, name in enumerate(NAMES)}
PROCESSOR = {"size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
JSON = "Correct it, or move the weights out of its folder to do without it."
GIVEN = {"image_size": 64, "mean": 0.5, "std": 0.5, "interpolation": "bicubic", "crop_pct": 1.0}
ARGS = "The checkpoint's own training arguments cannot be followed: "

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


@each(
    ("config", "message"),
    [
        ({"strides": [4, 2, 2]}, "'strides' is [4, 2, 2]: it should have at least 4 items"),
        ({"strides": [4, 2, 0, 2]}, "'strides.2' is 0: it should be greater than or equal to 1"),
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu': it should be 'gelu' or 'gelu_python'"),
        ({"layer_norm_eps": 0}, "'layer_norm_eps' is 0: it should be greater than 0"),
        ({"problem_type": "ranking"}, "'problem_type' is 'ranking': it should be"),
        ({"model_type": "vit"}, "'model_type' is 'vit': it should be 'van'"),
        ({"hidden_sizes": [8, 12, 16, 32]}, "says hidden_sizes (8, 12, 16, 32); the tensors have"),
        ({"depths": [1, 1, 1, 1]}, "says depths (1, 1, 1, 1); the tensors have (1, 2, 1, 1)"),
        ({"mlp_ratios": [8, 8, 4, 4]}, "says mlp_ratios (8, 8, 4, 4); the tensors have"),
        ({"dilation": 4}, "says dilation 4; the tensors have 3"),
        ({"architecture": "van_b0"}, "says architecture van_b0; the tensors have None"),
        ({"architecture": "resnet50"}, "says architecture resnet50; the tensors have"),
        ({"architecture": "van_x", "num_classes": 7}, "says num_classes 7; the tensors have 5"),
        ({"architecture": "van_x", "global_pool": "max"}, "'global_pool' is 'max': it should be"),
        ({"architecture": "van_x", "model_args": {"depths": [1, 1, 1, 1]}}, "says depths (1, 1,"),
        ({"architecture": "van_x", "model_args": {"act_layer": "relu"}}, "act_layer in model_args"),
        ({"architecture": "van_x", "pretrained_cfg": {"input_size": [1, 64, 64]}}, "in_chans 1"),
        ({"architecture": "van_x", "pretrained_cfg": {"pad_mode": "edge"}}, "has pad_mode in pre"),
    ],
)
def test_what_contradicts_the_tensors_is_refused(
    made: Made, config: dict[str, Any], message: str
) -> None:
    kind = {} if "architecture" in config else {"model_type": "van"}
    error = refused(made, config={**kind, **config})
    assert error.message.startswith("The config.json beside the weights")
    assert message in error.message
    assert error.remedy == JSON


def test_sound_configurations_are_taken(made: Made, tiny_config: VanConfig) -> None:
    sound = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "mlp_ratios": [4, 4, 2, 2]}
    more = {"strides": [4, 2, 1, 1], "drop_path_rate": 0.1, "dilation": 3, "se_ratio": 4}
    loaded = made(config={"model_type": "van", **sound, **more, "mean": [0.1] * 3})
    assert loaded.model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (8, 8)
    assert loaded.config == replace(tiny_config, strides=(4, 2, 1, 1))
    assert loaded.config.mac_count(64) > tiny_config.mac_count(64)
    assert loaded.source.notes == (
        "from the config.json beside the weights: strides (4, 2, 1, 1)",
        "not known here, in the config.json beside the weights: se_ratio, mean",
    )
    cfg = {"input_size": [3, 64, 64], "num_classes": 1000, "tag": "in1k", "pad_mode": None}
    timms = {"num_classes": 5, "num_features": 24, "global_pool": "avg", "pretrained_cfg": cfg}
    arguments = {"drop_rate": 0.1, "img_size": 64}
    loaded = made(config={"architecture": "van_mine", "model_args": arguments, **timms})
    assert loaded.config == tiny_config
    (note,) = made(config={"compilerOptions": {}}).source.notes
    assert note == "the config.json beside the weights is of no network: not used"


@each("arguments", [{"bn_eps": 1e-3}, {"gp": "max"}, {"bn_tf": True}, {"model_kwargs": {"a": 1}}])
def test_arguments_that_change_the_network(made: Made, arguments: dict[str, Any]) -> None:
    error = refused(made, args=arguments)
    key, value = next(iter(arguments.items()))
    assert error.message == (
        f"The checkpoint's own arguments say {key} {value}, which changes the network and is not "
        "supported."
    )
    assert error.remedy == f"If the network does without, take '{key}' out of the file."
    assert made(args={"gp": "avg", "bn_eps": 1e-5, "bn_tf": False, "model_kwargs": {}})


def test_arguments_that_say_otherwise_are_noted(made: Made) -> None:
    arguments = {"num_classes": 1000, "bce_loss": True, "class_map": "map.txt", "in_chans": 3}
    assert made(args=arguments).source.notes == (
        "the checkpoint's own arguments say num_classes 1000; the tensors have 5",
        "trained with --bce-loss: each logit is a class's own odds, not softmax's",
        "trained with --class-map map.txt, which orders the classes: give --labels",
    )


@each("key", ["cfg", "config"])
def test_what_the_logits_mean_and_mmpretrains_configuration(made: Made, key: str) -> None:
    kind = "multi_label_classification"
    assert made().config.problem_type == "single_label_classification"
    assert made(config={"model_type": "van", "problem_type": kind}).config.problem_type == kind
    text = "model = dict(head=dict(type='MultiLabelLinearClsHead'))"
    assert made(meta={key: text}).config.problem_type == kind
    text = "model = dict(backbone=dict(type='VAN', norm_cfg=dict(type='LN', eps=1e-3)))"
    assert made(meta={key: text}).config.layer_norm_eps == 1e-3
    blocks = "model = dict(backbone=dict(type='VAN', block_cfgs=dict(act_cfg=dict(type='ReLU'))))"
    assert "has block_cfgs, which are not supported" in refused(made, meta={key: blocks}).message


# --- the preprocessing -----------------------------------------------------------------------


@each(
    ("things", "text", "source"),
    [
        *(
            ({name: arguments}, text, "the checkpoint's own training arguments")
            for name in ("args", "hyper_parameters")
            for arguments, text in (
                ({"img_size": 96}, "96x96 bicubic, crop 0.9, mean 0.5"),
                ({"img_size": 96, "input_size": [3, 64, 64]}, "64x64 bicubic, crop 0.9"),
                ({"input_size": [3, 224, 320]}, "224x320 bicubic, crop 0.9"),
                (
                    {"mean": [0.4], "crop_mode": "squash"},
                    "224x224 bicubic, crop 0.9, squash, mean ",
                ),
                ({"crop_mode": "border", "crop_pct": 1.0}, "224x224 bicubic, crop 1, border"),
                ({"val_crop_size": 224, "val_resize_size": 232}, "224x224 bicubic, crop 0.965517"),
                ({"val_crop_size": 64, "interpolation": "bilinear"}, "64x64 bilinear, crop 0.25,"),
            )
        ),
        *(
            ({"processor": {**PROCESSOR, **said}}, text, "the preprocessor_config.json beside")
            for said, text in (
                ({}, "64x64 bicubic, crop 0.875, mean 0.5"),
                ({"crop_pct": 0.9}, "64x64 bicubic, crop 0.9,"),
                ({"size": {"shortest_edge": 384}}, "384x384 bicubic, crop 1, squash,"),
                ({"size": 383}, "383x383 bicubic, crop 0.875,"),
                (
                    {"image_processor_type": "ViTImageProcessorFast"},
                    "64x64 bicubic, crop 1, squash",
                ),
                (
                    {"image_processor_type": "BitImageProcessor", "size": 72, "crop_size": 64},
                    "64x64 bicubic, resize 72,",
                ),
                ({"do_normalize": False}, "64x64 bicubic, crop 0.875, mean 0/0/0, std 1/1/1"),
                ({"do_center_crop": None, "crop_size": None}, "64x64 bicubic"),
            )
        ),
        *(
            ({"config": {"architecture": "van_x", **said}}, text, "the config.json beside the")
            for stated, text in (
                (
                    {"input_size": [3, 64, 64], "crop_pct": 1.0},
                    "64x64 bicubic, crop 1, mean 0.485/",
                ),
                (
                    {"interpolation": "bilinear", "mean": [0.1] * 3},
                    "224x224 bilinear, crop 0.875, m",
                ),
                ({"crop_mode": "squash"}, "224x224 bicubic, crop 0.875, squash"),
            )
            for said in (stated, {"pretrained_cfg": stated})  # the former until 2023
        ),
        (
            {"config": {"model_type": "van", "image_size": 96}},
            "96x96 bicubic, crop 0.9, mean 0.5",
            "the config.json beside the weights (mean, std",
        ),
    ],
)
def test_what_is_said_is_done(made: Made, things: dict[str, Any], text: str, source: str) -> None:
    found = made(**things).preprocessing
    assert str(found).startswith(text)
    assert found.source.startswith(source)


@each(
    ("things", "message"),
    [
        *(
            ({"args": arguments}, ARGS + message)
            for arguments, message in (
                (
                    {"input_size": [3, 64, 96, 9]},
                    "The image_size [64, 96, 9] should be a valid int",
                ),
                ({"img_size": [64, 96, 3]}, "The image_size"),
                ({"interpolation": "random"}, "The interpolation 'random' should be 'nearest'"),
                ({"crop_mode": "fit"}, "The crop_mode 'fit' should be 'center', 'squash' or"),
                ({"mean": [0.5, 0.5]}, "The mean has 2 values, but the network takes 3 channels."),
                ({"std": 0}, "The std (0, 0, 0) is not positive"),
                (
                    {"val_crop_size": 64, "val_resize_size": 32},
                    "The preprocessing cuts 64 pixels o",
                ),
                ({"val_crop_size": 64, "backend": "tensor"}, "backend is 'tensor'"),
            )
        ),
        *(
            (
                {"config": {"architecture": "van_x", "pretrained_cfg": {key: 1}}},
                f"{key} is 1, which",
            )
            for key in ("crop_border_pixels", "label_offset")
        ),
        *(
            ({"meta": {"cfg": f"model = dict()\ntest_pipeline = [{steps}]"}}, message)
            for steps, message in (
                ("dict(type='ResizeEdge', scale=73)", "ResizeEdge's backend is 'cv2', not pillow"),
                ("dict(type='Rotate')", "a step of the test pipeline is 'Rotate'"),
                ("dict(type='ResizeEdge', edge='long', backend='pillow')", "edge is 'long'"),
                ("dict(type='CenterCrop', crop_size=64)", "the resized side is None"),
                ("dict(type='Normalize', mean=[1, 1, 1], to_rgb=False)", "the network takes BGR"),
            )
        ),
        *(
            ({"processor": {**PROCESSOR, **processor}}, reason)
            for processor, reason in (
                ({"image_processor_type": "SegformerImageProcessor"}, "none of those known: ConvN"),
                ({"do_flip_channel_order": True}, "do_flip_channel_order is True, which is not kn"),
                ({"size": {"height": 64, "width": 64}}, "not shortest_edge"),
                (
                    {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 64}},
                    "not height",
                ),
                ({"size": [64, 32]}, "only squares are supported"),
                (
                    {"image_processor_type": "ViTImageProcessor", "do_center_crop": True},
                    "do_center_crop is",
                ),
                (
                    {"image_processor_type": "BitImageProcessor", "do_center_crop": False},
                    "do_center_crop",
                ),
                ({"image_processor_type": "BitImageProcessor"}, "cuts 224 pixels out of an image"),
                ({"size": 0}, "image_size 0"),
                ({"size": "big"}, "cannot be followed"),
                ({"size": 10**400}, "image_size"),
                ({"resample": 77}, "resample is 77, none of Pillow's filters"),
                ({"do_resize": False}, "do_resize is False"),
                ({"rescale_factor": 1.0}, "rescale_factor is 1.0, not 1/255"),
                ({"image_mean": [0.5, 0.5]}, "The mean has 2 values"),
                ({"image_std": [0]}, "is not positive"),
                ({"crop_pct": 2}, "crop_pct is 2, not in (0, 1]"),
            )
        ),
    ],
)
def test_what_cannot_be_followed(made: Made, things: dict[str, Any], message: str) -> None:
    error = refused(made, **things)
    assert message in error.message
    assert error.remedy == (
        "Say yourself what the weights want: --image-size --mean --std --interpolation --crop-pct."
    )
    assert made(**things, preprocessing=GIVEN).preprocessing.image_size == 64


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


def test_the_nearest_to_the_weights_is_taken_and_the_others_are_named(made: Made) -> None:
    loaded = made(args={"img_size": 96}, processor=PROCESSOR)
    assert loaded.preprocessing.image_size == 96
    (note,) = loaded.source.notes
    assert note.endswith("; not from the preprocessor_config.json beside the weights")


# --- the classes -----------------------------------------------------------------------------


@each(
    ("inside", "names"),
    [
        *(
            (inside, tuple(NAMES))
            for inside in (
                {"class_to_idx": dict(reversed(INDEX.items()))},
                {"idx_to_class": dict(enumerate(NAMES))},
                {"classes": NAMES, "class_to_idx": INDEX},
                {"hyper_parameters": {"class_names": tuple(NAMES)}},
                {"meta": {"CLASSES": NAMES}},
                {"meta": {"dataset_meta": {"classes": NAMES}}},
                {"config": {"model_type": "van", "id2label": dict(enumerate(NAMES))}},
                {"config": {"architecture": "van_x", "label_names": NAMES}},
                {"config": {"architecture": "van_x", "labels": NAMES}},
                {"config": {"architecture": "van_x", "pretrained_cfg": {"label_names": NAMES}}},
            )
        ),
        ({"config": {"model_type": "van", "id2label": {i: f"LABEL_{i}" for i in range(5)}}}, None),
        ({"classes": 5, "class_names": None}, None),
        ({"classes": [1, 2, 3, 4, 5]}, tuple("12345")),
    ],
)
def test_class_names(made: Made, inside: dict[str, Any], names: tuple[str, ...] | None) -> None:
    loaded = made(**inside)
    assert loaded.class_names == names
    assert any(note.startswith("class names from ") for note in loaded.source.notes) == bool(names)


@each(
    ("inside", "message"),
    [
        ({"classes": NAMES[:4]}, "classes in the file names 4 classes; the network has 5."),
        ({"classes": [*NAMES[:4], None]}, "classes in the file does not name one class a logit."),
        ({"class_to_idx": {"a": 0, "b": 2}}, "class_to_idx in the file does not name one class a"),
        ({"class_to_idx": {"a": "x"}}, "class_to_idx in the file does not name one class a logit."),
        (
            {"classes": NAMES, "class_to_idx": {name: 4 - i for name, i in INDEX.items()}},
            "The class names contradict each other: class 0 is 'emu' by class_to_idx in the file, "
            "and 'ant' by classes in the file.",
        ),
        (
            {
                "config": {"architecture": "van_x", "label_names": NAMES},
                "meta": {"classes": NAMES[::-1]},
            },
            "The class names contradict each other: class 0 is 'emu' by classes in the file's meta",
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
    state = random_van(replace(tiny_config, num_classes=1), seed=1).state_dict()
    torch.save({"state_dict": state, "classes": ["cat", "dog"]}, tmp_path / "w.pth")
    loaded = load_van(str(tmp_path / "w.pth"))
    assert (loaded.config.num_classes, loaded.class_names) == (1, ("dog",))
    note = "one logit: nothing says whether of two classes or of a regression"
    assert note in loaded.source.notes
