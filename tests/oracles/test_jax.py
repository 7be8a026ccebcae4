"""The door to JAX: gradients are ours, compiled or not, and those of its own attention."""

import numpy as np
import pytest
import sizes
from judge import assert_near, assert_same
from sizes import qkv

from mha_fast import attention_vjp

jax = pytest.importorskip("jax")

from mha_fast.jax import attention  # noqa: E402

OPTIONS = {"causal": True, "softcap": 2.0, "dropout_p": 0.2, "seed": 3}


def loss(q, k, v, bias=None, **options):
    return jax.numpy.sum(attention(q, k, v, bias, **options) ** 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_attention_vjp(compiled):
    q, k, v = qkv(9, 13, heads=4, kv_heads=2)
    bias = sizes.random(4, 9, 13)
    out, pullback = attention_vjp(q, k, v, bias=bias, **OPTIONS)
    expected = pullback(2 * out)
    gradient = jax.grad(lambda *arrays: loss(*arrays, **OPTIONS), argnums=(0, 1, 2, 3))
    for _ in range(20 if compiled else 1):
        found = (jax.jit(gradient) if compiled else gradient)(q, k, v, bias)
        for a, name in zip(found, ("q", "k", "v", "bias"), strict=True):
            assert_same(np.asarray(a), getattr(expected, name), name)


def test_bfloat16_goes_through_without_a_detour():
    q, k, v = qkv(9, 13, dtype=sizes.BFLOAT16)
    out, pullback = attention_vjp(q, k, v)
    found = jax.grad(lambda q: attention(q, k, v).astype("float32").sum())(q)
    assert_same(np.asarray(attention(q, k, v)), out)
    assert_same(np.asarray(found), pullback(np.ones_like(out)).q)


def test_gradients_are_those_of_jax_itself():
    q, k, v = qkv(300, 300, 16, heads=2)

    def theirs(q, k, v):
        arrays = (x.swapaxes(1, 2) for x in (q, k, v))
        return (jax.nn.dot_product_attention(*arrays, is_causal=True) ** 2).sum()

    expected = jax.grad(theirs, argnums=(0, 1, 2))(q, k, v)
    found = jax.grad(lambda *x: loss(*x, causal=True), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(found, expected, strict=True):
        assert_near(np.asarray(a), np.asarray(b), 64 * np.abs(b).max())


def test_mapped_entries_are_those_of_a_batch():
    q, k, v = qkv(9, 13)
    mapped = jax.vmap(attention)(q, k, v)
    assert_same(np.asarray(mapped), np.asarray(attention(q, k, v)))


def test_large_calls_on_many_threads_come_back():
    q = sizes.random(8, 512, 64)
    gradient = jax.jit(jax.grad(lambda x: loss(x, x, x, causal=True)))
    first = np.asarray(gradient(q))
    for _ in range(10):
        assert_same(np.asarray(gradient(q)), first)


def test_canary_another_seed_has_another_gradient():
    q, k, v = qkv(9, 13)
    one, other = (jax.grad(loss)(q, k, v, **OPTIONS | {"seed": n}) for n in (3, 4))
    assert (np.asarray(one) != np.asarray(other)).any()
