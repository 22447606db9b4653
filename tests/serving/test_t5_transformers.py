"""T5 as transformers generates with it, from the same directory: greedy, beams, log-probabilities,
texts; from the directory itself, from a native checkpoint and from what that is exported to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.convert.open_model import open_model
from serving.generate_text import generate_text
from serving.generation import generate
from serving.open_served import open_served
from serving.requests import GenerationRequest, StopRules
from serving.sampling import SamplingParams
from stages.convert import run as convert
from tests.convert.models import convert_config, quiet
from tests.serving.t5_directory import EOS, PAD, V10, V11, t5_directory

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")
TEXTS = [
    "translate English to German: the quick brown fox",
    "the <extra_id_0> fox jumps over the lazy <extra_id_1>.",
    "A",
    "",
    "yes, no; yes no (1 + 2)",
    "the lazy dog translate to the the the the quick brown brown fox jumps over dog dog A B C no",
]
VERSIONS = {"1.0": V10, "1.1": V11}


@pytest.fixture(scope="module", params=VERSIONS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_directory(tmp_path_factory.mktemp("t5") / "hf", VERSIONS[request.param])


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    kind = transformers.T5ForConditionalGeneration
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def random_prompts(vocab: int) -> list[tuple[int, ...]]:
    chance = torch.Generator().manual_seed(4)
    lengths = [1 + 11 * i % 47 for i in range(22)]
    return [tuple(torch.randint(3, vocab, (n,), generator=chance).tolist()) for n in lengths]


@torch.inference_mode()
def test_greedy_tokens_alone_and_in_company(folder: Path, theirs: Any) -> None:
    served = open_served(str(folder), dtype=torch.float32, device="cpu")
    prompts = random_prompts(served.tokenizer.vocab_size)
    # More than one end, so that some of these texts reach theirs.
    ends = [EOS, *range(20, 119, 5)]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ends}
    expected = [
        theirs.generate(torch.tensor([prompt]), **options)[0, 1:].tolist() for prompt in prompts
    ]
    stop = StopRules(token_ids=frozenset(ends))
    request = GenerationRequest(
        prompts=tuple(prompts), max_tokens=24, sampling=SamplingParams(temperature=0), stop=stop
    )
    for rows in (1, 7):
        outputs = generate(served.model, served.tokenizer, request, max_rows=rows)
        assert [list(output.tokens) for output in outputs] == expected
    assert len({tuple(tokens) for tokens in expected}) > 10, expected
    assert len({len(tokens) for tokens in expected}) > 1


@torch.inference_mode()
def test_log_probabilities(folder: Path, theirs: Any) -> None:
    served = open_served(str(folder), dtype=torch.float32, device="cpu")
    prompt = random_prompts(served.tokenizer.vocab_size)[7]
    found = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, logprobs=3)
    request = GenerationRequest(prompts=(prompt,), max_tokens=16, sampling=sampling)
    [output] = generate(served.model, served.tokenizer, request)
    for logits, item in zip(found.logits, output.logprobs, strict=True):
        best = logits[0].log_softmax(-1).topk(3)
        assert [token for token, _ in item.top] == best.indices.tolist()
        assert [value for _, value in item.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(("width", "penalty"), [(4, 0.6), (3, 1.0)])
def test_texts_of_beams(
    folder: Path, theirs: Any, their_tokenizer: Any, width: int, penalty: float
) -> None:
    found = generate_text(folder, TEXTS, max_new_tokens=20, num_beams=width, length_penalty=penalty)
    for text, answer in zip(TEXTS, found, strict=True):
        ids = their_tokenizer(text, return_tensors="pt").input_ids
        out = theirs.generate(
            ids, max_new_tokens=20, num_beams=width, length_penalty=penalty, do_sample=False
        )
        tokens = [token for token in out[0, 1:].tolist() if token not in (EOS, PAD)]
        assert answer.replace("<pad>", "") == their_tokenizer.decode(tokens), text


def test_greedy_texts_of_every_form_of_the_model(
    folder: Path, theirs: Any, their_tokenizer: Any, tmp_path: Path
) -> None:
    """The directory, a native checkpoint of it, and what that is exported to."""
    native = convert(convert_config(folder, tmp_path / "native", to="native"), quiet()).path
    back = convert(convert_config(native, tmp_path / "back"), quiet()).path
    answers = [
        generate_text(path, TEXTS, max_new_tokens=24, temperature=0)
        for path in (folder, native, back)
    ]
    assert answers[0] == answers[1] == answers[2]
    for text, answer in zip(TEXTS, answers[0], strict=True):
        ids = their_tokenizer(text, return_tensors="pt").input_ids
        out = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, 1:].tolist()
        tokens = out[: out.index(EOS)] if EOS in out else out
        assert answer == their_tokenizer.decode(tokens), text
    for name in ("config.json", "generation_config.json"):
        assert json.loads((back / name).read_text())["decoder_start_token_id"] == PAD


def test_another_start_is_kept(tmp_path: Path) -> None:
    """Whose config.json says so, also where the tokenizer would begin otherwise."""
    other = t5_directory(tmp_path / "other", V10)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((other / name).read_text()) | {"decoder_start_token_id": 9}
        (other / name).write_text(json.dumps(config))
    native = convert(convert_config(other, tmp_path / "native", to="native"), quiet()).path
    back = convert(convert_config(native, tmp_path / "back"), quiet()).path
    model = transformers.T5ForConditionalGeneration.from_pretrained(back).eval()
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)[0]
    assert out[0] == 9
    for path in (other, native, back):
        opened = open_model(path)
        assert opened.config.decoder_start_token_id == 9
        greedy = SamplingParams(temperature=0)
        request = GenerationRequest(prompts=((5, 6, 7),), max_tokens=len(out) - 1, sampling=greedy)
        [output] = generate(opened.model, opened.tokenizer, request)
        assert list(output.tokens) == out[1:].tolist()
