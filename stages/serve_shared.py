"""The engine of ``mtk serve`` on several ranks that share each matrix: what each of them does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mtk.config.serve import ServeConfig
from mtk.convert.open_model import OpenedModel, read_native
from mtk.convert.open_shared import open_shared
from mtk.convert.source import find_source
from mtk.errors import ConfigError, Problem
from mtk.launch.failures import lost_peer
from mtk.launch.process import Place, join, require_gpus
from mtk.parallel.dims import Dims
from mtk.parallel.groups import Trace
from mtk.parallel.ranks import Ranks, make_ranks
from serving.engine_child import Relay
from serving.engine_messages import Warned, connect
from serving.follow import Follower
from serving.lead import Lead, leading_parts
from stages.serve import place_of, torch_engine

OPTION = "tensor_model_parallel_size"


def run_rank(place: Place, folder: Path, config: ServeConfig) -> None:
    """Rank 0 serves the engine; the others follow it."""
    dtype, device = place_of(config)
    if device == "cuda":
        require_gpus(place.world)
        place = replace(place, device=torch.device("cuda", place.local_rank))
    timeout = config.limits.step_timeout
    if place.rank:
        with join(place, timeout) as trace:
            opened, ranks = _open(config, place, dtype, trace)
            Follower(opened.model, ranks.tp).follow(folder)
        return
    line, lead = connect(folder), Lead(folder, place.world - 1)
    with join(place, timeout) as trace:
        opened, ranks = _open(config, place, dtype, trace)
        lead.gather(timeout)

        def warn(text: str) -> None:
            line.send(Warned(text))

        parts = leading_parts(lead, ranks.tp)
        engine = torch_engine(config, opened.model, opened.tokenizer, warn, parts)
        Relay(line, engine).serve()
        lead.close()
        if engine.error is not None and lost_peer(engine.error):
            # The launcher finds out which rank went, and tells the server.
            raise engine.error
    line.close()


def _open(
    config: ServeConfig, place: Place, dtype: torch.dtype, trace: Trace
) -> tuple[OpenedModel, Ranks]:
    source = find_source(config.load)
    model, _ = read_native(source)
    ranks = make_ranks(
        Dims(tp=place.world),
        rank=place.rank,
        device=place.device,
        kv_groups=model.query_groups,
        state_groups=model.state_groups,
        trace=trace,
    )
    if model.family == "t5":
        rule = f"is for models that continue a text; {source.folder} is a T5"
        raise ConfigError([Problem(OPTION, place.world, rule, "Nearest: 1.")])
    opened = open_shared(source, ranks, dtype=dtype, option=OPTION)
    opened.require_decoder("load", config.load)
    return opened, ranks
