"""A GGUF file: its hyperparameters, its weights as float32 and its tokenizer.

GGUF keeps everything a language model needs in one file: metadata as key-value
pairs, token and merge lists, and the weights in quantised blocks. The weights
are dequantised once, here; afterwards they are plain NumPy arrays.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3  # GGUF's token type of <|im_start|> and its like


@dataclass(frozen=True)
class Config:
    """The numbers that shape a Llama-type transformer."""

    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    rope_base: float
    rms_eps: float


def load(path: Path) -> tuple[Config, SimpleNamespace, Tokenizer]:
    """Read one model: its numbers, its weights and its tokenizer."""
    reader = GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    return read_config(meta), read_weights(reader), build_tokenizer(meta)


def read_config(meta: dict) -> Config:
    """Take the transformer's numbers out of the metadata."""
    arch, pre = meta["general.architecture"], meta["tokenizer.ggml.pre"]
    if (arch, pre) != ("llama", "smollm"):
        raise ValueError(
            f"this example runs a 'llama' model with the 'smollm' tokenizer, "
            f"but the file holds a {arch!r} model with {pre!r}"
        )
    return Config(
        layers=meta["llama.block_count"],
        num_heads=meta["llama.attention.head_count"],
        num_kv_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        context=meta["llama.context_length"],
        rope_base=meta["llama.rope.freq_base"],
        rms_eps=meta["llama.attention.layer_norm_rms_epsilon"],
    )


def read_weights(reader: GGUFReader) -> SimpleNamespace:
    """Dequantise all tensors: `token_embd`, `output_norm`, and `layers[i].attn_q` ...

    A matrix has shape (out, in), so a linear map is `x @ matrix.T`.
    """
    weights = SimpleNamespace(layers=[])
    for tensor in reader.tensors:
        array = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        name = tensor.name.removesuffix(".weight")
        if not name.startswith("blk."):
            setattr(weights, name, array)
            continue
        _, layer, name = name.split(".")
        while len(weights.layers) <= int(layer):
            weights.layers.append(SimpleNamespace())
        setattr(weights.layers[int(layer)], name, array)
    return weights


def build_tokenizer(meta: dict) -> Tokenizer:
    """Build the byte-level BPE tokenizer from the token and merge lists.

    Control tokens stay out of what `encode` finds in a text: whoever types
    "<|im_end|>" gets those ten characters, not the end of a turn. Code that means
    the token asks for `token_to_id`.
    """
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, type_ in types if type_ == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in control])
    tokenizer.encode_special_tokens = True
    return tokenizer
