"""SIGTERM while requests are in flight: all of them get their whole answer."""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import dataclass

from tests.serving.load.server_process import server_process
from tests.serving.wire import Stream, call, eventually

TICK, TOKENS, CLIENTS = 0.02, 40, 32
BODY = {"prompt": "Hello", "max_tokens": TOKENS, "logit_bias": {"65": 100}}


@dataclass(frozen=True)
class Drain:
    """whole: clients whose answer was complete. in_flight: requests when the signal came.
    late: status of a request that came after it. seconds: from signal to exit."""

    whole: int
    in_flight: int
    late: int
    code: int
    seconds: float
    complaints: str


def drain(clients: int = CLIENTS, *, own_process: bool = False) -> Drain:
    whole: list[int] = []
    limits = {"max_batch_size": 16, "max_queue": 64}
    with server_process(TICK, own_process=own_process, **limits) as server:

        def stream(number: int) -> None:
            opened = Stream(server.url, {**BODY, "seed": number})
            text = "".join(chunk["choices"][0]["text"] for chunk in opened)
            if text == "A" * TOKENS and opened.finished:
                whole.append(number)

        def whole_answer(number: int) -> None:
            status, answer, _ = call(server.url, "POST", "/v1/completions", {**BODY, "n": 2})
            if status == 200 and [c["text"] for c in answer["choices"]] == ["A" * TOKENS] * 2:
                whole.append(number)

        work = [(stream, whole_answer)[number % 4 == 3] for number in range(clients)]
        threads = [threading.Thread(target=f, args=(n,)) for n, f in enumerate(work)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: server.state()["in_flight"] == clients, 20)
        began = time.monotonic()
        server.process.terminate()
        assert eventually(lambda: call(server.url, "GET", "/readyz")[0] == 503)
        late = call(server.url, "POST", "/v1/completions", BODY)[0]
        _, complaints = server.process.communicate(timeout=60)
        seconds = time.monotonic() - began
        for thread in threads:
            thread.join(10)
        return Drain(
            len(whole), clients, late, server.process.returncode, seconds, complaints.strip()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--own-process", action="store_true", help="the engine has one")
    asked = parser.parse_args()
    for number in range(asked.times):
        found = drain(own_process=asked.own_process)
        print(
            f"{number + 1}: {found.whole} of {found.in_flight} whole, a late one got "
            f"{found.late}, exit {found.code} after {found.seconds:.1f} s {found.complaints}",
            flush=True,
        )


if __name__ == "__main__":
    main()
