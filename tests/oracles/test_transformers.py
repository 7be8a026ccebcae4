"""mha_fast.transformers: tiny random models give what their own eager attention gives."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from judge import assert_near  # noqa: E402
from transformers import masking_utils  # noqa: E402

import mha_fast.transformers  # noqa: E402
import mha_fast.transformers as door  # noqa: E402

NAME = door.register()
VOCAB, WINDOW = 99, 7
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SIZES | {
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}  # fmt: skip
DECODERS = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": WINDOW},
    "Gemma": GROUPED | {"head_dim": 8},
    "Gemma2": GROUPED | GEMMA | {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "Gemma3Text": GROUPED | GEMMA | {"sliding_window": WINDOW},
    "GptOss": GROUPED | MOE | {"head_dim": 8, "sliding_window": WINDOW},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Phi3": GROUPED,
    "Olmo2": GROUPED,
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64},
    "OPT": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoX": SIZES,
}
ENCODERS = {
    "Bert": SIZES,
    "Roberta": SIZES | {"pad_token_id": 0},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCAB},
    "ModernBert": SIZES | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2,
                           "local_attention": WINDOW, "global_attn_every_n_layers": 2},
}  # fmt: skip
WITH_BOTH = {
    "Bart": SEQ2SEQ,
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
           "vocab_size": VOCAB, "decoder_start_token_id": 0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    """Models this small spend their time in waiting for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(name, sizes, kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    for option in ("resid_pdrop", "attn_pdrop", "embd_pdrop", "dropout", "attention_dropout"):
        if hasattr(config, option):
            setattr(config, option, 0.0)
    model = getattr(transformers, kind).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for x in model.parameters():  # so that attention is not uniform
            x.mul_(3 if x.ndim > 1 else 1)
    return model


def with_ours(model, function):
    """What it returns with eager attention, and with ours."""
    results = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        results.append(function(model))
    return results


def texts(side=None, length=19):
    """Token ids and the mask of a batch of two texts, one of them short."""
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if side:
        mask[0, slice(None, 6) if side == "left" else slice(-6, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_outputs_near(mine, eager, rows=None):
    mine, eager = (x.detach() if rows is None else x.detach()[rows] for x in (mine, eager))
    assert torch.isfinite(mine).all()
    assert_near(mine.numpy(), eager.numpy(), 200 * (1 + eager.abs().max().item()))


GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

# ---- Decoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_eager_attention(name, side):
    model, inputs = model_of(name, DECODERS[name], "AutoModelForCausalLM"), texts(side)
    with torch.no_grad():
        eager, mine = with_ours(model, lambda m: m(**inputs).logits)
    assert_outputs_near(mine, eager, inputs["attention_mask"].bool())


@pytest.mark.parametrize("cached", ["dynamic", "static", "growing"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_eager_attention(name, cached):
    model = model_of(name, DECODERS[name], "AutoModelForCausalLM")

    def written(m, **more):
        with torch.no_grad():
            return m.generate(**texts("left"), **GREEDY, **more)

    eager = written(model)
    model.set_attn_implementation(NAME)
    more = {"static": {"cache_implementation": "static"}}.get(cached, {})
    if cached == "growing":
        more = {"cache": door.cache(model.config)}
    assert torch.equal(written(model, **more), eager)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_beams_are_those_of_eager_attention(name):
    model = model_of(name, DECODERS[name], "AutoModelForCausalLM")

    def written(m):
        more = {} if m.config._attn_implementation == "eager" else {"cache": door.cache(m.config)}
        with torch.no_grad():
            return m.generate(**texts("left"), **GREEDY, num_beams=3, **more)

    eager, mine = with_ours(model, written)
    assert torch.equal(mine, eager)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "GPT2"])
def test_a_training_step_has_the_gradients_of_eager_attention(name):
    model, inputs = model_of(name, DECODERS[name], "AutoModelForCausalLM"), texts("right")

    def gradients(m):
        m.zero_grad()
        m(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {n: x.grad.clone() for n, x in m.named_parameters() if x.grad is not None}

    eager, mine = with_ours(model, gradients)
    assert mine.keys() == eager.keys()
    for n in mine:
        assert_outputs_near(mine[n], eager[n])


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_packed_sequences_do_not_see_each_other(name):
    model = model_of(name, DECODERS[name], "AutoModelForCausalLM")
    ids = texts()["input_ids"][:1]
    positions = torch.cat([torch.arange(8), torch.arange(11)])[None]
    with torch.no_grad():
        eager, mine = with_ours(
            model, lambda m: m(ids, position_ids=positions, use_cache=False).logits
        )
        alone = model(ids[:, 8:]).logits
    assert_outputs_near(mine, eager)
    assert_outputs_near(mine[:, 8:], alone)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
def test_weights_come_out_where_they_are_asked_for(name):
    model, inputs = model_of(name, DECODERS[name], "AutoModelForCausalLM"), texts()
    with torch.no_grad():
        eager, mine = with_ours(model, lambda m: m(**inputs, output_attentions=True).attentions)
    assert len(mine) == len(eager) == 2
    for a, b in zip(mine, eager, strict=True):
        assert_outputs_near(a, b)


def test_dropout_acts_in_training_alone():
    sizes = DECODERS["Llama"] | {"attention_dropout": 0.5}
    model = model_of("Llama", sizes, "AutoModelForCausalLM")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.set_attn_implementation(NAME)

    def drawn(seed):
        torch.manual_seed(seed)
        return model(**texts(), use_cache=False).logits

    assert torch.equal(drawn(0), drawn(1))
    model.train()
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


# ---- Encoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_are_those_of_eager_attention(name, side):
    model, inputs = model_of(name, ENCODERS[name], "AutoModel"), texts(side)
    with torch.no_grad():
        eager, mine = with_ours(model, lambda m: m(**inputs).last_hidden_state)
    assert_outputs_near(mine, eager, inputs["attention_mask"].bool())


def test_images_give_the_vectors_of_eager_attention():
    sizes = SIZES | {"image_size": 16, "patch_size": 4}
    model, image = model_of("ViT", sizes, "AutoModel"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_outputs_near(*with_ours(model, lambda m: m(image).last_hidden_state)[::-1])


@pytest.mark.parametrize("name", WITH_BOTH)
def test_encoder_decoders_write_what_eager_attention_writes(name):
    model = model_of(name, WITH_BOTH[name], "AutoModelForSeq2SeqLM")
    with torch.no_grad():
        eager, mine = with_ours(model, lambda m: m.generate(**texts("right"), **GREEDY))
        assert torch.equal(mine, eager)
        inputs = texts("right") | {"decoder_input_ids": texts()["input_ids"][:, :9]}
        assert_outputs_near(*with_ours(model, lambda m: m(**inputs).logits)[::-1])


# ---- No matrix -----------------------------------------------------------------------------------


@pytest.fixture
def dense_masks(monkeypatch):
    """How many masks of all pairs were made."""
    made = []
    counted = masking_utils.sdpa_mask

    def sdpa_mask(*arguments, **options):
        made.append(arguments)
        return counted(*arguments, **options)

    monkeypatch.setattr(mha_fast.transformers, "sdpa_mask", sdpa_mask)
    return made


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_positions_and_padding_make_no_matrix(name, dense_masks):
    decoder = name in DECODERS
    sizes = DECODERS[name] if decoder else ENCODERS[name]
    model = model_of(name, sizes, "AutoModelForCausalLM" if decoder else "AutoModel")
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        model(**texts("right"))
        if decoder:
            model.generate(**texts("left"), **GREEDY)
            model.generate(**texts("left"), **GREEDY, cache_implementation="static")
    assert not dense_masks


def test_packed_sequences_make_one(dense_masks):
    """So the test before can fail."""
    model = model_of("Llama", DECODERS["Llama"], "AutoModelForCausalLM")
    model.set_attn_implementation(NAME)
    model(texts()["input_ids"][:1], position_ids=torch.arange(19)[None] % 8, use_cache=False)
    assert dense_masks


# ---- The cache, and mistakes ---------------------------------------------------------------------


def test_the_cache_grows_in_place():
    layer = door.GrowingLayer()
    new = torch.randn(2, 3, 100, 4)
    layer.update(new, new + 1)
    pointers = set()
    for i in range(150):
        keys, values = layer.update(new[:, :, i % 9, None], new[:, :, i % 9, None])
        pointers.add(keys.data_ptr())
        assert torch.equal(keys[:, :, -1], new[:, :, i % 9]) and torch.equal(keys[:, :, :100], new)
        assert torch.equal(values[:, :, :100], new + 1) and layer.get_seq_length() == 101 + i
    assert len(pointers) == 2  # full at 200 and 400


def test_the_cache_can_be_reordered_cropped_and_repeated():
    layer, other = door.GrowingLayer(), transformers.cache_utils.DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        new = torch.randn(other.keys.shape[0] if step else 2, 3, 5, 4, generator=generator)
        for x in (layer, other):
            x.update(new, -new)
            if step % 3 == 0:
                x.reorder_cache(torch.tensor([1, 0]).repeat(len(new) // 2))
            if step % 4 == 1:
                x.crop(-3)
            if step == 6:
                x.batch_repeat_interleave(2)
            if step == 8:
                x.batch_select_indices(torch.tensor([3, 0]))
            if step == 10:
                x.reset()
        if step != 10:
            assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
        else:
            assert layer.get_seq_length() == other.get_seq_length() == 0
            break


def test_tensors_elsewhere_are_refused():
    model = model_of("Llama", DECODERS["Llama"], "AutoModelForCausalLM")
    model.set_attn_implementation(NAME)
    with pytest.raises(TypeError, match="q is on meta, expected the CPU"):
        model.to("meta")(texts()["input_ids"].to("meta"))


def test_pages_are_refused():
    paged = type("PagedAttentionCache", (), {})()
    with pytest.raises(ValueError, match="cache is paged"):
        door.attend(None, None, None, None, None, cache=paged)


def test_registering_again_changes_nothing():
    assert door.register() == NAME == "mha_fast"
    assert np.isin(NAME, list(transformers.AttentionInterface().keys()))
