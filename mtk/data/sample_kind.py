"""What differs between families when training samples are made of datasets and their splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mtk.data.index_cache import IndexCache
from mtk.data.splits import SplitName
from mtk.data.token_source import SampleDataset, TokenSource


@dataclass(frozen=True)
class Part:
    """What a split takes of one dataset. units: numbers of what is divided, see
    :class:`SampleKind`."""

    name: str
    source: TokenSource
    units: range
    cache: IndexCache | None


class SampleKind(Protocol):
    """How the samples of one family are made of a part of a dataset."""

    @property
    def unit(self) -> str:
        """What ``--split`` divides, in the plural: "sequences" or "documents"."""
        ...

    def count(self, source: TokenSource) -> int:
        """Units of a whole dataset."""
        ...

    def mock(self) -> TokenSource:
        """The dataset behind ``--mock-data``. Raises ConfigError where it cannot be made."""
        ...

    def require_sample(self, part: Part, split: SplitName, raise_share: str) -> None:
        """Raise DataError if a part holds no sample, as far as that is cheap to tell.

        raise_share: what may help, to be put into the message; may be empty.
        """
        ...

    def one_epoch(self, part: Part) -> int:
        """Samples of a part in one epoch."""
        ...

    def dataset(self, part: Part, num_samples: int | None) -> SampleDataset:
        """At least ``num_samples`` samples; None: those of one epoch. Raises DataError."""
        ...
