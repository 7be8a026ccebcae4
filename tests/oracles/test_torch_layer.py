"""PyTorch's nn.MultiheadAttention computes the same from the same weights. Needs torch.

All constructions that torch's own tests of the module list are among the cases.
"""

import itertools

import numpy as np
import oracle_layer
import pytest
import sizes
from judge import assert_same, assert_within

from mha_fast import MultiHeadAttention

torch = pytest.importorskip("torch")

# Torch wants two masks of one kind; we do not mind, and it still computes the same.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")

BATCH, SEQLEN_Q, SEQLEN_K, EMBED, HEADS = 2, 5, 7, 12, 3


def module_of(real, seed=0, **construction):
    """A torch module in eval mode; its biases are not 0, as they are when it is new."""
    torch.manual_seed(seed)
    module = torch.nn.MultiheadAttention(**construction, dtype=getattr(torch, real.name)).eval()
    with torch.no_grad():
        for name, x in module.named_parameters():
            if name.endswith(("_bias", ".bias")):
                x.uniform_(-1, 1)
    return module


def layer_of(module):
    return MultiHeadAttention.from_state_dict(
        module.state_dict(), module.num_heads, add_zero_attn=module.add_zero_attn
    )


def call_torch(module, *arrays, swap=False, **options):
    """As arrays, batch first. `swap`: the module wants (seqlen, batch, embed_dim)."""
    tensors = [torch.from_numpy(x.swapaxes(0, 1) if swap else x) for x in arrays]
    options = {
        name: torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x
        for name, x in options.items()
    }
    with torch.no_grad():
        out, weights = module(*tensors, **options)
    out = out.numpy()
    return out.swapaxes(0, 1) if swap else out, None if weights is None else weights.numpy()


def assert_agree(layer, module, arrays, masks, **how):
    """Both are within the bound for the same question, so they agree within it."""
    answer = oracle_layer.multi_head_attention(layer, *arrays, **masks)
    empty = (answer.weights == 0).all(axis=-1)  # rows of heads, where torch gives NaN or 0
    bad = empty.any(axis=-2)[..., None]
    for average in (True, False):
        ours = layer(*arrays, **masks, need_weights=True, average_weights=average)
        theirs = call_torch(
            module, *arrays, **masks, need_weights=True, average_attn_weights=average, **how
        )
        weights, bound, no_row = answer.weights, answer.weights_bound, empty[..., None]
        if average:
            bound = (bound + weights * HEADS * np.finfo(layer.dtype).eps).mean(axis=-3)
            weights, no_row = weights.mean(axis=-3), bad
        for name, (out, p) in {"ours": ours, "torch's": theirs}.items():
            error_out, error_p = np.abs(out - answer.out), np.abs(p - weights)
            if name == "torch's":
                error_out, error_p = np.where(bad, 0, error_out), np.where(no_row, 0, error_p)
            assert_within(error_out, answer.out_bound, f"{name} out")
            assert_within(error_p, bound, f"{name} weights")
        assert ours.out.shape == theirs[0].shape
        assert ours.weights.shape == theirs[1].shape
    assert_same(layer(*arrays, **masks), ours.out)
    theirs, _ = call_torch(module, *arrays, **masks, need_weights=False, **how)
    error = np.where(bad, 0, np.abs(theirs - answer.out))
    assert_within(error, answer.out_bound, "torch's out without weights")


def module_samples(real):
    """What torch.testing's module database lists."""
    pytest.importorskip("expecttest")
    try:
        from torch.testing._internal.common_modules import module_db
    except ImportError as error:
        pytest.skip(f"torch.testing is incomplete: {error}")
    (info,) = [x for x in module_db if x.module_cls is torch.nn.MultiheadAttention]
    return info.module_inputs_func(
        info, "cpu", getattr(torch, real.name), requires_grad=False, training=False
    )


@pytest.mark.parametrize("batched", [False, True], ids=["as listed", "as a batch"])
def test_all_constructions_of_torchs_own_module_tests_agree(real, batched):
    samples = module_samples(real)
    assert len(samples) == 64
    for sample in samples:
        module = module_of(real, **sample.constructor_input.kwargs)
        arrays = [x.numpy() for x in sample.forward_input.args]
        masks = {n: x.numpy() for n, x in sample.forward_input.kwargs.items() if x is not None}
        if batched:  # the same tokens backwards as the second entry
            arrays = [np.stack([x, x[::-1]]) for x in arrays]
            join = {"key_padding_mask": np.stack, "attn_mask": np.concatenate}
            masks = {name: join[name]([x, x]) for name, x in masks.items()}
        swap = batched and not module.batch_first
        assert_agree(layer_of(module), module, arrays, masks, swap=swap)


CONSTRUCTIONS = [
    {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero, "kdim": kdim, "vdim": vdim}
    for bias, bias_kv, zero, (kdim, vdim) in itertools.product(
        (True, False), (True, False), (True, False), ((None, None), (8, None), (8, 9))
    )
]


def random_masks(attn, padding):
    """The kinds asked for. Row 1 sees nothing of entry 0 but keys that are not in a sequence."""
    masks = {}
    if attn:
        kind, axes = attn.split()
        seen = sizes.random_mask(*([BATCH * HEADS] * (axes == "3-D")), SEQLEN_Q, SEQLEN_K)
        seen[..., 1, :] = False
        masks["attn_mask"] = ~seen if kind == "bool" else sizes.additive(seen, np.float32)
    if padding:
        seen = sizes.random_mask(BATCH, SEQLEN_K, seed=1)
        masks["key_padding_mask"] = ~seen if padding == "bool" else sizes.additive(seen, np.float32)
    return masks


@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("attn", [None, "bool 2-D", "float 2-D", "bool 3-D", "float 3-D"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_mean_what_they_mean_in_torch(attn, padding, batch_first):
    for construction in CONSTRUCTIONS:
        construction = construction | {"embed_dim": EMBED, "num_heads": HEADS}
        module = module_of(np.dtype(np.float32), **construction, batch_first=batch_first)
        layer = layer_of(module)
        query = sizes.random(BATCH, SEQLEN_Q, EMBED)
        key, value = (sizes.random(BATCH, SEQLEN_K, n) for n in (layer.kdim, layer.vdim))
        masks = random_masks(attn, padding)
        assert_agree(layer, module, (query, key, value), masks, swap=not batch_first)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_self_attention_is_that_of_torchs_fast_path(real, bias, padding):
    module = module_of(real, embed_dim=64, num_heads=4, bias=bias, batch_first=True)
    x = sizes.random(BATCH, SEQLEN_K, 64, dtype=real)
    layer, masks = layer_of(module), random_masks(None, padding)
    answer = oracle_layer.multi_head_attention(layer, x, **masks)
    tensor = torch.from_numpy(x)
    more = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    with torch.no_grad():
        theirs = module(tensor, tensor, tensor, **more, need_weights=False)[0].numpy()
    for name, out in {"ours": layer(x, **masks), "torch's": theirs}.items():
        assert_within(np.abs(out - answer.out), answer.out_bound, f"{name} out")


def test_a_row_that_sees_nothing_is_nan_in_torch_and_the_bias_here():
    module = module_of(np.dtype(np.float32), embed_dim=EMBED, num_heads=HEADS, batch_first=True)
    x, hidden = sizes.random(BATCH, SEQLEN_K, EMBED), np.zeros((BATCH, SEQLEN_K), bool)
    hidden[1] = True
    theirs = call_torch(module, x, x, x, key_padding_mask=hidden, need_weights=True)
    assert np.isnan(theirs[0][1]).all() and np.isnan(theirs[1][1]).all()
    ours = layer_of(module)(x, key_padding_mask=hidden, need_weights=True)
    bias = module.out_proj.bias.detach().numpy()
    assert_same(ours.out[1], np.broadcast_to(bias, (SEQLEN_K, EMBED)))
    assert_same(ours.weights[1], np.zeros((SEQLEN_K, SEQLEN_K), np.float32))


def test_state_dict_goes_to_torch_and_back_equal_to_the_bit(real):
    listed = [x.constructor_input.kwargs for x in module_samples(real)]
    ours = [{"embed_dim": EMBED, "num_heads": HEADS, **more} for more in CONSTRUCTIONS]
    for construction in listed + ours:
        module, other = (module_of(real, seed, **construction) for seed in (0, 1))
        state = layer_of(module).state_dict()
        assert list(state) == list(module.state_dict())
        other.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=True)
        for name, x in module.state_dict().items():
            assert_same(state[name], x.numpy(), name)
            assert_same(other.state_dict()[name].numpy(), x.numpy(), name)


def test_new_weights_have_the_range_of_torchs(real):
    construction = {"embed_dim": 256, "num_heads": 4, "kdim": 100, "add_bias_kv": True}
    layer = MultiHeadAttention(**construction, dtype=real, seed=0)
    module = torch.nn.MultiheadAttention(**construction, dtype=getattr(torch, real.name))
    assert list(layer.weights) == list(module.state_dict())
    for name, x in module.state_dict().items():
        ours, theirs = layer.weights[name], x.numpy()
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        spread = np.sqrt(np.square(theirs).mean())
        six_errors = 6 * np.sqrt(2) * spread / np.sqrt(2 * x.numel())
        assert abs(np.sqrt(np.square(ours).mean()) - spread) <= six_errors, name


def test_canary_keys_and_values_exchanged_are_caught():
    module = module_of(np.dtype(np.float32), embed_dim=EMBED, num_heads=HEADS, batch_first=True)
    state = layer_of(module).state_dict()
    q, k, v = np.split(state["in_proj_weight"], 3)
    layer = MultiHeadAttention.from_state_dict(
        state | {"in_proj_weight": np.concatenate([q, v, k])}, HEADS
    )
    arrays = [sizes.random(BATCH, SEQLEN_K, EMBED)] * 3
    with pytest.raises(AssertionError, match="torch's out: .* are wrong"):
        assert_agree(layer, module, arrays, {})
