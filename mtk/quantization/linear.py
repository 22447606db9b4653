"""A linear layer that keeps its matrix in few bits, and models with such layers.

Shape suffixes: O outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.errors import ConversionError
from mtk.kernels import fused_on
from mtk.models.attention import Attention
from mtk.models.mlp import MLP
from mtk.quantization.formats import GROUP, format_of
from mtk.quantization.packing import EACH, PACKED, pack, packed_shape, unpack
from mtk.quantization.tensor import Kind, QuantizedTensor

# (layer, x [..., I]) -> [..., O].
Product = Callable[["QuantizedLinear", Tensor], Tensor]
Model = TypeVar("Model", bound=nn.Module)


class QuantizedLinear(nn.Module):
    """x W^T + b of a W that is never wholly there in full precision for longer than a product.

    packed: see :mod:`mtk.quantization.packing`. scale: fp32 [O, G]. input_scale: fp32 [I], a
    factor of the inputs, or None. product: how to multiply (None: with kernels where they run, as
    :mod:`mtk.quantization.kernel_product` does, else :func:`dequantized_product`). Weights are
    not trained.
    """

    def __init__(self, kind: Kind, outputs: int, inputs: int, groups: int) -> None:
        super().__init__()
        self.kind, self.out_features, self.in_features = kind, outputs, inputs
        self.product: Product | None = None
        self.packed = _fixed(torch.empty(packed_shape(kind, outputs, inputs), dtype=PACKED[kind]))
        self.scale = _fixed(torch.empty(outputs, groups, dtype=torch.float32))
        self.input_scale: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, q: QuantizedTensor, bias: Tensor | None) -> QuantizedLinear:
        """A layer of these weights, where they are. Raises ConversionError for groups that do not
        fill words."""
        if q.kind == "int4" and q.group % EACH:
            raise ConversionError(f"groups of {q.group} inputs; INT4 needs multiples of {EACH}.")
        outputs, inputs = q.values_OI.shape
        with torch.device("meta"):
            made = cls(q.kind, outputs, inputs, q.scale_OG.shape[1])
        made.packed = _fixed(pack(q))
        made.scale = _fixed(q.scale_OG)
        made.input_scale = None if q.input_I is None else _fixed(q.input_I)
        made.bias = None if bias is None else _fixed(bias.detach())
        return made

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def quantized(self) -> QuantizedTensor:
        values_OI = unpack(self.kind, self.packed.detach(), self.groups)
        factors = None if self.input_scale is None else self.input_scale.detach()
        return QuantizedTensor(self.kind, values_OI, self.scale.detach(), factors)

    def forward(self, x: Tensor) -> Tensor:
        product = self.product
        if product is None:
            product = _kernel_product() if fused_on(x.device) else dequantized_product
        return product(self, x)

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Moves to another device; scales keep their precision whatever type a model is cast to,
        as a cast looks at floating-point tensors only."""
        self._view_exact(torch.int32)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._view_exact(torch.float32)
        return self

    def _view_exact(self, dtype: torch.dtype) -> None:
        for held in (self.scale, self.input_scale):
            if held is not None:
                held.data = held.data.view(dtype)


def dequantized_product(linear: QuantizedLinear, x: Tensor) -> Tensor:
    """The plain product, of the weights rounded to the type of ``x``."""
    weight_OI = linear.quantized.dequantize().to(x.dtype)
    return F.linear(x, weight_OI, linear.bias)


def can_join(linears: Sequence[nn.Module]) -> bool:
    """Whether :func:`join` takes them."""
    kinds = {
        (module.kind, module.in_features, module.groups, module.bias is None)
        for module in linears
        if type(module) is QuantizedLinear and module.input_scale is None
    }
    plain = all(type(m) is QuantizedLinear and m.input_scale is None for m in linears)
    return plain and len(kinds) == 1


@torch.no_grad()
def join(linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Layers of one input as one layer; they become views of it, and nothing is kept twice."""
    first = linears[0]
    with torch.device("meta"):
        outputs = sum(linear.out_features for linear in linears)
        joined = QuantizedLinear(first.kind, outputs, first.in_features, first.groups)
    names = ["packed", "scale", *(["bias"] if first.bias is not None else [])]
    for name in names:
        parameters = [getattr(linear, name) for linear in linears]
        whole = torch.cat([parameter.detach() for parameter in parameters])
        setattr(joined, name, _fixed(whole))
        parts = torch.split(whole, [parameter.shape[0] for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
    joined.product = first.product
    return joined


def quantize_in_place(model: Model, kind: Kind, group: int = GROUP) -> Model:
    """Round the matrices of attention and MLPs of a model where they are, as ``mtk quantize``
    does; experts, routers, embeddings and the output matrix stay.

    group: inputs that share a scale, of INT4. Raises ConversionError for sizes that do not divide
    by it, and for a model with nothing to round.
    """
    rounding = format_of(kind, group)
    homes = [m for m in model.modules() if isinstance(m, (Attention, MLP))]
    done = 0
    for home in homes:
        for name, linear in list(home.named_children()):
            if type(linear) is nn.Linear:
                q = rounding.quantize(linear.weight.detach(), name)
                setattr(home, name, QuantizedLinear.of(q, linear.bias))
                done += 1
    if not done:
        raise ConversionError("the model has no plain matrix of attention or an MLP to quantise.")
    return model


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _kernel_product() -> Product:
    # Triton is not everywhere.
    from mtk.quantization.kernel_product import kernel_product

    return kernel_product
