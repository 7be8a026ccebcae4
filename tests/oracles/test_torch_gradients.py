"""PyTorch differentiates the dense formula to the same gradients. Optional: needs torch."""

import numpy as np
import oracle_gradient
import pytest
from judge import assert_near

from mha_fast import attention_vjp
from mha_fast.results import AttentionGradients

torch = pytest.importorskip("torch")

CALLS, PARTS = 1000, 10
LENGTHS = [1, 2, 3, 5, 13, 31, 67, 97]
SEVERAL_BLOCKS = [191, 193, 389]  # of keys
DIMS = [1, 2, 3, 5, 8, 13, 17, 33]
BATCHES = [(), (1,), (2,), (2, 1), (2, 2)]
MEASURED = 200
FIELDS = AttentionGradients._fields


@pytest.fixture(autouse=True, scope="module")
def one_thread_of_torch():
    """Two teams of threads in turn, for arrays this small, spend most of the time waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- What torch computes -------------------------------------------------------------------------


def dense(given):
    """The result, the log-sum-exp and which rows see nothing, of tensors by argument names, from
    the formula with all scores in memory."""
    q, k, v = (given[name] for name in "qkv")
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    scale = given.get("scale")
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    if "softcap" in given:
        s = given["softcap"] * torch.tanh(s / given["softcap"])
    position, key, seen = places(given, q.shape[-2], k.shape[-2])
    if "alibi_slopes" in given:
        s = s - given["alibi_slopes"][..., None, None] * (key - position).abs()
    for term in (given[name] for name in ("mask", "bias") if name in given):
        seen = seen & (term if term.dtype == torch.bool else term != -torch.inf)
        s = s if term.dtype == torch.bool else s + term
    s, seen, _ = torch.broadcast_tensors(s, seen, v[..., :1, :1])
    s = s.masked_fill(~seen, -torch.inf)
    sinks = torch.tensor(-torch.inf, dtype=s.dtype)
    if "sinks" in given:
        sinks = given["sinks"]
    s = torch.cat([s, sinks[..., None, None].expand(*s.shape[:-1], 1)], dim=-1)
    empty = (s == -torch.inf).all(dim=-1)
    s = s.masked_fill(empty[..., None], 0)  # else NaN, also in the gradients of all other rows
    return torch.softmax(s, dim=-1)[..., :-1] @ v, torch.logsumexp(s, dim=-1), empty


def places(given, seqlen_q, seqlen_k):
    """Positions of rows and of keys, and which keys a row may see by them."""
    length = torch.as_tensor(given.get("kv_lengths", seqlen_k))
    offset = torch.as_tensor(given.get("q_offset", length - seqlen_q))
    length, offset = length[..., None, None, None], offset[..., None, None, None]
    position, key = torch.arange(seqlen_q)[:, None] + offset, torch.arange(seqlen_k)
    seen = key < length
    left, right = given.get("window", (None, None))
    if left is not None:
        seen = seen & (key >= position - left)
    if right is not None:
        seen = seen & (key <= position + right)
    return position, key, seen & (key <= position) if given.get("causal") else seen


def torchs_gradients(arguments, d_out, d_lse):
    """Gradients by name, and which rows see nothing."""
    given = {name: tensor(x) for name, x in arguments.items()}
    names = [name for name in FIELDS if getattr(given.get(name), "is_floating_point", bool)()]
    for name in names:
        given[name].requires_grad_()
    out, lse, empty = dense(given)
    d_out = tensor(d_out).masked_fill(empty[..., None], 0)
    d_lse = tensor(d_lse).masked_fill(empty, 0)
    loss = (out * d_out).sum() + (lse * d_lse).sum()
    found = torch.autograd.grad(loss, [given[name] for name in names], allow_unused=True)
    zeros = {name: torch.zeros_like(given[name]) for name in names}
    return {n: zeros[n] if x is None else x for n, x in zip(names, found, strict=True)}, empty


def tensor(x):
    """What torch computes with, and may differentiate by."""
    if isinstance(x, float):
        return torch.tensor(x, dtype=torch.float64)
    return torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x


# ---- Random calls --------------------------------------------------------------------------------


def random_call(seed):
    """Arguments of attention_vjp, in float64, and cotangents of the result and the log-sum-exp."""
    rng = np.random.default_rng(seed)
    batch, kv_heads = BATCHES[rng.integers(len(BATCHES))], rng.integers(1, 4)
    heads = kv_heads * rng.integers(1, 4)
    seqlen_q, seqlen_k, dim, dim_v = (rng.choice(x) for x in (LENGTHS, LENGTHS, DIMS, DIMS))
    if rng.random() < 0.1:
        seqlen_k = rng.choice(SEVERAL_BLOCKS)
    shape = (*batch, heads, seqlen_q, seqlen_k)

    def sometimes_one(shape):
        return [1 if rng.random() < 0.2 else n for n in shape]

    given = {
        "q": rng.standard_normal((*batch, heads, seqlen_q, dim)),
        "k": rng.standard_normal((*sometimes_one(batch), kv_heads, seqlen_k, dim)),
        "v": rng.standard_normal((*sometimes_one(batch), kv_heads, seqlen_k, dim_v)),
    }
    for name, draw in DRAWN.items():
        if rng.random() < 0.3:
            given[name] = draw(rng, shape)
    d_out = rng.standard_normal((*shape[:-1], dim_v))
    return given, d_out, rng.standard_normal(shape[:-1])


def terms(rng, shape):
    """Numbers that broadcast to the scores in any way; some hide a key, or all keys of a row."""
    shape = [1 if rng.random() < 0.4 else n for n in shape]
    x = rng.standard_normal(shape[rng.integers(len(shape)) :])
    hidden = rng.choice([0, 0.1, 0.9])
    return np.where(rng.random(x.shape) < hidden, -np.inf, x)


def mask(rng, shape):
    x = terms(rng, shape)
    return x if rng.random() < 0.5 else x > -1


def of_each_head(rng, shape):
    return rng.standard_normal(shape[-3] if rng.random() < 0.5 else shape[:-2])


def of_each_batch_row(rng, shape, low, high):
    x = rng.integers(low, high, shape[:-3])
    return x if rng.random() < 0.5 else int(x.flat[0])


def window(rng, shape):
    return tuple(None if rng.random() < 0.3 else int(x) for x in rng.integers(0, shape[-1] + 3, 2))


DRAWN = {
    "mask": mask,
    "bias": terms,
    "causal": lambda rng, shape: True,
    "q_offset": lambda rng, shape: of_each_batch_row(rng, shape, -shape[-2] - 2, shape[-1] + 2),
    "window": window,
    "kv_lengths": lambda rng, shape: of_each_batch_row(rng, shape, 0, shape[-1] + 1),
    "scale": lambda rng, shape: float(rng.uniform(-1.5, 1.5)),
    # Lower ones flatten scores so far that 1 - tanh**2 loses all digits, in torch as in ours.
    "softcap": lambda rng, shape: float(rng.uniform(4, 50)),
    "sinks": of_each_head,
    "alibi_slopes": of_each_head,
}


def assert_gradients_are_torchs(found, given, d_out, d_lse):
    """To rounding: a few of the numbers that a gradient is a sum of, which three factors carry."""
    expected, empty = torchs_gradients(given, d_out, d_lse)
    assert {name for name in FIELDS if getattr(found, name) is not None} == set(expected)
    measures, answer = oracle_gradient.attention_vjp(**given, d_out=d_out, d_lse=d_lse)
    factor = 3 * (1 + answer.score.max(initial=0))
    for name, gradient in expected.items():
        got, size = np.asarray(getattr(found, name)), measures[name].size
        assert_near(got, gradient.numpy(), factor * size.reshape(got.shape), name)
    assert not found.q[empty.numpy()].any()
    return empty.any()


def test_every_option_is_drawn_but_dropout():
    from mha_fast.options import OPTIONS

    assert set(DRAWN) == set(OPTIONS) - {"dropout_p", "seed"}


@pytest.mark.parametrize("part", range(PARTS))
def test_gradients_of_any_call_are_those_of_torch(part):
    blind = 0
    for seed in range(part, CALLS, PARTS):
        given, d_out, d_lse = random_call(seed)
        _, pullback = attention_vjp(**given, return_lse=True)
        blind += bool(assert_gradients_are_torchs(pullback(d_out, d_lse), given, d_out, d_lse))
    assert blind  # in some calls a row sees nothing


# ---- Accuracy ------------------------------------------------------------------------------------


def errors_of(seed):
    """The largest errors of q, k and v's gradients in float32 over the largest exact number, ours
    and those of torch's scaled_dot_product_attention."""
    rng = np.random.default_rng(seed)
    seqlen_q, seqlen_k, dim = rng.integers(16, 400), rng.integers(16, 400), rng.integers(16, 128)
    causal = bool(rng.integers(2))
    q, d_out = rng.standard_normal((2, 1, 2, seqlen_q, dim), np.float32)
    k, v = rng.standard_normal((2, 1, 2, seqlen_k, dim), np.float32)
    options = {"causal": causal, "q_offset": 0}  # torch's rule
    exact, _ = torchs_gradients(
        {"q": q.astype(float), "k": k.astype(float), "v": v.astype(float), **options},
        d_out.astype(float),
        np.zeros(q.shape[:-1]),
    )
    ours = attention_vjp(q, k, v, **options)[1](d_out)[:3]
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
    theirs = torch.autograd.grad(out, tensors, torch.from_numpy(d_out))
    return [
        [np.abs(np.asarray(x) - right.numpy()).max() / right.abs().max() for x in (a, b)]
        for a, b, right in zip(ours, theirs, exact.values(), strict=True)
    ]


@pytest.fixture(scope="module")
def median_errors():
    """By name: ours, torch's."""
    medians = np.median([errors_of(seed) for seed in range(MEASURED)], axis=0)
    return dict(zip("qkv", medians, strict=True))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_float32_gradients_are_no_less_accurate_than_those_of_torch(name, median_errors):
    ours, theirs = median_errors[name]
    assert ours <= theirs, f"{name}: {ours:.3g}, torch's {theirs:.3g}"


def test_canary_a_gradient_that_differs_in_its_last_digits_is_caught():
    given, d_out, d_lse = random_call(seed=0)
    _, pullback = attention_vjp(**given, return_lse=True)
    found = pullback(d_out, d_lse)
    for name in "qkv":
        wrong = found._replace(**{name: getattr(found, name) * (1 + 1e-12)})
        with pytest.raises(AssertionError, match=name):
            assert_gradients_are_torchs(wrong, given, d_out, d_lse)
