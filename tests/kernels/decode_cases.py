"""Kernels of decoding beside plain PyTorch, on any device."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.kernels import has_triton
from mtk.models.rotary import rotate
from serving.paged.attention import attend_blocks

if has_triton():
    from mtk.kernels.decode_attention import decode_attention
    from mtk.kernels.few_rows import Shape, Workspace, before_norm, product, product_before_norm
    from mtk.kernels.gemv import gemv
    from mtk.kernels.heads import HeadForm, Rows, turn_and_store
    from mtk.kernels.look import look_at


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


@dataclass(frozen=True)
class Turn:
    """What is done to heads. rotated: channels, 0 for none. normed: by RMSNorms."""

    rotated: int
    interleaved: bool = False
    scale: float = 1.0
    normed: bool = False
    dtype: torch.dtype = torch.float32


PLAIN = Turn(0)


def heads_of(
    case: Heads, turn: Turn, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadForm]:
    """Projections of new tokens, and what queries, keys and values of them must become."""
    sizes = [case.queries, case.groups, case.groups]
    qkv = torch.randn(len(case.lengths), sum(sizes) * case.size).to(device, case.dtype)
    positions = torch.tensor(case.lengths, device=device) - 1
    q, k, v = torch.split(qkv.view(len(qkv), -1, case.size), sizes, dim=1)
    q, norms, tables = q * turn.scale, None, None
    if turn.normed:
        weights = torch.randn(2, case.size).to(device, case.dtype)
        norms = (weights[0], weights[1], 1e-3)
        q, k = (F.rms_norm(x, (case.size,), w, 1e-3) for x, w in ((q, weights[0]), (k, weights[1])))
    if turn.rotated:
        angles = torch.rand(max(case.lengths), turn.rotated, device=device) * 6
        tables = (angles.cos(), angles.sin())
        at = (tables[0][positions][:, None], tables[1][positions][:, None])
        q, k = (rotate(x, *at, interleaved=turn.interleaved) for x in (q, k))
    return qkv, q, k, v, HeadForm(tables, norms, turn.interleaved, turn.scale)


def check_attention(case: Heads, turn: Turn, device: torch.device) -> None:
    """New tokens' heads are turned and stored, and see all before them and themselves."""
    keys, values, table, slots = filled(case, device)
    before = keys.clone(), values.clone()
    lengths = torch.tensor(case.lengths, device=device)
    qkv, q, k, v, form = heads_of(case, turn, device)
    places = (table[slots, (lengths - 1) // case.block], (lengths - 1) % case.block)
    for store, new in zip(before, (k, v), strict=True):
        store.transpose(1, 2)[places] = new
    exact = attend_blocks(
        q.double(), before[0].double(), before[1].double(), table[slots], lengths, case.window
    )
    space = Workspace(device)
    rows = Rows(slots, lengths - 1, table, max(case.lengths))
    for early in (True, False):
        found = decode_attention(qkv, keys, values, rows, space, form, case.window, early=early)
        assert found.dtype == case.dtype and found.shape == q.shape
        near = 3e-5 if case.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found.double(), exact, rtol=near, atol=near)
    for store, expected in zip((keys, values), before, strict=True):
        torch.testing.assert_close(store, expected, rtol=near, atol=near, equal_nan=True)
    assert not space.arrived.any()


def check_nan_stays(groups: int, device: torch.device) -> None:
    """A row whose keys overflowed gives NaN, and no other does."""
    case = Heads(4, groups, 32, (200, 100, 300))
    keys, values, table, slots = filled(case, device)
    keys[table[slots[1], 2], :, 5] = float("nan")
    lengths = torch.tensor(case.lengths, device=device)
    qkv = torch.randn(3, (4 + 2 * groups) * 32, device=device)
    rows = Rows(slots, lengths - 1, table, 300)
    found = decode_attention(qkv, keys, values, rows, Workspace(device), HeadForm())
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert found.isnan().flatten(1).any(1).tolist() == [False, True, False]


TURNS = [
    Turn(48),
    Turn(24, normed=True),
    Turn(48, True),
    PLAIN,
    Turn(16, True, 0.7),
    Turn(48, normed=True, dtype=BF16),
]


def check_heads(turn: Turn, queries: int, device: torch.device) -> None:
    """Heads are made ready for attention, and stored."""
    case = Heads(queries, 2, 48, (40, 1, 16, 17), dtype=turn.dtype)
    keys, values, table, slots = filled(case, device)
    before = keys.clone(), values.clone()
    positions = torch.tensor(case.lengths, device=device) - 1
    qkv, q, k, v, form = heads_of(case, turn, device)
    found = turn_and_store(qkv, keys, values, Rows(slots, positions, table, 40), form)
    places = (table[slots, positions // 16], positions % 16)
    near = {"rtol": 1e-5, "atol": 1e-5} if turn.dtype != BF16 else {"rtol": 3e-2, "atol": 3e-2}
    for x, exact in zip(found, (q, k, v), strict=True):
        torch.testing.assert_close(x, exact, **near)
    for store, old, new in ((keys, before[0], found[1]), (values, before[1], found[2])):
        old.transpose(1, 2)[places] = new
        # And nothing else was touched.
        assert torch.equal(old.nan_to_num(), store.nan_to_num())


def check_look(device: torch.device, dtype: torch.dtype) -> None:
    """The first of the likeliest tokens that may be drawn; all logits are looked at for NaN."""
    logits = torch.randn(6, 5003).to(device, dtype)[:, :5001]
    logits[0, 17] = logits[0, 3999] = logits[0, 4500] = 50
    logits[1, 4000], logits[2, 5000] = float("nan"), float("inf")
    logits[3, 77], logits[4, 0] = float("-inf"), float("nan")
    space = Workspace(device)
    tokens, finite = look_at(logits, 4000, space).tolist()
    assert finite == [1, 0, 0, 0, 0, 1] and not space.arrived.any()
    assert tokens == logits[:, :4000].argmax(dim=-1).tolist() and tokens[0] == 17
    assert look_at(logits[5:], 5001, space).tolist() == [[int(logits[5].argmax())], [1]]


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
    x, weight, bias, norm, residual, exact = parts_of(case, 1, device)
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


def parts_of(
    case: Product, rows: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs, matrix, bias, norm and residual, and what comes out of them, in double."""
    torch.manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, case.dtype)

    wide = case.outputs * (2 if case.gated else 1)
    x, weight, bias = (
        made(rows, case.inputs),
        made(wide, case.inputs) / case.inputs**0.5,
        made(wide),
    )
    norm, residual = made(case.inputs), made(rows, case.outputs)
    exact = x.double()
    if case.normed:
        exact = F.rms_norm(exact, (case.inputs,), norm.double(), 1e-3)
    exact = F.linear(exact, weight.double(), bias.double() if case.biased else None)
    if case.gated:
        gate, up = exact.chunk(2, dim=-1)
        exact = F.silu(gate) * up
    if case.added:
        exact = exact + residual.double()
    return x, weight, bias, norm, residual, exact


# How a product of a few rows is cut; None: as the kernel does by itself.
CUTS = [None, (32, 1, 64, 64), (64, 3, 128, 64), (16, 4, 512, 64)]


def check_few_rows(
    case: Product, rows: int, cut: tuple[int, ...] | None, device: torch.device
) -> None:
    x, weight, bias, norm, residual, exact = parts_of(case, rows, device)
    space, near = Workspace(device), 2e-5 if case.dtype == torch.float32 else 3e-2
    shape = None if cut is None else Shape(*cut, stages=2)
    entered = before_norm(x, (norm, 1e-3)) if case.normed else x
    around = {
        "bias_F": bias if case.biased else None,
        "residual_MF": residual if case.added else None,
        "shape": shape,
    }
    found = product(entered, weight, space, gated=case.gated, **around)
    torch.testing.assert_close(found.double(), exact, rtol=near, atol=near)
    assert torch.equal(found, product(entered, weight, space, gated=case.gated, **around))
    if not case.gated:
        after = torch.randn(case.outputs).to(device, case.dtype)
        same, normed = product_before_norm(entered, weight, space, (after, 1e-3), **around)
        assert torch.equal(same, found)
        weighted = found.double() * after.double()
        torch.testing.assert_close(normed.weighted_ME.double(), weighted, rtol=near, atol=near)
        squares = found.double().square().sum(1)
        torch.testing.assert_close(normed.squares_TM.sum(0).double(), squares, rtol=near, atol=near)
    assert not space.arrived.any()
