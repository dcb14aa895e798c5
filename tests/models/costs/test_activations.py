"""The table of what layers keep, against what autograd really keeps of a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pentad.configs import Config, load
from pentad.models.costs.activations import RECOMPUTABLE, angle_rows, begin_rows, end_rows, layer_rows, prediction_rows
from pentad.models.costs.flops import layer_flops
from pentad.models.costs.kept import Kept, flops_of_again, kept_bytes
from pentad.models.costs.widths import LocalWork
from pentad.models.dropout import Draws
from pentad.models.mla import LatentAttention
from pentad.models.mtp import ahead
from pentad.models.sequences import Inputs
from pentad.models.transformer import Transformer
from pentad.parallel.comm.mesh import Axis
from pentad.parallel.context.gather import GatherLatent
from pentad.parallel.kernels.device import Cpu
from tests.jobs import DENSE

BATCH, LENGTH = 2, 128
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
_SHAPE = ["layers=3", "hidden=64", "heads=4", "ffn=160", "vocab=512"]
_EXPERTS = ["moe.experts=8", "moe.ffn=48"]
_LATENT = ["mla.kv_rank=24", "mla.nope_dim=16", "mla.rope_dim=8", "mla.value_dim=12", "kv_heads=null"]
MODELS = {
    "llama": ["family=llama", "kv_heads=2"],
    "qwen3": ["family=qwen3", "kv_heads=2"],
    "olmoe": ["family=olmoe", "kv_heads=null", *_EXPERTS],
    "gpt2": ["family=gpt2", "kv_heads=4"],
    "dropout": ["family=llama", "kv_heads=2", "dropout=0.1"],
    "hybrid": ["kv_heads=2", "attention_every=2", "linear.key_dim=12", "linear.value_dim=20"],
    "mixtral": ["family=mixtral", "kv_heads=2", *_EXPERTS],
    "weighed before": ["family=mixtral", "kv_heads=2", *_EXPERTS, "moe.weigh=before"],
    "qwen2_moe": ["family=qwen2_moe", "kv_heads=null", *_EXPERTS, "moe.shared=96", "moe.top_k=4"],
    "deepseek_v2": ["family=deepseek_v2", *_LATENT, *_EXPERTS, "moe.shared=96", "moe.dense_layers=1"],
    "deepseek_v3": [
        *("family=deepseek_v3", *_LATENT, *_EXPERTS, "mla.q_rank=40", "moe.shared=48", "moe.every=2", "qkv_bias=true"),
    ],
    "prediction": ["family=deepseek_v3", *_LATENT, *_EXPERTS, "mla.q_rank=40", "moe.shared=48", "mtp=2"],
    "gpt_oss": ["family=gpt_oss", "kv_heads=2", "window=32", *_EXPERTS],
    "losses": ["family=mixtral", "kv_heads=2", *_EXPERTS, "moe.router.aux_loss=0.01", "moe.router.z_loss=0.001"],
    "gated": ["family=gpt2", "kv_heads=4", *_EXPERTS, "moe.bias=true", "moe.shared=64", "moe.shared_gate=true"],
}


def job(name: str, dtype: str = "fp32") -> Config:
    model = [f"model.{key}" for key in (*_SHAPE, *MODELS[name])]
    train = [f"train.seq_len={LENGTH}", f"train.micro_batch={BATCH}", "train.global_batch=8", f"train.dtype={dtype}"]
    return load(DENSE, [*model, *train, "parallel.tp=1", "parallel.dp=2"])


def rows_of(cfg: Config, **work: int | bool) -> list[Kept]:
    """Of the whole model on one rank."""
    m = cfg.model
    here = LocalWork(sequences=BATCH, tokens=BATCH * LENGTH, width=_DTYPES[cfg.train.dtype].itemsize, **work)  # type: ignore[arg-type]
    layers = [row for layer in range(m.layers + m.mtp) for row in layer_rows(m, layer, here)]
    around = [*begin_rows(m, here), *angle_rows(m, here, each=False), *end_rows(m, here)]
    return [*layers, *around, *(row for _ in range(m.mtp) for row in prediction_rows(m, here))]


def measured(cfg: Config, *, latents: bool = False) -> int:
    """Bytes that autograd keeps of a forward pass; parameters and what the loader made left out."""
    torch.manual_seed(0)
    model = Transformer(cfg.model).to(_DTYPES[cfg.train.dtype])
    for module in model.modules() if latents else ():
        if isinstance(module, LatentAttention):
            module.latent_core = GatherLatent(Axis.single("cp"), Cpu())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, 512, (BATCH, LENGTH))
    labels = ahead(tokens, cfg.model.mtp) if cfg.model.mtp else tokens
    given = {x.untyped_storage()._cdata for x in (*model.parameters(), tokens, labels)}
    kept: dict[int, tuple[StorageWeakRef, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()  # not the tensor itself, which may be the output of what saves it

    draws = Draws(cfg.model.dropout, 0, 0, (0, 1), LENGTH, torch.arange(tokens.numel())) if cfg.model.dropout else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(Inputs(tokens, labels, draws=draws, share=0.25))
    # A part of the graph that leads nowhere is gone by now, with what it had saved.
    found = sum(nbytes for storage, nbytes in kept.values() if not storage.expired())
    del loss
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_what_autograd_keeps(name: str, dtype: str) -> None:
    cfg = job(name, dtype)
    # The weights of the head have no slot here, so their gradient is kept with the hidden states'.
    tables = (1 + cfg.model.mtp) * cfg.model.vocab * cfg.model.hidden * 4
    assert kept_bytes(rows_of(cfg)) == pytest.approx(measured(cfg) - tables, rel=0.005)


def test_gathered_latents_are_expanded_again() -> None:
    cfg = job("deepseek_v3")
    tables = cfg.model.vocab * cfg.model.hidden * 4
    assert kept_bytes(rows_of(cfg, latents=True)) == pytest.approx(measured(cfg, latents=True) - tables, rel=0.005)


def test_choices_leave_out_what_they_make_again() -> None:
    cfg = job("qwen3")
    (rows,) = ([*layer_rows(cfg.model, 1, LocalWork(sequences=2, tokens=256, width=4))],)
    stream, heads, inner = 256 * 64 * 4, 256 * 64 * 4, 256 * 160 * 4
    assert kept_bytes(rows, "full") == stream
    assert kept_bytes(rows) - kept_bytes(rows, {"activation"}) == inner
    assert kept_bytes(rows) - kept_bytes(rows, {"ffn"}) == 2 * inner
    assert kept_bytes(rows) - kept_bytes(rows, {"norm"}) == 2 * stream + 2 * 256 * 4
    rest = kept_bytes(rows, RECOMPUTABLE)
    assert rest == 2 * stream + heads + 256 * 4 * 4  # both residual streams, attention's output and log-sum-exp
    # Queries, keys and values of both, gate and up are most of a layer's products: not the output and down.
    dense = layer_flops(cfg.model, LENGTH)[0] * BATCH
    again = flops_of_again(rows, {"attention", "ffn"})
    assert again == 2.0 * 256 * 64 * (64 + 2 * 32 + 2 * 160) < dense


@pytest.mark.parametrize("name", MODELS)
def test_every_part_frees_something_where_it_is(name: str) -> None:
    m = job(name).model
    parts = {"norm", "head", "attention"}
    parts |= {"latent"} if m.mla.kv_rank else set()
    parts |= {"moe"} if m.moe.experts else set()
    parts |= {"ffn", "activation"} if m.moe.shared or len(m.moe_layers) < m.layers else set()
    rows = rows_of(job(name))
    assert {part for part in RECOMPUTABLE if kept_bytes(rows, {part}) < kept_bytes(rows)} == parts
