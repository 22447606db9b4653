"""Kernels of decoding beside plain PyTorch, on any device."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.models.rotary import rotate
from serving.paged.attention import attend_blocks


@dataclass(frozen=True)
class Heads:
    """Shapes of one attention. lengths: tokens of each row, the new one among them."""

    queries: int
    groups: int
    size: int
    lengths: tuple[int, ...]
    window: int | None = None
    dtype: torch.dtype = torch.float32
    block: int = 16

    @property
    def columns(self) -> int:
        return -(-max(self.lengths) // self.block)


BF16 = torch.bfloat16
CASES = [
    Heads(4, 4, 32, (1, 17, 64, 65, 200)),
    Heads(8, 2, 64, (300, 3), dtype=torch.float16),
    Heads(6, 1, 48, (33, 1, 129)),
    Heads(4, 2, 128, (777,), dtype=torch.float16),
    Heads(32, 2, 16, (90, 91)),
    Heads(4, 2, 32, (5, 40, 300), window=37),
    Heads(4, 2, 32, (1000,), window=130),
]


def filled(case: Heads, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, table (rows in reverse order of slots, one slot unused) and slots. What no
    sequence holds is NaN."""
    torch.manual_seed(1)
    needed = [-(-length // case.block) for length in case.lengths]
    blocks = list(range(1, sum(needed) + 1))
    random.Random(2).shuffle(blocks)
    shape = (len(blocks) + 1, case.groups, case.block, case.size)
    keys, values = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    table = torch.zeros(len(needed) + 1, case.columns, dtype=torch.int64)
    slots = list(range(len(needed), 0, -1))
    for slot, length in zip(slots, case.lengths, strict=True):
        for start in range(0, length, case.block):
            block, count = blocks.pop(), min(case.block, length - start)
            table[slot, start // case.block] = block
            keys[block, :, :count] = torch.randn(case.groups, count, case.size)
            values[block, :, :count] = torch.randn(case.groups, count, case.size)
    places = (keys.to(case.dtype), values.to(case.dtype), table, torch.tensor(slots))
    k, v, t, s = (x.to(device) for x in places)
    return k, v, t, s


def check_attention(case: Heads, device: torch.device) -> None:
    from mtk.kernels.paged_attention import Rows, attend_rows

    keys, values, table, slots = filled(case, device)
    lengths = torch.tensor(case.lengths, device=device)
    q = torch.randn(len(case.lengths), case.queries, case.size).to(device, case.dtype)
    exact = attend_blocks(
        q.double(), keys.double(), values.double(), table[slots], lengths, case.window
    )
    context = max(case.lengths)
    found = attend_rows(q, keys, values, Rows(slots, lengths - 1, table, context), case.window)
    assert found.dtype == case.dtype and found.shape == q.shape
    near = 2e-5 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, rtol=near, atol=near)


def check_nan_stays(device: torch.device) -> None:
    """A row whose keys overflowed gives NaN, and no other does."""
    from mtk.kernels.paged_attention import Rows, attend_rows

    case = Heads(4, 2, 32, (200, 100, 300))
    keys, values, table, slots = filled(case, device)
    keys[table[slots[1], 2], :, 5] = float("nan")
    lengths = torch.tensor(case.lengths, device=device)
    q = torch.randn(3, 4, 32, device=device)
    found = attend_rows(q, keys, values, Rows(slots, lengths - 1, table, 300))
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, False]


@dataclass(frozen=True)
class Turn:
    """How heads are rotated. rotated: channels, 0 for none."""

    rotated: int
    interleaved: bool = False
    scale: float = 1.0
    dtype: torch.dtype = torch.float32


TURNS = [Turn(48), Turn(24), Turn(48, True), Turn(0), Turn(16, True, 0.7), Turn(48, dtype=BF16)]


def check_rotation(turn: Turn, device: torch.device) -> None:
    from mtk.kernels.paged_attention import Rows, rotate_and_store

    case = Heads(6, 2, 48, (40, 1, 16, 17), dtype=turn.dtype)
    keys, values, table, slots = filled(case, device)
    before = keys.clone(), values.clone()
    qkv = torch.randn(4, 10 * 48).to(device, turn.dtype)
    tables = None
    positions = torch.tensor(case.lengths, device=device) - 1
    q, k, v = torch.split(qkv.view(4, 10, 48), [6, 2, 2], dim=1)
    q = q * turn.scale
    if turn.rotated:
        angles = torch.rand(64, turn.rotated, device=device) * 6
        tables = (angles.cos(), angles.sin())
        at = (tables[0][positions][:, None], tables[1][positions][:, None])
        q = rotate(q, *at, interleaved=turn.interleaved)
        k = rotate(k, *at, interleaved=turn.interleaved)
    rows = Rows(slots, positions, table, 40)
    found = rotate_and_store(
        qkv, tables, keys, values, rows, query_scale=turn.scale, interleaved=turn.interleaved
    )
    places = (table[slots, positions // 16], positions % 16)
    near = {"rtol": 1e-5, "atol": 1e-5} if turn.dtype != BF16 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, q, **near)
    for store, old, new in ((keys, before[0], k), (values, before[1], v)):
        torch.testing.assert_close(store.transpose(1, 2)[places], new, **near)
        # And nothing else was touched.
        old.transpose(1, 2)[places] = store.transpose(1, 2)[places]
        assert torch.equal(old.nan_to_num(), store.nan_to_num())


def check_gate(device: torch.device, dtype: torch.dtype) -> None:
    from mtk.kernels.gated import silu_product

    wide = (torch.randn(5, 2 * 1500) * 4).to(device, dtype)
    gate, up = wide.double().chunk(2, dim=-1)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    found = silu_product(wide).double()
    torch.testing.assert_close(found, F.silu(gate) * up, rtol=near, atol=near)


@dataclass(frozen=True)
class Product:
    """One kernel's product and what lies around it."""

    inputs: int
    outputs: int
    normed: bool = False
    biased: bool = False
    gated: bool = False
    added: bool = False
    dtype: torch.dtype = torch.float32


PRODUCTS = [
    Product(64, 37),
    Product(1024, 8, normed=True),
    Product(1500, 50, normed=True, biased=True),
    Product(2100, 30, gated=True, normed=True),
    Product(344, 10, gated=True, biased=True),
    Product(1376, 128, added=True, dtype=BF16),
    Product(1500, 64, normed=True, biased=True, gated=True, added=True, dtype=BF16),
]


def check_product(case: Product, device: torch.device) -> None:
    from mtk.kernels.gemv import gemv

    torch.manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, case.dtype)

    rows = case.outputs * (2 if case.gated else 1)
    x, weight, bias = made(1, case.inputs), made(rows, case.inputs) / case.inputs**0.5, made(rows)
    norm, residual = made(case.inputs), made(1, case.outputs)
    exact = x.double()
    if case.normed:
        exact = F.rms_norm(exact, (case.inputs,), norm.double(), 1e-3)
    exact = F.linear(exact, weight.double(), bias.double() if case.biased else None)
    if case.gated:
        gate, up = exact.chunk(2, dim=-1)
        exact = F.silu(gate) * up
    if case.added:
        exact = exact + residual.double()
    found = gemv(
        x,
        weight,
        bias_F=bias if case.biased else None,
        norm=(norm, 1e-3) if case.normed else None,
        residual_1F=residual if case.added else None,
        gated=case.gated,
    )
    near = 1e-5 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, rtol=near, atol=near)
