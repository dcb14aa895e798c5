"""The model that a run, a checkpoint or a Hugging Face folder holds, whole, on one device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.schema import ModelConfig
from ...models.hf.folder import Notice, load_hf, read_hf_config, to_stderr
from ...models.transformer import Transformer
from ...models.weights.vocab_padding import without_padding
from ..checkpoint.checkpointer import read_full, verify
from ..checkpoint.listing import checkpoints_of
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.saved_model import model_config_from_state
from ..run_folder import RunFile
from .tokenizer_files import TokenizerFiles, of_checkpoint, of_folder

_REMEMBERED = ".router.load"


@dataclass(frozen=True)
class SavedModel:
    """A model with the tokenizer that belongs to it."""

    model: Transformer
    tokenizer: TokenizerFiles


def open_model(path: str | os.PathLike[str], dtype: torch.dtype, notice: Notice = to_stderr) -> SavedModel:
    """A model to compute with.

    Args:
        path: a run's folder, of which the newest good checkpoint is taken; a checkpoint; or a Hugging Face folder.
        dtype: of the parameters.
        notice: told about damaged checkpoints and tensors that are passed over.

    Raises:
        UserError: `path` is none of these, or damaged.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").exists():
        return SavedModel(load_hf(folder, dtype), of_folder(folder, read_hf_config(folder)))
    found = find_checkpoint(folder, notice)
    return SavedModel(load_checkpoint(found, dtype), of_checkpoint(found))


def load_checkpoint(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Transformer:
    """A checkpoint of any layout as a module: `module(tokens (B, T)) -> logits (B, T, V)`, without padded ids.

    Args:
        path: one checkpoint, or a run's folder, of which the newest good checkpoint is taken.
        dtype: type of the parameters; the checkpoint's values are cast.

    Raises:
        UserError: there is no good checkpoint.
    """
    config, tensors = read_model(find_checkpoint(Path(path).expanduser()))
    config, tensors = without_padding(config, tensors)
    module = Transformer(config).to(dtype)
    values = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            values[name].copy_(tensor)
    return module


def read_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A checkpoint's model: its configuration, its parameters and the buffers that belong to the weights.

    Raises:
        UserError: the checkpoint is absent or damaged.
    """
    _, state = read_full(path, [])
    config = model_config_from_state(state)
    with torch.device("meta"):
        names = [name for name in Transformer(config).state_dict() if not name.endswith(_REMEMBERED)]
    tensors, _ = read_full(path, [f"model/{name}" for name in names])
    return config, {name: tensors[f"model/{name}"] for name in names}


def find_checkpoint(path: Path, notice: Notice = to_stderr) -> Path:
    """One checkpoint: `path` itself, or the newest good one of the run or of the folder of checkpoints that it is.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).exists():
        return path
    if not path.is_dir():
        raise UserError(Problem(str(path), "there is no such checkpoint, run or Hugging Face folder"))
    found = checkpoints_of(path)
    for checkpoint in found:
        problems = verify(checkpoint)
        if not problems:
            return checkpoint
        notice(f"{checkpoint} is damaged, using the one before: {'; '.join(problems)}")
    if found:
        raise UserError(Problem(str(path), f"all {len(found)} checkpoints are damaged"))
    what = (
        "this run has no checkpoint yet" if (path / RunFile.RESOLVED).is_file() else "holds neither a run nor a model"
    )
    raise UserError(Problem(str(path), f"{what}; name a run, a checkpoint or a Hugging Face folder"))
