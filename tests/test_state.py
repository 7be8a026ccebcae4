"""AttentionState: keys that come in pieces, with the bits of one call."""

import copy
import pickle

import numpy as np
import pytest
import sizes
from judge import assert_same
from options import OPTIONS, PAIRS, pair_of
from sizes import KEY_BLOCK, qkv

from mha_fast import AttentionState, attention, merge
from mha_fast._core import geometry

RUN = KEY_BLOCK * geometry()["run"]
SEQLEN_K = 2 * RUN + 500
CUTS = [(), (RUN,), (RUN, 2 * RUN), (1, 100, 100, RUN + 7, 2 * RUN + 1)]
DRAWN = ("dropout_p", "seed")  # they number the keys of a call, so a state has neither
NAMES = [name for name in OPTIONS if OPTIONS[name].argument not in DRAWN]


def arrays(seqlen_q=13, dtype=np.float32, seqlen_k=SEQLEN_K, **more):
    return qkv(seqlen_q, seqlen_k, 5, 9, **{"heads": 4, "kv_heads": 2, "dtype": dtype} | more)


def of_keys(terms, part, seqlen_k):
    """What a piece of keys has of masks and biases."""
    terms = {name: np.asarray(x) for name, x in terms.items()}
    return {n: x[..., part] if x.shape[-1:] == (seqlen_k,) else x for n, x in terms.items()}


def split(options):
    """Those of a state, and those of a piece."""
    terms = {name: options[name] for name in ("mask", "bias") if name in options}
    return {name: x for name, x in options.items() if name not in terms}, terms


def fed(state, k, v, cuts, terms=(), first=0):
    """The state after keys from `first` on, in pieces that end at `cuts`."""
    seqlen_k = k.shape[-2]
    for begin, end in zip((first, *cuts), (*cuts, seqlen_k), strict=True):
        part = slice(begin, end)
        of_part = of_keys(dict(terms), part, seqlen_k)
        assert state.update(k[..., part, :], v[..., part, :], **of_part) is state
    assert state.seqlen_k == seqlen_k
    return state


def assert_bits_of_one_call(state, q, k, v, **options):
    expected = attention(q, k, v, return_lse=True, **{"q_offset": 0} | options)
    found = state.result(return_lse=True)
    assert_same(found.out, expected.out)
    assert_same(found.lse, expected.lse)
    assert_same(state.result(), expected.out)


def offset(options):
    """Queries stand at the end, unless the option says where."""
    return {"q_offset": SEQLEN_K - 20} | options


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 13, 130])
def test_pieces_have_the_bits_of_one_call(isa, seqlen_q, cuts):
    q, k, v = arrays(seqlen_q)
    state = fed(AttentionState(q, causal=True, q_offset=RUN - 50), k, v, cuts)
    assert_bits_of_one_call(state, q, k, v, causal=True, q_offset=RUN - 50)


@pytest.mark.parametrize("cuts", [CUTS[2], CUTS[3]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_pieces_have_the_bits_of_one_call_under_every_option(dtype, name, cuts):
    q, k, v = arrays(dtype=dtype)
    options = offset(OPTIONS[name](q, k, v))
    own, terms = split(options)
    assert_bits_of_one_call(fed(AttentionState(q, **own), k, v, cuts, terms), q, k, v, **options)


@pytest.mark.parametrize("names", [x for x in PAIRS if {*x} <= {*NAMES}], ids=" and ".join)
def test_later_states_merge_to_the_bits_of_one_call(names):
    q, k, v = arrays(3)
    options = offset(pair_of(names, q, k, v))
    own, terms = split(options)
    state = AttentionState(q, **own)
    first = [fed(state, k[..., :RUN, :], v[..., :RUN, :], (), of_keys(terms, slice(RUN), SEQLEN_K))]
    later = fed(AttentionState(q, first_key=RUN, **own), k, v, (2 * RUN, 2 * RUN + 9), terms, RUN)
    assert first[0].merge(later) is state
    assert_bits_of_one_call(state, q, k, v, **options)


def test_states_merge_in_any_order_of_neighbours(isa):
    q, k, v = arrays()

    def state(first, last):
        return fed(AttentionState(q, first_key=first), k[..., :last, :], v[..., :last, :], (),
                   first=first)  # fmt: skip

    last = state(RUN, 2 * RUN).merge(state(2 * RUN, SEQLEN_K))
    assert_bits_of_one_call(state(0, RUN).merge(last), q, k, v)
    first = state(0, RUN).merge(state(RUN, 2 * RUN))
    assert_bits_of_one_call(first.merge(state(2 * RUN, SEQLEN_K)), q, k, v)
    nothing = AttentionState(q).merge(state(0, 2 * RUN))
    assert_bits_of_one_call(nothing.update(k[..., 2 * RUN :, :], v[..., 2 * RUN :, :]), q, k, v)


def test_normalised_parts_would_have_other_bits():
    """So these tests can tell."""
    q, k, v = arrays(130)
    parts = slice(RUN), slice(RUN, None)
    results = [attention(q, k[..., p, :], v[..., p, :], return_lse=True) for p in parts]
    assert (merge(*zip(*results, strict=True)).out != attention(q, k, v)).any()


@pytest.mark.parametrize("copied", [copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(copied):
    q, k, v = arrays()
    state = fed(AttentionState(q, window=(4000, 0), q_offset=SEQLEN_K - 13), *(
        x[..., : RUN + 9, :] for x in (k, v)), (5,))  # fmt: skip
    before = state.result()
    other = copied(state)
    other.update(k[..., RUN + 9 :, :], v[..., RUN + 9 :, :])
    assert_same(state.result(), before)
    assert_bits_of_one_call(other, q, k, v, window=(4000, 0), q_offset=SEQLEN_K - 13)


def test_threads_and_their_number_change_no_bit():
    q, k, v = (sizes.random(1, n, 64) for n in (3, 40_000, 40_000))
    for threads in (1, 2, 3):
        state = fed(AttentionState(q, threads=threads), k, v, (4 * RUN, 4 * RUN + 5))
        assert_bits_of_one_call(state, q, k, v)


@pytest.mark.parametrize("heads", [(), (2,), (3, 1, 2)], ids=str)
def test_ranks_are_those_of_attention(heads):
    q = sizes.random(*heads, 4, 5)
    k, v = (sizes.random(*heads, RUN + 70, n) for n in (5, 3))
    assert_bits_of_one_call(fed(AttentionState(q), k, v, (RUN, RUN + 1)), q, k, v)


def test_batch_axes_broadcast_as_in_attention():
    q, k = sizes.random(3, 1, 2, 4, 5), sizes.random(2, 2, RUN + 70, 5)
    options = {"kv_lengths": [[5, RUN + 3]], "q_offset": [[1], [2], [RUN]], "causal": True}
    assert_bits_of_one_call(fed(AttentionState(q, **options), k, k, (9,)), q, k, k, **options)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)], ids=str)
def test_axes_may_be_empty(shape):
    q, k, v = sizes.random(2, *shape), sizes.random(2, RUN + 7, shape[-1]), sizes.random(
        2, RUN + 7, 3)  # fmt: skip
    assert_bits_of_one_call(fed(AttentionState(q), k, v, (1, RUN)), q, k, v)


def test_without_keys_a_row_is_zero():
    q, k, v = arrays(seqlen_k=0)
    state = AttentionState(q).update(k, v)
    assert_bits_of_one_call(state, q, k, v)


def test_pieces_may_have_masks_of_different_kinds():
    q, k, v = arrays(seqlen_k=40)
    mask = sizes.random_mask(13, 40)
    terms = np.where(mask, np.float32(0), -np.inf).astype(np.float32)
    mask[:, :10] = True
    terms[:, :10] = 0
    state = AttentionState(q)
    for part, piece in ((slice(10), None), (slice(10, 25), mask), (slice(25, 40), terms)):
        piece = None if piece is None else piece[:, part]
        state.update(k[..., part, :], v[..., part, :], piece, bias=np.float32(0.5))
    assert_bits_of_one_call(state, q, k, v, mask=terms, bias=np.float32(0.5))


def test_hidden_keys_are_never_read():
    q, k, v = arrays()
    hidden = np.arange(SEQLEN_K) % 3 == 0
    clean = fed(AttentionState(q), k, v, (RUN, RUN + 50), {"mask": ~hidden}).result()
    k[..., hidden, :] = np.nan
    v[..., hidden, :] = np.nan
    assert_same(fed(AttentionState(q), k, v, (RUN, RUN + 50), {"mask": ~hidden}).result(), clean)


def test_memory_does_not_grow_with_keys():
    q, k, v = arrays()
    short = fed(AttentionState(q), k[..., :RUN, :], v[..., :RUN, :], ())
    long = fed(AttentionState(q), k[..., : 2 * RUN, :], v[..., : 2 * RUN, :], ())
    assert long.nbytes == short.nbytes < 2 * (q.nbytes + attention(q, k, v).nbytes)
    assert len(pickle.dumps(long)) < long.nbytes + 2000
    unseen = AttentionState(q, first_key=RUN, causal=True)
    assert fed(unseen, k[..., : 2 * RUN, :], v[..., : 2 * RUN, :], (), first=RUN).nbytes == q.nbytes


def test_a_window_that_begins_with_the_state_needs_no_records():
    q, k, v = arrays(100)
    options = {"window": (20, 0), "q_offset": RUN + 20}
    state = fed(AttentionState(q, first_key=RUN, **options), k, v, (), first=RUN)
    assert_bits_of_one_call(state, q, k, v, **options)
    shifted = fed(AttentionState(q, first_key=RUN, **options | {"q_offset": RUN + 19}), k, v, (),
                  first=RUN)  # fmt: skip
    before = fed(AttentionState(q, **options | {"q_offset": RUN + 19}), k[..., :RUN, :],
                 v[..., :RUN, :], ())  # fmt: skip
    options = options | {"q_offset": RUN + 19}
    assert_bits_of_one_call(before.merge(shifted), q, k, v, **options)


def test_pieces_may_change_after_the_call():
    q, k, v = arrays(seqlen_k=50)
    expected = attention(q, k, v, q_offset=0)
    state = AttentionState(q).update(k, v)
    k[:], v[:] = 7, 7
    assert_same(state.result(), expected)


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda k: k.astype(np.float64), "k has dtype and axes .*float64.*expected .*float32"),
        ("k", lambda k: k[..., :4], "k has head_dim 4, expected 5"),
        (
            "v",
            lambda v: v[..., :4],
            "v has dtype and axes .* 4.*, expected .* 9.* as in the pieces",
        ),
        ("v", lambda v: v[:, :1], "v has 1 heads, expected 2 as in k"),
        ("mask", lambda k: np.ones(k.shape[-2] + 1, bool), r"mask has shape \(11,\)"),
        ("bias", lambda k: np.ones(10, bool), "bias has dtype bool"),
    ],
)
def test_a_refused_piece_leaves_the_state_as_it_was(name, change, message):
    q, k, v = arrays(seqlen_k=30)
    state = AttentionState(q).update(k[..., :20, :], v[..., :20, :])
    before = pickle.dumps(state)
    piece = {"k": k[..., 20:, :], "v": v[..., 20:, :]}
    changed = change(piece.get(name, piece["k"]))
    with pytest.raises((TypeError, ValueError), match=message):
        state.update(**piece | {name: changed})
    assert pickle.dumps(state) == before
    assert_bits_of_one_call(state.update(**piece), q, k, v)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "first_key is 5, expected a multiple of 3072", {"first_key": 5}),
        (TypeError, "first_key is 2.0, expected an int", {"first_key": 2.0}),
        (TypeError, "dropout_p is no option of AttentionState", {"dropout_p": 0.5, "seed": 1}),
        (ValueError, "softcap is -1.0", {"softcap": -1}),
        (TypeError, "q_offset has dtype float64", {"q_offset": 0.5}),
        (ValueError, "kv_lengths holds -1 to -1", {"kv_lengths": -1}),
        (TypeError, "threads is 1.5", {"threads": 1.5}),
        (TypeError, "causal is 1, expected True or False", {"causal": 1}),
    ],
)
def test_options_are_checked_at_once(error, message, options):
    with pytest.raises(error, match=message):
        AttentionState(arrays()[0], **options)


def test_a_result_needs_a_piece():
    with pytest.raises(ValueError, match="has seen no piece of keys"):
        AttentionState(arrays()[0]).result()


def test_states_that_do_not_fit_do_not_merge():
    q, k, v = arrays()
    state = fed(AttentionState(q, causal=True), k[..., :RUN, :], v[..., :RUN, :], ())
    before = pickle.dumps(state)

    def later(q=q, v=v, **options):
        options = {"first_key": RUN, "causal": True} | options
        return AttentionState(q, **options).update(k[..., :7, :], v[..., :7, :])

    with pytest.raises(TypeError, match="later is a ndarray, expected an AttentionState"):
        state.merge(q)
    for wrong, message in (
        (later(first_key=2 * RUN), "later begins at key 6144, expected 3072"),
        (later(q=q + 1), "later has another q,"),
        (later(causal=False), "later has another causal"),
        (later(q_offset=3), "later has another q_offset"),
        (later(v=v[..., :4]), "v has dtype and axes"),
    ):
        with pytest.raises(ValueError, match=message):
            state.merge(wrong)
    assert pickle.dumps(state) == before
    state.merge(later())


def test_options_of_a_state_are_those_of_attention():
    assert {row.argument for row in OPTIONS.values()} - {"mask", "bias", *DRAWN} == {
        "causal", "q_offset", "window", "kv_lengths", "scale", "softcap", "sinks", "alibi_slopes"
    }  # fmt: skip
