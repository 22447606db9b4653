"""First-fit bin packing (Johnson 1973): each item goes into the first bin that has room."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Items by bin, in order. The result depends on the order of ``sizes`` and nothing else.

    A binary tree of the room in each bin finds the first one in log(items) steps. Raises
    ValueError for an item larger than a bin.
    """
    if any(size > capacity for size in sizes):
        raise ValueError(f"an item of {max(sizes)} does not fit into {capacity}")
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    for item, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
