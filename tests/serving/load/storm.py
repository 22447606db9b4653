"""Many clients at once that ask for different things in different ways, some of whom leave.

Every answer must be the asker's own, nothing may fail on the server's side, and when all have
gone nothing may be held.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.serving.load.leaving import Freed, freed
from tests.serving.load.overload import percentile
from tests.serving.load.server_process import MODELS, ServerProcess, server_process
from tests.serving.models import ByteTokenizer, greedy_without_cache, tiny_model
from tests.serving.wire import Stream, call

PROMPTS, LONGEST, LEAVING = 16, 48, 0.01
# Wrong in different ways, each with the status that it must get.
BAD: tuple[tuple[str, Any, int], ...] = (
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400),
    ("/v1/completions", b"{", 400),
    ("/api", {"prompts": []}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404),
)


@dataclass
class Tally:
    """statuses: of all answers. wrong: answers that are not the asker's own; kinds: how many of
    which kind and prompt. left: streams that a client closed in the middle; closed: when each
    did, by its seed."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    left: int = 0
    closed: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def failures(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 500)

    def note(self, status: int, tokens: int = 0) -> None:
        with self.lock:
            self.statuses[status] += 1
            self.tokens += tokens


def expectations(name: str = "tiny") -> dict[str, list[int]]:
    """Prompt -> the ids that greedy decoding appends, by the simplest decoder."""
    model = tiny_model(**MODELS[name])
    prompts = [f"storm {number}: " for number in range(PROMPTS)]
    return {prompt: greedy_without_cache(model, prompt.encode(), LONGEST) for prompt in prompts}


def _expected(ids: list[int], count: int) -> str:
    """Text of the first ``count`` ids, which ends at the end of a document."""
    cut = ids[:count]
    end = next((i for i, token in enumerate(cut) if token == ByteTokenizer.eod), len(cut))
    return ByteTokenizer().decode(cut[:end])


class _Client:
    def __init__(self, url: str, known: dict[str, list[int]], tally: Tally, seed: int) -> None:
        self._url, self._known, self._tally = url, known, tally
        self._random = random.Random(seed)

    def once(self) -> None:
        kind = self._random.choices(
            (self._streams, self._whole, self._megatron, self._chat, self._wrong),
            (6, 2, 2, 1, 1),
        )[0]
        prompt = self._random.choice(list(self._known))
        count = self._random.randint(1, LONGEST)
        kind(prompt, count)

    def _streams(self, prompt: str, count: int) -> None:
        leaving = self._random.random() < LEAVING * 2
        seed = self._random.getrandbits(60)
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "seed": seed}
        stream = Stream(self._url, body)
        if stream.status != 200:
            self._tally.note(stream.status)
            stream.rest()
            return
        text, expected = "", _expected(self._known[prompt], count)
        for number, chunk in enumerate(stream):
            if "error" in chunk:
                self._tally.note(chunk["error"]["code"])
                return
            text += chunk["choices"][0]["text"]
            if leaving and number >= count // 2:
                with self._tally.lock:
                    self._tally.left += 1
                    self._tally.closed[seed] = time.monotonic()
                stream.close()
                break
        good = expected.startswith(text) if leaving else text == expected and stream.finished
        self._judge(good, text, expected, f"stream {prompt}")
        self._tally.note(200, len(text))

    def _whole(self, prompt: str, count: int) -> None:
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "n": 2}
        status, answer, _ = call(self._url, "POST", "/v1/completions", body)
        if status == 200:
            expected = _expected(self._known[prompt], count)
            for choice in answer["choices"]:
                self._judge(choice["text"] == expected, choice["text"], expected, f"whole {prompt}")
        self._tally.note(status, 2 * count)

    def _megatron(self, prompt: str, count: int) -> None:
        body = {"prompts": [prompt], "tokens_to_generate": count, "top_k": 1}
        status, answer, _ = call(self._url, "PUT", "/api", body)
        if status == 200:
            expected = prompt + _expected(self._known[prompt], count)
            text = answer["text"][0].removesuffix("<|endoftext|>")
            self._judge(text == expected, text, expected, f"megatron {prompt}")
        self._tally.note(status, count)

    def _chat(self, prompt: str, count: int) -> None:
        messages = [{"role": "user", "content": prompt}]
        body = {"messages": messages, "max_tokens": count, "seed": 7}
        first, second = (call(self._url, "POST", "/v1/chat/completions", body) for _ in range(2))
        if first[0] == second[0] == 200:
            texts = [found[1]["choices"][0]["message"]["content"] for found in (first, second)]
            self._judge(texts[0] == texts[1], *texts, f"chat {prompt}")
        for status in (first[0], second[0]):
            self._tally.note(status, count)

    def _wrong(self, prompt: str, count: int) -> None:
        path, body, wanted = self._random.choice(BAD)
        status, answer, _ = call(self._url, "POST", path, body)
        good = status == wanted and answer["error"]["code"] == wanted
        self._judge(good, str(status), path, f"bad request to {path}")
        self._tally.note(status)

    def _judge(self, good: bool, found: str, expected: str, kind: str) -> None:
        if not good:
            with self._tally.lock:
                self._tally.kinds[kind] += 1
                self._tally.wrong.append(f"{found!r} instead of {expected!r}")


def storm(server: ServerProcess, seconds: float, clients: int = 64, model: str = "tiny") -> Tally:
    known, tally = expectations(model), Tally()
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        client = _Client(server.url, known, tally, number)
        while time.monotonic() < end:
            client.once()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--own-process", action="store_true", help="the engine has one")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--alone", type=float, default=20.0, help="seconds of one client, first")
    parser.add_argument("--deterministic-mode", action="store_true")
    asked = parser.parse_args()
    sizes: dict[str, Any] = {"max_batch_size": 32, "max_queue": 128, "max_concurrency": 128}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "freed"
        if asked.own_process:
            sizes["own_process"] = True
        else:
            sizes |= {"model": asked.model, "deterministic_mode": asked.deterministic_mode}
            sizes["freed_log"] = str(log)
        with server_process(**sizes) as server:
            single = storm(server, asked.alone, 1, asked.model)
            tally = storm(server, asked.seconds, asked.clients, asked.model)
            rates = single.tokens / asked.alone, tally.tokens / asked.seconds
            print(
                f"one client {rates[0]:.0f} tokens/s, {asked.clients} clients {rates[1]:.0f}: "
                f"{rates[1] / rates[0]:.1f} times"
            )
            if not asked.own_process:
                _tell_freed(freed(log, tally.closed))
            _tell(tally, server)


def _tell_freed(rows: Sequence[Freed]) -> None:
    seconds = [row.seconds for row in rows]
    print(
        f"{len(rows)} rows freed early, after p50 {1000 * percentile(seconds, 0.5):.0f} ms, "
        f"p99 {1000 * percentile(seconds, 0.99):.0f} ms, at most {max(r.steps for r in rows)} "
        f"steps; {sum(not row.quick for row in rows)} later than 250 ms and 2 steps"
    )


def _tell(tally: Tally, server: ServerProcess) -> None:
    print(
        f"{sum(tally.statuses.values())} requests, {tally.tokens} tokens, statuses "
        f"{dict(sorted(tally.statuses.items()))}, {tally.left} left in the middle, "
        f"{len(tally.wrong)} wrong answers {dict(tally.kinds)}, {tally.failures} failures, "
        f"held at the end: {server.leaks() or 'nothing'}"
    )
    for line in tally.wrong[:5]:
        print(line)


if __name__ == "__main__":
    main()
