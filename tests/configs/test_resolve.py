"""A resolved job has a value for every key, but for those whose value is that there is nothing."""

from __future__ import annotations

import pytest

from pentad.configs import load, preset_names
from pentad.configs.fields import all_keys, value_of

NOTHING = {
    "model.preset": "written out",
    "model.vocab_used": "all of the vocabulary",
    "model.window": "full attention",
    "model.mla.q_rank": "queries are not compressed",
    "model.moe.capacity_factor": "nothing is dropped",
    "parallel.context.inner": "the method has no groups",
    "parallel.data.deepspeed.stage": "another kind of data parallelism",
    "parallel.data.deepspeed.offload": "another kind of data parallelism",
    "parallel.data.deepspeed.config": "no file of the user's own",
    "parallel.data.states": "as `sharding` says",
    "parallel.data.grads": "as `sharding` says",
    "parallel.data.params": "as `sharding` says",
    "parallel.pipeline.group": "the schedule has no groups",
    "memory.group": "a stage is one part",
    "memory.recompute_layers": "all layers of a stage",
    "memory.offload_disk": "nothing goes to a disk",
    "memory.host_gib": "the host holds everything",
    "data.tokenizer.path": "the byte tokenizer",
    "data.tokenizer.eod": "the first of the usual names that the tokenizer has",
    "data.eod": "documents end where the index says",
    "checkpoint.resume": "from the start",
    "checkpoint.init": "drawn weights",
    "checkpoint.local.dir": "nodes keep none of their own",
    "log.prometheus": "nobody asks",
    "hardware.preset": "written out",
    "hardware.peak_tflops": "by the device's name, or measured",
    "hardware.peak_fp8_tflops": "by the device's name",
    "hardware.memory_gib": "not known",
    "hardware.host_gib_s": "measured",
    "hardware.ranks_per_node": "not known",
}
"""What None means for each key that may be so."""

JOBS = [[f"model.preset={name}", "model.vocab=128256"] for name in preset_names("models")]
JOBS += [
    ["model.preset=llama3_8b", "parallel.pp=4", "parallel.pipeline.schedule=gis"],
    ["model.preset=llama3_8b", "parallel.cp=4", "parallel.context.method=usp"],
    ["model.preset=llama3_8b", "optim.name=sgd", "optim.schedule.name=wsd"],
]


@pytest.mark.parametrize("overrides", JOBS, ids=[" ".join(job) for job in JOBS])
def test_only_keys_whose_value_it_is_are_none(overrides: list[str]) -> None:
    config = load(None, overrides)
    missing = {key for key in all_keys() if value_of(config, key) is None and _is_there(config, key)}
    assert missing <= set(NOTHING)


def _is_there(config: object, key: str) -> bool:
    """Whether the chosen class of its section has the key."""
    section, _, name = key.rpartition(".")
    return hasattr(value_of(config, section) if section else config, name)
