"""Dropout: published vectors, the share that is dropped, and a mean that stays."""

import numpy as np
import oracle
import pytest
from judge import assert_same
from sizes import KEY_BLOCK, qkv

from mha_fast import _core, attention, reference

# Of Threefry-4x32 with 20 rounds, from the known answers of Random123 (counter, key, words).
ONES, PI = "ffffffff " * 4, "243f6a88 85a308d3 13198a2e 03707344"
VECTORS = [
    ("0 0 0 0", "0 0 0 0", "9c6ca96a e17eae66 fc10ecd4 5256a7d8"),
    (ONES, ONES, "2a881696 57012287 f6c7446e a16a6732"),
    (PI, "a4093822 299f31d0 082efa98 ec4e6c89", "59cd1dbb b8879579 86b5d00c ac8b6d84"),
]
FUNCTIONS = [_core.threefry, reference.threefry, oracle.threefry]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__module__)
@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_random_words_are_the_published_ones(isa, function, counter, key, expected):
    if function is oracle.threefry:
        key = np.array(words(key), np.uint64)
    drawn = function(words(counter), key if isinstance(key, np.ndarray) else words(key))
    assert [int(word) for word in drawn] == words(expected)


def test_canary_a_wrong_word_is_noticed():
    assert _core.threefry([1, 0, 0, 0], [0] * 4) != words(VECTORS[0][2])


def kept(dropout_p, seed, seqlen_q=64, seqlen_k=3 * KEY_BLOCK + 5):
    """What is left of each weight, where each key has a value of its own and all scores are 0."""
    q, k = np.zeros((2, 2, seqlen_q, 1)), np.zeros((2, 2, seqlen_k, 1))
    v = np.broadcast_to(np.eye(seqlen_k), (2, 2, seqlen_k, seqlen_k))
    return attention(q, k, v, dropout_p=dropout_p, seed=seed) * seqlen_k


@pytest.mark.parametrize("dropout_p", [2**-16, 0.1, 0.5, 0.9, 0.999, 1 - 2**-20])
def test_a_share_of_the_weights_is_dropped_and_the_mean_stays(dropout_p):
    weights = kept(dropout_p, seed=1)
    share = 1 - min(round(dropout_p * 2**16), 2**16 - 1) / 2**16
    deviation = np.sqrt(share * (1 - share) / weights.size)
    assert abs((weights > 0).mean() - share) < 5 * deviation
    assert len(np.unique(weights.round(6))) <= 2
    assert abs(weights.mean() - 1) < 5 * deviation / share + 1e-9


def test_seeds_rows_heads_and_batch_rows_drop_different_weights():
    first, other = kept(0.5, 1) > 0, kept(0.5, 2) > 0
    patterns = [first[0, 0, 0], first[0, 0, 1], first[0, 1, 0], first[1, 0, 0], other[0, 0, 0]]
    far = [kept(0.5, 1 + 2**32)[0, 0, 0] > 0]
    agree = [np.mean(a == b) for i, a in enumerate(patterns) for b in patterns[:i] + far]
    assert all(0.4 < share < 0.6 for share in agree)


def test_what_is_dropped_is_what_the_reference_drops(isa):
    q, k, v = qkv(67, 2 * KEY_BLOCK + 3, 5, batch=(2,), heads=4, kv_heads=2)
    v = np.ones_like(v)
    options = {"dropout_p": 0.5, "seed": 2**40 + 1, "window": (100, 7), "q_offset": 250}
    seen = reference.attention(q, k, v, **options) > 0
    assert np.array_equal(attention(q, k, v, **options) > 0, seen)


def test_a_dropout_of_nothing_changes_no_bit(isa, real):
    q, k, v = qkv(19, KEY_BLOCK + 9, 5, dtype=real)
    expected = attention(q, k, v, causal=True)
    assert_same(attention(q, k, v, causal=True, dropout_p=0.0, seed=3), expected)
    assert_same(attention(q, k, v, causal=True, dropout_p=2**-20, seed=3), expected)
