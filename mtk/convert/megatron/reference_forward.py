"""A GPT computed straight from the files of Megatron's ranks, in the plainest form.

The second opinion of the parity check. It shares no code with :mod:`mtk.models`, the tables
or the joining of ranks: it goes through the stages and does what each tensor-parallel rank
does with its own piece, adding up what the ranks would reduce. Slow on purpose.

Shape suffixes: B batch, S sequence, T keys, E hidden size, V vocabulary, N all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtk.convert.lazy import LazyTensors
from mtk.errors import ConversionError

Shard = Mapping[str, Tensor]
BEFORE_ATTENTION = (
    "input_layernorm.",
    "input_norm.",
    "self_attention.linear_qkv.layer_norm_",
    "self_attention.layernorm_qkv.layer_norm_",
)
AROUND_ZERO = ("apply_layernorm_1p", "layernorm_zero_centered_gamma")
BEFORE_MLP = (
    "pre_mlp_layernorm.",
    "post_attention_layernorm.",
    "post_attention_norm.",
    "mlp.linear_fc1.layer_norm_",
    "layernorm_mlp.layer_norm_",
)


@dataclass(frozen=True)
class Files:
    """What the files hold. stages: in the order of the layers (virtual stages follow all
    stages of the one before), for each the shards of the tensor ranks, for each those of the
    expert ranks: raw names to tensors. version: of the checkpoint."""

    args: Mapping[str, Any]
    version: int
    stages: Sequence[Sequence[Sequence[Shard]]]


class ReferenceForward:
    """Logits [B, S, V] of the true vocabulary, and the residual stream [B, S, E] after the
    embedding and each layer. Raises ConversionError for names it does not know."""

    def __init__(self, files: Files) -> None:
        args = self.args = files.args
        self.files = files
        self.heads = int(args["num_attention_heads"])
        self.groups = self.heads
        if args.get("group_query_attention"):
            self.groups = int(args["num_query_groups"])
        self.depth = int(args.get("kv_channels") or args["hidden_size"] // self.heads)
        self.epsilon = float(args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5)
        self.rope = bool(args.get("use_rotary_position_embeddings")) or (
            args.get("position_embedding_type") == "rope"
        )

    def __call__(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            x_BSE = self._embedding(tokens_BS)
            states = [x_BSE]
            for stage in self.files.stages:
                for number in _numbers(stage[0][0]):
                    ranks = [[_layer(shard, number) for shard in experts] for experts in stage]
                    x_BSE = self._block(x_BSE, ranks)
                    states.append(x_BSE)
            return self._logits(x_BSE), states

    def _embedding(self, tokens_BS: Tensor) -> Tensor:
        ranks = [experts[0] for experts in self.files.stages[0]]
        x_BSE: Tensor | None = None
        for rank, shard in enumerate(ranks):
            table = get(shard, *_spellings("embedding.word_embeddings.weight"))
            mine = tokens_BS - rank * table.shape[0]
            inside = (mine >= 0) & (mine < table.shape[0])
            part = table[mine.clamp(0, table.shape[0] - 1)] * inside[..., None]
            x_BSE = part if x_BSE is None else x_BSE + part
        assert x_BSE is not None
        positions = _find(ranks[0], *_spellings("embedding.position_embeddings.weight"))
        return x_BSE if positions is None else x_BSE + positions[: tokens_BS.shape[1]]

    def _logits(self, x_BSE: Tensor) -> Tensor:
        return self._product(self._final_norm(x_BSE))

    def _final_norm(self, x_BSE: Tensor) -> Tensor:
        names = ("decoder", "language_model.encoder", "language_model.transformer")
        norms = [f"{name}.final_{kind}." for name in names for kind in ("layernorm", "norm")]
        return self._norm(x_BSE, self.files.stages[-1][0][0], *norms)

    def _product(self, x_BSE: Tensor) -> Tensor:
        last = [experts[0] for experts in self.files.stages[-1]]
        first = [experts[0] for experts in self.files.stages[0]]
        parts = []
        for own, start in zip(last, first, strict=True):
            output = _find(
                own,
                "output_layer.weight",
                "language_model.output_layer.weight",
                "word_embeddings_for_head.weight",
            )
            if output is None:
                output = get(start, *_spellings("embedding.word_embeddings.weight"))
            part = x_BSE @ output.T
            bias = _find(own, "lm_head.bias")
            parts.append(part if bias is None else part + bias)
        logits_BSV = torch.cat(parts, dim=-1)
        return logits_BSV[..., : self._vocabulary(logits_BSV.shape[-1])]

    def _vocabulary(self, rows: int) -> int:
        if self.args.get("true_vocab_size"):
            return int(self.args["true_vocab_size"])
        if not self.args.get("vocab_size"):
            return rows
        extra = self.args.get("tokenizer_type") == "NullTokenizer"
        return int(self.args["vocab_size"]) + extra

    def _norm(self, x: Tensor, shard: Shard, *names: str) -> Tensor:
        weight = get(shard, *(f"{name}weight" for name in names))
        if any(self.args.get(name) for name in AROUND_ZERO):
            weight = weight + 1
        if self.args.get("normalization", "LayerNorm") == "RMSNorm":
            return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.epsilon) * weight
        bias = get(shard, *(f"{name}bias" for name in names))
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.pow(2).mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(variance + self.epsilon) * weight + bias

    def _block(self, x_BSE: Tensor, ranks: Sequence[Sequence[Shard]]) -> Tensor:
        shards = [experts[0] for experts in ranks]
        y_BSE = self._norm(x_BSE, shards[0], *BEFORE_ATTENTION)
        x_BSE = x_BSE + self._attention(y_BSE, shards)
        y_BSE = self._norm(x_BSE, shards[0], *BEFORE_MLP)
        if _find(shards[0], "mlp.router.weight") is not None:
            return x_BSE + self._experts(y_BSE, ranks)
        return x_BSE + self._mlp(y_BSE, shards)

    def _attention(self, y_BSE: Tensor, shards: Sequence[Shard]) -> Tensor:
        qkv = ("self_attention.linear_qkv", "self_attention.layernorm_qkv")
        names = (*qkv, "self_attention.query_key_value", "attention.query_key_value")
        mixed = [linear(y_BSE, shard, *names) for shard in shards]
        if self.groups < len(shards):
            # Fewer groups than ranks: the ranks gather all, and each attends with its heads.
            mixed = [torch.cat(mixed, dim=-1)]
        heads = [head for part in mixed for head in self._heads(part, shards[0], len(mixed))]
        width = len(heads) // len(shards)
        y_BSE = torch.zeros_like(y_BSE)
        proj = ("self_attention.linear_proj", "self_attention.proj", "self_attention.dense")
        for rank, shard in enumerate(shards):
            own = torch.cat(heads[rank * width : (rank + 1) * width], dim=-1)
            y_BSE = y_BSE + own @ get(shard, *_weights(*proj, "attention.dense")).T
        bias = _find(shards[0], *_biases(*proj, "attention.dense"))
        return y_BSE if bias is None else y_BSE + bias

    def _heads(self, mixed: Tensor, shard: Shard, ranks: int) -> list[Tensor]:
        """What each head of a rank attends to, [B, S, D] each."""
        heads, groups, depth = self.heads // ranks, self.groups // ranks, self.depth
        # Core's own weights (linear_qkv) have one order, whatever the file's version says.
        version = self.files.version if any("query_key_value" in n for n in shard) else 3
        shape = mixed.shape[:-1]
        found = []
        for head in range(heads):
            if version == 0:
                q, k, v = mixed.view(*shape, 3, heads, depth)[..., head, :].unbind(-2)
            elif version == 1:
                q, k, v = mixed.view(*shape, heads, depth, 3)[..., head, :, :].unbind(-1)
            else:
                each = heads // groups
                group = mixed.view(*shape, groups, each + 2, depth)[..., head // each, :, :]
                q, k, v = group[..., head % each, :], group[..., each, :], group[..., each + 1, :]
            if self.args.get("qk_layernorm"):
                q = self._norm(q, shard, "self_attention.q_layernorm.")
                k = self._norm(k, shard, "self_attention.k_layernorm.")
            scores = self._turn(q) @ self._turn(k).transpose(-1, -2) / math.sqrt(depth)
            found.append(self._softmax(scores) @ v)
        return found

    def _softmax(self, scores: Tensor) -> Tensor:
        places = torch.arange(scores.shape[-1])
        before = places[:, None] - places[None, :]
        hidden = before < 0
        if self.args.get("window_size"):
            hidden = hidden | (before > self.args["window_size"][0])
        return torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)

    def _turn(self, x_BSD: Tensor) -> Tensor:
        if not self.rope:
            return x_BSD
        turned = int(self.depth * float(self.args.get("rotary_percent") or 1.0))
        base = float(self.args.get("rotary_base") or 10000)
        frequencies = 1.0 / base ** (torch.arange(0, turned, 2).float() / turned)
        if self.args.get("use_rope_scaling"):
            frequencies = self._slowed(frequencies)
        # In fp32, as models are trained: exact angles would differ from any of them.
        angles = (torch.arange(x_BSD.shape[1]).float()[:, None] * frequencies).to(x_BSD.dtype)
        rest = x_BSD[..., turned:]
        if self.args.get("rotary_interleaved"):
            x, y = x_BSD[..., 0:turned:2], x_BSD[..., 1:turned:2]
        else:
            x, y = x_BSD[..., : turned // 2], x_BSD[..., turned // 2 : turned]
        point = torch.complex(x.contiguous(), y.contiguous())
        point = point * torch.polar(torch.ones_like(angles), angles)
        if self.args.get("rotary_interleaved"):
            return torch.cat((torch.view_as_real(point).flatten(-2), rest), dim=-1)
        return torch.cat((point.real, point.imag, rest), dim=-1)

    def _slowed(self, frequencies: Tensor) -> Tensor:
        """Llama 3: by a factor where a turn takes more than 8192 tokens, not at all where it
        takes less than 2048, between the two by a mean that goes from one to the other."""
        stated = self.args.get("true_rope_scaling_factor", self.args.get("rope_scaling_factor", 8))
        factor, slowed = float(stated), []
        for frequency in frequencies:
            turn = 2 * math.pi / frequency
            share = (8192 / turn - 1) / (4 - 1)
            mean = (1 - share) * frequency / factor + share * frequency
            slowed.append(frequency / factor if turn > 8192 else frequency if turn < 2048 else mean)
        return torch.stack(slowed)

    def _mlp(self, y_BSE: Tensor, shards: Sequence[Shard]) -> Tensor:
        up = ("mlp.linear_fc1", "mlp.dense_h_to_4h", "layernorm_mlp.fc1")
        down = ("mlp.linear_fc2", "mlp.dense_4h_to_h", "layernorm_mlp.fc2")
        out_BSE = torch.zeros_like(y_BSE)
        for shard in shards:
            inner = self._activate(linear(y_BSE, shard, *up))
            out_BSE = out_BSE + inner @ get(shard, *_weights(*down)).T
        bias = _find(shards[0], *_biases(*down))
        return out_BSE if bias is None else out_BSE + bias

    def _experts(self, y_BSE: Tensor, ranks: Sequence[Sequence[Shard]]) -> Tensor:
        y_NE = y_BSE.flatten(0, 1)
        shares = self._shares(y_NE, ranks[0][0])
        out_NE, total = torch.zeros_like(y_NE), shares.shape[1]
        for expert in range(total):
            for shards in ranks:
                local = total // len(shards)
                matrices = self._matrices(shards[expert // local], expert % local, local)
                inner = self._activate(y_NE @ matrices[0].T)
                out_NE = out_NE + shares[:, expert, None] * (inner @ matrices[1].T)
        return (out_NE + self._shared(y_NE, ranks)).view_as(y_BSE)

    def _shares(self, y_NE: Tensor, shard: Shard) -> Tensor:
        """The weight of each expert for each token, 0 for those it does not go to."""
        logits = y_NE @ get(shard, "mlp.router.weight").T
        sigmoid = self.args.get("moe_router_score_function") == "sigmoid"
        over_all = sigmoid or self.args.get("moe_router_pre_softmax")
        scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, dim=-1)
        compared = scores if over_all else logits
        bias = _find(shard, "mlp.router.expert_bias")
        compared = compared if bias is None else compared + bias
        k = int(self.args.get("moe_router_topk") or 2)
        shares = torch.zeros_like(scores)
        for token in range(len(scores)):
            chosen = self._chosen(compared[token], k)
            if not over_all:
                shares[token, chosen] = torch.softmax(logits[token, chosen], dim=-1)
            else:
                own = scores[token, chosen]
                shares[token, chosen] = own / own.sum() if sigmoid and k > 1 else own
        return shares * float(self.args.get("moe_router_topk_scaling_factor") or 1.0)

    def _chosen(self, compared: Tensor, k: int) -> Tensor:
        """The experts of a token: the best k, of the best groups if there are groups."""
        groups = self.args.get("moe_router_num_groups")
        if groups:
            wanted = int(self.args["moe_router_group_topk"])
            parts = compared.view(int(groups), -1)
            rating = parts.sort(dim=-1, descending=True).values[:, : k // wanted].sum(-1)
            others = rating.argsort(descending=True)[wanted:]
            compared = parts.index_fill(0, others, -math.inf).flatten()
        return compared.argsort(descending=True)[:k]

    def _shared(self, y_NE: Tensor, ranks: Sequence[Sequence[Shard]]) -> Tensor:
        """What the expert that all tokens go through adds."""
        name, out_NE = "mlp.shared_experts", torch.zeros_like(y_NE)
        if _find(ranks[0][0], f"{name}.linear_fc1.weight") is None:
            return out_NE
        for experts in ranks:
            inner = self._activate(linear(y_NE, experts[0], f"{name}.linear_fc1"))
            out_NE = out_NE + inner @ get(experts[0], f"{name}.linear_fc2.weight").T
        gate = _find(ranks[0][0], f"{name}.gate_weight")
        return out_NE if gate is None else out_NE * torch.sigmoid(y_NE @ gate.T)

    def _matrices(self, shard: Shard, index: int, count: int) -> tuple[Tensor, Tensor]:
        """[out, in] both, of one of a rank's experts."""
        grouped = _find(shard, "mlp.experts.weight1")
        if grouped is not None:
            width = int(self.args["hidden_size"])
            up = grouped.reshape(-1).view(count, width, -1)[index]
            down = get(shard, "mlp.experts.weight2").reshape(-1).view(count, -1, width)[index]
            return up.T, down.T
        up, down = (
            get(
                shard,
                f"mlp.experts.local_experts.{index}.linear_fc{part}.weight",
                f"mlp.experts.linear_fc{part}.weight{index}",
            )
            for part in (1, 2)
        )
        return up, down

    def _activate(self, x: Tensor) -> Tensor:
        if self.args.get("swiglu"):
            gate, up = x.chunk(2, dim=-1)
            return gate * torch.sigmoid(gate) * up
        return self._activation()(x)

    def _activation(self) -> Callable[[Tensor], Tensor]:
        if self.args.get("squared_relu"):
            return lambda x: torch.relu(x) ** 2
        fused = self.args.get("bias_gelu_fusion") and self.args.get("add_bias_linear", True)
        if fused or self.args.get("openai_gelu"):
            root = math.sqrt(2 / math.pi)
            return lambda x: 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * x**3)))
        return lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _numbers(shard: Shard) -> list[int]:
    """Of the layers in a shard, counted within its stage."""
    split = [name.split("layers.")[1] for name in shard if "layers." in name]
    return sorted({int(rest.split(".")[0]) for rest in split})


def _layer(shard: Shard, number: int) -> Shard:
    """The tensors of a layer, by their names in it, none of them read yet."""
    mark = f"layers.{number}."
    names = {name.split(mark, 1)[1]: name for name in shard if mark in name}
    return LazyTensors(names, lambda name: shard[names[name]])


def _spellings(name: str) -> tuple[str, str]:
    return name, f"language_model.{name}"


def _weights(*names: str) -> list[str]:
    return [f"{name}{mark}weight" for name in names for mark in "._"]


def _biases(*names: str) -> list[str]:
    return [f"{name}{mark}bias" for name in names for mark in "._"]


def linear(x: Tensor, shard: Shard, *names: str) -> Tensor:
    y = x @ get(shard, *_weights(*names)).T
    bias = _find(shard, *_biases(*names))
    return y if bias is None else y + bias


def _find(shard: Shard, *names: str) -> Tensor | None:
    return next((shard[name] for name in names if name in shard), None)


def get(shard: Shard, *names: str) -> Tensor:
    found = _find(shard, *names)
    if found is None:
        raise ConversionError(f"the reference forward finds none of {', '.join(names[:4])}")
    return found
