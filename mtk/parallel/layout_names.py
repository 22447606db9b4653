"""Layouts from their short names, as :func:`mtk.parallel.legal_layouts.name` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from mtk.config.parallel import ParallelConfig
from mtk.errors import LayoutError, Problem
from mtk.parallel.legal_layouts import CP_KINDS, SCHEDULES, Options

GRAMMAR = (
    f"single, or parts joined by -: tpN[.sp[.overlap]], "
    f"ppN.{'|'.join(SCHEDULES)}[.cLAYERS][.LAYERS...], "
    f"cpN.{'|'.join(CP_KINDS.values())}, epN, dpN.replicate|optimizer|full[.xCOPIES]"
)
_NEXT_PART = re.compile(r"-(?=(?:tp|pp|cp|ep|dp)\d)")
_KIND_OF_CP = {short: long for long, short in CP_KINDS.items()}


def parse(text: str) -> ParallelConfig:
    """The layout that is called ``text``; its ``nproc`` is the number of ranks.

    Without a ``dp`` part there is one copy of the model. Raises LayoutError for text that
    names no layout; whether the layout is legal for a model is not asked here.
    """
    options: Options = {}
    copies = 1
    for part in [] if text == "single" else _NEXT_PART.split(text):
        degree, found = _read(text, part)
        if options.keys() & found.keys():
            raise _unreadable(text, f"{part!r} says again what an earlier part says")
        options |= found
        copies = degree if part.startswith("dp") else copies
    layout = ParallelConfig(**options)
    return replace(layout, nproc=layout.model_parallel_size * copies)


def _read(text: str, part: str) -> tuple[int, Options]:
    """The degree and the options of one part, such as ``pp2.interleaved.c1``."""
    for pattern, options in _PARTS.items():
        if (match := re.fullmatch(pattern, part)) and int(match["n"]) > 0:
            return int(match["n"]), options(match)
    raise _unreadable(text, f"{part!r} is no part of a layout")


def _unreadable(text: str, why: str) -> LayoutError:
    return LayoutError([Problem("layout", text, f"names no layout: {why}", f"Legal: {GRAMMAR}.")])


def _tensor(match: re.Match[str]) -> Options:
    return {
        "tensor_model_parallel_size": int(match["n"]),
        "sequence_parallel": match["sp"] is not None,
        "tp_comm_overlap": match["overlap"] is not None,
    }


def _pipeline(match: re.Match[str]) -> Options:
    options: Options = {
        "pipeline_model_parallel_size": int(match["n"]),
        "pipeline_schedule": match["schedule"],
    }
    if match["chunk"]:
        options["num_layers_per_virtual_pipeline_stage"] = int(match["chunk"])
    if match["split"]:
        options["pipeline_split"] = tuple(int(count) for count in match["split"].split(".")[1:])
    return options


def _context(match: re.Match[str]) -> Options:
    return {"context_parallel_size": int(match["n"]), "cp_comm_type": _KIND_OF_CP[match["kind"]]}


def _experts(match: re.Match[str]) -> Options:
    return {"expert_model_parallel_size": int(match["n"])}


def _data(match: re.Match[str]) -> Options:
    options: Options = {"data_parallel_sharding": match["mode"]}
    if match["copies"]:
        options["num_distributed_optimizer_instances"] = int(match["copies"])
    return options


_PARTS: Mapping[str, Callable[[re.Match[str]], Options]] = {
    r"tp(?P<n>\d+)(?P<sp>\.sp(?P<overlap>\.overlap)?)?": _tensor,
    rf"pp(?P<n>\d+)\.(?P<schedule>{'|'.join(SCHEDULES)})"
    r"(?:\.c(?P<chunk>\d+))?(?P<split>(?:\.\d+)*)": _pipeline,
    rf"cp(?P<n>\d+)\.(?P<kind>{'|'.join(_KIND_OF_CP)})": _context,
    r"ep(?P<n>\d+)": _experts,
    r"dp(?P<n>\d+)\.(?P<mode>replicate|optimizer|full)(?:\.x(?P<copies>\d+))?": _data,
}
