"""The cache that grows holds what transformers' own cache holds. Optional: needs transformers."""

import copy

import pytest
from tiny_transformers import (
    PAIRS,
    model_of,
    one_thread_of_torch,  # noqa: F401
    padding,
    words,
    written,
)
from transformers import DynamicCache, LlamaConfig, MistralConfig

import mha_fast.transformers
from mha_fast.transformers import cache

torch = pytest.importorskip("torch")
OURS = mha_fast.transformers.register()
CONFIGS = {
    "full": LlamaConfig(num_hidden_layers=1),
    "sliding": MistralConfig(num_hidden_layers=1, sliding_window=5),
    "window of one": MistralConfig(num_hidden_layers=1, sliding_window=1),
}


def pair(kind):
    return cache(CONFIGS[kind]), DynamicCache(config=CONFIGS[kind])


def update(caches, tokens, batch=2, **how):
    """New keys and values for the first layer of each; what it returns must be the same."""
    k, v = torch.randn(2, batch, 3, tokens, 4, **how)
    found = [cache.update(k, v, 0) for cache in caches]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert len({(c.get_seq_length(), c.get_mask_sizes(1, 0)) for c in caches}) == 1
    return found[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_one_by_one_are_those_of_the_cache_that_copies(kind):
    caches = pair(kind)
    for tokens in (7, *[1] * 30, 4, 1, 1, 9, *[1] * 30):
        update(caches, tokens)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_memory_moves_when_it_is_full_and_not_before(kind):
    caches = pair(kind)
    update(caches, 8)
    places = set()
    for _ in range(64):
        places.add(update(caches, 1)[0].untyped_storage().data_ptr())
    assert len(places) <= (4 if kind == "full" else 16)
    room = caches[0].layers[0]._rooms[0].memory.shape[-2]
    assert room <= (2 * 72 if kind == "full" else 2 * 13)


def test_views_of_earlier_steps_stay_what_they_were():
    caches = pair("full")
    kept = [update(caches, tokens)[0] for tokens in (5, 1, 1, 1, 20, 1)]
    then = [x.clone() for x in kept]
    caches[0].crop(-3), caches[1].crop(-3)
    for _ in range(30):
        update(caches, 1)
    assert all(torch.equal(a, b) for a, b in zip(kept, then, strict=True))


CHANGES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "crop": lambda cache: cache.crop(-3),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_cache_goes_on_after_a_change(kind, change):
    caches, batch = pair(kind), {"repeat": 4, "select": 1}.get(change, 2)
    for tokens in (4,) if kind == "sliding" else (6, 1, 1):
        update(caches, tokens)
    for each in caches:
        CHANGES[change](each)
    for tokens in (1, 1, 5, 1, 1):
        update(caches, tokens, batch)


@pytest.mark.parametrize("of", [copy.copy, copy.deepcopy])
def test_copy_and_its_original_go_on_apart(of):
    caches = pair("full")
    update(caches, 6)
    update(caches, 1)
    branch = [copy.copy(each) for each in caches]
    for each in branch:
        each.layers = [of(layer) for layer in each.layers]
    for _ in range(3):
        update(caches, 1)
        update(branch, 1)
        update(branch, 2)


def test_keys_with_gradients_are_not_written_over():
    caches = pair("full")
    update(caches, 3)
    k, _ = update(caches, 2, requires_grad=True)
    assert k.grad_fn is not None and update(caches, 1)[0].grad_fn is not None
    k.sum().backward()  # raises if a later step has written into what this one keeps
    with torch.no_grad():
        update(caches, 1)
        update(caches, 1)


def test_tokens_of_inference_mode_may_be_followed_by_others():
    caches = pair("full")
    with torch.inference_mode():
        update(caches, 4)
        update(caches, 1)
    with torch.no_grad():
        update(caches, 1)
        update(caches, 1)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss", "DeepseekV3", *PAIRS])
def test_tokens_written_with_it_are_the_same(name, how):
    model = model_of(name)
    inputs = {"input_ids": words(), "attention_mask": padding("left")}
    if "prompt_lookup_num_tokens" in how:
        inputs = {"input_ids": words(1, 9).repeat(1, 3)}
    for implementation in (OURS, "sdpa") if name in ("Llama", "Mistral") else (OURS,):
        found = written(model, implementation, inputs, cache=cache(model.config), **how)[0]
        assert found == written(model, implementation, inputs, **how)[0]


def test_layers_are_those_that_the_model_needs():
    config = model_of("Gemma2").config
    names = [type(layer).__name__ for layer in cache(config).layers]
    assert names == ["GrowingSlidingWindowLayer", "GrowingLayer"]
    names = [type(layer).__name__ for layer in cache(model_of("Llama4Text").config).layers]
    assert set(names) <= {"GrowingSlidingWindowLayer", "GrowingLayer"}
    assert type(cache(model_of("T5").config)).__name__ == "EncoderDecoderCache"


def test_what_is_no_configuration_is_an_error():
    with pytest.raises(AttributeError, match="get_text_config"):
        cache("llama")
