"""linear_vjp, layer_norm_vjp and the layer's: right in every direction, and the same bits."""

import numpy as np
import pytest
import sizes
from judge import FACTOR, assert_near, assert_same
from layers import BATCH, EMBED, HEADS, LAYERS, layer_of, tokens

from mha_fast import layer_norm, layer_norm_vjp, linear, linear_vjp, rotary_tables
from mha_fast.model.projection import ROWS_IN_CHAIN

COS, SIN = rotary_tables(20, 4, dtype=np.float64)
CALLS = {
    "plain": {},
    "causal, capped, sinks": {"causal": True, "softcap": 1.5, "sinks": np.linspace(-1, 1, HEADS)},
    "rotary": {"causal": True, "rotary": {"cos": COS, "sin": SIN, "interleaved": True}},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "padding": {"key_padding_mask": np.arange(13) >= np.array([[13], [8]])},
}


def assert_slope(f, x, gradient, what):
    """Central differences of f in a random direction; f is of about the size of its slope."""
    way, before, step = sizes.random(*x.shape, dtype=np.float64), x.copy(), 2.0**-17
    x += step * way
    up = f()
    x[...] = before - step * way
    down = f()
    x[...] = before
    slope = (gradient * way).sum()
    assert abs((up - down) / (2 * step) - slope) <= 2.0**-20 * (1 + abs(slope)), what


# ---- Products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 7, ROWS_IN_CHAIN, ROWS_IN_CHAIN + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_a_product_are_products(isa, real, rows, bias):
    x = sizes.random(rows, 13, dtype=real)
    weight, b = sizes.random(5, 13, dtype=real), sizes.random(5, dtype=real)
    out, pullback = linear_vjp(x, weight, b if bias else None)
    assert_same(out, linear(x, weight, b if bias else None))
    d_out = sizes.random(rows, 5, dtype=real, seed=3)
    found = pullback(d_out)
    wide = [a.astype(np.longdouble) for a in (d_out, x, weight)]
    assert_near(found.x, wide[0] @ wide[2], np.abs(d_out) @ np.abs(weight))
    assert_near(found.weight, wide[0].T @ wide[1], rows**0.5 * (np.abs(d_out).T @ np.abs(x)) + 1)
    if bias:
        assert_near(found.bias, wide[0].sum(axis=0), rows**0.5 * np.abs(d_out).sum(axis=0) + 1)
    else:
        assert found.bias is None


def test_bits_of_a_product_are_those_of_every_isa_and_thread_count(dtype):
    x, weight = sizes.random(3, 500, 40, dtype=dtype), sizes.random(70, 40, dtype=dtype)

    def call(threads=1):
        out, pullback = linear_vjp(x, weight, threads=threads)
        return pullback(sizes.random(3, 500, 70, dtype=dtype))[:2]

    (_, first), *others = sizes.on_every_isa(call)
    for isa, found in [*others, ("three threads", call(3))]:
        for a, b in zip(found, first, strict=True):
            assert a.dtype == dtype
            assert_same(a, b, isa)


# ---- Layer norm ----------------------------------------------------------------------------------


def test_layer_norm_is_its_definition(dtype):
    x, weight, bias = (sizes.random(*shape, dtype=dtype) for shape in ((2, 5, 33), (33,), (33,)))
    wide = x.astype(np.float64)
    spread = np.sqrt(wide.var(axis=-1, keepdims=True) + 1e-5)
    exact = (wide - wide.mean(axis=-1, keepdims=True)) / spread * weight.astype(float)
    exact += bias.astype(float)
    out = layer_norm(x, weight, bias)
    assert out.dtype == dtype
    eps = np.finfo(np.float32 if dtype.itemsize == 2 else dtype).eps
    bound = FACTOR * eps * (np.abs(exact) + 8) + np.abs(exact) * sizes.epsilon(dtype)
    assert (np.abs(out.astype(float) - exact) <= bound).all()
    assert_same(out, layer_norm_vjp(x, weight, bias)[0])


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_layer_norm_are_its_slopes(bias):
    x, weight = sizes.random(3, 4, 9, dtype=np.float64), sizes.random(9, dtype=np.float64)
    b = sizes.random(9, dtype=np.float64, seed=5) if bias else None
    out, pullback = layer_norm_vjp(x, weight, b, eps=0.1)
    d_out = sizes.random(*out.shape, dtype=np.float64, seed=6)
    found = pullback(d_out)

    def loss():
        return (layer_norm(x, weight, b, eps=0.1) * d_out).sum()

    for name, array in (("x", x), ("weight", weight)) + ((("bias", b),) if bias else ()):
        assert_slope(loss, array, getattr(found, name), name)


# ---- The layer -----------------------------------------------------------------------------------


def layer_and_inputs(more, seqlen=13):
    layer = layer_of(more, np.float64)
    memory = "kdim" in more
    inputs = [tokens(BATCH, seqlen, EMBED, dtype=np.float64)]
    widths = [getattr(layer, name) for name in ("kdim", "vdim") if memory]
    inputs += [tokens(BATCH, seqlen, width, dtype=np.float64) for width in widths]
    return layer, inputs


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("more", LAYERS.values(), ids=LAYERS)
def test_gradients_of_a_layer_are_its_slopes(more, call):
    layer, inputs = layer_and_inputs(more)
    if "rotary" in call and layer.head_dim % 2:
        call = call | {"rotary": {"cos": COS[:, :1], "sin": SIN[:, :1]}}
    out, pullback = layer.vjp(*inputs, **call)
    if "seed" not in call:
        assert_same(out, layer(*inputs, **call))
    d_out = sizes.random(*out.shape, dtype=np.float64, seed=6)
    found = pullback(d_out)
    assert found.weights.keys() == layer.weights.keys()

    def loss():
        return (layer.vjp(*inputs, **call)[0] * d_out).sum()

    for name, weight in layer.weights.items():
        assert_slope(loss, weight, found.weights[name], name)
    for name, x in zip(("query", "key", "value"), inputs, strict=False):
        assert_slope(loss, x, getattr(found, name), name)
    if "sinks" in call:
        assert_slope(loss, call["sinks"], found.sinks, "sinks")


@pytest.mark.parametrize(
    "names", [("query",), ("query", "key"), ("query", "value"), ("q", "k", "v")]
)
def test_inputs_that_are_one_array_share_a_gradient(names):
    layer, (x,) = layer_and_inputs({})
    y = tokens(BATCH, 13, EMBED, dtype=np.float64, seed=4)
    inputs = {"query": x} if names == ("query",) else {"query": x, "key": y, "value": y}
    if names == ("query", "key"):
        inputs = {"query": x, "key": x, "value": y}
    if names == ("query", "value"):
        inputs = {"query": x, "key": y, "value": x}
    out, pullback = layer.vjp(**inputs)
    found = pullback(out)
    copies = {"query": x, "key": inputs.get("key", x).copy(), "value": None}
    copies["value"] = inputs.get("value", copies["key"]).copy()
    apart = layer.vjp(**copies)[1](out)
    total = {"x": 0, "y": 0}
    for name in ("query", "key", "value"):
        source = inputs.get(name, x)
        total["x" if source is x else "y"] += getattr(apart, name)
    assert_near(found.query, total["x"], 8)
    given = [getattr(found, n) for n in ("key", "value") if getattr(found, n) is not None]
    assert len(given) == (names != ("query",))
    for gradient in given:
        assert_near(gradient, total["y"], 8)


def test_layer_bits_are_those_of_one_thread_and_every_isa():
    layer, x = layer_of(LAYERS["grouped"]), tokens(3, 300, EMBED)

    def call(threads=1):
        out, pullback = layer.vjp(x, causal=True, dropout_p=0.1, seed=3, threads=threads)
        found = pullback(out)
        return [found.query, *found.weights.values()]

    (_, first), *others = sizes.on_every_isa(call)
    for isa, found in [*others, ("three threads", call(3))]:
        for a, b in zip(found, first, strict=True):
            assert_same(a, b, isa)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_vjp(np.ones((3, 2)), np.ones((4, 3))), ValueError, "weight has width 3"),
        (lambda: linear_vjp(np.ones((3, 2)), np.ones((4, 2)))[1](np.ones((3, 2))), ValueError,
         "d_out has shape (3, 2), expected (3, 4)"),
        (lambda: layer_norm(np.ones((3, 2)), np.ones(3)), ValueError, "weight has shape (3,)"),
        (lambda: layer_norm(np.ones((3, 2)), np.ones(2), eps=-1.0), ValueError, "eps is -1.0"),
        (lambda: layer_norm(np.ones((3, 2), int), np.ones(2)), TypeError, "x has dtype int64"),
        (lambda: layer_norm_vjp(np.ones(2), np.ones(2))[1](np.ones(3)), ValueError,
         "d_out has shape (3,), expected (2,)"),
        (lambda: layer_of({}).vjp(np.ones((2, 3, EMBED)), causal=2), TypeError, "causal is 2"),
        (lambda: layer_of({}).vjp(np.ones((2, 3, EMBED)))[1](np.ones(3)), ValueError,
         f"d_out has shape (3,), expected (2, 3, {EMBED})"),
    ],
    ids=range(8),
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_canary_a_missing_part_of_a_gradient_is_caught():
    layer, (x,) = layer_and_inputs({})
    out, pullback = layer.vjp(x)
    weight = layer.weights["in_proj_weight"]
    gradient = pullback(out).weights["in_proj_weight"].copy()
    gradient[:EMBED] = 0

    def loss():
        return 0.5 * (layer(x) ** 2).sum()

    with pytest.raises(AssertionError, match="in_proj"):
        assert_slope(loss, weight, gradient, "in_proj")
