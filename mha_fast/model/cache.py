"""Keys and values of the tokens so far, for attention of the tokens to come."""

import os

import numpy as np

from .._core import geometry
from ..arguments import FLOATS, floats, integers, is_float, positive_int
from ..attention import attention
from .cache_file import Store, in_file, in_memory, opened, replacing

# Keys are forgotten in multiples of a run of the kernel's blocks, which count from key 0: so the
# bits stay those of a call that has them all.
RUN_KEYS = geometry()["key_block"] * geometry()["run"]
SMALLEST = 64  # tokens of room that a cache begins with
OWN = ("kv_lengths", "dropout_p", "seed")  # options that a cache sets, or has no use for


class KVCache:
    """Keys and values that grow token by token, and attention over them.

    A prompt at once, in chunks, or token by token gives the same bits, also with a `window`.

    Parameters
    ----------
    batch, kv_heads, head_dim : int
        Sizes of keys.
    head_dim_v : int, optional
        Width of values; default `head_dim`.
    dtype : dtype
        How they are stored: float16, bfloat16 (`ml_dtypes`), float32 or float64.
    window : int, optional
        A query sees so many keys before its own, as with ``window=(window, 0)``. The cache forgets
        what no later query can see, so it stays within 2 ``(window + 3072 + tokens of an append)``.
    path : str or path-like, optional
        Keep everything in a new file of this name, mapped into memory: it may be larger than
        memory, and `open` finds it again. A cache must be alone with its file.

    Attributes
    ----------
    k, v : ndarray, shape (batch, kv_heads, stored, head_dim)
        Views, without a copy, of the keys and values that are stored, up to the longest row;
        values have `head_dim_v`.
    lengths : ndarray of int64, shape (batch,)
        Tokens of each row so far, the forgotten ones included.
    forgotten : int
        How many keys are gone: stored key ``j`` is key ``forgotten + j``.
    capacity : int
        Stored tokens that there is room for.
    nbytes : int
        Of keys and values, room included.
    window : int or None
    dtype : numpy.dtype

    Raises
    ------
    TypeError, ValueError
        A size is not a positive int, or the dtype another one.
    FileExistsError
        There is a file of that name.

    Notes
    -----
    The layout of one buffer per layer with a length per row is that of most runtimes, see
    "Fast transformer decoding" (Shazeer, arXiv 1911.02150) for what it costs to read.

    Examples
    --------
    >>> cache = KVCache(batch=1, kv_heads=2, head_dim=4)
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 10, 4), np.float32)
    >>> prompt, token = slice(0, 9), slice(9, 10)
    >>> cache.append(k[:, :, prompt], v[:, :, prompt])
    >>> first = cache.attention(q[:, :, prompt])
    >>> cache.append(k[:, :, token], v[:, :, token])
    >>> last = cache.attention(q[:, :, token])
    >>> bool((last == attention(q, k, v, causal=True)[:, :, token]).all())
    True
    """

    def __init__(
        self,
        batch,
        kv_heads,
        head_dim,
        *,
        head_dim_v=None,
        dtype=np.float32,
        window=None,
        path=None,
    ):
        dim = positive_int("head_dim", head_dim)
        dim_v = dim if head_dim_v is None else positive_int("head_dim_v", head_dim_v)
        self.window = None if window is None else positive_int("window", window)
        outer = positive_int("batch", batch), positive_int("kv_heads", kv_heads), 0
        if not is_float(np.dtype(dtype)):
            raise TypeError(f"dtype is {np.dtype(dtype)}, expected {FLOATS}")
        shapes = (*outer, dim), (*outer, dim_v)
        self._path = None if path is None else os.fspath(path)
        if path is None:
            self._use(in_memory(shapes, dtype))
        else:
            self._use(in_file(path, shapes, dtype, self.window))

    def _use(self, store):
        self._store = store
        self._last = None  # lengths before the last append, and its tokens

    lengths = property(lambda self: self._store.lengths.copy())
    forgotten = property(lambda self: int(self._store.forgotten[0]))
    capacity = property(lambda self: self._store.k.shape[2])
    dtype = property(lambda self: self._store.k.dtype)
    nbytes = property(lambda self: self._store.k.nbytes + self._store.v.nbytes)
    k = property(lambda self: self._store.k[:, :, : self._stored])
    v = property(lambda self: self._store.v[:, :, : self._stored])
    _stored = property(lambda self: len(self) - self.forgotten)

    def __len__(self):
        return int(self._store.lengths.max())

    def __repr__(self):
        batch, kv_heads, capacity, head_dim = self._store.k.shape
        more = f", head_dim_v={self._store.v.shape[3]}" * (self._store.v.shape[3] != head_dim)
        more += f", window={self.window}" * (self.window is not None)
        more += f", path={self._path!r}" * (self._path is not None)
        return (
            f"<KVCache({batch}, {kv_heads}, {head_dim}, dtype={self.dtype}{more}) of {len(self)} "
            f"tokens, {self._stored} stored, room for {capacity}>"
        )

    # ---- Tokens in -------------------------------------------------------------------------------

    def append(self, k, v, lengths=None):
        """Add tokens to every row.

        Parameters
        ----------
        k : array_like, shape (batch, kv_heads, tokens, head_dim)
            Any float dtype, rounded to that of the cache; any strides. Without a batch axis if
            `batch` is 1.
        v : array_like, shape (batch, kv_heads, tokens, head_dim_v)
        lengths : array_like of int, shape (batch,), optional
            How many of the tokens each row has; those behind are padding. Default: all.

        Raises
        ------
        TypeError, ValueError
            An array has another dtype or shape, or the cache is open for reading alone. Then, as
            on a lack of memory or disk, the cache is as it was.
        """
        if not self._store.lengths.flags.writeable:
            raise ValueError("the cache is open for reading, expected mode 'r+' or 'c'")
        k = self._tokens("k", k, self._store.k.shape)
        v = self._tokens("v", v, self._store.v.shape)
        tokens = k.shape[2]
        if v.shape[2] != tokens:
            raise ValueError(f"v has {v.shape[2]} tokens, expected {tokens} as in k")
        before = self.lengths
        added = integers("lengths", tokens if lengths is None else lengths, before.shape, 0, tokens)
        added = np.broadcast_to(added, before.shape)
        self._make_room(int((before + added).max()), self._needed_from(before))
        if np.ptp(before) == 0 and np.ptp(added) == 0:
            self._write(slice(None), int(before[0]), int(added[0]), k, v)
        else:
            for row, (at, count) in enumerate(zip(before, added, strict=True)):
                self._write(row, int(at), int(count), k, v)
        self._store.lengths[:] = before + added  # last: who is interrupted has the cache of before
        self._last = before, tokens

    def _write(self, rows, at, count, k, v):
        place = slice(at - self.forgotten, at - self.forgotten + count)
        self._store.k[rows, :, place] = k[rows, :, :count]
        self._store.v[rows, :, place] = v[rows, :, :count]

    def _tokens(self, name, x, shape):
        batch, kv_heads, _, dim = shape
        x = floats(name, x, ("kv_heads", "tokens", "head_dim"))
        if x.ndim == 3 and batch == 1:
            x = x[None]
        if x.ndim != 4 or (*x.shape[:2], x.shape[3]) != (batch, kv_heads, dim):
            raise ValueError(
                f"{name} has shape {x.shape}, expected ({batch}, {kv_heads}, tokens, {dim})"
            )
        return x

    def _needed_from(self, positions):
        """The first key that queries at these positions or later can see."""
        return 0 if self.window is None else max(0, int(positions.min()) - self.window)

    def _make_room(self, length, needed_from):
        if length - self.forgotten <= self.capacity:
            return
        forgotten = max(self.forgotten, needed_from // RUN_KEYS * RUN_KEYS)
        stored = length - forgotten
        capacity = self.capacity if stored <= self.capacity else max(stored, 2 * self.capacity)
        self._rebuild(max(capacity, SMALLEST), forgotten)

    def _rebuild(self, capacity, forgotten=None, rows=None, path=...):
        """Move to a store of this capacity, with these rows, and without these keys."""
        path = self._path if path is ... else path
        old, last = self._store, self._last if rows is None else None
        rows = np.arange(len(old.lengths)) if rows is None else rows
        forgotten = self.forgotten if forgotten is None else forgotten
        lengths = old.lengths[rows]
        shapes = [(len(lengths), x.shape[1], capacity, x.shape[3]) for x in (old.k, old.v)]
        if path is None:
            new = in_memory(shapes, self.dtype)
            self._fill(new, lengths, forgotten, rows)
        else:
            with replacing(path) as beside:
                new = in_file(beside, shapes, self.dtype, self.window)
                self._fill(new, lengths, forgotten, rows)
        self._use(new)
        self._last = last

    def _fill(self, new, lengths, forgotten, rows):
        """Copy what each row has, and nothing of the memory behind: a file may go to others."""
        first = forgotten - self.forgotten
        for to, x in ((new.k, self._store.k), (new.v, self._store.v)):
            for row, (length, source) in enumerate(zip(lengths, rows, strict=True)):
                kept = max(0, int(length) - forgotten)
                to[row, :, :kept] = x[source, :, first : first + kept]
        new.lengths[:], new.forgotten[:] = lengths, forgotten

    # ---- Attention -------------------------------------------------------------------------------

    def attention(self, q, mask=None, *, q_offset=None, **options):
        """`mha_fast.attention` over the tokens so far; causal, and with the cache's window.

        Parameters
        ----------
        q : array_like, shape (batch, heads, seqlen_q, head_dim)
            Queries of the tokens of the last append, as many as it had; else the last query is at
            the last token. Without a batch axis if `batch` is 1.
        mask : array_like, optional
            As in `attention`; its last axis are the stored keys.
        q_offset : int or array_like of int, optional
            The position of the first query among all tokens, the forgotten ones included.
        **options
            Of `attention`, but for those of lengths and dropout.

        Returns
        -------
        ndarray or AttentionResult
            As `attention`.

        Raises
        ------
        TypeError, ValueError
            As `attention`, and where a query could see a key that is forgotten.
        """
        for name in OWN:
            if name in options:
                raise TypeError(f"{name} is given, expected none: the cache knows its tokens")
        q = floats("q", q, ("heads", "seqlen_q", "head_dim"))
        batch = len(self._store.lengths)
        if q.ndim != 4 and not (q.ndim == 3 and batch == 1) or q.ndim == 4 and len(q) != batch:
            raise ValueError(
                f"q has shape {q.shape}, expected ({batch}, heads, seqlen_q, head_dim)"
            )
        lengths, k, v = self._store.lengths - self.forgotten, self.k, self.v
        first = self._positions(q.shape[-2], q_offset)
        options = {"causal": True, "window": self._window()} | options
        self._check_sees_all(first, options["window"])
        first = first - self.forgotten
        if q.ndim == 3:
            k, v, lengths, first = k[0], v[0], lengths[0], first[0]
        return attention(q, k, v, mask, kv_lengths=lengths, q_offset=first, **options)

    def _window(self):
        return None if self.window is None else (self.window, None)

    def _positions(self, seqlen_q, q_offset):
        """Of the first query of each row."""
        lengths = self._store.lengths
        if q_offset is not None:
            given = integers("q_offset", q_offset, lengths.shape, -(2**53), 2**53)
            return np.broadcast_to(given, lengths.shape)
        if self._last is not None and self._last[1] == seqlen_q:
            return self._last[0]
        return lengths - seqlen_q

    def _check_sees_all(self, first, window):
        left = window[0] if isinstance(window, (tuple, list)) and window else None
        reach = None if left is None else int(first.min()) - left
        if self.forgotten and (reach is None or reach < self.forgotten):
            raise ValueError(
                f"a query could see key {0 if reach is None else max(reach, 0)}, expected none "
                f"before {self.forgotten}: those are forgotten"
            )

    # ---- The whole cache -------------------------------------------------------------------------

    def rewind(self, lengths):
        """Take back tokens: rows have these lengths again.

        Parameters
        ----------
        lengths : int or array_like of int, shape (batch,)
            From 0 to the length now.

        Raises
        ------
        TypeError, ValueError
            A length is none of these, or the next query would see a key that is forgotten.
        """
        now = self._store.lengths
        new = integers("lengths", lengths, now.shape, 0, len(self))
        new = np.broadcast_to(new, now.shape).copy()
        if (new > now).any():
            raise ValueError(f"lengths are {new.tolist()}, expected at most {now.tolist()}")
        if self.forgotten > self._needed_from(new):
            raise ValueError(
                f"lengths are {new.tolist()}, expected at least {self.forgotten + self.window}: "
                f"keys before {self.forgotten} are forgotten"
            )
        now[:] = new
        self._last = None

    def select(self, rows):
        """Make these rows, in this order, the batch: for beams, and for texts that are complete.

        Parameters
        ----------
        rows : array_like of int
            Numbers of rows, which may repeat.
        """
        rows = np.asarray(rows)
        batch = len(self._store.lengths)
        if rows.ndim != 1 or not rows.size:
            raise ValueError(f"rows has shape {rows.shape}, expected a list of ints")
        self._rebuild(self.capacity, rows=integers("rows", rows, rows.shape, 0, batch - 1))

    def fork(self):
        """A cache of its own in memory that holds the same."""
        other = KVCache.__new__(KVCache)
        other.window, other._path, other._store, other._last = self.window, None, self._store, None
        other._rebuild(max(self._stored, 1), path=None)
        other._last = self._last
        return other

    def __reduce__(self):
        return _restored, (self.window, *self.fork()._store[:4])

    def flush(self):
        """Write to the disk what is in the file's pages in memory."""
        if self._store.mapped is not None:
            self._store.mapped.flush()

    def save(self, path):
        """Write the cache to a file, whole or not at all; safetensors programs read it too.

        Raises
        ------
        ValueError
            It is the cache's own file.
        OSError
            It cannot be written.
        """
        if self._path is not None and os.path.exists(path) and os.path.samefile(path, self._path):
            raise ValueError(
                f"path is {os.fspath(path)!r}, the cache's own file: flush() writes it"
            )
        other = self.fork()
        other._rebuild(max(self._stored, 1), path=os.fspath(path))
        other.flush()

    @classmethod
    def open(cls, path, mode="r+"):
        """The cache in a file that `save` wrote or a cache with a `path` left.

        Parameters
        ----------
        path : str or path-like
        mode : {"r+", "r", "c"}
            Go on in the file; only read it; or leave it alone and keep changes in memory.

        Raises
        ------
        ValueError
            The file is damaged or none of ours.
        OSError
            It cannot be opened.
        """
        if mode not in ("r+", "r", "c"):
            raise ValueError(f"mode is {mode!r}, expected 'r+', 'r' or 'c'")
        cache = cls.__new__(cls)
        store, cache.window = opened(path, mode)
        cache._path = os.fspath(path) if mode == "r+" else None
        cache._use(store)
        return cache


def _restored(window, *arrays):
    cache = KVCache.__new__(KVCache)
    cache.window, cache._path = window, None
    cache._use(Store(*arrays))
    return cache
