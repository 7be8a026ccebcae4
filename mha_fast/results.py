"""What attention returns that is asked for more than one array: a named tuple of these fields."""

from collections import namedtuple
from itertools import compress, product

FIELDS = ("lse", "weights")


def named_result(out, *more):
    """`out`, or with those of FIELDS that are not None a named tuple of all."""
    asked = tuple([x is not None for x in more])
    return TYPES[asked]((out, *compress(more, asked))) if any(asked) else out


def _result_type(*fields):
    made = namedtuple("AttentionResult", fields, module="mha_fast")
    made.__doc__ = f"Results of attention: {', '.join(fields)}."
    # Types made at run time have no name that pickle could find.
    made.__reduce__ = lambda self: (_restored, (fields, tuple(self)))
    return made


def _restored(fields, values):
    return TYPES[tuple(name in fields for name in FIELDS)](values)


TYPES = {
    asked: _result_type("out", *compress(FIELDS, asked))._make
    for asked in product([False, True], repeat=len(FIELDS))
}
AttentionResult = TYPES[True, False].__self__
