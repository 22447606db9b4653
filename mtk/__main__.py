"""``python -m mtk``: the same program as the ``mtk`` script."""

from mtk.cli.main import run

run()
