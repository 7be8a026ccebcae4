"""The examples' models compute what transformers and torch do. Optional: needs both.

The bound: in each of the two, every layer may lose what the accuracy rule allows for numbers
of that size. For embeddings that is 7e-6.
"""

import json

import minilm
import numpy as np
import pytest
import reactions
import torch_file
from common import UserError, find
from judge import assert_within, tolerance

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SENTENCES = [
    "It is in this spirit that a majority of American governments have passed new laws since "
    "2009 making the registration or voting process more difficult.",
    "Short.",
    "",
    "The cat sat on the mat. " * 60,  # longer than the model reads
    "Łódź, 東京 and ☃ are words it must cut into pieces",
]
REACTIONS = [reactions.SAMPLE, "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1"]


def assert_equal_models(ours, theirs, layers, what):
    theirs = theirs.numpy()
    bound = 2 * layers * tolerance(np.abs(theirs), np.float32)
    assert_within(np.abs(ours - theirs), bound, what)


def folder(requirement, pattern):
    try:
        return find(requirement, pattern).parent
    except UserError as error:
        pytest.skip(f"{error} (make oracles does)")


@pytest.fixture(scope="module")
def original_minilm():
    path = folder(minilm.REQUIREMENT, "model.safetensors")
    return transformers.BertModel.from_pretrained(path, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def original_rxnmapper():
    path = folder(reactions.REQUIREMENT, "pytorch_model.bin")
    config = transformers.AlbertConfig(**json.loads((path / "config.json").read_text()))
    config._attn_implementation = "eager"
    model = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    tensors = torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    prefix = "albert."
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    model.load_state_dict({name: x for name, x in own.items() if not name.startswith("pooler")})
    return model


def test_padded_sentences_are_encoded_as_by_the_original(original_minilm):
    model = minilm.load()
    texts = [encoding.ids for encoding in model.tokenizer.encode_batch(SENTENCES)]
    tokens, lengths = minilm.pad(texts)
    real = torch.arange(tokens.shape[1]) < torch.from_numpy(lengths)[:, None]
    with torch.no_grad():
        theirs = original_minilm(
            torch.from_numpy(tokens), real.to(torch.int64), output_attentions=True
        )
    ours, weights = model.encoder(model.embeddings(tokens), lengths, return_weights=True)
    hidden = theirs.last_hidden_state
    assert_equal_models(ours[real.numpy()], hidden[real], minilm.LAYERS, "hidden states")
    theirs = torch.stack(theirs.attentions)
    rows = [x.swapaxes(2, 3)[:, real] for x in (torch.from_numpy(weights), theirs)]
    assert_equal_models(rows[0].numpy(), rows[1], minilm.LAYERS, "weights")
    mean = (hidden * real[..., None]).sum(axis=1) / real.sum(axis=1, keepdim=True)
    unit = mean / mean.norm(dim=-1, keepdim=True)
    assert_equal_models(model.embed(SENTENCES), unit, minilm.LAYERS, "embeddings")


@pytest.mark.parametrize("reaction", REACTIONS)
def test_reactions_are_looked_at_as_by_the_original(original_rxnmapper, reaction):
    model = reactions.load()
    tokens, weights = model.look(reaction)
    numbers = torch.tensor([[model.numbers[token] for token in tokens]])
    with torch.no_grad():
        theirs = original_rxnmapper(numbers, output_attentions=True).attentions
    assert_equal_models(weights, torch.cat(theirs), reactions.LAYERS, "weights")


def test_tensors_read_without_torch_are_those_of_torch():
    path = folder(reactions.REQUIREMENT, "pytorch_model.bin") / "pytorch_model.bin"
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = torch_file.load(path)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == np.float32
        assert np.array_equal(ours[name], tensor.numpy()), name


def test_canary_a_model_without_one_head_is_found(original_minilm, monkeypatch):
    model = minilm.load()
    kept = np.ones((minilm.LAYERS, minilm.HEADS), bool)
    kept[2, 9] = False  # the one that is missed least
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda sentences: embed(sentences, kept=kept))
    with pytest.raises(AssertionError, match="embeddings"):
        test_padded_sentences_are_encoded_as_by_the_original(original_minilm)
