"""How fast a corpus becomes token ids: mtk, its parts, and other programs, in one run."""
