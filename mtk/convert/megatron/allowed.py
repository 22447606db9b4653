"""The closed list of what a Megatron checkpoint's pickle may name. Everything else is refused.

Only names: nothing here is imported, and none of these classes is ever made. What has no
meaning for the weights becomes an inert object that remembers its name and its parts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

STORAGES: Mapping[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
    # Before torch 2 tensors of a GPU named its module.
    "torch.cuda.FloatStorage": torch.float32,
    "torch.cuda.HalfStorage": torch.float16,
    "torch.cuda.BFloat16Storage": torch.bfloat16,
    "torch.cuda.LongStorage": torch.int64,
    "torch.cuda.IntStorage": torch.int32,
    "torch.cuda.ByteStorage": torch.uint8,
}
DTYPES: Mapping[str, torch.dtype] = {
    f"torch.{name}": dtype
    for name, dtype in {
        "float64": torch.float64,
        "double": torch.float64,
        "float32": torch.float32,
        "float": torch.float32,
        "float16": torch.float16,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
        "int64": torch.int64,
        "int32": torch.int32,
        "int16": torch.int16,
        "int8": torch.int8,
        "uint8": torch.uint8,
        "bool": torch.bool,
    }.items()
}
DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict"})
NAMESPACES = frozenset({"argparse.Namespace", "types.SimpleNamespace"})

# Python 2's names of modules, which pickles of protocol 2 still use.
MODULES: Mapping[str, str] = {"__builtin__": "builtins"}

# Enums, which Python 3.11 may pickle as getattr(class, "member").
ENUMS = frozenset(
    {
        "megatron.core.enums.ModelType",
        "megatron.core.enums.Fp4Recipe",
        "megatron.core.enums.Fp8Recipe",
        "megatron.core.rerun_state_machine.RerunDiagnostic",
        "megatron.core.rerun_state_machine.RerunMode",
        "megatron.core.rerun_state_machine.RerunState",
        "megatron.core.transformer.enums.AttnBackend",
        "megatron.core.transformer.enums.AttnMaskType",
        "megatron.core.transformer.enums.AttnType",
        "megatron.core.transformer.enums.CudaGraphScope",
        "megatron.core.transformer.enums.LayerType",
        "megatron.core.transformer.enums.ModelType",
        "megatron.enums.ModelType",
        "megatron.legacy.model.enums.AttnMaskType",
        "megatron.legacy.model.enums.AttnType",
        "megatron.legacy.model.enums.LayerType",
        "megatron.model.enums.AttnMaskType",
        "megatron.model.enums.AttnType",
        "megatron.model.enums.LayerType",
        "megatron.model.enums.ModelType",
        "megatron.model.enums.PositionEmbeddingType",
        "signal.Signals",
    }
)
INERT = ENUMS | frozenset(
    {
        "_codecs.encode",
        "_io.BytesIO",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.dict",
        "builtins.frozenset",
        "builtins.int",
        "builtins.list",
        "builtins.set",
        "builtins.slice",
        "collections.deque",
        "datetime.datetime",
        "datetime.timedelta",
        "fp16.loss_scaler.DynamicLossScaler",
        "fp16.loss_scaler.LossScaler",
        "megatron.core.optimizer.OptimizerConfig",
        "megatron.core.optimizer.optimizer_config.OptimizerConfig",
        "megatron.core.transformer.transformer_config.MLATransformerConfig",
        "megatron.core.transformer.transformer_config.TransformerConfig",
        "megatron.fp16.loss_scaler.DynamicLossScaler",
        "megatron.fp16.loss_scaler.LossScaler",
        "megatron.model.fp16_deprecated.loss_scaler.DynamicLossScaler",
        "megatron.fp16_deprecated.loss_scaler.DynamicLossScaler",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.dtypes.UInt32DType",
        "numpy.ndarray",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
    }
)
