"""The door to autograd: its gradients are ours, to the bit."""

import numpy as np
import pytest
import sizes
from judge import assert_same
from sizes import qkv
from test_layer_gradients import assert_slope

from mha_fast import attention_vjp

autograd = pytest.importorskip("autograd", reason='pip install "mha_fast[autograd]"')
anp = pytest.importorskip("autograd.numpy")

from mha_fast.autograd import attention  # noqa: E402

OPTIONS = {"causal": True, "softcap": 2.0, "dropout_p": 0.2, "seed": 3}


def arrays(real=np.float64):
    q, k, v = qkv(9, 13, heads=4, kv_heads=2, dtype=real)
    bias = sizes.random(4, 9, 13, dtype=real)
    return q, k, v, None, bias, sizes.random(4, dtype=real), abs(sizes.random(4, dtype=real))


def loss(*arguments, **options):
    return anp.sum(anp.tanh(attention(*arguments, **options)))


def test_gradients_are_those_of_attention_vjp(real):
    given = arrays(real)
    names = ("q", "k", "v", "mask", "bias", "sinks", "alibi_slopes")
    out, pullback = attention_vjp(**dict(zip(names, given, strict=True)), **OPTIONS)
    order = (0, 1, 2, 4, 5, 6)
    found = autograd.grad(loss, order)(*given, **OPTIONS)
    exact = autograd.grad(lambda y: anp.sum(anp.tanh(y)))(out)
    expected = pullback(exact)
    for gradient, i in zip(found, order, strict=True):
        assert_same(gradient, getattr(expected, names[i]), names[i])


def test_a_program_around_it_is_differentiated():
    q, k, v, *_ = arrays()

    def program(q):
        out, lse = attention(anp.sin(q), k, v, return_lse=True)
        return anp.sum(out[..., 0] * lse) + anp.sum(q**2)

    assert_slope(lambda: program(q), q, autograd.grad(program)(q), "program")


def test_a_second_derivative_is_refused():
    q, k, v, *_ = arrays()
    first = autograd.grad(lambda q: loss(q, k, v))
    with pytest.raises(NotImplementedError, match="no gradient of that gradient"):
        autograd.grad(lambda q: anp.sum(first(q)))(q)


def test_import_of_the_package_does_not_load_autograd(output_of):
    assert output_of("import sys, mha_fast; print('autograd' in sys.modules)") == "False"


def test_canary_another_seed_has_another_gradient():
    given = arrays()
    one, other = (autograd.grad(loss)(*given, **OPTIONS | {"seed": n}) for n in (3, 4))
    assert (one != other).any()
