"""What other frameworks call our keys and values, for the line that says what to write instead."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from ..errors import nearest
from ..fields import optional
from ..tables.named import named

_KEYS: dict[str, str] = {
    "parallel.tp": "tensor_parallel_size tensor_model_parallel_size tensor_parallel tensor_parallel_degree tp_size",
    "parallel.pp": "pipeline_parallel_size pipeline_model_parallel_size pipeline_parallel pp_size",
    "parallel.cp": "context_parallel_size context_parallel context_parallel_degree sequence_parallel_size cp_size",
    "parallel.ep": "expert_parallel_size expert_model_parallel_size expert_parallel expert_parallel_degree ep_size",
    "parallel.dp": "data_parallel_size data_parallel data_parallel_degree dp_size dp_degree",
    "parallel.data.sharding": "zero_stage zero_optimization zero fsdp fsdp_config sharding_strategy",
    "parallel.pipeline.chunks": "virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank",
    "train.steps": "max_steps train_iters train_steps num_steps total_steps iterations max_iters training_steps "
    "num_epochs epochs num_train_epochs",
    "train.global_batch": "batch_size global_batch_size train_batch_size gbs gradient_accumulation_steps",
    "train.micro_batch": "micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu mbs "
    "local_batch_size device_batch_size",
    "train.seq_len": "seq_length sequence_length max_seq_len max_seq_length block_size context_length max_length",
    "train.dtype": "dtype torch_dtype precision mixed_precision bf16 fp16 param_dtype",
    "train.seed": "random_seed",
    "train.device": "accelerator",
    "model.layers": "num_layers num_hidden_layers n_layers n_layer",
    "model.hidden": "hidden_size d_model n_embd dim embed_dim",
    "model.heads": "num_attention_heads num_heads n_heads n_head",
    "model.kv_heads": "num_key_value_heads num_query_groups n_kv_heads num_kv_heads",
    "model.ffn": "ffn_hidden_size intermediate_size ffn_dim d_ff",
    "model.vocab": "vocab_size padded_vocab_size",
    "model.rope.theta": "rope_theta rotary_base",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon",
    "model.moe.experts": "num_experts num_local_experts n_routed_experts",
    "model.moe.top_k": "num_experts_per_tok moe_router_topk moe_top_k",
    "model.tied": "tie_word_embeddings tied_embeddings tie_embeddings",
    "model.preset": "model_name model_name_or_path flavor",
    "optim.lr": "learning_rate max_lr peak_lr",
    "optim.clip": "clip_grad max_grad_norm grad_clip gradient_clip_val max_norm",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_eps adam_epsilon",
    "optim.weight_decay": "wd",
    "optim.schedule.warmup_steps": "warmup warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps warmup_ratio",
    "optim.schedule.min_ratio": "min_lr lr_min min_lr_ratio",
    "optim.schedule.name": "lr_scheduler_type lr_decay_style scheduler lr_scheduler",
    "data.paths": "data_path train_data dataset dataset_path data_dir train_files",
    "data.tokenizer.path": "tokenizer_path tokenizer_model tokenizer_name tokenizer_file",
    "data.prefetch": "num_workers dataloader_num_workers",
    "data.document_mask": "reset_position_ids reset_attention_mask intra_document_masking",
    "eval.every": "eval_interval eval_freq val_check_interval",
    "eval.steps": "eval_iters limit_val_batches",
    "checkpoint.every": "save_interval save_steps save_freq checkpoint_interval save_every",
    "checkpoint.keep": "save_total_limit keep_latest_k",
    "checkpoint.keep_every": "keep_period save_retain_interval",
    "checkpoint.keep_best": "save_top_k load_best_model_at_end",
    "checkpoint.dir": "save save_dir checkpoint_dir",
    "checkpoint.resume": "load resume_from_checkpoint resume_from",
    "checkpoint.init": "pretrained_model_name_or_path finetune init_from",
    "log.every": "log_interval logging_steps log_freq",
    "log.wandb": "report_to use_wandb enable_wandb wandb_log",
    "log.wandb_project": "project project_name",
    "log.tensorboard": "tensorboard_dir enable_tensorboard",
    "memory.recompute": "activation_checkpointing gradient_checkpointing activation_checkpoint recompute_granularity "
    "recompute_activations ac",
    "memory.recompute_parts": "recompute_modules",
    "memory.recompute_layers": "recompute_num_layers",
    "memory.recompute_every": "selective_ac_option",
    "memory.offload_activations": "activation_offload activation_offloading fine_grained_activation_offloading "
    "cpu_offloading enable_activation_offloading",
    "name": "run_name exp_name experiment_name job_name",
    "runs_dir": "output_dir out_dir dump_folder work_dir",
    "faults.timeout_s": "distributed_timeout_minutes nccl_timeout ddp_timeout",
}
FOREIGN_KEYS = {name: key for key, names in _KEYS.items() for name in names.split()}
"""Key of another framework to ours."""

_FP16 = "; fp16 needs loss scaling, which there is none of; bf16 has the range of fp32: set bf16"
FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "train.dtype": {
        "bfloat16": "bf16", "torch.bfloat16": "bf16", "bf16-mixed": "bf16", "float32": "fp32", "torch.float32": "fp32",
        "float": "fp32", "single": "fp32", "tf32": "fp32", "32": "fp32", "float64": "fp64", "double": "fp64",
        "torch.float64": "fp64", "64": "fp64", "16": "bf16",
    },
    "train.device": {"gpu": "cuda", "nvidia": "cuda", "cuda:0": "cuda"},
    "parallel.data.sharding": {
        "dp": "ddp", "none": "ddp", "0": "ddp", "zero0": "ddp", "1": "zero1", "zero-1": "zero1",
        "3": "fsdp", "zero3": "fsdp", "zero-3": "fsdp", "fsdp2": "fsdp2", "full_shard": "fsdp", "full": "fsdp",
    },
    "optim.name": {"adam": "adamw", "fused_adam": "adamw", "momentum": "sgd"},
    "optim.schedule.name": {"cos": "cosine", "none": "constant", "const": "constant", "warmup_stable_decay": "wsd"},
    "memory.recompute": {"true": "full", "all": "full", "false": "none", "off": "none", "no": "none"},
    "memory.offload_activations": {"true": "all", "full": "all", "cpu": "all", "false": "none", "off": "none"},
    "model.activation": {"silu": "swiglu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    "model.norm": {"rmsnorm": "rms", "rms_norm": "rms", "layernorm": "layer", "layer_norm": "layer"},
    "model.position": {"rotary": "rope", "absolute": "learned", "embedding": "learned"},
    "data.name": {"json": "jsonl", "txt": "text", "megatron": "bin", "indexed": "bin", "mmap": "bin", "mix": "blend"},
    "parallel.pipeline.schedule": {"interleaved_1f1b": "interleaved", "interleaved1f1b": "interleaved",
                                   "zero_bubble": "zb-h1", "zbv": "zb-v", "dualpipe": "dualpipev", "afab": "gpipe"},
    "parallel.context.method": {"p2p": "ring", "a2a": "ulysses", "all_gather": "allgather"},
}  # fmt: skip
"""For some keys, values of other frameworks and ours."""


def foreign_key(key: str) -> str | None:
    """`did you mean …?` for a key that another framework has, under whichever section; None for others."""
    ours = FOREIGN_KEYS.get(key.rpartition(".")[2].lower().replace("-", "_"))
    return None if ours is None else f"did you mean {ours}?"


def foreign_value(key: str, annotation: Any, value: object) -> str:
    """The hint for a word that the key does not have: the same by another name, the nearest one, or nothing."""
    if not isinstance(value, str):
        return ""
    word = value.strip().lower()
    if key == "train.dtype" and word in ("fp16", "float16", "half", "torch.float16", "16-mixed"):
        return _FP16
    known = FOREIGN_VALUES.get(key, {}).get(word)
    if known is not None:
        return meant(known)
    inner, _ = optional(annotation)
    mark = named(inner)
    choices = list(mark.table) if mark is not None else []
    if get_origin(inner) is Literal:
        choices = [c for c in get_args(inner) if isinstance(c, str)]
    return meant(nearest(word.replace("_", "-"), choices) or nearest(word, choices))


def meant(word: str | None) -> str:
    """`; did you mean …?`, or nothing."""
    return f"; did you mean {word}?" if word else ""
