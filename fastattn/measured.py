"""The fastest backend per GPU, direction, mask and size. Written by ``python -m benchmarks order``, not by hand.

Empty while there are no committed results: then ``dispatch.ORDER`` alone decides.
"""

#: Architecture -> (direction, kind of call) -> head_dim -> (number of keys from which on, backend), shortest first.
FASTEST: dict[str, dict[tuple[str, str], dict[int, tuple[tuple[int, str], ...]]]] = {}

#: The files of rows that it was made from.
SOURCES: tuple[str, ...] = ()
