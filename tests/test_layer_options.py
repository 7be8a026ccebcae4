"""What a layer's call hands on: a cap, sinks, rotary positions and a cache, to the bit."""

import numpy as np
import pytest
from judge import assert_same
from layers import BATCH, EACH, EMBED, HEADS, LAYERS, layer_of, tokens

from mha_fast import KVCache, attention, linear, rotary, rotary_tables

SEQLEN = 40
SINKS = np.linspace(-1, 2, HEADS)
ROTARY = dict(zip(("cos", "sin"), rotary_tables(SEQLEN, 4), strict=True))
PLAIN = [{}, LAYERS["grouped"], LAYERS["no bias"]]


def by_steps(layer, x, rotated=None, **options):
    """The layer of public functions."""
    q, kv = layer.num_heads, layer.num_kv_heads
    qkv = linear(x, layer.weights["in_proj_weight"], layer.weights.get("in_proj_bias"))
    qkv = qkv.reshape(*x.shape[:-1], q + 2 * kv, layer.head_dim).swapaxes(-2, -3)
    q, k, v = np.split(qkv, [q, q + kv], axis=-3)
    if rotated:
        q, k = rotary(q, **rotated), rotary(k, **rotated)
    heads = attention(q, k, v, causal=True, **options).swapaxes(-2, -3)
    heads = heads.reshape(*x.shape[:-1], -1)
    return linear(heads, layer.weights["out_proj.weight"], layer.weights.get("out_proj.bias"))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("more", PLAIN, ids=str)
def test_options_are_those_of_the_public_functions(more, interleaved, real):
    layer, x = layer_of(more, real.type), tokens(BATCH, SEQLEN, EMBED, dtype=real)
    options = {"softcap": 1.5, "sinks": SINKS}
    rotated = ROTARY | {"interleaved": interleaved}
    expected = by_steps(layer, x, rotated, **options)
    assert_same(layer(x, causal=True, rotary=rotated, **options), expected)
    assert (layer(x, causal=True) != expected).any()


@pytest.mark.parametrize("chunks", [[40], [17, 1, 1, 20, 1], [1] * 40], ids=len)
@pytest.mark.parametrize("more", PLAIN, ids=str)
def test_tokens_in_chunks_have_the_bits_of_one_call(more, chunks):
    layer, x = layer_of(more), tokens(BATCH, SEQLEN, EMBED)
    cache = KVCache(BATCH, layer.num_kv_heads, layer.head_dim)
    outs, at = [], 0
    for count in chunks:
        part = x[:, at : at + count]
        outs.append(layer(part, causal=True, rotary=ROTARY, cache=cache, sinks=SINKS))
        at += count
    whole = layer(x, causal=True, rotary=ROTARY, sinks=SINKS)
    assert_same(np.concatenate(outs, axis=1), whole)


def test_a_text_alone_needs_no_batch_axis():
    layer, x = layer_of({}), tokens(SEQLEN, EMBED)
    cache = KVCache(1, HEADS, layer.head_dim)
    outs = [layer(x[i : i + 20], causal=True, rotary=ROTARY, cache=cache) for i in (0, 20)]
    assert_same(np.concatenate(outs), layer(x, causal=True, rotary=ROTARY))


def test_rows_of_a_cache_may_stand_at_positions_of_their_own():
    layer, x = layer_of({}), tokens(BATCH, SEQLEN, EMBED)
    cache = KVCache(BATCH, HEADS, layer.head_dim)
    layer(x[:, :30], causal=True, rotary=ROTARY, cache=cache)
    cache.rewind([30, 12])
    last = layer(x[:, 30:31], rotary=ROTARY, cache=cache)
    for row, length in enumerate((30, 12)):
        alone = np.concatenate([x[row, :length], x[row, 30:31]])
        assert_same(last[row], layer(alone, causal=True, rotary=ROTARY)[-1:])


def test_weights_of_cached_keys_are_returned():
    layer, x = layer_of({}), tokens(BATCH, SEQLEN, EMBED)
    cache = KVCache(BATCH, HEADS, layer.head_dim)
    layer(x[:, :-1], cache=cache, causal=True)
    weights = layer(x[:, -1:], cache=cache, causal=True, **EACH).weights
    assert_same(weights, layer(x, causal=True, **EACH).weights[..., -1:, :])


X = tokens(BATCH, 5, EMBED)
CACHE = KVCache(BATCH, HEADS, EMBED // HEADS)


@pytest.mark.parametrize(
    ("more", "call", "error", "message"),
    [
        ({}, {"rotary": (1, 2)}, TypeError, "rotary is (1, 2), expected a dict"),
        ({}, {"rotary": {"cos": 1}}, ValueError, "rotary has 'cos', expected 'cos' and 'sin'"),
        ({}, {"rotary": ROTARY | {"x": 1}}, ValueError, "'x', expected 'cos' and 'sin'"),
        ({}, {"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({}, {"sinks": np.zeros(3)}, ValueError, "sinks has shape (3,)"),
        ({}, {"cache": {}}, TypeError, "cache is a dict, expected a KVCache or None"),
        ({}, {"cache": CACHE, "key": X + 1}, ValueError, "cache is given, expected None beside"),
        ({}, {"cache": CACHE, "key_padding_mask": np.zeros((BATCH, 5), bool)}, ValueError, "None"),
        ({"add_zero_attn": True}, {"cache": CACHE}, ValueError, "cache is given, expected None"),
        ({}, {"cache": CACHE, "softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({}, {"cache": KVCache(1, HEADS, 6)}, ValueError, "k has shape (2, 4, 5, 6), expected (1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_options_are_refused_by_name_and_the_cache_is_as_before(more, call, error, message):
    with pytest.raises(error) as caught:
        layer_of(more)(X, **call)
    assert message in str(caught.value)
    assert len(CACHE) == 0


def test_canary_positions_that_start_again_are_caught():
    layer, x = layer_of({}), tokens(BATCH, SEQLEN, EMBED)
    outs = [layer(x[:, i : i + 20], causal=True, rotary=ROTARY) for i in (0, 20)]
    with pytest.raises(AssertionError):
        assert_same(np.concatenate(outs, axis=1), layer(x, causal=True, rotary=ROTARY))
