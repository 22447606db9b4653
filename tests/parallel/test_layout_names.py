"""Short names of layouts back into layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtk.config.parallel import ParallelConfig
from mtk.errors import LayoutError
from mtk.parallel.layout_names import parse
from mtk.parallel.legal_layouts import legal_layouts, name
from tests.parallel.test_legal_layouts import BATCH, DENSE, mixture


@pytest.mark.parametrize("world", [1, 2, 4, 6])
def test_every_legal_layout_comes_back(world: int) -> None:
    for model in (DENSE, mixture()):
        for layout in legal_layouts(world, model, BATCH):
            assert parse(name(layout)) == layout


def test_splits_and_copies_come_back() -> None:
    for text in (
        "pp2.zero-bubble.3.5",
        "pp2.interleaved.2.2.1.3-dp4.full.x2",
        "tp4.sp-pp2.zbv",
        "tp2.sp.overlap",
    ):
        assert name(parse(text)) == text
    layout = ParallelConfig(
        nproc=4, pipeline_model_parallel_size=2, pipeline_schedule="1f1b", pipeline_split=(5, 3)
    )
    assert parse(name(layout)) == layout


def test_without_data_parallelism_there_is_one_copy() -> None:
    assert parse("cp2.ring") == parse("cp2.ring-dp1.replicate")
    assert parse("ep2-dp2.replicate").nproc == 2
    assert parse("single") == replace(ParallelConfig(), nproc=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no part"),
        ("tp", "'tp' is no part"),
        ("tp0", "'tp0' is no part"),
        ("tp2.overlap", "'tp2.overlap' is no part"),
        ("tp2.spp", "'tp2.spp' is no part"),
        ("tp2-tp4", "'tp4' says again"),
        ("pp2", "'pp2' is no part"),
        ("pp2.zero", "'pp2.zero' is no part"),
        ("cp2", "'cp2' is no part"),
        ("cp2.p2p", "'cp2.p2p' is no part"),
        ("dp2", "'dp2' is no part"),
        ("ep2.x2", "'ep2.x2' is no part"),
        ("single-tp2", "'single' is no part"),
        ("tp2,pp2.1f1b", "'tp2,pp2.1f1b' is no part"),
    ],
)
def test_what_names_no_layout(text: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        parse(text)
