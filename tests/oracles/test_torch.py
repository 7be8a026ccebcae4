"""PyTorch's scaled_dot_product_attention computes the same. Optional: needs torch."""

import itertools

import numpy as np
import pytest
import sizes
from judge import assert_accurate
from sizes import qkv, random_mask

from mha_fast import attention

torch = pytest.importorskip("torch")

DTYPES = sizes.REALS


def sdpa(q, k, v, mask=None, **options):
    q, k, v = (torch.from_numpy(np.array(x)) for x in (q, k, v))
    mask = None if mask is None else torch.from_numpy(np.array(mask))
    function = torch.nn.functional.scaled_dot_product_attention
    return function(q, k, v, attn_mask=mask, **options).numpy()


def assert_agree(ours, theirs, q, k, v, mask=None, **options):
    """Both obey the accuracy rule for the same question, so they agree within it."""
    assert_accurate(ours, q, k, v, mask, **options)
    assert_accurate(theirs, q, k, v, mask, **options)


@pytest.mark.parametrize("real", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(13, 13), (5, 67), (67, 5), (1, 201), (201, 201)])
def test_causal_with_offset_zero_is_torchs_rule(real, size):
    q, k, v = qkv(*size, 16, 5, dtype=real)
    options = {"causal": True, "q_offset": 0}
    ours = attention(q, k, v, **options)
    assert_agree(ours, sdpa(q, k, v, is_causal=True), q, k, v, **options)


@pytest.mark.parametrize("real", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("single", list(itertools.product([False, True], repeat=4)), ids=str)
def test_masks_broadcast_as_in_torch(real, kind, single):
    q, k, v = qkv(13, 67, 16, dtype=real)
    shape = [1 if s else n for n, s in zip((2, 2, 13, 67), single, strict=True)]
    mask = random_mask(*shape, seed=1)
    mask[..., 0] = True  # torch gives NaN, or 0, where a row sees nothing
    if kind == "float":
        mask = sizes.additive(mask, real)
    theirs = sdpa(q, k, v, mask)
    assert_agree(attention(q, k, v, mask), theirs, q, k, v, mask)


@pytest.mark.parametrize("real", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_grouped_heads_are_those_of_torch(real, group_size):
    q, k, v = qkv(13, 67, 16, heads=2 * group_size, kv_heads=2, dtype=real)
    theirs = sdpa(q, k, v, enable_gqa=True)
    assert_agree(attention(q, k, v), theirs, q, k, v)


@pytest.mark.parametrize("real", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_scale_and_other_head_dim_of_values_are_those_of_torch(real, scale):
    q, k, v = qkv(13, 67, 8, 21, dtype=real)
    theirs = sdpa(q, k, v, scale=scale)
    assert_agree(attention(q, k, v, scale=scale), theirs, q, k, v, scale=scale)


@pytest.mark.parametrize("real", DTYPES, ids=str)
def test_tensors_are_accepted_where_they_lie(real):
    q, k, v = qkv(13, 67, 16, dtype=real)
    tensors = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in (q, k, v)]
    views = [x.transpose(1, 2) for x in tensors]
    assert not views[0].is_contiguous()
    theirs = torch.nn.functional.scaled_dot_product_attention(*views).numpy()
    assert_agree(attention(*views), theirs, q, k, v)


def op_info_samples(dtype):
    pytest.importorskip("expecttest")
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as error:
        pytest.skip(f"torch.testing is incomplete: {error}")
    name = "nn.functional.scaled_dot_product_attention"
    (op,) = [op for op in op_db if op.name == name]
    for sample in op.sample_inputs("cpu", dtype):
        if not sample.kwargs.get("dropout_p"):
            yield sample


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("real", DTYPES, ids=str)
def test_samples_of_torchs_own_operator_tests_agree(real):
    count = 0
    for sample in op_info_samples(getattr(torch, real.name)):
        q, k, v = (x.numpy() for x in (sample.input, *sample.args[:2]))
        mask = sample.kwargs.get("attn_mask")
        mask = None if mask is None else mask.numpy()
        causal = sample.kwargs.get("is_causal", False)
        options = {"causal": causal, "q_offset": 0 if causal else None}
        gqa = sample.kwargs.get("enable_gqa", False)
        theirs = sdpa(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
        ours = attention(q, k, v, mask, **options)
        assert_agree(ours, theirs, q, k, v, mask, **options)
        count += 1
    assert count > 5
