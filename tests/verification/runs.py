"""Tiny configurations and command lines for the tests of ``mtk verify``."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mtk.cli.main import main

DENSE = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--num-query-groups", "2", "--seq-length", "16", "--vocab-size", "61"),
    *("--make-vocab-size-divisible-by", "16", "--lr", "1e-3", "--device", "cpu"),
    *("--num-threads", "1"),
]
MOE = [
    *DENSE,
    *("--num-experts", "4", "--moe-ffn-hidden-size", "32", "--disable-bias-linear"),
    *("--moe-aux-loss-coeff", "0.3", "--moe-z-loss-coeff", "0.03"),
]


def verify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, result of ``mtk verify ... --json``, and what people read."""
    code = main(["verify", *words, "--json"])
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    results = [event for event in events if event["event"] == "result"]
    return code, results[0] if results else {}, captured.err
