"""What a call of attention will do, before it does it."""

from typing import NamedTuple

import numpy as np

from ._core import ask
from .arguments import compute_dtype, result_dtype, thread_count
from .options import OPTIONS, checked


class Plan(NamedTuple):
    """How a call is carried out; prints as a few lines.

    Attributes
    ----------
    isa : str
        Instruction set.
    layout : str
        "queries in lanes", or "keys in lanes" where all tiles have few rows. Both give the same
        bits.
    rows_per_tile, tiles, tasks, threads : int
        Tasks are tiles, or parts of their keys where tiles are too few for the threads.
    scratch_bytes : int
        Of each thread.
    record_bytes : int
        Of partial results where keys are split, for all threads.
    blocks, blocks_visited : int
        Blocks of keys of all tiles, and those that some row may see by its position. What a mask
        hides is found out later.
    notes : tuple of str
        What costs more than it has to, and why.
    """

    isa: str
    layout: str
    rows_per_tile: int
    tiles: int
    tasks: int
    threads: int
    scratch_bytes: int
    record_bytes: int
    blocks: int
    blocks_visited: int
    notes: tuple

    @property
    def skipped(self):
        """The share of blocks that no tile visits."""
        return 1 - self.blocks_visited / self.blocks if self.blocks else 0.0

    def __str__(self):
        lines = [
            f"instruction set   {self.isa}, {self.layout}",
            f"tiles             {self.tiles:,} of up to {self.rows_per_tile} rows",
            f"tasks             {self.tasks:,} on {self.threads} thread(s)",
            f"scratch memory    {self.scratch_bytes:,} bytes a thread, "
            f"{self.record_bytes:,} for all",
            f"blocks of keys    {self.blocks_visited:,} of {self.blocks:,} visited, "
            f"{self.skipped:.0%} skipped",
        ]
        return "\n".join(lines + [f"note              {note}" for note in self.notes])


def explain(q, k, v, mask=None, *, threads=None, **options):
    """Tell what `attention` would do with these arguments, without doing it.

    Parameters
    ----------
    q, k, v, mask
        As in `attention`.
    threads : int, optional
        As in `attention`.
    **options
        The options of `attention`.

    Returns
    -------
    Plan

    Raises
    ------
    TypeError, ValueError
        As `attention`.
    MemoryError
        No memory for the scratch space of a thread.

    Examples
    --------
    >>> import numpy as np
    >>> q = np.zeros((8, 1024, 64), np.float32)
    >>> plan = explain(q, q, q, causal=True)
    >>> plan.layout, plan.skipped > 0.3
    ('queries in lanes', True)
    """
    threads = thread_count("threads", threads)
    given = ask(q, k, v, mask, **options)
    question = given if given.plain else checked(given)
    return Plan(**question.plan(threads), notes=tuple(_notes(given, question)))


def _notes(given, question):
    real = compute_dtype(question.q, question.k, question.v)
    for name in ("q", "k", "v", *OPTIONS):
        before, after = getattr(given, name), getattr(question, name)
        if isinstance(after, np.ndarray) and after is not before and not isinstance(before, int):
            yield f"{name} is converted before the call: {_kind(before)}"
    for name in "kv":
        x = getattr(question, name)
        if x.dtype != real:
            yield f"{name} is {x.dtype}, computed in {real}: converted block by block"
        elif x.shape[-1] > 1 and x.strides[-1] != x.itemsize and x.size:
            yield f"{name}'s last axis has stride {x.strides[-1]}: read through copies of blocks"
    if result_dtype(question.q, question.k, question.v) != real:
        yield f"out is rounded from {real} to {result_dtype(question.q, question.k, question.v)}"


def _kind(x):
    return f"{x.dtype} array" if isinstance(x, np.ndarray) else type(x).__name__
