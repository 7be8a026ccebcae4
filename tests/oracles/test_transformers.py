"""Models of transformers compute with our attention what they compute with their own.

Optional: needs transformers. The oracle is its ``eager`` attention.
"""

import numpy as np
import pytest
from judge import assert_within
from tiny_transformers import (
    BATCH,
    DECODERS,
    ENCODERS,
    PAIRS,
    assert_near_gradients,
    assert_near_models,
    model_of,
    one_thread_of_torch,  # noqa: F401
    padding,
    run,
    words,
    written,
)

import mha_fast.transformers

torch = pytest.importorskip("torch")
OURS = mha_fast.transformers.register()
SIDES = [None, "left", "right"]


def both(model, **inputs):
    return run(model, OURS, **inputs), run(model, "eager", **inputs)


# ---- Forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_a_decoder_are_those_of_eager(name, side):
    there = padding(side)
    ours, theirs = both(model_of(name), input_ids=words(), attention_mask=there)
    assert_near_models(ours.logits[there > 0], theirs.logits[there > 0], name)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ENCODERS)
def test_states_of_an_encoder_are_those_of_eager(name, side):
    there = padding(side)
    ours, theirs = both(model_of(name, "Model"), input_ids=words(), attention_mask=there)
    ours, theirs = (x.last_hidden_state[there > 0] for x in (ours, theirs))
    assert_near_models(ours, theirs, name)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", PAIRS)
def test_logits_of_an_encoder_and_a_decoder_are_those_of_eager(name, side):
    inputs = {"input_ids": words(), "attention_mask": padding(side)}
    ours, theirs = both(model_of(name), **inputs, decoder_input_ids=words(BATCH, 9))
    assert_near_models(ours.logits, theirs.logits, name, layers=4)


def test_states_of_a_vision_model_are_those_of_eager():
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    ours, theirs = both(model_of("ViT", "Model"), pixel_values=images)
    assert_near_models(ours.last_hidden_state, theirs.last_hidden_state, "ViT")


@pytest.mark.parametrize("name", ["Llama", "Bert", "GptOss"])
def test_bfloat16_is_no_less_exact_than_with_eager(name):
    head = "Model" if name == "Bert" else "ForCausalLM"
    there = padding("left")
    inputs = {"input_ids": words(), "attention_mask": there}
    exact = run(model_of(name, head), "eager", **inputs)[0][there > 0]
    model = model_of(name, head).to(torch.bfloat16)
    ours, theirs = (x[0][there > 0].float() for x in both(model, **inputs))
    rms = [(x - exact).square().mean().sqrt() for x in (ours, theirs)]
    assert 0 < rms[0] <= 1.1 * rms[1]


# ---- Generation ----------------------------------------------------------------------------------

HOW = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_tokens_that_a_model_writes_are_those_of_eager(name, how):
    if how == "static" and name == "DeepseekV3":
        pytest.skip("transformers' static cache holds keys and values of one width")
    model = model_of(name)
    inputs = {"input_ids": words(), "attention_mask": padding("left")}
    ours, theirs = (written(model, x, inputs, **HOW[how]) for x in (OURS, "eager"))
    assert ours[0] == theirs[0]
    assert_near_models(ours[1], theirs[1], "logits", layers=4)


def test_sampled_tokens_are_those_of_eager():
    model, inputs = model_of("Llama"), {"input_ids": words()}
    found = []
    for implementation in (OURS, "eager"):
        torch.manual_seed(4)
        found.append(written(model, implementation, inputs, do_sample=True)[0])
    assert found[0] == found[1]


# ---- Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "GPT2", "Bert", "DistilBert"])
def test_output_attentions_are_the_weights_of_eager(name):
    head = "Model" if name in ENCODERS else "ForCausalLM"
    there = padding("left")
    inputs = {"input_ids": words(), "attention_mask": there, "output_attentions": True}
    ours, theirs = both(model_of(name, head), **inputs)
    assert len(ours.attentions) == len(theirs.attentions) == 2
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        rows = there[:, None, :, None] > 0
        assert_near_models(torch.where(rows, a, 0), torch.where(rows, b, 0), "weights")
    assert_near_models(ours[0][there > 0], theirs[0][there > 0], "states")
    assert run(model_of(name, head), OURS, input_ids=words()).attentions is None


@pytest.mark.parametrize("name", PAIRS)
def test_cross_attentions_are_the_weights_of_eager(name):
    inputs = {"input_ids": words(), "attention_mask": padding("right")}
    inputs |= {"decoder_input_ids": words(BATCH, 9), "output_attentions": True}
    ours, theirs = both(model_of(name), **inputs)
    for kind in ("decoder_attentions", "cross_attentions"):
        for a, b in zip(ours[kind], theirs[kind], strict=True):
            assert_near_models(a, b, kind)


# ---- Training ------------------------------------------------------------------------------------


def gradients(model, implementation, **inputs):
    model.zero_grad()
    run(model, implementation, grad=True, **inputs).loss.backward()
    return {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}


TRAINED = [
    "Llama", "Mistral", "Gemma2", "GptOss", "DeepseekV3", "GPT2", "Qwen3", "Phi3", "T5", "Bart",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_a_step_of_training_are_those_of_eager(name):
    model, there = model_of(name).train(), padding("right")
    inputs = {"input_ids": words(), "attention_mask": there}
    inputs["labels"] = torch.where(there > 0, words(), -100)
    ours, theirs = (gradients(model, x, **inputs) for x in (OURS, "eager"))
    size = max(float(x.abs().max()) for x in theirs.values())
    assert_near_gradients(ours, theirs, size)
    assert any("relative_attention_bias" in x for x in ours) or name != "T5"
    assert any("sinks" in x and ours[x].any() for x in ours) or name != "GptOss"


def test_three_steps_of_an_optimizer_end_where_eager_ends():
    ends = []
    for implementation in (OURS, "eager"):
        model = model_of("Llama").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(3):
            loss = run(model, implementation, grad=True, input_ids=words(), labels=words()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ends.append(losses)
    assert ends[1][2] < ends[1][0]
    assert_near_models(*map(torch.tensor, ends), "losses", layers=6)


def test_dropout_is_torchs_to_seed_and_ends_with_training():
    model = model_of("Llama", attention_dropout=0.5)

    def logits(seed):
        torch.manual_seed(seed)
        return run(model, OURS, input_ids=words()).logits

    assert torch.equal(logits(5), logits(6))
    model.train()
    assert torch.equal(logits(5), logits(5))
    assert not torch.equal(logits(5), logits(6))


def test_gradients_with_dropout_are_the_same_when_layers_are_computed_again():
    found = []
    for again in (False, True):
        model = model_of("Llama", attention_dropout=0.5).train()
        if again:
            model.activation_checkpointing_enable()
        torch.manual_seed(7)
        found.append(gradients(model, OURS, input_ids=words(), labels=words()))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo does
def test_compiled_model_computes_and_learns_what_eager_does():
    model, there = model_of("Llama"), padding("right")
    inputs = {"input_ids": words(), "attention_mask": there, "use_cache": False}
    inputs["labels"] = torch.where(there > 0, words(), -100)
    theirs = run(model, "eager", **inputs).logits
    gradient = gradients(model, "eager", **inputs)
    model.set_attn_implementation(OURS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(**inputs).logits
    assert_near_models(found[there > 0], theirs[there > 0], "logits")
    model.zero_grad()
    compiled(**inputs).loss.backward()
    ours = {n: x.grad for n, x in model.named_parameters()}
    assert_near_gradients(ours, gradient, max(float(x.abs().max()) for x in gradient.values()))


# ---- The name ------------------------------------------------------------------------------------


def test_name_is_registered_as_often_as_one_likes():
    from transformers import AttentionInterface, AttentionMaskInterface

    before = [AttentionInterface()[OURS], AttentionMaskInterface()[OURS]]
    assert mha_fast.transformers.register() == OURS == "mha_fast"
    assert before == [AttentionInterface()[OURS], AttentionMaskInterface()[OURS]]


def test_model_from_a_folder_takes_the_name(tmp_path):
    from transformers import AutoModel

    model = model_of("Bert", "Model")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=OURS).eval()
    assert loaded.config._attn_implementation == OURS
    ours = run(loaded, OURS, input_ids=words())
    assert_near_models(ours[0], run(model, "eager", input_ids=words())[0], "states")


def test_canary_a_model_that_forgets_its_mask_is_caught():
    model, there = model_of("Llama"), padding("left")
    theirs = run(model, "eager", input_ids=words(), attention_mask=there).logits
    forgot = run(model, OURS, input_ids=words()).logits
    with pytest.raises(AssertionError, match="wrong"):
        assert_near_models(forgot[there > 0], theirs[there > 0], "logits")
    with pytest.raises(AssertionError, match="wrong"):
        assert_within(np.full(1, 1e-3), np.full(1, 1e-6), "numbers")
