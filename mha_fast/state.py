"""Attention over keys that come in pieces."""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from ._core import FARTHEST, ask, attend_from, geometry
from .arguments import boolean, floats, integers, non_negative_int, plain_array, thread_count
from .options import OPTIONS, checked
from .results import named_result

RUN = geometry()["key_block"] * geometry()["run"]
PER_HEAD = ("sinks", "alibi_slopes")
# What all pieces have alike. Dropout numbers the keys of a call.
SHARED = tuple(n for n in OPTIONS if n not in ("mask", "bias", "dropout_p", "seed"))


class AttentionState:
    """What rows of queries have of the keys so far: their running max, sum and weighted sum.

    Keys come in order, in pieces of any length. What `result` returns has the bits of one call of
    `attention` over all of them. A state is small, does not grow with the keys, and can be pickled,
    so that it may travel to where the next keys are.

    Parameters
    ----------
    q : array_like, shape (..., heads, seqlen_q, head_dim)
        Queries, as in `attention`. They are not copied.
    first_key : int
        Position of the first key that this state sees, a multiple of 3072. Keys before it belong to
        other states, see `merge`, or are seen by no row.
    q_offset : int or array_like of int, broadcast to the batch axes
        Query ``i`` stands at ``i + q_offset``, key ``j`` of the whole sequence at ``j``.
    threads : int, optional
        Upper limit for the calls of this state; see `set_num_threads`.
    **options
        causal, window, kv_lengths, scale, softcap, sinks, alibi_slopes, as in `attention`; lengths
        count from key 0 of the whole sequence.

    Attributes
    ----------
    q : ndarray
    first_key : int
    seqlen_k : int
        Where the next key stands.
    nbytes : int
        Memory of the queries and of what is known of them.

    Raises
    ------
    TypeError, ValueError
        As `attention`; or `first_key` is no multiple of 3072.

    Notes
    -----
    Keys of 16 blocks of 192 make a run, and runs merge in order (csrc/kernel.inc.h, rule 4). The
    state holds the total of the complete runs, and up to 3071 keys and values after them. One that
    does not begin at key 0, nor where its `window` does, holds a record for each run that some row
    sees: the total of the runs before, which it does not know, has to be merged into the first.

    Examples
    --------
    >>> import numpy as np
    >>> import mha_fast
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5000, 4), np.float32)
    >>> state = AttentionState(q, causal=True)
    >>> for piece in np.split(np.arange(5000), [100, 4000]):
    ...     _ = state.update(k[:, piece], v[:, piece])
    >>> bool((state.result() == mha_fast.attention(q, k, v, causal=True)).all())
    True
    """

    def __init__(self, q, *, first_key=0, q_offset=0, kv_lengths=None, threads=None, **options):
        if unknown := sorted(set(options).difference(SHARED)):
            raise TypeError(f"{unknown[0]} is no option of AttentionState, expected {SHARED}")
        self.q = floats("q", q)
        self.first_key = self.seqlen_k = non_negative_int("first_key", first_key)
        if first_key % RUN:
            raise ValueError(f"first_key is {first_key}, expected a multiple of {RUN}")
        self.threads = thread_count("threads", threads)
        self._options = options
        self._positions = {
            "q_offset": integers("q_offset", q_offset, np.shape(q_offset), -FARTHEST, FARTHEST),
            "kv_lengths": integers("kv_lengths", kv_lengths, np.shape(kv_lengths), 0, FARTHEST),
        }
        simple = {name: x for name, x in options.items() if name not in PER_HEAD}
        checked(ask(self.q, self.q[..., :0, :], self.q[..., :0, :], **simple))
        # What is known of complete runs: their total alone, or if it misses some, each of them.
        self._records, self._is_whole = [], self._sees_nothing_before()
        self._pending = []  # pieces of the run that is not complete; the first has no keys

    @property
    def nbytes(self):
        known = itertools.chain(*self._records, *self._pending)
        return self.q.nbytes + sum(x.nbytes for x in known if x is not None)

    def update(self, k, v, mask=None, *, bias=None):
        """Take in the next keys.

        Parameters
        ----------
        k : array_like, shape (..., kv_heads, keys, head_dim)
        v : array_like, shape (..., kv_heads, keys, head_dim_v)
            All but the number of keys is as in the pieces before. They may change after the call.
        mask, bias : array_like, broadcast to (..., heads, seqlen_q, keys), optional
            Those of these keys, as in `attention`.

        Returns
        -------
        AttentionState
            This one.

        Raises
        ------
        TypeError, ValueError
            As `attention`; or an array has another dtype or shape than those before. Then, as after
            a MemoryError, the state is what it was.
        """
        piece = self._piece(k, v, mask, bias)
        empty, *pending = self._pending or [piece.part(0, 0).copy()]
        records, first, held = self._records, self.seqlen_k, self.seqlen_k % RUN
        rest = min(-held % RUN, piece.keys)  # of the run that is not complete
        if rest:
            pending = [*pending, piece.part(0, rest).copy()]
        if rest and (held + rest) % RUN == 0:
            records = self._with_runs(records, _joined(pending), first - held)
            pending = []
        last = rest + (piece.keys - rest) // RUN * RUN
        if last > rest:
            records = self._with_runs(records, piece.part(rest, last), first + rest)
        if last < piece.keys:
            pending = [*pending, piece.part(last, piece.keys).copy()]
        self._records, self._pending = records, [empty, *pending]
        self.seqlen_k += piece.keys
        return self

    def merge(self, later):
        """Take in what another state knows of the keys that come next.

        Parameters
        ----------
        later : AttentionState
            Of the same queries and options, with a `first_key` where this one ends. It stays as it
            is.

        Returns
        -------
        AttentionState
            This one: with the bits of one that has seen all these keys itself.

        Raises
        ------
        TypeError, ValueError
            `later` is none, begins elsewhere, or has other queries, options or arrays.
        """
        if not isinstance(later, AttentionState):
            raise TypeError(f"later is a {type(later).__name__}, expected an AttentionState")
        if later.first_key != self.seqlen_k:
            raise ValueError(
                f"later begins at key {later.first_key}, expected {self.seqlen_k}, where this ends"
            )
        mine, theirs = self._what_is_asked(), later._what_is_asked()
        for name, x in mine.items():
            if not np.array_equal(x, theirs[name]):
                raise ValueError(f"later has another {name}, expected that of this state")
        if self._pending and later._pending:
            later._pending[0].check_like(self._pending[0])
        records, pending = [*self._records, *later._records], later._pending or self._pending
        if self._is_whole and len(records) > 1:
            records = [self._total(records, pending[0])]
        self._records, self._pending = records, pending
        self.seqlen_k = later.seqlen_k
        return self

    def result(self, *, return_lse=False):
        """Attention over the keys so far, as `attention` returns it.

        It may be asked for at any time, and changes nothing.

        Raises
        ------
        ValueError
            There was no piece yet, so that head_dim_v is unknown.
        """
        return_lse = boolean("return_lse", return_lse)
        if not self._pending:
            raise ValueError("the state has seen no piece of keys, expected an update before")
        total = self._total(self._records, self._pending[0]) if self._records else None
        question = self._question(_joined(self._pending), self.seqlen_k // RUN * RUN)
        out, lse = attend_from(question, total, None, True, self.threads)
        return named_result(out, lse if return_lse else None, None)

    def _piece(self, k, v, mask, bias):
        """The next keys, checked."""
        k, v = floats("k", k), floats("v", v)
        mask, bias = (
            x if x is None else _wide(plain_array(name, x), k.shape[-2])
            for name, x in (("mask", mask), ("bias", bias))
        )
        piece = _Piece(k, v, mask, bias)
        self._question(piece, self.seqlen_k)
        if self._pending:
            piece.check_like(self._pending[0])
        return piece

    def _question(self, piece, first):
        """Attention over a piece whose first key stands at `first`, without what comes before."""
        q_offset, lengths = self._positions["q_offset"], self._positions["kv_lengths"]
        positions = {
            "q_offset": q_offset - first,
            "kv_lengths": None if lengths is None else np.clip(lengths - first, 0, piece.keys),
        }
        return checked(ask(self.q, **piece._asdict(), **positions, **self._options))

    def _sees_nothing_before(self):
        """Is there no key before the first that some row may see by its position?"""
        left, _ = self._options.get("window") or (None, None)
        lowest = int(self._positions["q_offset"].min(initial=FARTHEST))
        return self.first_key == 0 or (left is not None and self.first_key <= lowest - left)

    def _what_is_asked(self):
        return {"q": self.q, **dict.fromkeys(SHARED), **self._positions, **self._options}

    def _with_runs(self, records, piece, first):
        """The records, and what the complete runs of a piece add to them."""
        if self._is_whole:
            total = records[0] if records else None
            return [attend_from(self._question(piece, first), total, None, False, self.threads)]
        for at in range(0, piece.keys, RUN):
            question = self._question(piece.part(at, at + RUN), first + at)
            record = attend_from(question, None, None, False, self.threads)
            if record[1][..., 1].any():  # l; a run that no row sees changes nothing
                records = [*records, record]
        return records

    def _total(self, records, empty):
        """One state of all runs, by way of a question without keys."""
        question = self._question(empty, 0)
        return functools.reduce(
            lambda total, run: attend_from(question, total, run, False, self.threads), records
        )


class _Piece(NamedTuple):
    """Some keys. A mask and a bias have an axis of that many, of stride 0 where it was 1."""

    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray | None
    bias: np.ndarray | None

    @property
    def keys(self):
        return self.k.shape[-2]

    def part(self, first, last):
        k, v = (x[..., first:last, :] for x in self[:2])
        return _Piece(k, v, *(x if x is None else x[..., first:last] for x in self[2:]))

    def copy(self):
        return _Piece(*(x if x is None else x.copy() for x in self))

    def check_like(self, first):
        for name, mine, other in zip("kv", self, first, strict=False):
            mine, other = ((x.dtype, *x.shape[:-2], x.shape[-1]) for x in (mine, other))
            if mine != other:
                raise ValueError(
                    f"{name} has dtype and axes {mine}, expected {other} as in the pieces before"
                )


def _wide(term, keys):
    """A mask or bias with an axis of keys."""
    own = term.shape[:-1]
    return np.broadcast_to(term, (*own, keys)) if term.shape[len(own) :] in ((), (1,)) else term


def _joined(pieces):
    """Pieces of one run as one."""
    if len(pieces) == 1:
        return pieces[0]
    k, v = (np.concatenate(x, axis=-2) for x in zip(*(p[:2] for p in pieces), strict=True))
    terms = ([(p[i], p.keys) for p in pieces] for i in (2, 3))
    return _Piece(k, v, *map(_joined_term, terms))


def _joined_term(parts):
    """Of pairs of a mask or bias, or None, and its number of keys."""
    given = [x for x, _ in parts if x is not None]
    if not given:
        return None
    adds = any(x.dtype != np.bool_ for x in given)
    axes = np.broadcast_shapes(*(x.shape[:-1] for x in given))

    def plain(x):
        if x is None:
            return np.array(not adds)  # adds nothing, hides nothing
        return np.where(x, 0, -np.inf) if adds and x.dtype == np.bool_ else x

    return np.concatenate([np.broadcast_to(plain(x), (*axes, keys)) for x, keys in parts], axis=-1)
