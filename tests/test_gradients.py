"""attention_vjp: accurate, the same bits everywhere, and nothing of what is hidden."""

import numpy as np
import oracle_gradient
import pytest
import sizes
from judge import assert_same, assert_within, compute_dtype, rounding, tolerance
from options import OPTIONS, PAIRS, pair_of
from sizes import KEY_BLOCK, qkv

import mha_fast
from mha_fast import AttentionGradients, attention, attention_vjp, reference

SEQLEN_Q, SEQLEN_K = 67, 2 * KEY_BLOCK + 9  # two shares of the keys
FIELDS = AttentionGradients._fields


def arrays(dtype=np.float32, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, **more):
    return qkv(seqlen_q, seqlen_k, 5, 9, **{"heads": 4, "kv_heads": 2, "dtype": dtype} | more)


def cotangents(q, v, seed=7):
    shape = (*q.shape[:-1], v.shape[-1])
    dtype = compute_dtype(q.dtype)
    return sizes.random(*shape, dtype=dtype, seed=seed), sizes.random(*shape[:-1], dtype=dtype)


def gradients(q, k, v, d_out, d_lse, threads=None, **options):
    result, pullback = attention_vjp(q, k, v, return_lse=True, threads=threads, **options)
    return result, pullback(d_out, d_lse)


def assert_gradients_accurate(found, q, k, v, d_out, d_lse, **options):
    """|g - g64| <= FACTOR (1 + max|score|) eps size, the rule of the forward pass with the size of
    each gradient in place of that of `out`, and a rounding to its storage dtype."""
    compute = compute_dtype(np.result_type(q, k, v))
    wide = np.longdouble if compute == np.float64 else np.float64
    exact, answer = oracle_gradient.attention_vjp(q, k, v, d_out, d_lse, wide=wide, **options)
    assert {name for name in FIELDS if getattr(found, name) is not None} == set(exact)
    factor = 3 * tolerance(answer.score, compute).max(initial=0)  # three factors carry the error
    for name, (right, size) in exact.items():
        got = np.asarray(getattr(found, name))
        right, size = (x.reshape(got.shape) for x in (right, size))
        bound = factor * size + rounding(right, got.dtype) + 2**10 * sizes.smallest_normal(compute)
        assert_within(np.abs(got - right), bound, f"gradient of {name}")


@pytest.mark.parametrize("seqlen_q", [1, SEQLEN_Q])
def test_gradients_are_accurate_for_every_option(isa, dtype, option, seqlen_q):
    q, k, v = arrays(dtype, seqlen_q)
    options = option(q, k, v)
    cotangent = cotangents(q, v)
    result, found = gradients(q, k, v, *cotangent, **options)
    assert_gradients_accurate(found, q, k, v, *cotangent, **options)
    assert_same(result, attention(q, k, v, return_lse=True, **options))
    for name in ("q", "k", "v"):
        assert getattr(found, name).dtype == dtype


@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_gradients_of_two_options_are_accurate(names, real):
    q, k, v = arrays(real)
    options = pair_of(names, q, k, v)
    cotangent = cotangents(q, v)
    _, found = gradients(q, k, v, *cotangent, **options)
    assert_gradients_accurate(found, q, k, v, *cotangent, **options)


@pytest.mark.parametrize("seqlen_k", [1, 191, 192, 193, 384, 385])
@pytest.mark.parametrize("seqlen_q", [1, 13, 191, 192, 193, 389])
def test_gradients_are_accurate_at_other_sizes(isa, seqlen_q, seqlen_k):
    q, k, v = arrays(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=2, batch=(1,))
    cotangent = cotangents(q, v)
    _, found = gradients(q, k, v, *cotangent, causal=True)
    assert_gradients_accurate(found, q, k, v, *cotangent, causal=True)


@pytest.mark.parametrize("dims", [(1, 1), (3, 70), (64, 64), (130, 17)], ids=str)
def test_gradients_are_accurate_for_other_widths(isa, real, dims):
    q, k, v = qkv(70, 200, *dims, heads=2, kv_heads=1, batch=(), dtype=real)
    cotangent = cotangents(q, v)
    _, found = gradients(q, k, v, *cotangent)
    assert_gradients_accurate(found, q, k, v, *cotangent)


@pytest.mark.parametrize("name", OPTIONS)
def test_central_differences_agree(name):
    """In random directions, of a function that the definitions did not write."""
    q, k, v = arrays(np.float64, 20, 30)
    options = OPTIONS[name](q, k, v)
    d_out, d_lse = cotangents(q, v)
    _, found = gradients(q, k, v, d_out, d_lse, **options)
    given = {"q": q, "k": k, "v": v, **options}

    def loss(arguments):
        out, lse = attention(**arguments, return_lse=True)
        return (out * d_out).sum() + np.where(np.isfinite(lse), lse * d_lse, 0).sum()

    for field in FIELDS:
        gradient = getattr(found, field)
        if gradient is None:
            continue
        x = np.asarray(given[field], np.float64)
        way, step = np.where(np.isfinite(x), sizes.random(*x.shape, dtype=np.float64), 0), 2.0**-17
        ends = (given | {field: x + sign * step * way if x.ndim else float(x + sign * step * way)}
                for sign in (1, -1))  # fmt: skip
        up, down = (loss(arguments) for arguments in ends)
        slope = (np.asarray(gradient) * way).sum()
        assert abs((up - down) / (2 * step) - slope) <= 2.0**-20 * (1 + np.abs(slope)), field


# ---- Bits ----------------------------------------------------------------------------------------


def test_bits_are_those_of_every_isa_and_thread_count(option, dtype):
    q, k, v = arrays(dtype, 200, 1200)
    options = option(q, k, v)
    cotangent = cotangents(q, v)

    def call(threads=1):
        return tuple(x for x in gradients(q, k, v, *cotangent, threads, **options)[1])

    (_, first), *others = sizes.on_every_isa(call)
    for isa, found in [*others, ("three threads", call(3))]:
        for name, a, b in zip(FIELDS, found, first, strict=True):
            if a is not None:
                assert_same(np.asarray(a), np.asarray(b), f"{name} of {isa}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("threads", [2, 4])
def test_one_head_on_many_threads_has_the_bits_of_one(causal, threads):
    q, k, v = qkv(1500, 1900, 16, heads=1, batch=())
    cotangent = cotangents(q, v)
    expected = gradients(q, k, v, *cotangent, 1, causal=causal)[1][:3]
    for _ in range(3):
        found = gradients(q, k, v, *cotangent, threads, causal=causal)[1][:3]
        for name, a, b in zip("qkv", found, expected, strict=True):
            assert_same(a, b, name)


def test_a_batch_row_alone_has_the_bits_of_its_batch():
    q, k, v = arrays(batch=(3,))
    d_out, d_lse = cotangents(q, v)
    whole = gradients(q, k, v, d_out, d_lse, causal=True)[1]
    alone = gradients(q[1], k[1], v[1], d_out[1], d_lse[1], causal=True)[1]
    for name in "qkv":
        assert_same(getattr(whole, name)[1], getattr(alone, name))


def test_padding_changes_no_bit():
    """Keys past kv_lengths, and rows whose cotangent is 0, add nothing."""
    q, k, v = arrays()
    d_out, d_lse = cotangents(q, v)
    d_out[:, :, 50:], d_lse[:, :, 50:] = 0, 0
    part = (slice(None), slice(None), slice(300))
    rows = (slice(None), slice(None), slice(50))
    whole = gradients(q, k, v, d_out, d_lse, kv_lengths=300, causal=True, q_offset=250)[1]
    cut = gradients(q[rows], k[part], v[part], d_out[rows], d_lse[rows], causal=True, q_offset=250)[
        1
    ]
    assert_same(whole.q[rows], cut.q)
    assert_same(whole.k[part], cut.k)
    assert_same(whole.v[part], cut.v)
    assert not whole.k[:, :, 300:].any() and not whole.v[:, :, 300:].any()


# ---- What is hidden ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hiding", ["kv_lengths", "key mask", "float mask", "causal", "open window"]
)
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
def test_poison_that_a_row_does_not_see_reaches_no_gradient(isa, hiding, poison):
    """A key, its value, and the query and cotangent of a row, each with all that meets it."""
    q, k, v = arrays()
    options = OPTIONS[hiding](q, k, v)
    d_out, d_lse = cotangents(q, v)
    seen = attention(q, k, v, return_weights=True, **options).weights > 0
    clean = gradients(q, k, v, d_out, d_lse, **options)[1]
    hidden = ~seen.any(axis=(0, 1, 2))
    if hidden.any():
        for name in ("k", "v"):
            bad = {"q": q, "k": k.copy(), "v": v.copy()}
            bad[name][:, :, hidden] = poison
            found = gradients(*bad.values(), d_out, d_lse, **options)[1]
            for a, b in zip(found[:3], clean[:3], strict=True):
                assert_same(a, b, name)
    row = 3
    for bad_q, bad_d in ((poison, 0.0), (0.0, poison)):
        bad = q.copy(), d_out.copy()
        bad[0][0, 0, row] += bad_q
        bad[1][0, 0, row] += bad_d
        found = gradients(bad[0], k, v, bad[1], d_lse, **options)[1]
        others = np.arange(SEQLEN_Q) != row
        assert_same(found.q[0, 0, others], clean.q[0, 0, others])
        blind = ~seen[0, 0, row]
        for name in ("k", "v"):
            assert_same(getattr(found, name)[0, 0, blind], getattr(clean, name)[0, 0, blind])
            assert_same(getattr(found, name)[0, 1], getattr(clean, name)[0, 1])


def test_a_nan_that_is_seen_always_shows(isa):
    q, k, v = arrays()
    d_out, d_lse = cotangents(q, v)
    d_out[1, 3, 5] = np.nan
    found = gradients(q, k, v, d_out, d_lse, causal=True)[1]
    assert np.isnan(found.q[1, 3, 5]).all()
    seen = np.arange(SEQLEN_K) <= 5 + SEQLEN_K - SEQLEN_Q
    for name in ("k", "v"):
        assert np.array_equal(np.isnan(getattr(found, name)[1, 1]).all(axis=-1), seen)
        assert not np.isnan(getattr(found, name)[0]).any()


def test_rows_that_see_nothing_have_no_gradient(isa, dtype):
    q, k, v = arrays(dtype)
    found = gradients(q, k, v, *cotangents(q, v), causal=True, q_offset=-5)[1]
    assert (found.q[:, :, :5] == 0).all() and (found.q[:, :, 5:] != 0).any()


@pytest.mark.parametrize("module", [mha_fast, reference], ids=["mha_fast", "reference"])
def test_a_sink_of_minus_infinity_has_no_gradient(module):
    q, k, v = arrays(np.float64)
    options = {"sinks": np.full(4, -np.inf), "causal": True, "q_offset": -5}
    _, pullback = module.attention_vjp(q, k, v, **options)  # rows 0 to 4 see nothing
    assert not pullback(cotangents(q, v)[0]).sinks.any()


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("heads", [(), (2,), (2, 0, 2), (0, 3, 2)], ids=str)
def test_axes_may_be_empty(shape, heads):
    rows, keys, dim = shape
    q, k = np.ones((*heads, rows, dim)), np.ones((*heads, keys, dim))
    out, pullback = attention_vjp(q, k, k)
    found = pullback(np.ones_like(out))
    assert found.q.shape == q.shape and found.k.shape == found.v.shape == k.shape
    assert not found.q.any()


def test_reference_gives_the_same(option):
    q, k, v = arrays(np.float64)
    options = option(q, k, v)
    cotangent = cotangents(q, v)
    result, pullback = reference.attention_vjp(q, k, v, return_lse=True, **options)
    assert_gradients_accurate(pullback(*cotangent), q, k, v, *cotangent, **options)
    assert_same(result, reference.attention(q, k, v, return_lse=True, **options))


# ---- Use -----------------------------------------------------------------------------------------


def test_gradients_have_the_shapes_that_were_broadcast(real):
    q = sizes.random(2, 1, 4, 13, 5, dtype=real)
    k, v = (sizes.random(3, 2, 200, 5, dtype=real, seed=i) for i in (1, 2))
    v = v[:1]
    options = {
        "mask": sizes.random(200, dtype=real),
        "bias": sizes.random(3, 1, 13, 1, dtype=real),
        "sinks": sizes.random(2, 1, 4, dtype=real),
        "alibi_slopes": abs(sizes.random(1, dtype=real)),
    }
    shape = (2, 3, 4, 13, 5)
    cotangent = sizes.random(*shape, dtype=real), sizes.random(*shape[:-1], dtype=real)
    _, found = gradients(q, k, v, *cotangent, **options)
    assert_gradients_accurate(found, q, k, v, *cotangent, **options)


def test_a_pullback_may_be_called_again_and_cotangents_may_broadcast():
    q, k, v = arrays()
    out, pullback = attention_vjp(q, k, v, causal=True)
    ones = pullback(np.ones_like(out))
    for again in (pullback(np.float32(1)), pullback([[1.0]]), pullback(np.ones_like(out))):
        for a, b in zip(again[:3], ones[:3], strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("module", [mha_fast, reference], ids=["mha_fast", "reference"])
@pytest.mark.parametrize("name", AttentionGradients._fields)
def test_each_gradient_may_be_asked_for_alone(name, module):
    q, k, v = arrays()
    options = {
        "mask": sizes.random(SEQLEN_K),
        "bias": sizes.random(SEQLEN_Q, SEQLEN_K),
        "sinks": sizes.random(4),
        "alibi_slopes": abs(sizes.random(4)),
        "scale": 0.3,
    }
    d_out = cotangents(q, v)[0]
    (_, pull_all), (_, pull_one) = (
        module.attention_vjp(q, k, v, **options, **which) for which in ({}, {"wrt": [name]})
    )
    found = pull_one(d_out)
    assert_same(*(np.asarray(getattr(x, name)) for x in (found, pull_all(d_out))))
    assert all(x is None for field, x in zip(found._fields, found, strict=True) if field != name)


@pytest.mark.parametrize("wrt", ["qkv", ["q", "weights"], ("",)], ids=str)
def test_unknown_names_of_gradients_are_refused(wrt):
    with pytest.raises(ValueError, match="wrt has .*, expected names among q, k, v"):
        attention_vjp(*arrays(), wrt=wrt)


def test_what_is_no_collection_of_names_is_refused():
    with pytest.raises(TypeError, match="wrt is 5, expected names among q, k, v"):
        attention_vjp(*arrays(), wrt=5)


def test_memory_does_not_grow_with_queries_times_keys(output_of):
    script = """
import numpy as np, mha_fast
def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(next(x for x in status if x.startswith("VmHWM")).split()[1])
q, k, v, g = (np.ones((1, 8, 8192, 64), np.float32) for _ in range(4))
mha_fast.attention_vjp(q[:, :, :200], k[:, :, :200], v[:, :, :200])[1](g[:, :, :200])
before = peak()
out, pullback = mha_fast.attention_vjp(q, k, v, threads=2)
found = pullback(g)
kept = out.nbytes + 3 * 4 * 8 * 8192 + sum(x.nbytes for x in found[:3])
print(peak() - before - kept)
"""
    assert int(output_of(script, timeout=120)) < 40 * 2**20


def test_memory_of_a_shared_bias_is_that_of_one_batch_entry(output_of):
    script = """
import numpy as np, mha_fast, tracemalloc
q = np.ones((32, 2, 200, 8), np.float32)
out, pullback = mha_fast.attention_vjp(q, q, q, bias=np.ones((2, 200, 200), np.float32))
tracemalloc.start()
pullback(out)
print(tracemalloc.get_traced_memory()[1] / (4 * 2 * 200 * 200))
"""
    assert float(output_of(script)) < 3 + 32 * 3 * 8 / 200 + 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1]), TypeError, "d_out has dtype int64, expected float16"),
        (lambda f: f(np.ones((9, 9))), ValueError, "d_out has shape (9, 9), expected one that"),
        (lambda f: f(1.0, 1.0), ValueError, "d_lse is given, expected None without return_lse"),
    ],
)
def test_bad_cotangents_are_refused_by_name(call, error, message):
    _, pullback = attention_vjp(*arrays())
    with pytest.raises(error) as caught:
        call(pullback)
    assert message in str(caught.value)


def test_canary_a_gradient_off_by_a_little_is_caught():
    q, k, v = arrays()
    cotangent = cotangents(q, v)
    found = gradients(q, k, v, *cotangent)[1]
    for name in "qkv":
        wrong = found._replace(**{name: getattr(found, name) * np.float32(1 + 2e-4)})
        with pytest.raises(AssertionError, match=f"gradient of {name}"):
            assert_gradients_accurate(wrong, q, k, v, *cotangent)
