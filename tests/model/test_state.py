"""Names of three formats, the architecture read back, and the strict load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from tests.each import each
from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.architecture import config_from_state_dict, variant_of
from van_deploy.model.keys import FORMATS, translate_keys
from van_deploy.model.random_weights import random_van
from van_deploy.model.state import network_from_state, official_state
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig

if TYPE_CHECKING:
    from tests.model.conftest import Rename

State = dict[str, Tensor]


@pytest.fixture
def state(tiny: VAN) -> State:
    return {name: tensor.clone() for name, tensor in tiny.state_dict().items()}


def _load(state: State, head: Sequence[str] | None = None) -> VAN:
    tensors = official_state(state).tensors
    return network_from_state(tensors, config_from_state_dict(tensors, head)[0])


def _images(count: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 64, 64, generator=torch.Generator().manual_seed(1))


# --- names -----------------------------------------------------------------------------------


@each("target", FORMATS)
def test_every_name_of_every_format_is_translated(tiny: VAN, renamed: Rename, target: str) -> None:
    official = tiny.state_dict()
    names = list(renamed(official, target))
    translation = translate_keys(names)
    assert translation.format == target
    assert list(translation.names.values()) == list(official)
    assert (translation.unused, translation.unknown, translation.beside) == ((), (), ())


@each("target", FORMATS)
def test_three_formats_give_the_same_logits(tiny: VAN, renamed: Rename, target: str) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(_load(renamed(tiny.state_dict(), target))(images), tiny(images))


def test_transformers_extra_layer_norm_is_known_and_noted(state: State, renamed: Rename) -> None:
    foreign = renamed(state, "transformers")
    foreign |= {"van.layernorm.weight": torch.ones(24), "van.layernorm.bias": torch.zeros(24)}
    loaded = official_state(foreign)
    assert "van.layernorm.weight" not in loaded.tensors
    assert loaded.notes == (
        "van.layernorm.bias, van.layernorm.weight: in the file, but Transformers does not compute "
        "logits or feature maps with them; left out",
    )


def test_that_layer_norm_is_unexpected_among_official_names(state: State) -> None:
    state["van.layernorm.weight"] = torch.ones(24)
    with pytest.raises(CheckpointError, match=r"1 unexpected: van\.layernorm\.weight"):
        _load(state)


@each("other", ["transformers", "mmpretrain"], fresh="state")
def test_mixed_formats_are_refused(state: State, renamed: Rename, other: str) -> None:
    mixed = renamed({k: v for k, v in state.items() if k.startswith("block1")}, other)
    mixed |= {k: v for k, v in state.items() if not k.startswith("block1")}
    with pytest.raises(CheckpointError, match=f"mixes formats, and is whole in none: .*{other}"):
        official_state(mixed)


PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "_forward_module.")


@each("target", FORMATS, fresh="state")
@each("prefix", [*PREFIXES, "module._orig_mod.", "a.b.c."], fresh="state")
def test_a_network_is_found_behind_any_prefix(
    state: State, tiny: VAN, renamed: Rename, prefix: str, target: str
) -> None:
    wrapped = {prefix + name: t for name, t in renamed(state, target).items()}
    wrapped |= {"n_averaged": torch.tensor(9), "criterion.weight": torch.ones(5)}
    wrapped |= {f"{prefix}total_ops": torch.zeros(1), "val_accuracy.tp": torch.zeros(5)}
    found = official_state(wrapped)
    assert found.notes == (
        "left by training, no part of the network: n_averaged, criterion.weight, "
        f"{prefix}total_ops, val_accuracy.tp",
    )
    assert torch.equal(_load(wrapped)(_images()), tiny(_images()))


def test_what_stands_beside_a_network_is_no_guess(state: State, tiny: VAN) -> None:
    wrapped = {f"model.{name}": tensor for name, tensor in state.items()}
    wrapped["normalize.mean"] = torch.ones(3)
    with pytest.raises(CheckpointError) as error:
        official_state(wrapped, "state_dict")
    assert error.value.message == (
        "The checkpoint holds tensors beside the VAN whose part is unknown: normalize.mean."
    )
    assert error.value.remedy.endswith("name its own: --container state_dict.model.")


def test_several_networks_under_one_key(state: State) -> None:
    both = {f"{who}.{name}": t for who in ("student", "teacher") for name, t in state.items()}
    with pytest.raises(UsageError) as error:
        official_state(both, "state_dict")
    assert error.value.message == (
        "The checkpoint holds 2 networks: official names under 'student.', official names under "
        "'teacher.'."
    )
    assert error.value.remedy == (
        "Say which: --container state_dict.student or --container state_dict.teacher."
    )


def test_other_networks_are_refused_without_a_guess() -> None:
    with pytest.raises(CheckpointError) as error:
        translate_keys(["layer1.0.conv1.weight", "fc.weight"])
    assert error.value.message == (
        "The checkpoint is not a VAN: no tensor is called as its Large Kernel Attention is. "
        "Its 2 tensors begin with layer1.0.conv1.weight, fc.weight."
    )


@each(
    ("target", "prefix", "beside", "notes"),
    [
        ("official", "", "", ("a backbone (official names), without a classification head",)),
        (
            "official",
            "backbone.",
            "decode_head.conv_seg.weight",
            (
                "a backbone of a segmenter (official names), without a classification head",
                "not the backbone's, left out: 1 tensors of decode_head",
            ),
        ),
        (
            "official",
            "backbone.",
            "rpn_head.rpn_conv.weight",
            (
                "a backbone of a detector (official names), without a classification head",
                "not the backbone's, left out: 1 tensors of rpn_head",
            ),
        ),
        ("mmpretrain", "", "", ("a backbone (mmpretrain names), without a classification head",)),
        (
            "transformers",
            "",
            "layernorm.weight",
            (
                "a backbone (transformers names), without a classification head",
                "layernorm.weight: in the file, but Transformers does not compute logits or "
                "feature maps with them; left out",
            ),
        ),
    ],
    fresh="state",
)
def test_backbones_are_read_without_what_surrounds_them(
    state: State,
    renamed: Rename,
    target: str,
    prefix: str,
    beside: str,
    notes: tuple[str, ...],
) -> None:
    body = renamed({k: v for k, v in state.items() if not k.startswith("head.")}, target)
    body = {prefix + name.removeprefix("van."): tensor for name, tensor in body.items()}
    found = official_state(body | ({beside: torch.ones(2)} if beside else {}))
    assert found.notes == notes
    assert set(found.tensors) == {name for name in state if not name.startswith("head.")}


def test_what_may_be_the_backbones_own_stops_it(state: State) -> None:
    body = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("head.")}
    with pytest.raises(CheckpointError, match=r"whose part is unknown: stem2\.weight"):
        official_state(body | {"stem2.weight": torch.ones(2)})


# --- the architecture ------------------------------------------------------------------------


@each("name", VARIANTS)
def test_every_variant_is_read_back(name: str) -> None:
    config = VARIANTS[name].config
    with torch.device("meta"):
        state = VAN(config).state_dict()
    assert config_from_state_dict(state) == (config, ())
    assert variant_of(config) == name


@each(
    "config",
    [
        VanConfig((8, 8, 16, 16), (1, 1, 1, 1), (4, 3, 2, 1), num_classes=2, in_chans=1),
        VanConfig((8, 8, 8, 8), (1, 2, 11, 1), (1.5, 2.25, 2, 2), lka_kernels=(7, 9)),
        VanConfig((10, 6, 7, 3), (2, 1, 1, 1), (1.3, 2, 2, 2), in_chans=7, lka_kernels=(3, 5)),
        VanConfig((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1, 1), patch_sizes=(4, 2, 5, 3)),
    ],
)
def test_unusual_architectures_are_read_back(config: VanConfig) -> None:
    model = random_van(config, seed=3)
    tensors = official_state(model.state_dict()).tensors
    read, notes = config_from_state_dict(tensors)
    assert notes == (
        ()
        if config.lka_kernels == (5, 7)
        else (
            f"kernels {config.lka_kernels[0]} and {config.lka_kernels[1]}: the dilation "
            f"{config.lka_dilation} is the paper's for the first, the weights do not say",
        )
    )
    again = network_from_state(tensors, read)
    assert (read.embed_dims, read.depths, read.hidden_dims) == (
        config.embed_dims,
        config.depths,
        config.hidden_dims,
    )
    assert (read.num_classes, read.in_chans) == (config.num_classes, config.in_chans)
    assert (read.lka_kernels, read.lka_dilation) == (config.lka_kernels, config.lka_dilation)
    images = torch.randn(1, config.in_chans, 64, 64)
    assert torch.equal(again(images), model(images))


def test_a_missing_block_is_named(state: State) -> None:
    rest = {k: v for k, v in state.items() if not k.startswith("block2.0.")}
    with pytest.raises(CheckpointError, match=r"lacks block2\.0 but has block2\.1"):
        _load(rest)


def test_a_missing_stage_is_named(state: State) -> None:
    rest = {k: v for k, v in state.items() if not k.startswith("block4.")}
    with pytest.raises(CheckpointError, match="no block in stage 4 of the VAN"):
        _load(rest)


def test_even_kernels_are_refused(state: State) -> None:
    name = "block1.0.attn.spatial_gating_unit.conv_spatial.weight"
    state[name] = torch.zeros(8, 1, 4, 4)
    with pytest.raises(CheckpointError, match="conv_spatial is 4x4; LKA's are square and odd"):
        _load(state)


def test_an_enormous_block_number_costs_nothing(state: State) -> None:
    state["block1.999999.norm1.weight"] = torch.ones(8)
    with pytest.raises(CheckpointError, match=r"lacks block1\.1 but has block1\.999999"):
        _load(state)


# --- sequential heads ------------------------------------------------------------------------


def _with_head(tiny: VAN, head: nn.Sequential) -> tuple[State, nn.Module]:
    """Return the tiny network's state dict with another head, and that head fitted to data."""
    torch.manual_seed(3)
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.uniform_(layer.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
    body = {k: v for k, v in tiny.state_dict().items() if not k.startswith("head.")}
    return {**body, **{f"head.{k}": v for k, v in head.state_dict().items()}}, head.eval()


@each(
    ("head", "said", "layers"),
    [
        (nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 7)), None, ("dropout", 7)),
        (nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 7)), None, ("batchnorm", 7)),
        (
            nn.Sequential(nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 7)),
            "linear,relu,linear",
            (9, "relu", 7),
        ),
        (
            nn.Sequential(
                *(nn.Flatten(), nn.Linear(24, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Dropout()),
                *(nn.Linear(9, 7), nn.Sigmoid()),
            ),
            "flatten,linear,batchnorm,gelu,dropout,linear,sigmoid",
            ("flatten", 9, "batchnorm", "gelu", "dropout", 7, "sigmoid"),
        ),
    ],
)
def test_a_sequential_head_is_part_of_the_network(
    tiny: VAN, head: nn.Sequential, said: str | None, layers: tuple[int | str, ...]
) -> None:
    state, own = _with_head(tiny, head)
    tensors = official_state(state).tensors
    config, notes = config_from_state_dict(tensors, said.split(",") if said else None)
    assert (config.head, config.num_classes) == (layers, 7)
    assert notes == (
        ("the head begins with layers without weights: taken for dropout (--head)",)
        if layers[0] == "dropout"
        else ()
    )
    model = network_from_state(tensors, config)
    features = tiny.forward_head(tiny.forward_features(_images(2)), pre_logits=True)
    assert torch.equal(model(_images(2)), own(features))
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())


def test_what_a_head_does_not_tell_is_asked(tiny: VAN) -> None:
    state, _ = _with_head(tiny, nn.Sequential(nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 7)))
    with pytest.raises(CheckpointError) as error:
        _load(state)
    assert error.value.message == (
        "The head is linear, ?, linear: the weights do not say what stands at each '?'."
    )
    assert error.value.remedy.startswith("Say all its layers, such as --head linear,relu,linear;")
    assert _load(state, ["linear", "relu", "linear"])
    for said in ("linear,linear", "linear,relu", "linear,relu,linear,linear", "relu,linear,linear"):
        with pytest.raises(UsageError, match=f"^--head {said} is not the checkpoint's: linear, "):
            _load(state, said.split(","))


def test_one_linear_layer_needs_no_head(state: State) -> None:
    with pytest.raises(UsageError, match="The head is one linear layer"):
        _load(state, ["linear"])


# --- the strict load -------------------------------------------------------------------------


def test_network_is_ready_to_deploy(state: State) -> None:
    model = _load(state)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_network_shares_no_memory_with_the_file(state: State) -> None:
    model = _load(state)
    before = model.get_parameter("head.bias").clone()
    state["head.bias"].add_(1)
    assert torch.equal(model.get_parameter("head.bias"), before)


def test_missing_counters_are_no_fault(state: State, tiny: VAN) -> None:
    rest = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(_load(rest)(images), tiny(images))


def test_every_difference_is_listed_by_name(state: State) -> None:
    del state["block2.1.norm2.running_var"]
    del state["norm3.bias"]
    state["extra.weight"] = torch.ones(1)
    state["block2.0.mlp.fc2.weight"] = torch.ones(12, 47, 1, 1)
    with pytest.raises(CheckpointError) as error:
        _load(state)
    assert error.value.message == (
        "The checkpoint does not fit the VAN its shapes describe. "
        "2 missing: block2.1.norm2.running_var, norm3.bias; 1 unexpected: extra.weight; "
        "1 wrongly shaped: block2.0.mlp.fc2.weight (12, 47, 1, 1) instead of (12, 48, 1, 1)."
    )


def test_long_lists_are_cut_and_counted(state: State) -> None:
    state |= {f"extra.{index:02d}": torch.ones(1) for index in range(25)}
    with pytest.raises(CheckpointError, match=r"25 unexpected: extra.00, .*extra.09 and 15 more\."):
        _load(state)


@each("value", [float("nan"), float("inf"), float("-inf")], fresh="state")
def test_nan_and_infinite_weights_are_refused(state: State, value: float) -> None:
    state["block1.0.attn.proj_1.weight"][0, 0] = value
    state["norm2.bias"][3] = value
    with pytest.raises(CheckpointError) as error:
        _load(state)
    assert error.value.message == (
        "2 tensors hold NaN or infinite values: block1.0.attn.proj_1.weight, norm2.bias."
    )


def test_negative_variances_are_refused(state: State) -> None:
    state["patch_embed1.norm.running_var"][0] = -1
    with pytest.raises(CheckpointError, match=r"negative: patch_embed1\.norm\.running_var\."):
        _load(state)


@each("dtype", [torch.float16, torch.bfloat16, torch.float64], fresh="state")
def test_other_precisions_are_converted_and_noted(state: State, dtype: torch.dtype) -> None:
    other = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    loaded = official_state(other)
    assert {t.dtype for t in loaded.tensors.values()} == {torch.float32, torch.int64}
    assert loaded.notes == (f"weights converted to float32 from {str(dtype)[6:]}",)


def test_values_too_large_for_float32_are_refused(state: State) -> None:
    state["head.bias"] = state["head.bias"].double() * 0 + 1e300
    with pytest.raises(CheckpointError, match=r"infinite values: head\.bias"):
        _load(state)


def test_integer_weights_are_refused(state: State) -> None:
    state["head.weight"] = torch.ones(5, 24, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"not floating point: head\.weight\."):
        _load(state)


def test_hollow_tensors_are_refused(state: State) -> None:
    state["head.weight"] = torch.ones(1).expand(10**9, 24)
    with pytest.raises(CheckpointError, match="claim more elements than the file holds"):
        _load(state)


def test_loading_leaves_the_random_state_alone(state: State) -> None:
    before = torch.random.get_rng_state()
    _load(state)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_real_weights_in_three_formats(shared_checkpoint: Path, renamed: Rename) -> None:
    from van_deploy.model.files import read_weights

    tensors = read_weights(shared_checkpoint).tensors
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits = [_load(renamed(tensors, target))(images) for target in FORMATS]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
