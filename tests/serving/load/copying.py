"""How much guesses bring, and cost, by how often a text repeats itself.

    python -m tests.serving.load.copying --threads 1 --batch 1 8

The model has the work of a real one, but says what it is told to: after each of its tokens the
next in a circle, with a probability that the temperature sets, otherwise any. Runs with and without
guesses take turns; the median of ``--repeats`` counts. ``--cpu-time`` counts the processor's time
instead of the clock's, where others use the machine too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.config.serve import CacheConfig
from mtk.models.build import build_model
from mtk.models.gpt import GPT
from mtk.models.init import initialize
from serving.decode_speed import DecodeFigures, measure_decode
from serving.sampling import SamplingParams

WORDS = 64
SHARPNESS = 10.0
# Probability that the next token is that of the circle.
RIGHT = {"repeats itself": 1.0, "80 % repeated": 0.8, "40 % repeated": 0.4, "random": 0.0}


def circle_model(layers: int, hidden: int) -> GPT:
    """Whatever its layers compute is multiplied with 0; logits of the next token are SHARPNESS
    above the others, about."""
    config = make(
        ModelConfig, num_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64,
        num_query_groups=max(1, hidden // 128), seq_length=4096, vocab_size=WORDS,
        hidden_dropout=0.0, attention_dropout=0.0, position_embedding_type="rope",
        normalization="RMSNorm", activation="swiglu", add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    model = build_model(config)
    initialize(model, config, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.zero_()
        words = torch.nn.functional.normalize(torch.randn(WORDS, hidden), dim=-1)
        model.embedding.tokens.weight[:WORDS] = words  # type: ignore[union-attr]
        model.output_weight[:WORDS] = words.roll(1, 0) * SHARPNESS / math.sqrt(hidden)
    return model.eval()


def sampling(right: float) -> SamplingParams:
    if right == 1:
        return SamplingParams(temperature=0)
    if right == 0:
        return SamplingParams(temperature=100.0, seed=1)
    return SamplingParams(
        temperature=SHARPNESS / math.log((WORDS - 1) * right / (1 - right)), seed=1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        time.perf_counter = time.process_time
    torch.manual_seed(1)
    model = circle_model(args.layers, args.hidden).to(args.device, getattr(torch, args.dtype))
    print("| text | batch | tokens/s without | with | ratio | tokens a step | guessed, right |")
    print("|---|---|---|---|---|---|---|")
    for batch in args.batch:
        for name, right in RIGHT.items():
            runs: dict[str, list[DecodeFigures]] = {"off": [], "lookup": []}
            for _ in range(args.repeats):
                for mode, kept in runs.items():
                    options = CacheConfig(prefix_caching=False, speculation=mode)  # type: ignore[arg-type]
                    kept.append(
                        measure_decode(model, batch, args.prompt_tokens, args.new_tokens,
                                       options=options, sampling=sampling(right))
                    )  # fmt: skip
            off, on = (statistics.median(run.tokens_per_second for run in kept)
                       for kept in runs.values())  # fmt: skip
            last = runs["lookup"][-1]
            print(
                f"| {name} | {batch} | {off:,.0f} | {on:,.0f} | {on / off:.2f} | "
                f"{last.step_tokens / batch:.2f} | {last.drafted}, {last.accepted} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
