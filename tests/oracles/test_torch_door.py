"""mha_fast.torch: torch's own samples, gradients, compiler and exporter; and our bits."""

import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import sizes
from judge import FACTOR, assert_near, assert_same, assert_within
from options import OPTIONS
from sizes import qkv

import mha_fast

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

from mha_fast.torch import (  # noqa: E402
    array_of,
    attention,
    scaled_dot_product_attention,
    tensor_of,
)

SDPA = torch.nn.functional.scaled_dot_product_attention
OP = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FIELDS = ("q", "k", "v", "mask", "bias", "sinks", "alibi_slopes")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.from_numpy(sizes.random(*shape, seed=seed)).to(dtype)


def three(seqlen_q=13, seqlen_k=31, dtype=torch.float32, **more):
    return [tensor_of(x).to(dtype) for x in qkv(seqlen_q, seqlen_k, 8, **more)]


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


# ---- As torch has it -----------------------------------------------------------------------------


def samples(dtype):
    return [
        sample
        for sample in OP.sample_inputs("cpu", dtype, requires_grad=True)
        if not sample.kwargs.get("dropout_p")
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_own_samples_forward_and_backward(dtype):
    """The exact result is torch's in double precision. Ours may be FACTOR times as far from it as
    torch's in the same dtype, and as far as numbers of this size and scores of this size round."""
    assert len(samples(dtype)) > 10
    for sample in samples(dtype):
        tensors = [sample.input, *sample.args]
        mask = sample.kwargs.get("attn_mask")
        wide = {"attn_mask": mask if mask is None or mask.dtype == torch.bool else mask.double()}
        ours = with_gradients(scaled_dot_product_attention, tensors, sample.kwargs)
        theirs = with_gradients(SDPA, tensors, sample.kwargs)
        exact = with_gradients(SDPA, [x.double() for x in tensors], sample.kwargs | wide)
        for mine, other, right in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == dtype and mine.shape == right.shape
            error, common = ((x.double() - right).abs().numpy() for x in (mine, other))
            largest = right.abs().max().item() + size_of_terms(*tensors)
            bound = FACTOR * common.max(initial=0) + largest * torch.finfo(dtype).eps
            assert_within(error, np.broadcast_to(bound, error.shape), str(sample.kwargs))


def with_gradients(function, tensors, options):
    tensors = leaves(tensors)
    out = function(*tensors, **options)
    return [x.detach() for x in (out, *torch.autograd.grad(out, tensors, torch.ones_like(out)))]


def size_of_terms(q, k, v):
    """Of a gradient, before they cancel: the greatest score times the greatest value."""
    q, k, v = (x.detach().abs().max().item() * x.shape[-1] ** 0.25 for x in (q, k, v))
    return q * k * v


def test_fewer_queries_stand_at_the_first_keys():
    q, k, v = three(3, 7)
    assert_same(
        scaled_dot_product_attention(q, k, v, is_causal=True).numpy(),
        mha_fast.attention(q.numpy(), k.numpy(), v.numpy(), causal=True, q_offset=0),
    )


def test_heads_broadcast_as_in_torch():
    q, k, v = random(2, 1, 5, 8), random(1, 4, 7, 8, seed=1), random(4, 7, 8, seed=2)
    found = scaled_dot_product_attention(q, k, v)
    assert_near(found.numpy(), SDPA(q, k, v).numpy(), 10)
    q = random(2, 4, 5, 8)
    grouped = scaled_dot_product_attention(q, k[:, :2], v[:2], enable_gqa=True)
    theirs = SDPA(q, k[:, :2], v[None, :2].expand(2, -1, -1, -1), enable_gqa=True)
    assert_near(grouped.numpy(), theirs.numpy(), 10)
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, k[:, :2], v[:2])


def test_dropout_follows_torchs_generator():
    q, k, v = leaves(three())

    def drawn(seed):
        torch.manual_seed(seed)
        out = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        return out, torch.autograd.grad(out.sum(), q)[0]

    for a, b in zip(drawn(1), drawn(1), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(drawn(1)[0], drawn(2)[0])


def test_rows_that_see_nothing_are_zero():
    q, k, v = leaves(three())
    mask = torch.zeros(13, 31, dtype=torch.bool)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out.sum().backward()
    assert not out.any() and not q.grad.any() and not v.grad.any()


# ---- As we have it -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_bits_are_those_of_arrays_under_every_option(name):
    arrays = qkv(13, 200, 8, heads=4, kv_heads=2)
    given = dict(zip("qkv", arrays, strict=True)) | OPTIONS[name](*arrays)
    result = mha_fast.attention(**given, return_lse=True, return_weights=True)
    tensors = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    found = attention(**tensors, return_lse=True, return_weights=True)
    for a, b in zip(found, result, strict=True):
        assert_same(a.numpy(), b)
    d_out, d_lse = sizes.random(*result.out.shape), sizes.random(*result.lse.shape)
    seen = result.lse > -np.inf
    _, pullback = mha_fast.attention_vjp(**given, return_lse=True)
    expected = pullback(d_out, d_lse * seen)
    wanted = [n for n in FIELDS if n in given and given[n].dtype != np.bool_]
    tensors |= {n: tensors[n].requires_grad_() for n in wanted}
    found = attention(**tensors, return_lse=True, return_weights=True)
    for a, b in zip(found, result, strict=True):
        assert_same(a.detach().numpy(), b)
    (out, lse, _), cotangents = found, map(torch.from_numpy, (d_out, d_lse * seen))
    gradients = torch.autograd.grad([out, lse], [tensors[n] for n in wanted], list(cotangents))
    for n, x in zip(wanted, gradients, strict=True):
        assert_same(x.numpy(), getattr(expected, n))


@pytest.mark.parametrize("names", ["qkv", ("bias", "sinks"), ("mask", "alibi_slopes")], ids=str)
def test_gradients_pass_torchs_numerical_check(names):
    q, k, v = three(5, 9, dtype=torch.float64, heads=4, kv_heads=2, batch=(2,))
    given = {
        "q": q, "k": k, "v": v, "bias": random(5, 9), "mask": random(2, 1, 5, 9, seed=1),
        "sinks": random(4), "alibi_slopes": random(4, seed=1).abs(),
    }  # fmt: skip
    given = {n: x.double() for n, x in given.items()}

    def function(*tensors):
        inputs = given | dict(zip(names, tensors, strict=True))
        return tuple(attention(**inputs, causal=True, softcap=5.0, return_lse=True))

    assert torch.autograd.gradcheck(function, leaves([given[n] for n in names]))


def test_numbers_of_each_batch_row_are_tensors():
    q, k, v = three()
    lengths = torch.tensor([7, 30])[:, None][:, 0]
    found = attention(q, k, v, kv_lengths=lengths, causal=True, q_offset=torch.tensor([2, 17]))
    arrays = (x.numpy() for x in (q, k, v))
    expected = mha_fast.attention(*arrays, kv_lengths=[7, 30], causal=True, q_offset=[2, 17])
    assert_same(found.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_tensors_are_views_of_the_same_memory(dtype):
    x = random(3, 4, 6, dtype=dtype).mT[1:, ::2]
    a = array_of(x)
    assert a.ctypes.data == x.data_ptr() and a.shape == x.shape
    assert torch.equal(tensor_of(a), x) and tensor_of(a).data_ptr() == x.data_ptr()
    assert a.dtype == (ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.dtype(str(dtype)[6:]))


def test_gradients_of_16_bit_tensors_are_those_of_arrays():
    tensors = leaves(three(dtype=torch.bfloat16))
    out = attention(*tensors)
    out.backward(torch.ones_like(out))
    result, pullback = mha_fast.attention_vjp(*map(array_of, tensors))
    assert_same(array_of(out), result)
    for x, expected in zip(tensors, pullback(np.float32(1))[:3], strict=True):
        assert_same(array_of(x.grad), expected)


# ---- Compiled and exported -----------------------------------------------------------------------


def block(q, k, v):
    out = scaled_dot_product_attention(q * 2, k, v, is_causal=True)
    more = attention(out, k, v, window=(3, None), q_offset=2, return_lse=True, scale=0.5)
    return more.out.sin() + more.lse[..., None]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo does
@pytest.mark.parametrize("needs_grad", [False, True])
def test_compiled_code_gives_the_same(needs_grad):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    mine, other = ([x.requires_grad_(needs_grad) for x in leaves(three())] for _ in range(2))
    a, b = compiled(*mine), block(*other)
    assert torch.equal(a, b)
    if needs_grad:
        for x in (a, b):
            x.sum().backward()
        assert all(torch.equal(x.grad, y.grad) for x, y in zip(mine, other, strict=True))


def test_exported_programs_give_the_same():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return block(q, k, v)

    tensors = three()
    program = torch.export.export(Module(), tuple(tensors))
    assert "mha_fast.attend" in str(program.graph)
    assert torch.equal(program.module()(*tensors), block(*tensors))


def test_operators_pass_torchs_checks():
    tensors = leaves(three())
    arguments = (*tensors, *[None] * 7, True, None, None, None, 0.0)
    for keeps in (False, True):
        torch.library.opcheck(
            torch.ops.mha_fast.attend.default, (*arguments, keeps, True),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


# ---- Mistakes ------------------------------------------------------------------------------------


def nested(*tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        return torch.nested.nested_tensor(list(tensors))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 3)), "k is a ndarray, expected a tensor"),
        (torch.zeros(2, 2, 31, 8, device="meta"), r"k is on meta, expected the CPU: k.cpu\(\)"),
        (torch.eye(8).to_sparse(), "k is torch.sparse_coo, expected a dense tensor"),
        (nested(torch.zeros(2, 8)), "k is nested, expected a dense tensor"),
        (torch.zeros(2, 2, 31, 8, dtype=torch.int64), "k has dtype int64, expected float16"),
        (
            torch.zeros(2, 2, 31, 8, dtype=torch.complex64),
            "k has dtype complex64, expected float16",
        ),
    ],
)
def test_tensors_that_numpy_cannot_read_are_refused(wrong, message):
    q, _, v = three()
    with pytest.raises(TypeError, match=message):
        attention(q, wrong, v)


def test_arguments_that_do_not_fit_are_refused():
    q, k, v = three()
    with pytest.raises(ValueError, match="attn_mask is given, expected None beside is_causal"):
        scaled_dot_product_attention(q, k, v, torch.ones(13, 31), is_causal=True)
    with pytest.raises(TypeError, match="query, key and value have dtypes .* expected one"):
        scaled_dot_product_attention(q, k.double(), v)
    with pytest.raises(TypeError, match="softcap is no argument of scaled_dot_product_attention"):
        scaled_dot_product_attention(q, k, v, softcap=1.0)
    with pytest.raises(TypeError, match="is_causal is no option of attention"):
        attention(q, k, v, is_causal=True)
    with pytest.raises(ValueError, match="k has head_dim 7, expected 8"):
        attention(q.requires_grad_(), k[..., :7], v)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_windows_are_checked_with_gradients_and_without(needs_grad):
    q, k, v = [x.requires_grad_(needs_grad) for x in leaves(three())]
    for window, error, message in (
        ((-1, 0), ValueError, r"window is .*, expected sides of at least 0"),
        (3, TypeError, r"window is 3, expected a tuple \(left, right\)"),
        ((1, 2, 3), ValueError, "window has 3 entries"),
    ):
        with pytest.raises(error, match=message):
            attention(q, k, v, window=window)


def test_a_second_gradient_is_refused():
    q, k, v = leaves(three())
    loss = attention(q, k, v).square().sum()
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---- Threads -------------------------------------------------------------------------------------


SCRIPT = """
import {first}, {second}
from pathlib import Path
import torch, mha_fast, mha_fast.torch
x = torch.randn(3, 8, 512, 64)
mha_fast.torch.attention(*x)
print(sum("libgomp" in line and "r-xp" in line for line in open("/proc/self/maps")))
torch.set_num_threads(1)
print(mha_fast.get_num_threads())
"""


@pytest.mark.parametrize("order", [("torch", "mha_fast"), ("mha_fast", "torch")], ids=str)
def test_the_team_is_torchs(order):
    script = SCRIPT.format(first=order[0], second=order[1])
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_importing_mha_fast_does_not_load_torch():
    script = "import mha_fast, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
