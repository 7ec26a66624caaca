"""Tensor names of three formats, the architecture of a state dict, and strict loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.each import each
from tests.errors import error_of
from tests.model.conftest import has_equal_outputs, rename, save_weights
from van_deploy.errors import CheckpointError, UsageError, VanDeployError
from van_deploy.model.checkpoint import config_from_state, load_van, read_weights
from van_deploy.model.keys import FORMATS, Checkpoint
from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VARIANTS, VanConfig

State = dict[str, Tensor]
# Prefixes, and those of wrapped modules inside.
PREFIXES = dict.fromkeys(("", "_orig_mod.", "backbone.", "_forward_module."), "")
PREFIXES |= {"module.": "_orig_mod.", "net.": "_checkpoint_wrapped_module."}
PREFIXES |= {"a.b.c.": "_fsdp_wrapped_module."}
LKA = "block1.0.attn.spatial_gating_unit"
ONE = torch.ones(1)


@pytest.fixture
def state(tiny: VAN) -> State:
    return tiny.state_dict()


def load(folder: Path, content: object, head: str | None = None) -> VAN:
    torch.save(content, folder / "w.pth")
    layers = head.split(",") if head else None
    return load_van(str(folder), head=layers, layer_norm_eps=1e-6).model


def read(folder: Path, content: object) -> Checkpoint:
    torch.save(content, folder / "w.pth")
    return read_weights(folder / "w.pth")


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# --- names -----------------------------------------------------------------------------------


@each("target", FORMATS)
@each("prefix", PREFIXES)
def test_name_formats(tmp_path: Path, state: State, tiny: VAN, prefix: str, target: str) -> None:
    names = with_prefix(prefix, rename(state, target))
    wrapped = {n.replace("mlp.", f"mlp.{PREFIXES[prefix]}"): tensor for n, tensor in names.items()}
    wrapped |= {"n_averaged": torch.tensor(9), "criterion.weight": torch.ones(5)}
    averaged = f"ema_{next(iter(names)).replace('.', '_')}"  # of mmcv 1's EMAHook
    wrapped |= {f"{prefix}total_ops": torch.zeros(1), "val_acc.tp": ONE, averaged: ONE}
    assert has_equal_outputs(load(tmp_path, wrapped), tiny)
    checkpoint = read(tmp_path, wrapped)
    assert checkpoint.format == target
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.tensors.items())
    (note,) = checkpoint.notes
    assert note.endswith(f"criterion.weight, {prefix}total_ops, val_acc.tp, {averaged}")


@each(
    ("target", "prefix", "other", "note"),
    [
        ("official", "", None, "a backbone (official names), without a classification head"),
        ("mmpretrain", "", None, "a backbone (mmpretrain names), without"),
        ("transformers", "", "layernorm.weight", "are not the network's: layernorm.weight"),
        ("official", "backbone.", "rpn_head.conv.weight", "the network's: rpn_head.conv.weight"),
        ("official", "module.backbone.", "module.neck.weight", "network's: module.neck.weight"),
    ],
)
def test_backbones_ignore_other_modules(
    tmp_path: Path, state: State, target: str, prefix: str, other: str | None, note: str
) -> None:
    names = {n.removeprefix("van."): t for n, t in rename(body(state), target).items()}
    others = {other: torch.ones(2)} if other else {}
    checkpoint = read(tmp_path, with_prefix(prefix, names) | others)
    assert note in checkpoint.notes[-1]
    assert checkpoint.tensors.keys() == {n for n in body(state) if "num_batches" not in n}
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.tensors.items())


@each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_to_float32(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    converted = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert load(tmp_path, converted).config.num_classes == 5
    loaded = read(tmp_path, converted)
    assert {t.dtype for t in loaded.tensors.values()} == {torch.float32}
    assert loaded.notes == (f"weights converted to float32 from {str(dtype)[6:]}",)


# --- errors ----------------------------------------------------------------------------------


def mixed(state: State, other: str) -> State:
    first = {n: t for n, t in state.items() if n.startswith("block1")}
    return {n: t for n, t in state.items() if n not in first} | rename(first, other)


def quantised(state: State) -> Tensor:
    return torch.quantize_per_tensor(state["head.weight"], 0.1, 0, torch.qint8)


SEVERAL = (
    "official names under 'state_dict.a', transformers names under 'state_dict.b'. "
    "Select one: --container state_dict.a or --container state_dict.b;"
)


@each(
    ("change", "message"),
    [
        # names
        (lambda s: with_prefix("m.", s) | {"mean": ONE}, "select it with --container state_dict.m"),
        (lambda s: with_prefix("backbone.", body(s)) | {"stem2.weight": ONE}, ": stem2.weight."),
        (lambda s: with_prefix("a.", s) | with_prefix("b.", rename(s, "transformers")), SEVERAL),
        (lambda s: mixed(s, "transformers"), "several networks, or one in mixed formats: "),
        (lambda s: mixed(s, "mmpretrain"), "several networks, or one in mixed formats: "),
        (lambda _: {"layer1.weight": ONE, "fc": ONE}, "not a VAN (2 tensors: layer1.weight, fc)"),
        ({"van.layernorm.weight": torch.ones(24)}, "not the VAN's: van.layernorm"),
        ({"block1.999999.norm1.weight": torch.ones(8)}, "not the VAN's: block1.999999.norm1"),
        ({"extra.weight": ONE}, "not the VAN's: extra.weight."),
        # missing tensors
        ("block2.0.", "block2.0.mlp.fc1.weight"),
        ("block4.", "tensors that are not the VAN's: patch_embed4."),
        ("norm3.bias", 'Missing key(s) in state_dict: "norm3.bias".'),
        ("block2.1.norm2.running_var", 'Missing key(s) in state_dict: "block2.1.norm2.ru'),
        # shapes
        ({"patch_embed1.proj.weight": torch.ones(8, 3, 7)}, "patch_embed1.proj.weight"),
        ({f"{LKA}.conv_spatial.weight": torch.ones(8, 1, 4, 4)}, "are (5, 4); LKA's are odd"),
        ({f"{LKA}.conv0.weight": torch.ones(8, 1, 3, 5)}, f"mismatch for {LKA}.conv0.weight"),
        ({"block2.0.mlp.fc2.weight": torch.ones(12, 47, 1, 1)}, "block2.0.mlp.fc2.weight: copying"),
        ({"head.weight": torch.ones(5)}, "head.weight"),
        # values
        ({"head.bias": torch.tensor([0, float("nan"), 0, 0, 0])}, "head.bias contains NaN or i"),
        ({"norm1.bias": torch.full((8,), float("-inf"))}, "norm1.bias contains NaN or inf"),
        ({"head.bias": torch.full((5,), 1e300, dtype=torch.float64)}, "head.bias contains NaN o"),
        ({"patch_embed2.norm.running_var": torch.linspace(-1, 1, 12)}, "running_var is negative"),
        ({"head.weight": torch.ones(5, 24, dtype=torch.int8)}, "head.weight is not floating point"),
        (
            lambda s: s | {"head.weight": quantised(s)},
            "head.weight is not floating point: pass the",
        ),
        ({"head.weight": ONE.expand(10**9, 24)}, "claims more elements than the file contains"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_invalid_state_dicts(tmp_path: Path, state: State, change: Any, message: str) -> None:
    kind = CheckpointError if isinstance(change, dict | str) else VanDeployError
    if isinstance(change, dict):
        state = state | change
    elif isinstance(change, str):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(change)}
    else:
        state = change(state)
    error = error_of(kind, load, tmp_path, {"state_dict": state})
    assert message in " ".join(str(error).split())


# --- the architecture ------------------------------------------------------------------------


@each("name", VARIANTS)
def test_config_of_every_variant(name: str) -> None:
    config = VARIANTS[name].config
    with torch.device("meta"):
        model = VAN(config)
    assert config_from_state(model.state_dict()) == (config, ())
    assert config.variant == name
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())
    head = config.embed_dims[-1] * config.num_classes
    assert config.mac_count((64, 128)) - head == 2 * (config.mac_count(64) - head)


@each(
    "config",
    [
        VanConfig((8, 8, 16, 16), (1, 1, 1, 1), (4, 3, 2, 1), num_classes=2, in_chans=1),
        VanConfig((8, 8, 8, 8), (1, 2, 11, 1), (1.5, 2.25, 2, 2), lka_kernels=(7, 9)),
        VanConfig((10, 6, 7, 3), (2, 1, 1, 1), (1.3, 2, 2, 2), in_chans=7, lka_kernels=(3, 5)),
        VanConfig((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1, 1), patch_sizes=(4, 2, 5, 3)),
    ],
)
def test_config_of_unusual_architectures(tmp_path: Path, config: VanConfig) -> None:
    model = random_van(config, seed=3)
    loaded = load_van(save_weights(tmp_path, model.state_dict()))
    assert len(loaded.source.notes) == (config.lka_kernels != (5, 7))
    assert (loaded.config.trunk, loaded.config.patch_sizes) == (config.trunk, config.patch_sizes)
    assert has_equal_outputs(loaded.model, model)
    assert loaded.preprocessing.channels == config.in_chans


# --- sequential heads ------------------------------------------------------------------------

MIXED = (nn.Flatten(), nn.Linear(24, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 7), nn.SiLU())
UNKNOWN = (nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 7))


def sequential(state: State, *layers: nn.Module) -> State:
    return {**body(state), **with_prefix("head.", nn.Sequential(*layers).state_dict())}


@each(
    ("layers", "head", "expected"),
    [
        ((nn.Dropout(0.2), nn.Linear(24, 7)), None, "dropout,7"),
        ((nn.BatchNorm1d(24), nn.Linear(24, 7)), None, "batchnorm,7"),
        (UNKNOWN, "linear,tanh,linear", "9,tanh,7"),
        (MIXED, "flatten,linear,batchnorm,gelu,linear,silu", "flatten,9,batchnorm,gelu,7,silu"),
    ],
)
def test_sequential_head(tmp_path: Path, tiny: VAN, layers: Any, head: Any, expected: str) -> None:
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_var, layer.running_mean = 0.5 + torch.rand(2, layer.num_features)
    model = load(tmp_path, sequential(tiny.state_dict(), *layers), head)
    assert ",".join(map(str, model.config.head)) == expected
    assert model.config.num_classes == 7
    images = torch.randn(2, 3, 64, 64)
    features = tiny.forward_head(tiny.forward_features(images), pre_logits=True)
    assert torch.equal(model(images), nn.Sequential(*layers).eval()(features))
    assert model.config.parameter_count() == sum(p.numel() for p in model.parameters())


def test_unknown_head_layers_must_be_given(tmp_path: Path, state: State) -> None:
    content = sequential(state, *UNKNOWN)
    message = error_of(CheckpointError, load, tmp_path, content).message
    assert message.startswith("Unknown head: its layers are linear, ?, linear")
    for head in ("linear,linear", "linear,relu", "linear,relu,linear,linear", "relu,linear,linear"):
        message = error_of(UsageError, load, tmp_path, content, head).message
        assert message.startswith(f"--head {head} does not match: its layers are linear, ?")
    message = error_of(UsageError, load, tmp_path, content, "linear,tanh,linear,sigmoid").message
    assert message.startswith("The head ends with a sigmoid")
    assert "not a sequence" in error_of(UsageError, load, tmp_path, state, "linear").message
