"""Head statistics against numbers known by hand, importance and pruning against small models."""

import itertools

import numpy as np
import pytest
import sizes
from judge import assert_same, assert_within, tolerance

from mha_fast import heads

PER_HEAD = [
    heads.normalised_entropy,
    heads.peak_weight,
    heads.mean_distance,
    heads.previous_token_share,
    heads.first_token_share,
]
ALL = [*PER_HEAD, heads.similarity]
named = pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)


def random_weights(*shape, dtype=np.float64, causal=True, seed=0):
    """Rows that sum to 1 and, if causal, see no later key."""
    p = np.exp(sizes.random(*shape, dtype=np.float64, seed=seed))
    if causal:
        p *= np.tri(*shape[-2:], k=max(shape[-1] - shape[-2], 0))
    return (p / p.sum(axis=-1, keepdims=True)).astype(dtype)


def uniform_causal(n):
    return np.tri(n) / np.arange(1, n + 1)[:, None]


def assert_close(found, expected, terms):
    """Equal within the rounding of a sum of `terms` numbers of the expected size."""
    expected = np.asarray(expected, np.float64)
    bound = tolerance(np.full((1, 1), terms), np.float64).item() * (1 + np.abs(expected))
    assert found.dtype == np.float64
    assert_within(np.abs(found - expected), bound, "the statistic")


CASES = {
    "each looks at itself": (np.eye(4), [0, 1, 0, 0, 0.25]),
    "each looks at the one before": (np.eye(4, k=-1), [0, 1, 1, 1, 1 / 3]),
    "all look at the first": (np.eye(1, 4) + np.zeros((4, 1)), [0, 1, 1.5, 1 / 3, 1]),
    "all look everywhere": (np.full((4, 4), 0.25), [1, 0.25, 1.25, 0.25, 0.25]),
    "half here, half before": (
        np.eye(4) / 2 + np.eye(4, k=-1) / 2 + np.eye(1, 4) / 2 * [[1], [0], [0], [0]],
        [0.75, 0.625, 0.375, 0.5, 0.375],
    ),
    "one row at the end of its keys": (np.array([[0.5, 0.25, 0.125, 0.125]]), None),
}
CASES["one row at the end of its keys"] = (
    CASES["one row at the end of its keys"][0],
    [1.75 / 2, 0.5, 0.5 * 3 + 0.25 * 2 + 0.125, 0.125, 0.5],
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", sizes.DTYPES, ids=str)
def test_statistics_are_those_counted_by_hand(case, dtype):
    weights, expected = CASES[case]
    found = [function(weights.astype(dtype)[None]) for function in PER_HEAD]
    assert_same(np.concatenate(found), np.array(expected, np.float64))
    for function, number in zip(PER_HEAD, expected, strict=True):
        assert function(weights.astype(dtype)) == number, "two axes are one head"


def test_uniform_causal_head_is_even_but_for_the_row_with_no_choice():
    n = 9
    assert_close(heads.normalised_entropy(uniform_causal(n)), (n - 1) / n, n)
    assert_close(heads.normalised_entropy(uniform_causal(n), rows=np.arange(n) > 0), 1, n)
    assert_close(heads.first_token_share(uniform_causal(n)), (1 / np.arange(1, n + 1)).mean(), n)


def test_entropy_and_similarity_stay_between_zero_and_one():
    even = [heads.normalised_entropy(np.full((1, n), 1 / n)) for n in range(1, 200)]
    assert max(even) == 1
    weights = random_weights(1, 40, 1000)
    nearly = weights * (1 + np.finfo(np.float64).eps * sizes.random_mask(*weights.shape))
    pairs = np.stack([weights[0], nearly[0]], axis=1)[..., None, :]
    assert heads.similarity(pairs).max() == 1


def by_definition(p, first_position):
    """All five numbers of one head, in plain loops over rows and keys."""
    numbers, previous = [], []
    for i, row in enumerate(p):
        position = i + first_position
        seen = [x for x in row if x != 0]
        if not seen:
            continue
        entropy = -sum(x * np.log(x) for x in seen) / np.log(len(seen)) if len(seen) > 1 else 0
        distance = sum(x * abs(position - j) for j, x in enumerate(row))
        numbers.append((entropy, max(seen), distance, row[0]))
        if 0 < position <= len(row):
            previous.append(row[position - 1])
    *others, first = np.mean(numbers, axis=0)
    return *others, np.mean(previous), first


@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (1, 2, 3, 11), (3, 2, 13), (2, 1, 9, 4)])
@pytest.mark.parametrize("q_offset", [None, 0, 2])
def test_statistics_agree_with_loops_over_the_definitions(shape, q_offset):
    weights = random_weights(*shape)
    first = shape[-1] - shape[-2] if q_offset is None else q_offset
    expected = np.empty((len(PER_HEAD), *shape[:-2]))
    for head in np.ndindex(shape[:-2]):
        expected[:, *head] = by_definition(weights[head], first)
    for function, numbers in zip(PER_HEAD, expected, strict=True):
        positions = function in (heads.mean_distance, heads.previous_token_share)
        found = function(weights, **({"q_offset": q_offset} if positions else {}))
        assert_close(found, numbers, weights.size)


def test_offset_differs_between_batch_entries():
    weights = random_weights(2, 3, 4, 9)
    for function in (heads.mean_distance, heads.previous_token_share):
        both = function(weights, q_offset=[1, 3])
        assert_same(both[0], function(weights[0], q_offset=1))
        assert_same(both[1], function(weights[1], q_offset=3))


def divergence(p, q):
    """Jensen-Shannon in bits, by Kullback and Leibler."""
    middle = (p + q) / 2
    pairs = itertools.chain(zip(p, middle, strict=True), zip(q, middle, strict=True))
    return sum(x * np.log2(x / m) for x, m in pairs if x > 0) / 2


def test_similarity_is_one_minus_the_mean_divergence():
    weights = random_weights(2, 4, 5, 6)
    found = heads.similarity(weights)
    for entry, a, b in itertools.product(range(2), range(4), range(4)):
        pairs = zip(weights[entry, a], weights[entry, b], strict=True)
        expected = 1 - np.mean([divergence(p, q) for p, q in pairs])
        assert_close(found[entry, a, b], expected, weights.size)


def test_similarity_is_symmetric_and_one_for_equal_heads():
    weights = random_weights(2, 3, 17, 17, dtype=np.float32)
    found = heads.similarity(weights[:, [0, 1, 2, 0]])
    assert_same(found, found.swapaxes(-1, -2).copy())
    assert (np.diagonal(found, axis1=-2, axis2=-1) == 1).all()
    assert (found[:, 0, 3] == 1).all()
    assert (found[:, 0, 1] < 1).all() and (found >= 0).all()


def test_similarity_leaves_out_rows_that_one_head_does_not_see():
    apart, alike = [[1.0, 0], [0, 1]], [[0.5, 0.5], [0.5, 0.5]]
    weights = np.array([apart, alike]).swapaxes(0, 1)
    assert heads.similarity(weights)[0, 1] == 0.5
    weights[1, 0] = 0
    assert heads.similarity(weights)[0, 1] == 1


@named
def test_statistics_do_not_depend_on_batch_order_or_strides(function):
    weights = random_weights(3, 4, 13, 31, dtype=np.float32)
    expected = function(weights)
    for entry in range(3):
        assert_same(function(weights[entry]), expected[entry].copy())
    order = [2, 0, 3, 1]
    permuted = expected[:, order]
    if function is heads.similarity:
        permuted = permuted[:, :, order]
    assert_same(function(weights[:, order]), permuted.copy())
    assert_same(function(np.asfortranarray(weights)), expected)
    assert_same(function(weights[..., ::-1][..., ::-1]), expected)
    read_only = weights.copy()
    read_only.flags.writeable = False
    assert_same(function(read_only), expected)


@named
def test_poison_in_rows_left_out_changes_no_bit(function):
    weights = random_weights(2, 3, 13, 31)
    rows = sizes.random_mask(2, 13)
    assert not rows.all() and rows.any(axis=-1).all()
    expected = function(weights, rows=rows)
    assert not np.array_equal(expected, function(weights))
    for poison in (np.nan, np.inf, -np.inf, 1e308):
        dirty = np.where(rows[:, None, :, None], weights, poison)
        assert_same(function(dirty, rows=rows), expected)


@named
def test_nan_in_a_row_that_counts_shows_in_its_head_alone(function):
    weights = random_weights(2, 3, 13, 31)
    weights[0, 1, 5] = np.nan
    touched = np.zeros((2, 3), bool)
    touched[0, 1] = True
    if function is heads.similarity:
        touched = touched[:, :, None] | touched[:, None, :]
    assert np.array_equal(np.isnan(function(weights)), touched)


@named
def test_row_that_sees_nothing_does_not_count(function):
    weights = random_weights(2, 3, 13, 13)
    rows = np.arange(13) % 3 > 0
    without = np.where(rows[:, None], weights, 0)
    assert_same(function(without), function(weights, rows=rows))


@named
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 2, 2)])
def test_head_without_a_row_that_counts_is_nan(function, shape):
    found = function(np.zeros(shape))
    assert found.shape == (2, 3, 3)[: found.ndim] or 0 in found.shape
    assert np.isnan(found).all()
    assert np.isnan(function(np.ones(shape), rows=False)).all()


@named
def test_padding_rows_are_left_out_with_their_batch_entry(function):
    weights = random_weights(2, 3, 9, 9, causal=False)
    weights[1, :, :, 5:] = 0  # what attention gives for kv_lengths=[9, 5]
    short = function(weights[1, :, :5, :5])
    found = function(weights, rows=np.arange(9) < np.array([[9], [5]]))
    assert_close(found[1], short, weights.size)
    assert_same(found[0].copy(), function(weights[0]))


BAD = [
    (TypeError, {"weights": np.ones((2, 3, 3), int)}, "weights has dtype int64, expected float16"),
    (ValueError, {"weights": np.ones(3)}, r"weights has shape \(3,\), expected"),
    (TypeError, {"weights": np.ma.ones((2, 3, 3))}, "weights is a masked array"),
    (TypeError, {"rows": [1, 0, 1]}, "rows has dtype int64, expected bool"),
    (ValueError, {"rows": [True, False]}, r"rows has shape \(2,\), .* = \(3,\)"),
    (ValueError, {"rows": np.ones((4, 3), bool)}, r"rows has shape \(4, 3\), expected"),
]


@named
@pytest.mark.parametrize(("error", "arguments", "message"), BAD, ids=[row[2][:25] for row in BAD])
def test_bad_weights_and_rows_are_refused_by_name(function, error, arguments, message):
    with pytest.raises(error, match=message):
        function(**({"weights": np.ones((2, 3, 3))} | arguments))


@pytest.mark.parametrize("function", [heads.mean_distance, heads.previous_token_share])
def test_bad_offset_is_refused_by_name(function):
    weights = np.ones((2, 3, 4, 4))
    with pytest.raises(TypeError, match="q_offset has dtype float64, expected integers"):
        function(weights, q_offset=1.5)
    with pytest.raises(ValueError, match=r"q_offset has shape \(3,\), .* = \(2,\)"):
        function(weights, q_offset=[1, 2, 3])


def test_similarity_of_a_single_matrix_is_refused():
    with pytest.raises(
        ValueError, match=r"\(3, 3\), expected at least \(heads, seqlen_q, seqlen_k\)"
    ):
        heads.similarity(np.eye(3))


USE = np.array([[3.0, 0.0, 1.0], [5.0, 1.0, 0.5]])


def additive_loss(kept):
    return USE[~kept].sum()


def twins_loss(kept):
    """Heads 0 and 1 do the same, so either may go; head 2 does little."""
    return 4.0 * (not (kept[0] or kept[1])) + 1.0 * (not kept[2])


def test_importance_of_independent_heads_is_their_use():
    assert_same(heads.importance(additive_loss, (2, 3)), USE)


def test_pruning_removes_the_least_useful_head_first():
    curve = heads.pruning_curve(additive_loss, (2, 3))
    order = np.argsort(USE, axis=None, kind="stable")
    assert np.array_equal(np.ravel_multi_index(curve.removed.T, USE.shape), order)
    assert_same(curve.losses, np.cumsum([0, *np.sort(USE, axis=None)]))
    kept = np.ones(USE.shape, bool)
    kept[tuple(curve.removed[:4].T)] = False
    assert additive_loss(kept) == curve.losses[4]


def test_pruning_measures_anew_what_importance_cannot_see():
    assert_same(heads.importance(twins_loss, 3), np.array([0.0, 0, 1]))
    curve = heads.pruning_curve(twins_loss, 3)
    assert curve.removed.tolist() == [[0], [2], [1]]
    assert curve.losses.tolist() == [0, 0, 1, 5]


@pytest.mark.parametrize("steps", [0, 1, 3, None])
def test_pruning_stops_after_its_steps_and_counts_its_calls(steps):
    calls = []

    def loss(kept):
        calls.append(kept.shape)
        return float(kept.sum())

    curve = heads.pruning_curve(loss, 4, steps=steps)
    steps = 4 if steps is None else steps
    assert curve.removed.shape == (steps, 1)
    assert curve.losses.tolist() == [4 - n for n in range(steps + 1)]
    assert len(calls) == 1 + sum(4 - n for n in range(steps))
    assert set(calls) == {(4,)}


def test_loss_may_keep_and_change_what_it_is_given():
    given = []

    def loss(kept):
        given.append(kept)
        value = additive_loss(kept)
        kept[...] = False
        return value

    assert_same(heads.importance(loss, (2, 3)), USE)
    curve = heads.pruning_curve(loss, (2, 3))
    assert_same(curve, heads.pruning_curve(additive_loss, (2, 3)))
    assert len({id(kept) for kept in given}) == len(given)


BAD_PRUNING = [
    (TypeError, (additive_loss, 2.0), "heads is 2.0, expected an int or a tuple of ints"),
    (TypeError, (additive_loss, (2, True)), "heads is .*, expected an int or a tuple"),
    (ValueError, (additive_loss, (2, -1)), "heads is .*, expected numbers of at least 0"),
    (TypeError, (lambda kept: "low", 2), "loss returned 'low', expected a number"),
    (TypeError, (lambda kept: None, 2), "loss returned None, expected a number"),
    (ValueError, (lambda kept: np.nan, 2), "loss returned nan, expected a finite"),
    (ValueError, (lambda kept: np.float32(np.inf), 2), "loss returned .*inf"),
]


@pytest.mark.parametrize("function", [heads.importance, heads.pruning_curve])
@pytest.mark.parametrize(("error", "arguments", "message"), BAD_PRUNING)
def test_bad_heads_and_losses_are_refused(function, error, arguments, message):
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("error", "steps", "message"),
    [
        (TypeError, 1.0, "steps is 1.0, expected an int or None"),
        (ValueError, 7, "steps is 7, expected 0 to 6, the number of heads"),
        (ValueError, -1, "steps is -1, expected 0 to 6"),
    ],
)
def test_bad_steps_are_refused_before_the_first_call(error, steps, message):
    def loss(kept):
        raise AssertionError("called")

    with pytest.raises(error, match=message):
        heads.pruning_curve(loss, (2, 3), steps=steps)


def test_canary_a_statistic_of_the_wrong_rows_is_found(monkeypatch):
    monkeypatch.setattr(heads, "_sees", lambda p: np.ones(p.shape[:-1], bool))
    with pytest.raises(AssertionError):
        test_row_that_sees_nothing_does_not_count(heads.peak_weight)
