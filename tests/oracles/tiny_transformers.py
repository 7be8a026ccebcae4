"""Tiny random models of transformers' architectures, and what they are asked."""

import numpy as np
import pytest
from judge import FACTOR, assert_within, tolerance

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS, VOCABULARY, BATCH, LENGTH, PADDING = 2, 61, 2, 21, 6
SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCABULARY}
HEADS = {"num_hidden_layers": LAYERS, "num_attention_heads": 4}
WORDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = SIZES | HEADS | WORDS | {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": LAYERS,
}  # fmt: skip
OF_BART = {
    "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "vocab_size": VOCABULARY,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
OF_T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
    "vocab_size": VOCABULARY, "decoder_start_token_id": 1, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "dropout_rate": 0.0,
}  # fmt: skip

DECODERS = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 8},
    "Gemma2": GROUPED | {"head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "Gemma3Text": GROUPED | {"head_dim": 8, "sliding_window": 8},
    "GptOss": GROUPED | EXPERTS | {"head_dim": 8, "sliding_window": 8},
    "Llama4Text": GROUPED
    | EXPERTS
    | {"head_dim": 8, "attention_chunk_size": 8, "intermediate_size_mlp": 48},
    "DeepseekV3": SIZES | HEADS | WORDS | LATENT | {"num_key_value_heads": 4},
    "GPT2": WORDS | {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY},
    "GPTNeoX": SIZES | HEADS | WORDS,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Phi3": GROUPED,
    "Olmo2": GROUPED,
    "Gemma": GROUPED | {"head_dim": 8},
    "OPT": SIZES | HEADS | WORDS | {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
ENCODERS = {
    "Bert": SIZES | HEADS,
    "Roberta": SIZES | HEADS,
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4} | SIZES,
    "ModernBert": SIZES | HEADS | WORDS | {"local_attention": 8, "global_attn_every_n_layers": 2},
}
PAIRS = {
    "T5": WORDS | OF_T5,
    "Bart": WORDS | OF_BART,
    "Marian": WORDS | OF_BART,
}
SEEING = {"ViT": {"image_size": 12, "patch_size": 4} | SIZES | HEADS}
NO_DROPOUT = {
    name: 0.0
    for name in (
        "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout",
    )
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread_of_torch():
    """Two teams of threads in turn, for arrays this small, spend most of the time waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(name, head="ForCausalLM", **options):
    """A model in eval mode, with weights that make attention choose."""
    settings = (DECODERS | ENCODERS | PAIRS | SEEING)[name] | NO_DROPOUT | options
    torch.manual_seed(1)
    if name == "GPT2":
        head = head.replace("ForCausalLM", "LMHeadModel")
    if name == "T5":
        head = "ForConditionalGeneration"
    if name in ("Bart", "Marian"):
        head = "ForConditionalGeneration" if name == "Bart" else "MTModel"
    config = getattr(transformers, f"{name}Config")(**settings)
    if not hasattr(transformers, f"{name}{head}"):
        name = name.removesuffix("Text")
    model = getattr(transformers, f"{name}{head}")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1 or key.endswith(("bias", "sinks")):
                weight.normal_(std=0.25)
    return model


def words(*shape):
    """Tokens, of which none is padding, the first or the last of a text."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, shape or (BATCH, LENGTH), generator=generator)


def padding(side):
    """1 where a token is; the last text is shorter, by tokens on the left or on the right."""
    there = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side is not None:
        there[-1, slice(PADDING) if side == "left" else slice(-PADDING, None)] = 0
    return there


def run(model, implementation, grad=False, **inputs):
    model.set_attn_implementation(implementation)
    with torch.set_grad_enabled(grad):
        return model(**inputs)


def written(model, implementation, inputs, **options):
    """The tokens that a model writes, and the logits that it chose them by."""
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    found = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return found.sequences.tolist(), torch.stack(found.logits)


def assert_near_models(ours, theirs, what, layers=LAYERS):
    """In each of the two, every layer may lose what the accuracy rule allows for numbers of that
    size."""
    ours, theirs = ours.detach().numpy(), theirs.detach().numpy()
    bound = 2 * layers * tolerance(np.abs(theirs), np.float32)
    assert_within(np.abs(ours - theirs), bound, what)


def assert_near_gradients(ours, theirs, size):
    """Sums over tokens of numbers that errors of LAYERS layers have come through."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().numpy()
        bound = FACTOR**2 * LAYERS * LENGTH * np.finfo(np.float32).eps * size
        assert_within(error, np.broadcast_to(bound, error.shape), name)
