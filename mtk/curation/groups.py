"""Groups of documents that belong together, found pair by pair (union-find)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Groups:
    """Documents 0 .. N - 1; a group is named by its first document. 8 bytes a document."""

    def __init__(self, number: int) -> None:
        self._above = np.arange(number, dtype=np.int64)

    def first(self, document: int) -> int:
        """The first document of the group of ``document``."""
        above = self._above
        while above[document] != document:
            above[document] = above[above[document]]
            document = int(above[document])
        return document

    def join(self, one: int, other: int) -> None:
        """The two groups become one."""
        first, second = self.first(one), self.first(other)
        self._above[max(first, second)] = min(first, second)

    def join_all(self, firsts: npt.NDArray[np.int64]) -> None:
        """Document i joins ``firsts[i]``, an earlier one or itself; for groups still untouched."""
        self._above[:] = firsts

    def all_firsts(self) -> npt.NDArray[np.int64]:
        """[N] the first document of every group. An entry never points behind itself, so the
        whole is flat after a logarithmic number of halvings."""
        while True:
            above = self._above[self._above]
            if np.array_equal(above, self._above):
                return above
            self._above = above
