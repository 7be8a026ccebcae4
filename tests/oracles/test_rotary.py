"""Rotary tables are those of transformers, which the published models were trained with."""

import numpy as np
import pytest

from mha_fast import rotary, rotary_tables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

LONG = {"factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": LONG,
    "llama3": LONG | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": LONG,
    "yarn of other turns": LONG | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn of DeepSeek": LONG | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn of given size": LONG | {"attention_factor": 1.3},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [50, 300])
def test_tables_are_those_of_transformers(name, head_dim, length):
    scaling = {"rope_type": name.split()[0], "rope_theta": 500000.0, **SCALINGS[name]}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=dict(scaling),
    )
    speed, size = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=length)
    angles = np.outer(np.arange(length), speed.double().numpy())
    cos, sin = rotary_tables(length, head_dim, scaling=scaling, dtype=np.float64)
    bound = 2**-22 * (1 + np.abs(angles))  # theirs are float32
    assert (np.abs(cos - size * np.cos(angles)) <= bound).all()
    assert (np.abs(sin - size * np.sin(angles)) <= bound).all()


def test_rotation_is_that_of_llama():
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 4, 9, 16), dtype=np.float32) for _ in range(2))
    cos, sin = rotary_tables(9, 16)
    wide = (torch.from_numpy(np.tile(a, 2))[None] for a in (cos, sin))
    theirs = apply_rotary_pos_emb(torch.from_numpy(q), torch.from_numpy(k), *wide)
    for x, expected in zip((q, k), theirs, strict=True):
        bound = 2**-22 * np.abs(x).max()
        assert (np.abs(rotary(x, cos, sin) - expected.numpy()) <= bound).all()
