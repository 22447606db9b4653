"""Degrees of parallelism and which ranks share which axis. Knows no torch and no processes.

Rank order, slowest to fastest: pipeline, data, context, tensor; so tensor-parallel ranks are
neighbours on one machine. ``shards`` is data x context: the ranks that hold the same weights
and see different tokens, over which gradients are summed and FSDP shards. Experts are shared
out over neighbours in ``shards``; the ranks with the same experts are ``expert_shards``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtk.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Dims:
    """How many ranks share each axis.

    replicas: copies of the optimizer state among ``shards`` (hybrid sharding).
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    replicas: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> Dims:
        """The degrees for ``world`` ranks; data parallelism takes what the others leave.

        The configuration's rules must hold (``ParallelConfig.problems_with_world``).
        """
        return cls(
            tp=parallel.tensor_model_parallel_size,
            cp=parallel.context_parallel_size,
            dp=world // parallel.model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            ep=parallel.expert_model_parallel_size,
            replicas=parallel.num_distributed_optimizer_instances,
        )

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def shards(self) -> int:
        """Ranks that hold the same dense weights before FSDP shards them."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks that hold the same experts before FSDP shards them."""
        return self.shards // self.ep

    def rank(self, *, pp: int, dp: int, cp: int, tp: int) -> int:
        """The global rank at these coordinates."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """The indices of ``rank`` along pp, dp, cp and tp."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return {"pp": pp, "dp": dp, "cp": cp, "tp": tp}

    def partition(self, axis: str) -> list[tuple[int, ...]]:
        """All ranks cut into the groups of an axis, each in the group's order.

        axis: world, tp, cp, dp, pp, shards, ep, expert_shards, ends (first and last stage).
        """
        keys: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            keys.setdefault(self._key(axis, rank), []).append(rank)
        if axis == "ends":
            return [(ranks[0], ranks[-1]) for ranks in keys.values()]
        return [tuple(ranks) for ranks in keys.values()]

    def _key(self, axis: str, rank: int) -> tuple[int, ...]:
        """What the ranks of one group have in common."""
        at = self.coordinates(rank)
        shard = at["dp"] * self.cp + at["cp"]
        match axis:
            case "world":
                return ()
            case "tp":
                return (at["pp"], at["dp"], at["cp"])
            case "cp":
                return (at["pp"], at["dp"], at["tp"])
            case "dp":
                return (at["pp"], at["cp"], at["tp"])
            case "pp" | "ends":
                return (at["dp"], at["cp"], at["tp"])
            case "shards":
                return (at["pp"], at["tp"])
            case "ep":
                return (at["pp"], at["tp"], shard // self.ep)
            case "expert_shards":
                return (at["pp"], at["tp"], shard % self.ep)
        raise ValueError(f"unknown axis {axis}")
