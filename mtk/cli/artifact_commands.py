"""``mtk lineage`` and ``mtk checkpoint inspect | fsck``: what is on disk, and is it whole?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

_PATH = typer.Argument(help="Directory, prefix, or a file of the artifact.")
_CHECKPOINT = typer.Argument(help="A checkpoint, or the folder that holds them.")
_VERIFY = typer.Option("--verify/--no-verify", help="Hash every file of the chain.")
_JSON = typer.Option("--json", help="Machine-readable JSON lines on stdout, people on stderr.")


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the commands to ``app`` and to the group ``checkpoint``."""
    app.command("lineage", help="Print what an artifact was made from, with digests.")(_lineage)
    group = parents["checkpoint"]
    group.command("inspect", help="Steps, tensors, shapes, sizes and metrics.")(_inspect)
    group.command("fsck", help="Hash every file of every checkpoint in a folder.")(_fsck)


def _lineage(
    path: Annotated[str, _PATH],
    verify: Annotated[bool, _VERIFY] = True,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    from mtk.artifacts import lineage_lines, open_artifact, verify_lineage
    from mtk.log import Reporter

    artifact = open_artifact(_newest(path))
    checked = verify_lineage(artifact) if verify else None
    lines = lineage_lines(artifact, checked)
    if checked is not None:
        gone = sum(state == "gone" for state in checked.values())
        lines.append(f"{len(checked) - gone} verified, {gone} gone (deleted since).")
    Reporter(json_lines=json_).result(
        "\n".join(lines),
        verified=verify,
        chain=artifact.as_input("artifact").to_dict(),
        states=[
            {"path": path, "digest": digest, "state": state}
            for (path, digest), state in (checked or {}).items()
        ],
    )


def _newest(path: str) -> str:
    """``path``, or the newest checkpoint in it if it is a folder of checkpoints."""
    from pathlib import Path

    from mtk.artifacts import find_marker

    if find_marker(path) is None and any(Path(path).glob("step_*")):
        from mtk.checkpoint.steps import checkpoint_folder

        return str(checkpoint_folder(path))
    return path


def _inspect(
    path: Annotated[str, _CHECKPOINT],
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = True,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    from mtk.artifacts import open_artifact
    from mtk.checkpoint import checkpoint_folder, complete_steps, read_model_config
    from mtk.checkpoint.tensors import read_index
    from mtk.config import to_dict
    from mtk.log import Reporter

    folder = checkpoint_folder(path)
    artifact = open_artifact(folder, "checkpoint")
    steps = complete_steps(path) or complete_steps(folder.parent)
    parts = sorted(file.name.removesuffix(".index.json") for file in folder.glob("*.index.json"))
    entries = {part: read_index(folder, part) for part in parts}
    fields: dict[str, Any] = {
        "path": str(folder),
        "digest": artifact.digest,
        "steps": steps,
        "bytes": sum(entry.size for entry in artifact.files),
        "model": to_dict(read_model_config(folder)),
        "metrics": dict(artifact.metrics),
        "tensors": entries,
    }
    lines = _inspect_lines(fields, with_tensors=tensors)
    Reporter(json_lines=json_).result("\n".join(lines), **fields)


def _inspect_lines(fields: Mapping[str, Any], *, with_tensors: bool) -> list[str]:
    lines = [
        f"{fields['path']}  sha256:{fields['digest'][:16]}  {fields['bytes']:,} bytes",
        f"complete steps: {', '.join(str(step) for step in fields['steps'])}",
        "model: " + ", ".join(f"{k} {v}" for k, v in fields["model"].items() if v is not None),
    ]
    lines += [f"metric {name}: {value}" for name, value in fields["metrics"].items()]
    for part, entries in fields["tensors"].items():
        count = sum(_elements(entry["shape"]) for entry in entries.values())
        lines.append(f"{part}: {len(entries)} tensors, {count:,} values")
        if with_tensors:
            lines += [
                f"  {name}  {entry['shape']}  {entry['dtype']}"
                for name, entry in sorted(entries.items())
            ]
    return lines


def _elements(shape: list[int]) -> int:
    from math import prod

    return prod(shape)


def _fsck(path: Annotated[str, _CHECKPOINT], json_: Annotated[bool, _JSON] = False) -> None:
    from pathlib import Path

    from mtk.artifacts import find_marker
    from mtk.checkpoint import checkpoint_folder
    from mtk.errors import CheckpointError
    from mtk.log import Reporter

    if find_marker(path) is not None:
        folders = [Path(path)]
    else:
        folders = sorted(Path(path).glob("step_*")) or [checkpoint_folder(path)]
    states = {str(folder): _state(folder) for folder in folders}
    reporter = Reporter(json_lines=json_)
    text = "\n".join(f"{folder}: {state}" for folder, state in states.items())
    reporter.result(text, checkpoints=states)
    bad = [folder for folder, state in states.items() if state != "ok"]
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(states)} checkpoints are damaged or incomplete: {', '.join(bad)}. "
            f"mtk does not load them; delete them, or restore their files."
        )


def _state(folder: Any) -> str:
    from mtk.artifacts import open_artifact, verify
    from mtk.errors import ArtifactError

    try:
        verify(open_artifact(folder, "checkpoint"))
    except ArtifactError as error:
        return str(error)
    return "ok"
