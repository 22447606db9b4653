"""Orders of the rows of the fused query, key and value, by version of the checkpoint.

Since version 2 a rank's rows are, for each of its groups, its queries, its key, its value.
Version 0 has all queries, all keys, all values of the rank; version 1 interleaves the three
channel by channel. Both are older than grouped attention: as many keys as queries. The version
only speaks of weights called ``query_key_value``; those of Megatron-core always have the order
of version 2.
"""

from __future__ import annotations

from torch import Tensor

GROUPED = 2


def to_groups(rows: Tensor, version: int, heads: int) -> Tensor:
    """A rank's rows of any version in the order of version 2. heads: of the rank."""
    if version >= GROUPED:
        return rows
    rest = rows.shape[1:]
    if version == 0:
        return rows.reshape(3, heads, -1, *rest).transpose(0, 1).reshape(rows.shape)
    return rows.reshape(heads, -1, 3, *rest).transpose(1, 2).reshape(rows.shape)
