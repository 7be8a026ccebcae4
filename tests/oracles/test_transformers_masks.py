"""Which keys are seen: as numbers where they say it, as transformers' matrix where they do not.

Optional: needs transformers. The oracle is its `sdpa_mask` and its ``eager`` attention.
"""

import numpy as np
import pytest
from tiny_transformers import (
    BATCH,
    DECODERS,
    ENCODERS,
    LENGTH,
    PAIRS,
    VOCABULARY,
    assert_near_models,
    model_of,
    one_thread_of_torch,  # noqa: F401
    padding,
    run,
    words,
    written,
)
from transformers import AutoModelForCausalLM, BloomConfig, masking_utils
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import mha_fast.transformers
from mha_fast import attention
from mha_fast.transformers import mask as ours

torch = pytest.importorskip("torch")
OURS = mha_fast.transformers.register()
WITHOUT_MATRIX = [name for name in DECODERS if name != "Llama4Text"]


@pytest.fixture
def matrices(monkeypatch):
    """The shapes of all matrices of queries and keys that transformers' function makes."""
    shapes, make = [], masking_utils.sdpa_mask

    def counted(*args, **kwargs):
        found = make(*args, **kwargs)
        shapes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(masking_utils, "sdpa_mask", counted)
    return shapes


# ---- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", [*WITHOUT_MATRIX, *PAIRS])
def test_writing_after_padding_makes_no_matrix(name, static, matrices):
    how = {"cache_implementation": "static"} if static and name != "DeepseekV3" else {}
    inputs = {"input_ids": words(), "attention_mask": padding("left")}
    written(model_of(name), OURS, inputs, **how)
    assert matrices == []


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_of_padded_texts_makes_no_matrix(name, matrices):
    run(model_of(name, "Model"), OURS, input_ids=words(), attention_mask=padding("right"))
    assert matrices == []


def test_step_of_training_makes_no_matrix(matrices):
    inputs = {"input_ids": words(), "attention_mask": padding("right"), "labels": words()}
    run(model_of("Mistral"), OURS, grad=True, **inputs).loss.backward()
    assert matrices == []


def test_canary_matrices_are_counted(matrices):
    run(model_of("Llama"), "mha_fast", input_ids=words(), attention_mask=padding("left"))
    assert matrices == []
    run(model_of("Llama4Text"), "mha_fast", input_ids=words(), attention_mask=padding("left"))
    assert matrices == [(BATCH, 1, LENGTH, LENGTH)]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "Llama4Text"])
def test_packed_texts_are_those_of_eager_and_see_only_themselves(name, matrices):
    model, tokens = model_of(name), words(1, LENGTH)
    places = torch.cat([torch.arange(8), torch.arange(LENGTH - 8)])[None]
    inputs = {"input_ids": tokens, "position_ids": places, "use_cache": False}
    packed = run(model, OURS, **inputs).logits
    assert matrices
    assert_near_models(packed, run(model, "eager", **inputs).logits, name)
    alone = run(model, OURS, input_ids=tokens[:, :8]).logits
    assert_near_models(packed[:, :8], alone, name)


def test_masks_of_four_axes_go_in_as_they_are():
    model = model_of("Llama")
    seen = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.6
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    theirs = run(model, "eager", input_ids=words(), attention_mask=added).logits
    for mask in (seen, added):
        found = run(model, OURS, input_ids=words(), attention_mask=mask).logits
        assert_near_models(found, theirs, str(mask.dtype))


def test_decoder_that_reads_both_ways_is_that_of_eager(matrices):
    model, there = model_of("Llama"), padding("right")
    model.config.is_causal = False
    found = run(model, OURS, input_ids=words(), attention_mask=there).logits
    assert matrices == []
    theirs = run(model, "eager", input_ids=words(), attention_mask=there).logits
    assert_near_models(found[there > 0], theirs[there > 0], "logits")


# ---- The mask function ---------------------------------------------------------------------------

CAUSAL, BOTH_WAYS = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
FUNCTIONS = {
    "causal": CAUSAL,
    "both ways": BOTH_WAYS,
    "window": masking_utils.sliding_window_causal_mask_function(5),
    "window of one": masking_utils.sliding_window_causal_mask_function(1),
    "window both ways": masking_utils.sliding_window_bidirectional_mask_function(3),
}
OTHERS = {
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(BATCH, dtype=int)),
    "turned": masking_utils.and_masks(CAUSAL, masking_utils.sliding_window_overlay(5)),
    "three": masking_utils.and_masks(
        masking_utils.sliding_window_overlay(5), CAUSAL, masking_utils.sliding_window_overlay(3)
    ),
    "window to the right": masking_utils.and_masks(
        masking_utils.sliding_window_overlay(5), BOTH_WAYS
    ),
    "either": masking_utils.or_masks(masking_utils.sliding_window_overlay(5), CAUSAL),
    "lambda": lambda batch, head, q, kv: (kv <= q) & (kv % 2 == 0),
}
PLACES = [(6, 6, 0, 0), (1, 9, 8, 0), (4, 9, 5, 0), (3, 8, 9, 4), (5, 16, 2, 0)]


def weights_seen(mask, seqlen_q, seqlen_k):
    """Where attention has weights, (batch, 1, seqlen_q, seqlen_k)."""
    q, k = np.zeros((BATCH, 1, seqlen_q, 2)), np.zeros((BATCH, 1, seqlen_k, 2))
    given = {name: np.asarray(x) if name == "mask" else x for name, x in mask.options.items()}
    return attention(q, k, k, **given, return_weights=True).weights > 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_of_a_mask_mean_what_the_matrix_shows(name, place, padded):
    seqlen_q, seqlen_k, q_offset, kv_offset = place
    there = None
    if padded:  # the end is missing where a static cache is longer than the text so far
        there = torch.ones(BATCH, q_offset + seqlen_q, dtype=torch.bool)
        there[0, 1:3] = there[1, :6] = False
    given = dict(batch_size=BATCH, q_length=seqlen_q, kv_length=seqlen_k, q_offset=q_offset)
    given |= dict(kv_offset=kv_offset, mask_function=FUNCTIONS[name], attention_mask=there)
    found = ours(**given)
    assert found.options is not None and "tensor" not in vars(found)
    matrix = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    assert found.shape == matrix.shape and found.ndim == matrix.ndim
    assert np.array_equal(weights_seen(found, seqlen_q, seqlen_k), matrix.numpy())
    assert torch.equal(found.tensor, matrix)


@pytest.mark.parametrize("name", OTHERS)
def test_other_mask_functions_make_the_matrix(name):
    given = dict(batch_size=BATCH, q_length=7, kv_length=7, mask_function=OTHERS[name])
    found = ours(**given)
    assert found.options is None
    assert torch.equal(found.tensor, masking_utils.sdpa_mask(**given, allow_is_causal_skip=False))


def test_function_that_only_vmap_may_call_makes_the_matrix():
    given = dict(batch_size=BATCH, q_length=7, kv_length=7, use_vmap=True)
    found = ours(**given)
    assert found.options is None
    assert torch.equal(found.tensor, masking_utils.sdpa_mask(**given, allow_is_causal_skip=False))


def test_full_view_of_both_sides_needs_no_mask_where_none_is_allowed():
    given = dict(batch_size=BATCH, q_length=7, kv_length=7, mask_function=BOTH_WAYS)
    there = torch.ones(BATCH, 7, dtype=torch.bool)
    assert ours(**given, allow_is_bidirectional_skip=True, attention_mask=there) is None
    assert ours(**given, attention_mask=there).options == {"q_offset": 0}


def test_mask_is_a_matrix_for_whoever_looks_inside():
    found = ours(batch_size=1, q_length=3, kv_length=3)
    matrix = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    assert torch.equal(found[:, 0], matrix[:, 0])
    assert torch.equal(found.expand(2, 1, 3, 3)[1:], matrix)
    assert torch.equal(torch.cat([found, matrix], dim=-1), torch.cat([matrix] * 2, dim=-1))
    assert torch.equal(matrix & found, matrix)
    assert torch.equal(torch.where(found, 1, 0), matrix.long())
    assert found.device == matrix.device and found.dtype == torch.bool
    with pytest.raises(AttributeError, match="_nothing"):
        _ = found._nothing


# ---- What is refused -----------------------------------------------------------------------------


def test_model_with_attention_of_its_own_is_refused():
    config = BloomConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCABULARY
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=OURS)
    with pytest.raises(NotImplementedError, match="attention of its own.*'eager'"):
        model(words(), attention_mask=padding("left"))


@pytest.mark.parametrize("side", [None, "left"])
def test_tensors_on_another_device_are_refused(side):
    model = model_of("Llama").to("meta")
    inputs = {"input_ids": words().to("meta"), "attention_mask": padding(side).to("meta")}
    with pytest.raises(NotImplementedError, match="on CPUs, found tensors on 'meta'"):
        run(model, OURS, **inputs)


def test_attention_refuses_tensors_on_another_device():
    from transformers import AttentionInterface

    q = torch.ones(1, 1, 2, 4, device="meta")
    with pytest.raises(NotImplementedError, match="on CPUs, found tensors on 'meta'"):
        AttentionInterface()[OURS](torch.nn.Module(), q, q, q, None)


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_keys_that_a_model_chooses_are_refused(name):
    from transformers import AttentionInterface

    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match=rf"takes {name}, .*'eager'"):
        AttentionInterface()[OURS](torch.nn.Module(), q, q, q, None, **{name: q})


def test_paged_cache_is_refused():
    from transformers import AttentionInterface

    q, paged = torch.ones(1, 1, 2, 4), object.__new__(PagedAttentionCache)
    with pytest.raises(NotImplementedError, match="no paged caches"):
        AttentionInterface()[OURS](torch.nn.Module(), q, q, q, None, cache=paged)
