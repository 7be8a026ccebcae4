"""What functions return that are asked for more than one array."""

import functools
from collections import namedtuple


def named_result(out, **more):
    """`out`, or with what is not None a named tuple of both."""
    more = {name: x for name, x in more.items() if x is not None}
    return result_type("out", *more)(out, *more.values()) if more else out


@functools.cache
def result_type(*fields):
    """The one type of results with these fields."""
    made = namedtuple("AttentionResult", fields, module="mha_fast")
    made.__doc__ = f"Results of attention: {', '.join(fields)}."
    # Types made at run time have no name that pickle could find.
    made.__reduce__ = lambda self: (_restored, (self._fields, tuple(self)))
    return made


def _restored(fields, values):
    return result_type(*fields)(*values)


AttentionResult = result_type("out", "lse")
