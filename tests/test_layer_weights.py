"""A layer's weights: drawn, in a dict, in a file, without some heads, and in its repr."""

import numpy as np
import oracle_layer
import pytest
from judge import assert_same, assert_within
from layers import BATCH, EACH, EMBED, HEADS, LAYERS, layer_of, tokens

from mha_fast import MultiHeadAttention


def test_new_weights_follow_torchs_distributions(real):
    layer = MultiHeadAttention(256, 4, kdim=100, add_bias_kv=True, dtype=real, seed=0)
    assert {x.dtype for x in layer.weights.values()} == {real}
    limits = {
        "q_proj_weight": np.sqrt(6 / (256 + 256)),
        "k_proj_weight": np.sqrt(6 / (256 + 100)),
        "v_proj_weight": np.sqrt(6 / (256 + 256)),
        "out_proj.weight": np.sqrt(1 / 256),
    }
    for name, limit in limits.items():
        x = np.abs(layer.weights[name])
        assert (x <= real.type(limit)).all()
        missing = -np.log(1e-9) / x.size  # of the range, with a probability of one in a billion
        assert x.max() > limit * (1 - missing)
    for name in ("in_proj_bias", "out_proj.bias"):
        assert not layer.weights[name].any()
    for name in ("bias_k", "bias_v"):
        deviations = np.abs(np.std(layer.weights[name]) * np.sqrt(256) - 1)
        assert deviations < 6 / np.sqrt(2 * 256)  # six standard errors
    packed = MultiHeadAttention(256, 4, seed=0).weights["in_proj_weight"]
    assert np.abs(packed).max() <= np.float32(np.sqrt(6 / (4 * 256)))


def test_the_same_seed_gives_the_same_bits():
    def weights(seed):
        return MultiHeadAttention(24, 4, add_bias_kv=True, seed=seed).weights

    for name, x in weights(7).items():
        assert_same(weights(7)[name], x)
        assert_same(weights(np.random.default_rng(7))[name], x)
        if "bias" not in name.removeprefix("bias_"):
            assert (weights(8)[name] != x).any()
            assert (weights(None)[name] != x).any()


@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
def test_state_dict_gives_the_same_layer_without_a_copy(more, real):
    layer = layer_of(more, real.type)
    state = {f"encoder.0.{name}": x for name, x in layer.state_dict().items()}
    state["encoder.1.weight"] = np.ones(3)
    again = MultiHeadAttention.from_state_dict(
        state, HEADS, "encoder.0.", add_zero_attn=layer.add_zero_attn
    )
    assert repr(again) == repr(layer)
    assert list(again.weights) == list(layer.weights)
    assert all(x is layer.weights[name] for name, x in again.weights.items())


def test_dtype_of_a_layer_is_chosen_or_that_of_its_weights(dtype):
    state = {name: x.astype(dtype) for name, x in layer_of({}).weights.items()}
    wide = dtype == np.float64
    assert MultiHeadAttention.from_state_dict(state, HEADS).dtype == ("f8" if wide else "f4")
    assert MultiHeadAttention.from_state_dict(state, HEADS, dtype="f8").dtype == "f8"
    state["in_proj_bias"] = state["in_proj_bias"].astype("f8")
    assert MultiHeadAttention.from_state_dict(state, HEADS).dtype == "f8"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
def test_saved_and_loaded_layer_is_equal_to_the_bit(tmp_path, more, suffix, real):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="needs the extra `models`")
    layer = layer_of(more, real.type)
    layer.save(tmp_path / f"layer{suffix}")
    again = MultiHeadAttention.load(
        str(tmp_path / f"layer{suffix}"), HEADS, add_zero_attn=layer.add_zero_attn
    )
    assert repr(again) == repr(layer)
    for name, x in layer.weights.items():
        assert_same(again.weights[name], x)


def without(name):
    return lambda state: state.pop(name)


def with_shape(name, *shape):
    return lambda state: state.update({name: np.ones(shape, np.float32)})


SEPARATE = {"kdim": 7, "add_bias_kv": True}
STATES = [
    ({}, without("out_proj.weight"), r"out_proj.weight is missing, found in_proj_weight, in_p"),
    ({}, without("in_proj_weight"), "in_proj_weight is missing, found in_proj_bias, out_proj"),
    ({}, without("in_proj_bias"), "in_proj_bias is missing, found in_proj_weight, out_proj"),
    ({}, without("out_proj.bias"), "out_proj.bias is missing"),
    ({}, dict.clear, "out_proj.weight is missing, found nothing"),
    (SEPARATE, without("k_proj_weight"), "k_proj_weight is missing, found q_proj_weight"),
    (SEPARATE, without("q_proj_weight"), "in_proj_weight is missing, found k_proj_weight"),
    (SEPARATE, without("bias_v"), "bias_v is missing"),
    ({}, with_shape("rope", 3), "rope is unknown, expected only in_proj_weight, in_proj_b"),
    ({}, with_shape("q_proj_weight", 24, 24), "k_proj_weight is missing"),
    (SEPARATE, with_shape("in_proj_weight", 72, 24), "in_proj_weight is unknown, expected only"),
    ({}, with_shape("in_proj_weight", 24), r"in_proj_weight has shape \(24,\), expected a matrix"),
    ({}, with_shape("in_proj_weight", 0, 24), r"has shape \(0, 24\), expected a matrix"),
    ({}, with_shape("in_proj_weight", 72, 23), r"has shape \(72, 23\), expected \(72, 24\)"),
    ({}, with_shape("in_proj_weight", 71, 24), r"has shape \(71, 24\), expected \(72, 24\)"),
    ({}, with_shape("in_proj_weight", 60, 24), r"has shape \(60, 24\), expected \(72, 24\)"),
    ({}, with_shape("in_proj_weight", 3, 24), r"has shape \(3, 24\), expected \(72, 24\)"),
    ({}, with_shape("in_proj_bias", 71), r"in_proj_bias has shape \(71,\), expected \(72,\)"),
    (
        {},
        with_shape("out_proj.weight", 24, 22),
        "out_proj.weight has 22 columns, expected a multiple of num_heads, 4",
    ),
    ({}, with_shape("out_proj.weight", 23, 24), r"has shape \(72, 24\), expected \(72, 23\)"),
    ({}, with_shape("out_proj.bias", 1, 24), r"has shape \(1, 24\), expected \(24,\)"),
    (SEPARATE, with_shape("v_proj_weight", 23, 24), r"shape \(23, 24\), expected \(24, 24\)"),
    (SEPARATE, with_shape("bias_k", 24), r"bias_k has shape \(24,\), expected \(1, 1, 24\)"),
]


@pytest.mark.parametrize(("more", "change", "message"), STATES, ids=[x[-1][:40] for x in STATES])
def test_bad_state_names_what_was_found_and_expected(tmp_path, more, change, message):
    state = layer_of(more).state_dict()
    change(state)
    prefixed = {f"model.self_attn.{name}": x for name, x in state.items()}
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention.from_state_dict(prefixed, HEADS, "model.self_attn.")
    np.savez(tmp_path / "bad.npz", **prefixed)
    with pytest.raises(ValueError, match=rf"bad\.npz: model.self_attn.*{message}"):
        MultiHeadAttention.load(tmp_path / "bad.npz", HEADS, "model.self_attn.")


# ---- Heads taken out -----------------------------------------------------------------------------


@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("heads", [[], [0], [3, 1], [0, 1], {2, 3}, range(1, 4)], ids=str)
def test_pruned_layer_is_the_layer_without_what_the_heads_add(more, heads):
    layer = layer_of(more)
    group_size = HEADS // layer.num_kv_heads
    if len(heads) != group_size * len({h // group_size for h in heads}):
        with pytest.raises(ValueError, match=f"expected whole groups of the {group_size} heads"):
            layer.prune_heads(heads)
        return
    pruned = layer.prune_heads(heads)
    assert pruned.num_heads == HEADS - len(heads)
    assert (pruned.embed_dim, pruned.head_dim) == (EMBED, layer.head_dim)
    silent = {name: x.copy() for name, x in layer.weights.items()}
    by_head = silent["out_proj.weight"].reshape(EMBED, HEADS, layer.head_dim)
    by_head[:, list(heads)] = 0
    silent = MultiHeadAttention.from_state_dict(silent, HEADS, add_zero_attn=layer.add_zero_attn)
    arguments = [tokens(BATCH, 13, n) for n in (EMBED, layer.kdim, layer.vdim)]
    answer = oracle_layer.multi_head_attention(silent, *arguments, causal=True)
    result = pruned(*arguments, causal=True, **EACH)
    assert_within(np.abs(result.out - answer.out), answer.out_bound, "out")
    kept = [h for h in range(HEADS) if h not in heads]
    assert_same(result.weights, layer(*arguments, causal=True, **EACH).weights[:, kept])
    for name, x in pruned.weights.items():
        assert not np.shares_memory(x, layer.weights[name])


@pytest.mark.parametrize(
    ("heads", "found"), [([4], r"\[4\]"), ([-1], r"\[-1\]"), ([0, 1, 2, 3], r"\[0, 1, 2, 3\]")]
)
def test_heads_that_are_not_there_or_all_are_refused(heads, found):
    with pytest.raises(ValueError, match=f"heads holds {found}, expected some of 0 to 3, not all"):
        layer_of({}).prune_heads(heads)


# ---- What it says --------------------------------------------------------------------------------


@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
def test_repr_is_a_call_that_makes_such_a_layer(more, real):
    layer = MultiHeadAttention(EMBED, HEADS, **more, dtype=real)
    again = eval(repr(layer), {"MultiHeadAttention": MultiHeadAttention})
    assert repr(again) == repr(layer)
    shapes = {name: x.shape for name, x in layer.weights.items()}
    assert {name: x.shape for name, x in again.weights.items()} == shapes
    assert layer.num_parameters == sum(np.prod(shape) for shape in shapes.values())


def test_repr_shows_what_is_unusual_and_nothing_else():
    assert repr(MultiHeadAttention(24, 4)) == "MultiHeadAttention(24, 4)"
    layer = MultiHeadAttention(24, 4, num_kv_heads=2, head_dim=5, bias=False, dtype="f8")
    text = "MultiHeadAttention(24, 4, num_kv_heads=2, head_dim=5, bias=False, dtype='float64')"
    assert repr(layer) == text


SIZES = [
    (TypeError, (24.0, 4), {}, "embed_dim is 24.0, expected a positive int"),
    (TypeError, (24, "4"), {}, "num_heads is '4', expected a positive int"),
    (TypeError, (24, True), {}, "num_heads is True, expected a positive int"),
    (TypeError, (24, 4), {"kdim": 1.5}, "kdim is 1.5, expected a positive int"),
    (TypeError, (24, 4), {"dtype": "f2"}, "dtype is 'f2', expected float32 or float64"),
    (TypeError, (24, 4), {"dtype": ">f4"}, "dtype is '>f4', expected float32 or float64"),
    (ValueError, (0, 4), {}, "embed_dim is 0, expected at least 1"),
    (ValueError, (24, -4), {}, "num_heads is -4, expected at least 1"),
    (ValueError, (24, 5), {}, "embed_dim is 24, expected a multiple of num_heads, 5, or a head"),
    (ValueError, (24, 4), {"num_kv_heads": 3}, "num_kv_heads is 3, expected a divisor of num_h"),
    (ValueError, (24, 4), {"num_kv_heads": 8}, "num_kv_heads is 8, expected a divisor of num_h"),
    (ValueError, (24, 4), {"head_dim": 0}, "head_dim is 0, expected at least 1"),
    (ValueError, (24, 4), {"vdim": 0}, "vdim is 0, expected at least 1"),
]


@pytest.mark.parametrize(("error", "sizes", "more", "message"), SIZES, ids=[x[-1] for x in SIZES])
def test_bad_size_is_named(error, sizes, more, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention(*sizes, **more)


def test_canary_a_pruned_layer_with_another_head_gone_is_caught():
    layer = layer_of({})
    x = tokens(BATCH, 13, EMBED)
    answer = oracle_layer.multi_head_attention(layer.prune_heads([1]), x)
    with pytest.raises(AssertionError, match="out: .* are wrong"):
        assert_within(np.abs(layer.prune_heads([2])(x) - answer.out), answer.out_bound, "out")
