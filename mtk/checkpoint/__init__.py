"""Native checkpoints: safetensors + JSON, a folder a step, no pickle.

``DIR/step_XXXXXXXX/`` is an artifact of kind "checkpoint" and holds ``model.json`` (the
model's configuration), ``model.index.json`` + ``model-*.safetensors``, the optimizer's
in the same form, ``training.json`` (counters and schedule), ``random.safetensors`` and
``tokenizer/``. A folder without its ``artifact.json`` does not exist to any reader.
"""

from mtk.checkpoint.load import LoadedModel, load_model, read_model_config
from mtk.checkpoint.steps import (
    checkpoint_folder,
    complete_steps,
    latest_step,
    prune_steps,
    step_folder,
)
from mtk.checkpoint.tensors import read_tensors, write_tensors

__all__ = [
    "LoadedModel",
    "checkpoint_folder",
    "complete_steps",
    "latest_step",
    "load_model",
    "prune_steps",
    "read_model_config",
    "read_tensors",
    "step_folder",
    "write_tensors",
]
