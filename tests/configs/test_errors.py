"""Every user mistake is one line that names the key, what was given and the way out; all of them come at once."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pentad.configs import Config, Problem, UserError, load, validate
from pentad.configs.fields import all_keys
from tests.jobs import DENSE

# Override(s) of the dense job (4 ranks: tp 2 x dp 2), the key of the line, and fragments that the line must contain.
WRONG: list[tuple[list[str], str, list[str]]] = [
    (["train.stepz=1"], "train.stepz", ["unknown key", "train.steps", "command line"]),
    (["trian.steps=1"], "trian.steps", ["unknown section", "train"]),
    (["foo.bar=1"], "foo.bar", ["model", "parallel", "hardware"]),
    (["lr=1"], "lr", ["optim.lr"]),
    (["train.lr=1"], "train.lr", ["optim.lr"]),
    (["model.rope.tetha=1"], "model.rope.tetha", ["model.rope.theta"]),
    (["train.steps=four"], "train.steps", ["an integer", "'four'"]),
    (["train.steps=1.5"], "train.steps", ["an integer", "1.5"]),
    (["train.steps=true"], "train.steps", ["an integer", "true"]),
    (["train.steps={a: 1}"], "train.steps", ["an integer", "{a: 1}"]),
    (["train.steps.a=1"], "train.steps.a", ["train.steps has no keys", "an integer"]),
    (["optim.lr=null"], "optim.lr", ["a number", "null"]),
    (["optim.lr=[1]"], "optim.lr", ["a number", "[1]"]),
    (["model.tied=perhaps"], "model.tied", ["true or false", "perhaps"]),
    (["model.window=none"], "model.window", ["an integer or null", "none"]),
    (["train.dtype=fp16"], "train.dtype", ["bf16, fp32, fp64", "fp16"]),
    (["model=3"], "model", ["is a section", "layers"]),
    (["log.profile=[a]"], "log.profile", ["a list of integers", "a"]),
    (["log.profile[0]=3"], "log.profile[0]", ["log.profile=[…]"]),
    (["log.profile=[500]"], "log.profile", ["500", "train.steps=240"]),
    (["name=${nope}"], "name", ["${nope}", "cannot be resolved"]),
    (["name=a/b"], "name", ["slash", "a/b"]),
    (["--train.steps=3"], "--train.steps=3", ["dashes", "write train.steps=3"]),
    (["+train.steps=3"], "+train.steps=3", ["train.steps=VALUE"]),
    (["train.steps"], "train.steps", ["key=value", "train.steps=VALUE"]),
    (["train.steps=[1"], "train.steps", ["an integer", "[1"]),
    (["model.preset=lama3_8b"], "model.preset", ["lama3_8b", "did you mean llama3_8b?"]),
    (["hardware.preset=h100"], "hardware.preset", ["h100", "h100_"]),
    (["model.family=lama"], "model.family", ["llama, mistral", "lama"]),
    (["optim.name=adamv"], "optim.name", ["adamw, sgd", "adamv"]),
    (["optim.schedule.name=cosin"], "optim.schedule.name", ["constant, linear, cosine, wsd", "cosin"]),
    (["data.name=[1]"], "data.name", ["stdlib, text", "[1]"]),
    (["optim.momentum=0.9"], "optim.momentum", ["optim.name=sgd", "optim.name is adamw"]),
    (["data.name=text"], "data.paths", ["missing", "a list of texts"]),
    (["data.name=text", "data.paths=[]"], "data.paths", ["empty"]),
    (["data.name=text", "data.paths=[/no/such.txt]"], "data.paths", ["no such file", "/no/such.txt"]),
    (["data.name=bin", "data.paths=/no/x.bin"], "data.paths", ["no such file", "/no/x.bin.bin"]),
    (["data.tokenizer.path=/no/tokenizer.json"], "data.tokenizer.path", ["no such file"]),
    (["checkpoint.init=/no/folder"], "checkpoint.init", ["no such file", "/no/folder"]),
    (["checkpoint.resume=/no/step-1"], "checkpoint.resume", ["no such file", "/no/step-1"]),
    (["train.steps=0"], "train.steps", ["at least 1", "0"]),
    (["train.seq_len=-4"], "train.seq_len", ["at least 1", "-4"]),
    (["model.heads=0"], "model.heads", ["at least 1", "0"]),
    (["optim.lr=.nan"], "optim.lr", ["at least 0", "nan"]),
    (["optim.beta2=1"], "optim.beta2", ["below 1", "1.0"]),
    (["data.holdout=1.5"], "data.holdout", ["below 1", "1.5"]),
    (["data.holdout=0"], "data.holdout", ["eval.every"]),
    (["model.dropout=1"], "model.dropout", ["below 1"]),
    (["optim.schedule.min_ratio=2"], "optim.schedule.min_ratio", ["from 0 to 1", "2.0"]),
    (["optim.schedule.warmup_steps=300"], "optim.schedule.warmup_steps", ["300", "train.steps=240"]),
    (["optim.schedule.name=wsd", "optim.schedule.decay_steps=231"], "optim.schedule.decay_steps", ["231", "240"]),
    (["model.hidden=257"], "model.hidden", ["257", "model.heads=4", "model.hidden=260"]),
    (["model.head_dim=33"], "model.head_dim", ["even", "33"]),
    (
        ["model.kv_heads=3", "parallel.tp=1", "parallel.dp=4", "train.micro_batch=2"],
        "model.heads",
        ["model.kv_heads=3", "4"],
    ),
    (["model.ffn=705"], "model.ffn", ["705", "parallel.tp=2", "706"]),
    (["model.vocab=321"], "model.vocab", ["321", "parallel.tp=2", "322"]),
    (["model.vocab=256"], "model.vocab", ["256", "257"]),
    (["train.seq_len=255", "train.micro_batch=1"], "train.seq_len", ["255", "parallel.tp=2", "train.seq_len=256"]),
    (["train.global_batch=12"], "train.global_batch", ["12", "train.micro_batch=4 x parallel.dp=2 = 8", "16"]),
    (["parallel.dp=4", "train.micro_batch=1"], "parallel.dp", ["8 ranks", "world size is 4", "parallel.dp=2"]),
    (["model.position=learned", "model.max_positions=128"], "model.max_positions", ["128", "train.seq_len=256"]),
    (
        ["parallel.cp=2", "parallel.dp=1", "parallel.context.method=tokenring", "parallel.context.duplex=true"],
        "parallel.context.duplex",
        ["both ways", "tokenring", "set it to ring"],
    ),
    *(
        (
            ["parallel.cp=2", "parallel.dp=1", f"parallel.context.method={method}", "parallel.context.inner=2"],
            "parallel.context.inner",
            ["2 ranks", f"parallel.context.method={method}", "usp"],
        )
        for method in ("allgather", "ulysses", "ring", "tokenring")
    ),
    (
        ["parallel.context.method=rings"],
        "parallel.context.method",
        ["one of auto", "mean ring?"],
    ),
    (
        ["parallel.cp=2", "parallel.dp=1", "parallel.context.method=usp", "parallel.context.inner=3"],
        "parallel.context.inner",
        ["3 must divide parallel.cp=2", "leave it out"],
    ),
    (
        ["parallel.cp=2", "parallel.dp=1", "train.seq_len=513"],
        "train.seq_len",
        ["513", "cp=2", "set train.seq_len=514"],
    ),
    (["parallel.ep=2"], "parallel.ep", ["model.moe.experts=0", "set parallel.ep=1"]),
    (["parallel.etp=2"], "parallel.etp", ["model.moe.experts=0", "set parallel.etp=1"]),
    (["model.rope.scaling=yarn", "model.rope.beta_slow=33"], "model.rope.beta_fast", ["beta_slow=33.0", "32.0"]),
    (["model.rope.scaling=llama3", "model.rope.low_freq_factor=4"], "model.rope.high_freq_factor", ["4.0"]),
    (["checkpoint.init=/", "checkpoint.resume=/"], "checkpoint.init", ["checkpoint.resume", "null"]),
]


_PP = ["parallel.pp=2", "parallel.dp=1"]
_P = "parallel.pipeline"
_PARAMS, _GRADS, _STATES = "parallel.data.params", "parallel.data.grads", "parallel.data.states"
_FSDP = ["parallel.data.sharding=fsdp"]
_FOUR = ["parallel.tp=1", "parallel.dp=2", "parallel.cp=2"]
_PARTS = ["memory.recompute=selective"]
WRONG += [
    (["parallel.pp=0", "parallel.dp=2"], "parallel.pp", ["at least 1", "0"]),
    ([*_PP, f"{_P}.schedule=2f2b"], f"{_P}.schedule", ["one of gpipe, 1f1b", "dualpipev", "2f2b"]),
    ([*_PP, f"{_P}.schedule=v-half", f"{_P}.chunks=3"], f"{_P}.chunks", ["v-half", "2 chunks", "3"]),
    ([*_PP, f"{_P}.schedule=zb-h1", f"{_P}.chunks=2"], f"{_P}.chunks", ["zb-h1", "1 chunk", "2", "gis"]),
    ([*_PP, f"{_P}.chunks=0"], f"{_P}.chunks", ["at least 1", "0"]),
    (["data.prefetch=-1"], "data.prefetch", ["at least 0", "-1"]),
    ([*_PP, f"{_P}.schedule=zb-v", f"{_P}.vocab=balanced"], f"{_P}.vocab", ["zb-v", "1f1b, gis, interleaved, v-half"]),
    ([*_PP, f"{_P}.vocab=balanced", "model.vocab=322"], "model.vocab", ["322", "tp=2 x parallel.pp=2 = 4", "324"]),
    ([*_PP, f"{_P}.vocab_barriers=3"], f"{_P}.vocab_barriers", ["one of 1, 2", "3"]),
    ([*_PP, f"{_P}.group=2"], f"{_P}.group", ["1f1b", "2", "leave it out"]),
    (
        ["parallel.pp=4", "parallel.tp=1", "parallel.dp=1", f"{_P}.chunks=2", f"{_P}.group=1"],
        f"{_P}.group",
        ["2 to", "4"],
    ),
    ([*_PP, f"{_P}.chunks=2", f"{_P}.group=3"], f"{_P}.group", ["1 to 2", "parallel.pp=2", "3"]),
    ([*_PP, f"{_P}.schedule=interleaved", f"{_P}.group=1"], f"{_P}.group", ["parallel.pp=2", "1"]),
    ([*_PP, f"{_P}.layers=[4]"], f"{_P}.layers", ["1 counts", "parallel.pp=2", "chunks=1", "2 stages"]),
    ([*_PP, f"{_P}.layers=[1, 2]"], f"{_P}.layers", ["sums to 3", "model.layers=4"]),
    ([*_PP, f"{_P}.layers=[-1, 5]"], f"{_P}.layers", ["at least 0", "-1"]),
    ([*_PP, f"{_P}.layers=even"], f"{_P}.layers", ["auto or a list of integers", "even"]),
    ([*_PP, "parallel.data.sharding=fsdp2"], "parallel.data.sharding", ["fsdp", "parallel.pp=2", "zero1"]),
    ([*_FOUR, f"{_STATES}=3"], _STATES, ["3", "parallel.dp=2 x parallel.cp=2 = 4", "states=2"]),
    (["parallel.data.states=0"], _STATES, ["0", "states=1"]),
    (["parallel.data.states=some"], _STATES, ["node, all", "some"]),
    ([*_FOUR, f"{_PARAMS}=3"], _PARAMS, ["3", "= 4", "set parallel.data.params=2"]),
    ([*_FOUR, f"{_PARAMS}=4", f"{_GRADS}=2"], _PARAMS, ["4 ranks", "gradients over 2", "divisor of 2"]),
    (
        [*_FSDP, "faults.numerics.replicas_every=2"],
        "faults.numerics.replicas_every",
        ["2 ranks", "set parallel.data.params=1"],
    ),
    ([*_FOUR, "parallel.data.grads=4", f"{_STATES}=2"], _GRADS, ["4 ranks", "states over 2", "divisor of 2"]),
    ([*_FOUR, "parallel.data.sharding=zero2", f"{_STATES}=2"], _GRADS, ["4 ranks", "states over 2"]),
    ([*_FOUR, f"{_GRADS}=3"], _GRADS, ["3", "= 4", "set parallel.data.grads=2"]),
    (
        ["parallel.data.sharding=zero2", "faults.numerics.checksums=true"],
        "faults.numerics.checksums",
        ["2 ranks", "parallel.data.grads=1", "replicas_every"],
    ),
    (
        ["parallel.data.sharding=zero2", "train.deterministic=elastic"],
        "train.deterministic",
        ["2 ranks", "parallel.data.grads=1"],
    ),
    (["parallel.data.sharding=hsdp"], "parallel.data.sharding", ["hsdp", "set hardware.ranks_per_node"]),
    (["parallel.data.states=node"], _STATES, ["node", "set hardware.ranks_per_node"]),
    (
        ["parallel.data.states=node", "hardware.ranks_per_node=3", "parallel.tp=2"],
        _STATES,
        ["ranks_per_node=3", "parallel.tp=2"],
    ),
    (["memory.recompute=some"], "memory.recompute", ["one of none, full, selective", "some"]),
    ([*_PARTS, "memory.recompute_parts=[]"], "memory.recompute_parts", ["empty", "norm, activation", "none"]),
    ([*_PARTS, "memory.recompute_parts=[mlp]"], "memory.recompute_parts", ["mlp is no part", "did you mean ffn"]),
    ([*_PARTS, "memory.recompute_parts=[head]"], "memory.recompute_parts", ["head keeps no logits", "leave it out"]),
    ([*_PARTS, "memory.recompute_parts=[moe]"], "memory.recompute_parts", ["moe", "model.moe.experts=0"]),
    ([*_PARTS, "memory.recompute_parts=[latent]"], "memory.recompute_parts", ["latent", "model.mla.kv_rank=0"]),
    ([*_PARTS, "memory.token_share=1.5"], "memory.token_share", ["1.5 is no share between 0 and 1", "0.5, or auto"]),
    ([*_PARTS, "memory.token_share=1"], "memory.token_share", ["1 is no share", "memory.recompute=none keeps"]),
    ([*_PARTS, "memory.token_share=0"], "memory.token_share", ["0 is no share", "none keeps nothing"]),
    ([*_PARTS, "memory.token_share=half"], "memory.token_share", ["none, auto", "half"]),
    ([*_PARTS, "memory.token_share=auto"], "memory.token_share", ["auto, but", "set hardware.memory_gib"]),
    (
        [*_PARTS, "memory.recompute_parts=[moe]", "memory.token_share=0.5", "model.moe.experts=8"],
        "memory.token_share",
        ["0.5", "rows of moe", "add some of norm"],
    ),
    (
        ["memory.offload_optimizer=host", "memory.optimizer_subgroup_mib=nan"],
        "memory.optimizer_subgroup_mib",
        ["nan MiB are no size", "as 64"],
    ),
    (["memory.offload_optimizer=auto"], "memory.offload_optimizer", ["auto", "set hardware.memory_gib"]),
    (
        ["memory.offload_optimizer=auto", "hardware.memory_gib=80", "optim.states=int4"],
        "optim.states",
        ["int4 moments stay", "memory.offload_optimizer=none"],
    ),
    (["memory.recompute=auto"], "memory.recompute", ["auto", "set hardware.memory_gib"]),
    (["memory.recompute=full", "memory.recompute_every=0"], "memory.recompute_every", ["at least 1", "0"]),
    (["memory.group=0"], "memory.group", ["at least 1 layer", "0"]),
    (
        ["faults.numerics.checksums=true", "parallel.data.sharding=fsdp2", "parallel.dp=2"],
        "faults.numerics.checksums",
        ["fsdp", "zero1", "replicas_every"],
    ),
    (["faults.spares=-1"], "faults.spares", ["at least 0", "-1"]),
    (["train.deterministic=always"], "train.deterministic", ["true or false or elastic"]),
    (["train.deterministic=elastic", "parallel.data.sharding=fsdp2"], "train.deterministic", ["fsdp", "zero1"]),
    (["train.deterministic=elastic", "optim.states=int8"], "train.deterministic", ["coded", "fp32"]),
    (
        ["train.deterministic=elastic", "faults.numerics.checksums=true"],
        "train.deterministic",
        ["checksums", "faults.numerics.checksums=false"],
    ),
    (
        ["train.deterministic=elastic", "memory.offload_optimizer=host"],
        "train.deterministic",
        ["memory.offload_optimizer=none"],
    ),
    (
        ["train.deterministic=elastic", "train.micro_batch=1", "train.global_batch=65536"],
        "train.deterministic",
        ["32768", "train.micro_batch"],
    ),
    (
        ["train.deterministic=elastic", "model.moe.experts=4", "parallel.ep=2"],
        "train.deterministic",
        ["experts", "parallel.ep=1"],
    ),
    (["faults.ladder=[spare,climb]"], "faults.ladder", ["respawn", "climb"]),
    (["faults.recover=true", "faults.ladder=[spare,spare]"], "faults.ladder", ["spare 2 times", "once"]),
    (["faults.recover=true", "faults.layouts=[tp=x]"], "faults.layouts", ["parallel.tp", "an integer"]),
    (["faults.recover=true", "faults.layouts=[chunk=2]"], "faults.layouts", ["parallel.chunk", "tp, pp"]),
    (
        ["faults.recover=true", "faults.layouts=[tp=3 pp=1 dp=1]"],
        "faults.layouts",
        ["'tp=3 pp=1 dp=1'", "parallel.tp"],
    ),
    (["faults.recover=true", "faults.layouts=[pp=4]"], "faults.layouts", ["8 ranks", "fewer"]),
    (["faults.recover=true", "faults.watch=false"], "faults.recover", ["watcher", "set faults.watch=true"]),
    (["faults.recover=true", "train.device=cuda"], "faults.recover", ["CPUs", "train.device=cpu"]),
    (["faults.recover=true", "parallel.data.sharding=fsdp2"], "faults.recover", ["fsdp", "zero1"]),
    (["faults.recover=true", "optim.states=int8"], "faults.recover", ["coded", "optim.states=bf16"]),
    (
        ["faults.recover=true", "memory.offload_optimizer=disk", "memory.offload_disk=/tmp"],
        "faults.recover",
        ["from files", "memory.offload_optimizer=host"],
    ),
    (["memory.group=2", "parallel.data.sharding=fsdp2"], "memory.group", ["2: fsdp", "zero1"]),
]

_SHARDING = "parallel.data.sharding"
_DS, _ENGINE = [f"{_SHARDING}=deepspeed"], "parallel.data.deepspeed"
WRONG += [
    ([*_DS, "parallel.tp=1", "parallel.pp=2"], _SHARDING, ["deepspeed", "parallel.pp=2", "zero1"]),
    ([*_DS, "model.moe.experts=8", "parallel.ep=2"], _SHARDING, ["deepspeed", "parallel.ep=2", "zero1"]),
    ([*_DS, "model.moe.experts=8"], _SHARDING, ["parallel.etp=1", "set parallel.etp=2", "zero1"]),
    ([*_DS, "parallel.tp=4", "parallel.dp=1"], _SHARDING, ["parallel.dp=1 x parallel.cp=1", "zero1"]),
    ([*_DS, "train.dtype=fp64"], "train.dtype", ["deepspeed has no fp64", "bf16"]),
    ([*_DS, "optim.states=int8"], "optim.states", ["int8", "deepspeed", "bf16"]),
    ([*_DS, "memory.offload_optimizer=host"], "memory.offload_optimizer", ["host", f"{_ENGINE}.offload=optimizer"]),
    ([*_DS, "memory.offload_activations=all"], "memory.offload_activations", ["all", "deepspeed", "zero1"]),
    ([*_DS, "memory.group=2"], "memory.group", ["2: deepspeed", "zero1"]),
    ([*_DS, "faults.numerics.checksums=true"], "faults.numerics.checksums", ["deepspeed", "zero1"]),
    ([*_DS, "faults.numerics.on_spike=skip"], "faults.numerics.on_spike", ["skip", "deepspeed", "tell"]),
    ([*_DS, "faults.recover=true"], "faults.recover", ["deepspeed", "zero1"]),
    ([*_DS, f"{_ENGINE}.offload=all"], f"{_ENGINE}.offload", ["stage 3 only", "this is 2", "stage=3"]),
    (
        [*_DS, f"{_ENGINE}.stage=3", "memory.recompute=full", "faults.numerics.recompute=true"],
        "faults.numerics.recompute",
        ["ZeRO 3", "stage=2"],
    ),
    ([*_DS, f"{_ENGINE}.stage=0"], f"{_ENGINE}.stage", ["1, 2, 3", "0"]),
    ([*_DS, f"{_ENGINE}.config=/no/ds.json"], f"{_ENGINE}.config", ["no such file", "/no/ds.json"]),
]


_EIGHT = ["model.moe.experts=8"]
_MOE, _ROUTER = "model.moe", "model.moe.router"
_LATENT = ["model.mla.kv_rank=16", "model.kv_heads=null"]
WRONG += [
    (["model.moe.experts=-1"], "model.moe.experts", ["at least 0", "-1"]),
    ([*_EIGHT, "parallel.ep=0"], "parallel.ep", ["at least 1", "0"]),
    ([*_EIGHT, "parallel.ep=8"], "parallel.ep", ["ep=8 x parallel.etp=1 = 8", "tp=2", "dp=2 = 4", "set parallel.ep"]),
    ([*_EIGHT, "parallel.etp=8"], "parallel.etp", ["parallel.etp=8 = 8", "= 4", "set parallel.etp"]),
    ([*_EIGHT, "parallel.ep=4", "parallel.etp=2"], "parallel.ep", ["parallel.ep=4 x parallel.etp=2 = 8", "= 4"]),
    (["model.moe.experts=6", "parallel.ep=4"], "model.moe.experts", ["6", "parallel.ep=4", "model.moe.experts=8"]),
    ([*_EIGHT, f"{_MOE}.ffn=34", "parallel.etp=4"], f"{_MOE}.ffn", ["34", "parallel.etp=4", f"{_MOE}.ffn=36"]),
    ([*_EIGHT, f"{_MOE}.ffn=0"], f"{_MOE}.ffn", ["at least 1", "0"]),
    ([*_EIGHT, f"{_MOE}.shared=33"], f"{_MOE}.shared", ["33", "parallel.tp=2", "34"]),
    ([*_EIGHT, f"{_MOE}.dense_layers=5"], f"{_MOE}.dense_layers", ["5", "model.layers=4"]),
    ([*_EIGHT, f"{_MOE}.dense_layers=1", "model.ffn=705", f"{_MOE}.ffn=64"], "model.ffn", ["705", "706"]),
    ([*_EIGHT, f"{_MOE}.every=0"], f"{_MOE}.every", ["at least 1", "0"]),
    ([*_EIGHT, f"{_MOE}.top_k=9"], f"{_MOE}.top_k", ["9", "experts=8", "top_k=8"]),
    ([*_EIGHT, f"{_MOE}.top_k=0"], f"{_MOE}.top_k", ["at least 1", "0"]),
    ([*_EIGHT, f"{_MOE}.top_k=13", f"{_ROUTER}.null_experts=4"], f"{_MOE}.top_k", ["13", "experts=8", "= 12"]),
    (
        [*_EIGHT, f"{_MOE}.top_k=5", f"{_ROUTER}.groups=4", f"{_ROUTER}.groups_kept=2"],
        f"{_MOE}.top_k",
        ["5", "the 4 experts", "groups_kept=2 groups of 2", "top_k=4"],
    ),
    ([*_EIGHT, f"{_ROUTER}.groups=3"], f"{_MOE}.experts", ["8", f"{_ROUTER}.groups=3", "9"]),
    ([*_EIGHT, f"{_ROUTER}.groups=0"], f"{_ROUTER}.groups", ["at least 1", "0"]),
    ([*_EIGHT, f"{_ROUTER}.groups=2", f"{_ROUTER}.groups_kept=3"], f"{_ROUTER}.groups_kept", ["3", "groups=2"]),
    ([*_EIGHT, f"{_ROUTER}.groups=8"], f"{_ROUTER}.group_members", ["2", "a group's 1", "group_members=1"]),
    ([*_EIGHT, f"{_ROUTER}.groups=2", f"{_ROUTER}.name=sinkhorn"], f"{_ROUTER}.groups", ["2", "top_k", "sinkhorn"]),
    (
        [*_EIGHT, f"{_ROUTER}.name=expert_choice", f"{_ROUTER}.selection_bias=true"],
        f"{_ROUTER}.selection_bias",
        ["expert_choice", f"set {_ROUTER}.selection_bias=false"],
    ),
    (
        [*_EIGHT, f"{_ROUTER}.name=expert_choice", f"{_ROUTER}.aux_loss=0.01"],
        f"{_ROUTER}.aux_loss",
        ["expert_choice", "0.01", f"set {_ROUTER}.aux_loss=0"],
    ),
    ([*_EIGHT, f"{_ROUTER}.name=sinkhorn", f"{_ROUTER}.aux_loss=0.01"], f"{_ROUTER}.aux_loss", ["sinkhorn", "0.01"]),
    ([*_EIGHT, f"{_ROUTER}.name=best"], f"{_ROUTER}.name", ["top_k, expert_choice, sinkhorn", "best"]),
    ([*_EIGHT, f"{_ROUTER}.aux_loss=-1"], f"{_ROUTER}.aux_loss", ["at least 0", "-1"]),
    ([*_EIGHT, f"{_ROUTER}.scale=0"], f"{_ROUTER}.scale", ["above 0", "0"]),
    ([*_EIGHT, f"{_ROUTER}.jitter=1"], f"{_ROUTER}.jitter", ["at least 0 and below 1", "1.0"]),
    (
        [*_EIGHT, f"{_ROUTER}.null_experts=4", f"{_ROUTER}.groups=2"],
        f"{_ROUTER}.null_experts",
        ["4", f"{_ROUTER}.groups=2", "set"],
    ),
    (
        [*_EIGHT, f"{_ROUTER}.null_experts=4", f"{_ROUTER}.name=expert_choice"],
        f"{_ROUTER}.null_experts",
        ["4", "expert_choice", "set"],
    ),
    ([*_EIGHT, f"{_ROUTER}.null_experts=4", f"{_ROUTER}.name=sinkhorn"], f"{_ROUTER}.null_experts", ["4", "sinkhorn"]),
    ([*_EIGHT, f"{_MOE}.capacity_factor=0"], f"{_MOE}.capacity_factor", ["above 0", "0.0"]),
    (
        [*_EIGHT, f"{_MOE}.capacity_factor=1", f"{_ROUTER}.name=sinkhorn"],
        f"{_MOE}.capacity_factor",
        ["1", "sinkhorn", f"set {_MOE}.capacity_factor=null"],
    ),
    ([*_EIGHT, f"{_MOE}.pad=true"], f"{_MOE}.pad", [f"{_MOE}.capacity_factor is null", f"{_MOE}.pad=false"]),
    ([*_EIGHT, f"{_MOE}.pad=true", f"{_MOE}.capacity_factor=1"], f"{_MOE}.pad", ["local", "micro_batch"]),
    ([*_EIGHT, f"{_MOE}.overlap_chunks=0"], f"{_MOE}.overlap_chunks", ["1 to 8 or auto", "0"]),
    ([*_EIGHT, f"{_MOE}.overlap_chunks=9"], f"{_MOE}.overlap_chunks", ["1 to 8 or auto", "9"]),
    ([*_EIGHT, f"{_MOE}.overlap_chunks=some"], f"{_MOE}.overlap_chunks", ["auto or an integer", "some"]),
    ([*_EIGHT, "parallel.data.sharding=fsdp2"], "parallel.data.sharding", ["experts=8", "zero1", "parallel.ep"]),
    (
        [*_EIGHT, "model.mtp=1", "parallel.pp=2", "parallel.tp=1", "parallel.pipeline.vocab=balanced"],
        "parallel.pipeline.vocab",
        ["multi-token", "model.mtp=1", "set parallel.pipeline.vocab=ends"],
    ),
    ([*_LATENT, "model.mla.rope_dim=33"], "model.mla.rope_dim", ["even", "33"]),
    ([*_LATENT, "model.kv_heads=2"], "model.kv_heads", ["2", "model.heads=4", "model.kv_heads=null"]),
    ([*_LATENT, "model.head_dim=64"], "model.head_dim", ["64", "128", "192", "model.head_dim=null"]),
    ([*_LATENT, "model.sinks=true"], "model.sinks", ["latent", "kv_rank=16", "set model.sinks=false"]),
    ([*_LATENT, "model.qk_norm=true"], "model.qk_norm", ["latent", "kv_rank=16", "set model.qk_norm=false"]),
    (["model.window_every=0"], "model.window_every", ["at least 1", "0"]),
    (["model.attention_every=0"], "model.attention_every", ["at least 1", "0"]),
    (["model.attention_every=2", "model.linear.chunk=48"], "model.linear.chunk", ["power of two", "48"]),
]


@pytest.mark.parametrize(("overrides", "key", "fragments"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_one_mistake_is_one_line(overrides: list[str], key: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(DENSE, overrides, world_size=4)
    lines = {str(p) for p in caught.value.problems if p.key == key}
    assert len(lines) >= 1, f"no line about {key}: {caught.value}"
    for fragment in fragments:
        assert any(fragment in line for line in lines), f"{fragment!r} not in {lines}"
    assert all("\n" not in str(p) and len(str(p)) < 400 for p in caught.value.problems)
    # The two files of a .bin/.idx pair are two lines; nothing else follows from one mistake.
    assert len(caught.value.problems) == (2 if "data.name=bin" in overrides else 1), caught.value


def test_a_problem_carries_every_key_whose_value_it_blames(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Problem] = []

    def recorded(config: Config, world_size: int | None) -> list[Problem]:
        found.extend(validate(config, world_size))
        return []

    monkeypatch.setattr(sys.modules["pentad.configs.load"], "validate", recorded)
    for overrides, *_ in WRONG:
        with suppress(UserError):
            load(DENSE, overrides, world_size=4)
    for problem in found:
        blamed, *_ = re.split("; (?:set|leave|give|change|or)", problem.message)
        keys = {key for key in re.findall(r"([a-z_]+(?:\.[a-z_]+)+)=", blamed) if key in all_keys()}
        assert keys <= set(problem.keys), problem
    assert sum(bool(problem.follows) for problem in found) > 50


def test_a_mistake_hides_no_other_that_only_names_its_key() -> None:
    with pytest.raises(UserError) as caught:
        load(DENSE, ["model.moe.experts=4", "parallel.data.sharding=fsdp2", "parallel.ep=0"])
    assert {p.key for p in caught.value.problems} == {"parallel.ep", "parallel.data.sharding"}


def test_tensor_degree_that_divides_nothing_names_every_size() -> None:
    with pytest.raises(UserError) as caught:
        load(DENSE, ["parallel.tp=3", "model.vocab=320", "train.seq_len=256"], world_size=4)
    assert {p.key for p in caught.value.problems} == {
        "parallel.tp",
        "model.heads",
        "model.kv_heads",
        "model.ffn",
        "model.vocab",
        "train.seq_len",
    }


def test_all_mistakes_come_at_once_with_file_and_line(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "model:\n"
        "  layers: 2\n"
        "  hidden: 64\n"
        "  heads: 4\n"
        "  ffn: many\n"
        "optim:\n"
        "  learning_rate: 1\n"
        "train:\n"
        "  global_batch: 5\n"
        "  micro_batch: 2\n"
        "trian.steps: 5\n"
    )
    with pytest.raises(UserError) as caught:
        load(job, ["eval.evry=3", "-train.seed=1"])
    found = {p.key: p.message for p in caught.value.problems}
    assert set(found) == {
        "model.ffn",
        "optim.learning_rate",
        "train.global_batch",
        "trian.steps",
        "eval.evry",
        "-train.seed=1",
    }
    assert f"({job}:5)" in found["model.ffn"]
    assert f"({job}:7)" in found["optim.learning_rate"]
    assert f"({job}:9)" in found["train.global_batch"]
    assert f"({job}:11)" in found["trian.steps"]
    assert "(command line)" in found["eval.evry"]


def test_missing_sizes_are_all_named_and_suggest_a_preset() -> None:
    with pytest.raises(UserError) as caught:
        load(None, ["train.steps=3"])
    assert [p.key for p in caught.value.problems] == ["model.ffn", "model.heads", "model.hidden", "model.layers"]
    assert all("missing" in p.message and "model.preset" in p.message for p in caught.value.problems)


@pytest.mark.parametrize(
    ("text", "line", "fragment"),
    [
        ("train: {steps: 1\n", ":2", "not valid YAML"),
        ("train:\n  steps: 1\n steps: 2\n", ":3", "not valid YAML"),
        ("a: 1\na: 2\n", ":2", "duplicate"),
        ("- 1\n- 2\n", "", "top level"),
        ("hello\n", "", "top level"),
        ("name: \x00\n", "", "not valid"),
        ("a: &x {b: *x}\n", ":1", "recursive"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, line: str, fragment: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(UserError) as caught:
        load(job)
    (problem,) = caught.value.problems
    assert problem.key == f"{job}{line}" and fragment in problem.message and "\n" not in str(problem)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("name: x\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="no such file; did you mean demo\\?"):
        load("demmo")
    with pytest.raises(UserError, match=r"no such file; did you mean .*/train\.yaml\?"):
        load(tmp_path / "trian.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "binary.yaml")


def test_vocabulary_that_cannot_be_derived(tmp_path: Path) -> None:
    tiny = ["model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128"]
    (tmp_path / "x.bin").touch()
    (tmp_path / "x.idx").touch()
    with pytest.raises(UserError, match=r"model\.vocab: missing, and data\.name=bin has no tokenizer"):
        load(None, [*tiny, "data.name=bin", f"data.paths={tmp_path / 'x'}"])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.vocab: missing, .* set model\.vocab"):
        load(None, [*tiny, f"data.tokenizer.path={tmp_path / 'tokenizer.json'}"])


def test_world_size_that_the_degrees_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"parallel\.tp=2 x .* = 2 does not divide the world size 3"):
        load(DENSE, ["parallel.dp=null"], world_size=3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.ep=4"],
        ["parallel.ep=2", "parallel.etp=2", "model.moe.ffn=64"],
        ["parallel.etp=4"],
        ["model.activation=gelu", "model.moe.every=2", "model.moe.dense_layers=1"],
        ["model.moe.router.name=expert_choice", "model.moe.capacity_factor=1.5"],
        ["model.moe.capacity_factor=1", "model.moe.pad=true", "model.moe.capacity_scope=local"],
        ["model.moe.router.null_experts=8", "model.moe.top_k=12"],
        ["model.moe.router.groups=4", "model.moe.router.groups_kept=2", "model.moe.top_k=4"],
        ["model.ffn=705", "model.moe.ffn=64"],  # no dense layer: tp does not cut model.ffn
        ["model.moe.overlap_chunks=auto"],
        ["model.moe.overlap_chunks=3"],
    ],
)
def test_what_experts_allow(overrides: list[str]) -> None:
    assert load(DENSE, [*_EIGHT, *overrides], world_size=4).model.moe.experts == 8


def test_keys_of_experts_mean_nothing_without_them() -> None:
    meaningless = ["top_k=9", "dense_layers=9", "pad=true", "router.groups=3", "router.null_experts=2", "shared=33"]
    assert not load(DENSE, [f"model.moe.{key}" for key in meaningless], world_size=4).model.moe_layers


def test_all_problems_of_experts_come_at_once() -> None:
    wrong = ["experts=6", "top_k=7", "dense_layers=9", "pad=true", "shared=33", "router.groups=4"]
    with pytest.raises(UserError) as caught:
        load(DENSE, ["parallel.ep=4", *(f"model.moe.{w}" for w in wrong)], world_size=4)
    expected = {"experts", "top_k", "dense_layers", "pad", "shared"}
    assert {p.key for p in caught.value.problems} == {f"model.moe.{key}" for key in expected}


def test_all_problems_of_a_pipeline_come_at_once() -> None:
    wrong = ["schedule=v-min", "chunks=3", "vocab=balanced", "group=2", "layers=[1, 1]"]
    with pytest.raises(UserError) as caught:
        load(DENSE, [*_PP, "model.vocab=322", "parallel.data.sharding=fsdp2", *(f"{_P}.{w}" for w in wrong)])
    expected = {f"{_P}.{key}" for key in ("chunks", "vocab", "group", "layers")}
    assert {p.key for p in caught.value.problems} == expected | {"model.vocab", "parallel.data.sharding"}


def test_kv_heads_may_be_fewer_than_tp_when_they_divide_it() -> None:
    assert load(DENSE, ["model.kv_heads=1", "parallel.tp=4", "parallel.dp=1"], world_size=4).model.kv_heads == 1
    with pytest.raises(UserError, match=r"model\.kv_heads: 6 and parallel\.tp=4"):
        load(DENSE, ["model.heads=12", "model.head_dim=16", "model.kv_heads=6", "parallel.tp=4"])
