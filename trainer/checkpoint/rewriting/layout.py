"""What each rank of a layout would hold of a checkpoint, worked out without ranks, devices or memory for tensors.

The model is built on torch's meta device as a job builds it, once for each rank: so the pieces are those of the job.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ....configs.errors import Problem, UserError
from ....configs.load import load
from ....configs.schema import Config
from ....models.parallelize import build_model
from ....parallel.global_tensor import GlobalTensor, boxes
from ....parallel.replicas.flat import FlatReplicas
from ....parallel.replicas.protocol import ShardSlice
from ....parallel.sharding_rules import Sharding
from ...pipeline.programs import Pipeline
from ...setup import DTYPES, spreads_of, unmet_mesh_of
from ..index import Contents
from ..stored import StoredTensor
from ..tensors import DTYPES as STORED_DTYPES
from ..writers import Extent, Holding

OPTION = "--layout"
_SHORT = {
    "sharding": "data.sharding",
    "params": "data.params",
    "grads": "data.grads",
    "states": "data.states",
    "bucket_mib": "data.bucket_mib",
    "schedule": "pipeline.schedule",
    "chunks": "pipeline.chunks",
    "layers": "pipeline.layers",
    "vocab": "pipeline.vocab",
}
"""Keys of `parallel` that need no section in front."""


def layout_config(state: Mapping[str, Any], words: str) -> Config:
    """A job with the model of a checkpoint, in a layout.

    Args:
        state: of the checkpoint.
        words: `KEY=VALUE,KEY=VALUE…`, keys of `parallel`.

    Raises:
        UserError: the layout cannot be, or the state does not say the model.
    """
    pairs = [word.partition("=") for word in _split(words)]
    wrong = [key for key, equals, value in pairs if not (key and equals and value)]
    if wrong or not pairs:
        message = f"is {words!r}; give keys of parallel with their values, such as tp=2,pp=2,dp=2,sharding=zero1"
        raise UserError(Problem(OPTION, message))
    layout = {f"parallel.{_SHORT.get(key, key)}": value for key, _, value in pairs}
    if layout.get("parallel.data.sharding") == "deepspeed":
        unknown = "what DeepSpeed's engine would hold is not known without it"
        raise UserError(Problem(OPTION, f"{unknown}; give sharding=zero1, which it loads too"))
    same = state.get("same")
    same = same if isinstance(same, Mapping) else {}
    dp = layout.get("parallel.dp", "1")
    with tempfile.TemporaryDirectory(prefix="pentad-") as name:
        folder = Path(name)
        for suffix in (".bin", ".idx"):
            (folder / f"none{suffix}").touch()  # no data is read
        job = {
            "model": state.get("model"),
            "train": {
                "steps": 1,
                "global_batch": 64 * max(1, int(dp) if dp.isdecimal() else 1),
                "micro_batch": 1,
                "seq_len": same.get("train.seq_len", 1024),
                "dtype": same.get("train.dtype", "fp32"),
            },
            "optim": {"name": "sgd", "momentum": 0.0},
            "data": {"name": "bin", "paths": [str(folder / "none")]},
        }
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        try:
            return load(path, [f"{key}={value}" for key, value in layout.items()])
        except UserError as error:  # the file is nobody's
            place = re.compile(rf" \({re.escape(str(path))}:\d+\)")
            raise UserError(*(replace(each, message=place.sub("", each.message)) for each in error.problems)) from None


def _split(words: str) -> list[str]:
    """At commas, but for those inside brackets."""
    found, depth = [""], 0
    for letter in words:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [word.strip() for word in found]


def layout_holdings(cfg: Config, contents: Contents) -> list[dict[str, Holding]]:
    """What each rank holds of a checkpoint's tensors.

    States of the shape of their parameter lie as it does. What belongs to no parameter of the model, as the scales of
    coded moments, every rank is said to hold whole, so that it is dealt out by size.

    Args:
        cfg: of `layout_config`.
        contents: of the checkpoint.

    Raises:
        UserError: the checkpoint does not have the model's parameters.
    """
    models = {name: about for name, about in contents.tensors.items() if name.startswith("model/")}
    kinds = sorted({name.partition("/")[2].partition("/")[0] for name in contents.tensors if name not in models})
    found: list[dict[str, Holding]] = []
    placed: set[str] = set()
    for rank in range(cfg.parallel.ranks):
        held: dict[str, Holding] = {}
        pieces = dict(_pieces(cfg, rank))
        for prefix in ("model/", *(f"optim/{kind}/" for kind in kinds)):
            for name, extents in pieces.items():
                parameter, about = models.get(f"model/{name}"), contents.tensors.get(f"{prefix}{name}")
                if parameter is None:
                    raise UserError(Problem(str(contents.path), f"model/{name}: the checkpoint does not have it"))
                if about is not None and about.shape == parameter.shape:
                    held[f"{prefix}{name}"] = _holding(about, extents)
        placed |= held.keys()
        found.append(held)
    for name in contents.tensors.keys() - placed:
        about = contents.tensors[name]
        whole = _holding(about, (((0,) * len(about.shape), about.shape),))
        for held in found:
            held[name] = whole
    return found


def _holding(about: StoredTensor, extents: tuple[Extent, ...]) -> Holding:
    return Holding(about.shape, STORED_DTYPES[about.dtype], False, extents)


def _pieces(cfg: Config, rank: int) -> Iterator[tuple[str, tuple[Extent, ...]]]:
    """What a rank holds of each parameter and buffer, in the order in which it saves them."""
    pipeline, mesh = Pipeline.of(cfg), unmet_mesh_of(cfg, rank)
    model, where = build_model(
        cfg.model,
        mesh,
        device=torch.device("meta"),
        dtype=DTYPES[cfg.train.dtype],
        part=pipeline.split.part(pipeline.stages_of(mesh.axis("pp").rank)),
        balanced=pipeline.split.balanced,
    )
    sharding = cfg.parallel.data.sharding
    if sharding == "fsdp2" and mesh.axis("data").size > 1:
        slices = _rows(where, mesh.axis("data").rank, mesh.axis("data").size)
    else:
        mib = cfg.parallel.data.bucket_mib
        stage_of = pipeline.split.stage_of
        slices = FlatReplicas(model, where, mesh, spreads=spreads_of(cfg), bucket_mib=mib, stage_of=stage_of).pieces()
    for piece in slices:
        found = boxes(piece.sharding.placement, piece.start, piece.stop)
        yield piece.name, tuple((box.offsets, box.sizes) for box in found)
    names = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in names:
            yield name, tuple((box.offsets, box.sizes) for box in GlobalTensor.of(buffer).boxes)


def _rows(where: Mapping[str, Sharding], rank: int, size: int) -> Iterator[ShardSlice]:
    """As FSDP2 cuts parameters: their rows like torch's chunk."""
    for name, sharding in where.items():
        rows, *rest = sharding.placement.local_shape
        width = math.prod(rest)
        each = -(-rows // size)
        start, stop = min(rank * each, rows) * width, min((rank + 1) * each, rows) * width
        if start < stop:
            yield ShardSlice(name, sharding, start, stop, name, 0)
