"""Published vocabularies, where MTK_TEST_ASSETS has them: known ids and library parity."""

from __future__ import annotations

import inspect

import pytest

from mtk.tokenizers import build_tokenizer
from mtk.tokenizers.tiktoken_ranks import PATTERNS
from tests.tokenizers.samples import TRICKY, asset, options

LONG = "".join(TRICKY) * 3


def test_patterns_are_those_of_the_library() -> None:
    from tiktoken_ext import openai_public

    source = inspect.getsource(openai_public)
    assert PATTERNS["gpt2"] in source
    assert PATTERNS["cl100k"] in source
    for part in PATTERNS["o200k"].split("'s|'t|")[0].split("|"):
        assert part.rstrip("(?i:") in source


@pytest.mark.parametrize(
    ("name", "size", "eod", "ids"),
    [
        ("cl100k_base", 100_277, 100_257, [15339, 1917]),
        ("o200k_base", 200_019, 199_999, [24912, 2375]),
    ],
)
def test_tiktoken(name: str, size: int, eod: int, ids: list[int]) -> None:
    path = str(asset(f"tiktoken/{name}.tiktoken"))
    tokenizer = build_tokenizer(options(tokenizer_type="TikTokenizer", tokenizer_model=path))
    assert (tokenizer.vocab_size, tokenizer.eod) == (size, eod)
    assert tokenizer.encode("hello world") == ids
    assert tokenizer.decode(tokenizer.encode(LONG)) == LONG


def test_gpt2_equals_tiktoken_on_its_vocabulary() -> None:
    """Two implementations of byte-level BPE agree."""
    import tiktoken

    from mtk.tokenizers.library import GPT2BPETokenizer

    files = {
        "vocab_file": str(asset("gpt2/vocab.json")),
        "merge_file": str(asset("gpt2/merges.txt")),
    }
    tokenizer = build_tokenizer(options(tokenizer_type="GPT2BPETokenizer", **files))
    assert isinstance(tokenizer, GPT2BPETokenizer)
    # In GPT-2's vocabulary the ids order by rank, so they serve as ranks.
    ranks = {tokenizer.token_bytes(i) or b"": i for i in range(50256)}
    other = tiktoken.Encoding(
        "gpt2", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={}
    )
    for text in [*TRICKY, LONG]:
        assert tokenizer.encode(text) == other.encode_ordinary(text)


class TestSentencePiece:
    @pytest.fixture
    def model(self) -> str:
        pytest.importorskip("sentencepiece")
        return str(asset("sentencepiece/botchan_en_bpe_1000.model"))

    def test_plain(self, model: str) -> None:
        for kind in ("GPTSentencePieceTokenizer", "Llama2Tokenizer", "SentencePieceTokenizer"):
            tokenizer = build_tokenizer(options(tokenizer_type=kind, tokenizer_model=model))
            assert tokenizer.vocab_size == 1000
            assert tokenizer.eod == tokenizer.eos == 2
            ids = tokenizer.encode("I saw a girl")
            assert 1 not in ids
            assert tokenizer.decode(ids) == "I saw a girl"
            assert tokenizer.encode_batch(["I saw", "a"]) == [
                tokenizer.encode("I saw"),
                tokenizer.encode("a"),
            ]

    def test_bos_on_request(self, model: str) -> None:
        config = options(
            tokenizer_type="Llama2Tokenizer", tokenizer_model=model, tokenizer_add_bos=True
        )
        assert build_tokenizer(config).encode("a")[0] == 1

    def test_legacy_additions(self, model: str) -> None:
        config = options(
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=model,
            tokenizer_sentencepiece_legacy=True,
            vocab_extra_ids=2,
        )
        tokenizer = build_tokenizer(config)
        appended = [tokenizer.piece(i) for i in range(1000, tokenizer.vocab_size)]
        assert appended == [
            "<CLS>",
            "<SEP>",
            "<EOD>",
            "<MASK>",
            "<PAD>",
            "<extra_id_0>",
            "<extra_id_1>",
        ]
        assert (tokenizer.eod, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1002, 1, 2, 1004)
        ids = tokenizer.encode("I saw<extra_id_1>a girl</s>")
        assert [i for i in ids if i >= 1000 or i == 2] == [1006, 2]
        assert "<extra_id_1>" in tokenizer.decode(ids)

    def test_damaged_model(self, model: str, tmp_path: object) -> None:
        from pathlib import Path

        from mtk.errors import DataError

        bad = Path(str(tmp_path)) / "bad.model"
        bad.write_bytes(Path(model).read_bytes()[:100])
        with pytest.raises(DataError, match="not a SentencePiece model"):
            build_tokenizer(options(tokenizer_type="Llama2Tokenizer", tokenizer_model=str(bad)))
