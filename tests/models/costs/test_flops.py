"""Parameter counts and FLOPs against published values and against arithmetic that is written out here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from pentad.configs import ModelConfig, UserError, load, preset_names
from pentad.models.costs.flops import (
    flops_per_step,
    flops_per_token,
    flops_per_token_full_attention,
    layer_flops,
    layer_windows,
    mean_pairs,
    parameter_count,
    report,
    s_mfu_flops_per_token,
    step_flops,
    unmasked_pairs,
)
from pentad.models.costs.kept import SomeTokens
from pentad.models.costs.recompute import flops_again
from pentad.parallel.token_blocks import TokenBlocks
from tests.jobs import DENSE

# Parameters of the released checkpoints, in units of 1e9 (model cards and safetensors metadata).
PUBLISHED_BILLIONS = {
    "gpt2": 0.12444,
    "gpt2_medium": 0.35482,
    "gpt2_large": 0.77403,
    "gpt2_xl": 1.55761,
    "llama2_7b": 6.738,
    "llama2_13b": 13.016,
    "llama2_70b": 68.977,
    "llama3_8b": 8.030,
    "llama3_70b": 70.554,
    "llama3.1_8b": 8.030,
    "llama3.1_70b": 70.554,
    "llama3.1_405b": 405.85,
    "llama3.2_1b": 1.236,
    "llama3.2_3b": 3.213,
    "mistral_7b": 7.242,
    "qwen2.5_0.5b": 0.494,
    "qwen2.5_1.5b": 1.544,
    "qwen2.5_3b": 3.086,
    "qwen2.5_7b": 7.616,
    "qwen2.5_14b": 14.770,
    "qwen2.5_32b": 32.764,
    "qwen2.5_72b": 72.706,
    "qwen3_0.6b": 0.596,
    "qwen3_1.7b": 1.721,
    "qwen3_4b": 4.022,
    "qwen3_8b": 8.191,
    "qwen3_14b": 14.768,
    "qwen3_32b": 32.762,
}


# Total and active parameters in units of 1e9, as many digits as are published: model cards, technical reports, and for
# the two Llamas and the fine-grained Mixtral the papers that made them; active ones with the embedding table.
PUBLISHED_MIXTURES = {
    "mixtral_8x7b": ("46.70", "12.88"),
    "mixtral_8x22b": ("140.63", "39.16"),
    "mixtral_8x22b_g8t8": ("140.65", "22.27"),
    "llama3_8b_e8t2": ("47.49", "13.67"),
    "llama3_8x70b": ("465.2", "126.9"),
    "qwen2_57b_a14b": ("57.41", "14.25"),
    "qwen3_30b_a3b": ("30.53", "3.35"),
    "qwen3_235b_a22b": ("235.09", "22.19"),
    "deepseek_v2_lite": ("15.71", "2.66"),
    "deepseek_v2": ("235.74", "21.38"),
    "deepseek_v3": ("671.03", "37.55"),
    "olmoe_1b_7b": ("6.92", "1.28"),
    "gpt_oss_20b": ("20.91", "4.19"),
    "gpt_oss_120b": ("116.83", "5.71"),
    "kimi_k2": ("1026.4", "32.86"),
}

# GFLOP per token at 4096 tokens, unmasked attention and full attention, of NVIDIA's and of torchtitan's formulas.
PUBLISHED_GFLOP = {
    "mixtral_8x7b": (79.71, 82.93),
    "mixtral_8x22b": (242.2, 250.7),
    "qwen2_57b_a14b": (84.65, 87.12),
    "qwen3_30b_a3b": (23.01, 27.84),
    "qwen3_235b_a22b": (148.03, 166.96),
    "deepseek_v3": (249.81, 280.5),
    "deepseek_v3_mtp": (259.99, 291.2),
}


def model(name: str) -> ModelConfig:
    return load(None, [f"model.preset={name}"]).model


def test_every_model_has_a_published_count() -> None:
    assert {*PUBLISHED_BILLIONS, *PUBLISHED_MIXTURES, "deepseek_v3_mtp"} == set(preset_names("models"))


@pytest.mark.parametrize("name", PUBLISHED_MIXTURES)
def test_parameter_counts_of_mixtures(name: str) -> None:
    counts = parameter_count(model(name))
    for found, published in zip((counts.total, counts.active), PUBLISHED_MIXTURES[name], strict=True):
        last_digit = 10.0 ** -len(published.partition(".")[2])
        assert found / 1e9 == pytest.approx(float(published), rel=1e-3, abs=last_digit / 2)


@pytest.mark.parametrize("name", PUBLISHED_GFLOP)
def test_flops_of_mixtures(name: str) -> None:
    unmasked, full = PUBLISHED_GFLOP[name]
    assert flops_per_token(model(name), 4096) / 1e9 == pytest.approx(unmasked, rel=1e-3)
    assert flops_per_token_full_attention(model(name), 4096) / 1e9 == pytest.approx(full, rel=1e-3)


def test_flops_of_gpt_oss_know_its_alternating_windows() -> None:
    # NVIDIA's published TFLOP/s over tokens/s: 32.61; by its formula 32.58, and 34.33 with full attention everywhere.
    config = model("gpt_oss_120b")
    assert flops_per_token(config, 4096) / 1e9 == pytest.approx(32.6, rel=2e-3)
    assert flops_per_token(dataclasses.replace(config, window=None), 4096) / 1e9 == pytest.approx(34.33, rel=2e-3)


def test_mixtral_by_hand() -> None:
    # Layer: q and output 2 x 4096^2 = 33554432, k and v 2 x 4096 x 1024 = 8388608, two experts of 3 x 4096 x 14336 =
    # 176160768: 394264576; 32 layers 12616466432; head 4096 x 32000 = 131072000; sum 12747538432; x 6 = 76485230592.
    # Attention at 4096: 2048 x 4096 x 2 x 32 x 6 = 3221225472. The router's 32 x 4096 x 8 multiply-adds count in S-MFU
    # only, the head does not there.
    config = model("mixtral_8x7b")
    assert flops_per_token(config, 4096) == 76485230592 + 3221225472
    assert s_mfu_flops_per_token(config, 4096) == 6 * (12616466432 + 32 * 4096 * 8) + 3221225472
    # Norms 65 x 4096, router 32 x 4096 x 8 and the input's table are the rest of what a token meets.
    assert parameter_count(config).active == 12747538432 + 131072000 + 65 * 4096 + 32 * 4096 * 8
    assert parameter_count(config).total - parameter_count(config).active == 6 * 32 * 176160768


def test_deepseek_v3_by_hand() -> None:
    # Latent attention: queries 7168 x 1536 + 1536 x 128 x 192 = 48758784, keys, values 7168 x 576 + 512 x 128 x 256 =
    # 20905984, output 128 x 128 x 7168 = 117440512: 187105280. Experts 9 x 3 x 7168 x 2048 = 396361728 in 58 layers,
    # 3 x 7168 x 18432 = 396361728 in 3: the layers are all alike, 583467008 x 61 = 35591487488. Head 7168 x 129280.
    # Attention at 4096: 2048 x 128 x (192 + 128) x 61 x 6 = 30702305280.
    config = model("deepseek_v3")
    head = 7168 * 129280
    assert flops_per_token(config, 4096) == 6 * (35591487488 + head) + 30702305280
    # One module more: a layer, 2 x 7168^2 and a head.
    more = flops_per_token(model("deepseek_v3_mtp"), 4096) - flops_per_token(config, 4096)
    assert more == 6 * (583467008 + 2 * 7168**2 + head) + 30702305280 / 61


def test_kinds_of_a_mixture() -> None:
    parts = step_flops(model("deepseek_v3_mtp"), 4096, mean_pairs(model("deepseek_v3_mtp"), [4096]))
    expert = 3 * 7168 * 2048
    assert parts.ffn == 6 * 4096 * 3 * 3 * 7168 * 18432
    assert parts.experts == 6 * 4096 * 59 * 8 * expert and parts.shared == 6 * 4096 * 59 * expert
    assert parts.mtp == 6 * 4096 * 2 * 7168**2 and parts.head == 6 * 4096 * 2 * 7168 * 129280
    assert parts.total == sum(dataclasses.asdict(parts).values())
    everything = dict.fromkeys(range(61), "full")
    found = flops_again(model("deepseek_v3"), 4096, 0.0, everything)
    assert found == step_flops(model("deepseek_v3"), 4096, 0.0).layers / 3


def test_of_some_tokens_only_the_rest_is_made_again_but_experts_are() -> None:
    mixtral, blocks = model("mixtral_8x7b"), TokenBlocks(64, 48)
    for part, elements in (("attention", 4096 * (4096 + 2 * 1024)), ("moe", 2 * 2 * 4096 * 14336)):
        again = 1.0 if part == "moe" else 0.25
        choice = SomeTokens(frozenset({part, "norm"}), blocks)
        assert flops_again(mixtral, 4096, 0.0, {0: choice}) == 2 * 4096 * elements * again


def _with_moe(config: ModelConfig, **changes: object) -> ModelConfig:
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))  # type: ignore[arg-type]


def test_every_second_layer_and_dense_first_ones() -> None:
    config = _with_moe(model("mixtral_8x7b"), every=2, dense_layers=3)
    routed = [layer for layer in range(32) if layer >= 3 and (layer - 3) % 2 == 1]
    assert config.moe_layers == tuple(routed) and len(routed) == 14
    network = 3 * 4096 * 14336
    parts = step_flops(config, 1, 0.0)
    assert (parts.experts, parts.ffn) == (6 * 14 * 2 * network, 6 * 18 * network)
    counts = parameter_count(config)
    assert parameter_count(model("mixtral_8x7b")).total - counts.total == 18 * (7 * network + 8 * 4096)
    *layers, head = layer_flops(config, 64)
    assert layers[4] - layers[3] == 2 * 64 * network and layers[3] == layers[0]
    assert sum(layers) + head == pytest.approx(flops_per_token(config, 64) * 64 / 3, rel=1e-12)


def test_null_experts_take_their_share_of_the_choices() -> None:
    config = model("mixtral_8x7b")
    router = dataclasses.replace(config.moe.router, null_experts=8)
    adaptive = _with_moe(config, router=router, top_k=4)
    # Half of four choices among eight experts and eight null ones.
    assert flops_per_token(adaptive, 4096) == flops_per_token(config, 4096)
    assert parameter_count(adaptive).active - parameter_count(config).active == 32 * 8 * 4096  # the router's rows


def test_biases_sinks_and_norms_count_as_parameters_only() -> None:
    # Per layer: query, key and value biases 4096 + 2 x 512, output 2880, sinks 64, norms 2 x 2880, router 32 x 2881,
    # experts 32 x (3 x 2880^2 + 3 x 2880); attention 2 x 2880 x 4096 + 2 x 2880 x 512; tables 2 x 201088 x 2880.
    layer = 5120 + 2880 + 64 + 5760 + 32 * 2881 + 32 * (3 * 2880**2 + 3 * 2880) + 2 * 2880 * 4608
    assert parameter_count(model("gpt_oss_20b")).total == 24 * layer + 2 * 201088 * 2880 + 2880
    olmoe = model("olmoe_1b_7b")
    heads = dataclasses.replace(olmoe, qk_norm_whole=False)
    assert parameter_count(olmoe).total - parameter_count(heads).total == 16 * (2 * 2048 - 2 * 128)
    bare = dataclasses.replace(model("gpt_oss_20b"), qkv_bias=False, out_bias=False, sinks=False)
    bare = _with_moe(bare, bias=False, router=dataclasses.replace(bare.moe.router, logit_bias=False))
    assert flops_per_token(bare, 4096) == flops_per_token(model("gpt_oss_20b"), 4096)


def test_pairs_of_layers_with_different_windows_are_their_mean() -> None:
    config = dataclasses.replace(model("gpt_oss_20b"), layers=3)  # windows in layers 0 and 2
    assert layer_windows(config) == (128, None, 128)
    assert mean_pairs(config, [512, 64]) == (2 * unmasked_pairs([512, 64], 128) + unmasked_pairs([512, 64])) / 3
    assert mean_pairs(model("llama3_8b"), [512]) == unmasked_pairs([512])
    assert mean_pairs(model("mistral_7b"), iter([8192])) == unmasked_pairs([8192], 4096)


@pytest.mark.parametrize("name", [*PUBLISHED_BILLIONS, *PUBLISHED_MIXTURES])
def test_layers_and_head_sum_to_a_third_of_training(name: str) -> None:
    length = 512
    assert sum(layer_flops(model(name), length)) == pytest.approx(
        flops_per_token(model(name), length) * length / 3, rel=1e-12
    )


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_parameter_counts(name: str) -> None:
    counts = parameter_count(model(name))
    assert counts.total / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], rel=1e-3)
    assert counts.active == counts.total


def test_gpt2_parameters_by_hand() -> None:
    # Per layer: qkv 768 x 2304 + 2304, output 768 x 768 + 768, up 768 x 3072 + 3072, down 3072 x 768 + 768,
    # two LayerNorms of 2 x 768: 1771776 + 590592 + 2362368 + 2360064 + 3072 = 7087872.
    # Tables: 50257 x 768 + 1024 x 768 = 39383808; the last LayerNorm 1536; the head is tied.
    counts = parameter_count(model("gpt2"))
    assert counts.total == 12 * 7087872 + 39383808 + 1536
    assert counts.embedding == 39383808


def test_llama_405b_is_the_published_figure() -> None:
    # NVIDIA's figures for Llama 3.1 405B at 8192 tokens, GFLOP per token: 2524 by its formula, 2521 from its published
    # TFLOP/s over tokens/s.
    per_token = flops_per_token(model("llama3.1_405b"), 8192) / 1e9
    assert per_token == pytest.approx(2524, rel=5e-3)
    assert per_token == pytest.approx(2521, rel=5e-3)


def test_llama3_8b_by_hand() -> None:
    # Multiply-adds per token and layer: q 4096 x 4096 = 16777216, k and v 2 x 4096 x 1024 = 8388608, output 16777216,
    # gate, up and down 3 x 4096 x 14336 = 176160768: together 218103808; 32 layers: 6979321856.
    # Head 4096 x 128256 = 525336576. Sum 7504658432; times 6: 45027950592.
    # Attention at 8192: 8192 / 2 = 4096 keys per query on average, 4096 wide, twice (scores, values), 32 layers:
    # 4096 x 4096 x 2 x 32 = 1073741824; times 6: 6442450944.
    assert flops_per_token(model("llama3_8b"), 8192) == 45027950592 + 6442450944
    assert flops_per_token_full_attention(model("llama3_8b"), 8192) == 45027950592 + 2 * 6442450944


def test_llama3_70b_by_hand() -> None:
    # Layer: q and output 2 x 8192^2 = 134217728, k and v 2 x 8192 x 1024 = 16777216, ffn 3 x 8192 x 28672 = 704643072:
    # 855638016; 80 layers 68451041280; head 8192 x 128256 = 1050673152; sum 69501714432; times 6 = 417010286592.
    # Attention at 8192: 4096 x 8192 x 2 x 80 = 5368709120; times 6 = 32212254720.
    assert flops_per_token(model("llama3_70b"), 8192) == 417010286592 + 32212254720


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_8b_by_hand_and_the_head_counts_when_tied(tied: bool) -> None:
    # Layer: q and output 2 x 4096 x 4096 = 33554432, k and v 2 x 4096 x 1024 = 8388608,
    # ffn 3 x 4096 x 12288 = 150994944: 192937984; 36 layers 6945767424; head 4096 x 151936 = 622329856;
    # sum 7568097280; times 6 = 45408583680. Attention at 4096: 2048 x 4096 x 2 x 36 x 6 = 3623878656.
    config = dataclasses.replace(model("qwen3_8b"), tied=tied)
    assert flops_per_token(config, 4096) == 45408583680 + 3623878656
    assert parameter_count(config).total == 8190735360 - (622329856 if tied else 0)


def test_qwen3_with_heads_wider_than_hidden_by_hand() -> None:
    # Qwen3 0.6B: 16 heads of 128 = 2048 on a width of 1024. Layer: q and output 2 x 1024 x 2048 = 4194304,
    # k and v 2 x 1024 x 1024 = 2097152, ffn 3 x 1024 x 3072 = 9437184: 15728640; 28 layers 440401920;
    # head 1024 x 151936 = 155582464; sum 595984384; times 6 = 3575906304. Attention at 4096: 2048 x 2048 x 2 x 28 x 6.
    assert flops_per_token(model("qwen3_0.6b"), 4096) == 3575906304 + 1409286144


def test_mistral_7b_with_its_window_by_hand() -> None:
    # Layer: as Llama 3 8B, 218103808; 32 layers 6979321856; head 4096 x 32000 = 131072000; sum 7110393856;
    # times 6 = 42662363136. At 8192 with a window of 4096: the first 4096 queries see 4096^2 / 2 = 8388608 pairs, the
    # other 4096 queries 4096 each = 16777216; together 25165824, that is 3072 per query.
    # 3072 x 4096 x 2 x 32 x 6 = 4831838208.
    assert flops_per_token(model("mistral_7b"), 8192) == 42662363136 + 4831838208
    # Up to the window's length the window changes nothing: 2048 x 4096 x 2 x 32 x 6 = 3221225472.
    assert flops_per_token(model("mistral_7b"), 4096) == 42662363136 + 3221225472
    # The full square knows no window: 8192 x 4096 x 2 x 32 x 6 = 12884901888.
    assert flops_per_token_full_attention(model("mistral_7b"), 8192) == 42662363136 + 12884901888


def test_gpt2_by_hand() -> None:
    # No gate. Layer: 768 x 2304 + 768 x 768 + 2 x 768 x 3072 = 1769472 + 589824 + 4718592 = 7077888; 12 layers
    # 84934656; head 768 x 50257 = 38597376; sum 123532032; times 6 = 741192192.
    # Attention at 1024: 512 x 768 x 2 x 12 x 6 = 56623104.
    assert flops_per_token(model("gpt2"), 1024) == 741192192 + 56623104


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_pairs_are_the_mask_up_to_half_its_edge(window: int | None) -> None:
    length = 64
    reach = min(length, window or length)
    mask = sum(1 for q in range(length) for k in range(length) if 0 <= q - k < reach)
    assert unmasked_pairs([length], window) == mask - reach / 2


def test_packed_documents_use_their_own_squares() -> None:
    assert unmasked_pairs([100, 28, 72]) == (100**2 + 28**2 + 72**2) / 2
    assert unmasked_pairs([100, 28], window=50) == (50 * 100 - 1250) + 28**2 / 2
    config = model("llama3_8b")
    whole = flops_per_step(config, 4096, unmasked_pairs([4096]))
    packed = flops_per_step(config, 4096, unmasked_pairs([1024] * 4))
    # 4 x 1024^2 / 2 pairs instead of 4096^2 / 2, at 6 x 2 x 4096 x 32 FLOPs a pair.
    assert whole - packed == (4096**2 - 4 * 1024**2) / 2 * 6 * 2 * 4096 * 32
    assert flops_per_step(config, 8 * 4096, unmasked_pairs([4096] * 8)) == 8 * whole


def test_kinds_sum_to_the_step() -> None:
    config = model("llama3_8b")
    parts = step_flops(config, 8192, unmasked_pairs([8192]))
    assert parts.head == 6 * 8192 * 4096 * 128256
    assert parts.attention == 6442450944 * 8192
    assert parts.total == parts.projections + parts.attention + parts.ffn + parts.head
    assert parts.total == flops_per_token(config, 8192) * 8192


def test_report() -> None:
    found = report("llama3_8b", 8192)
    assert found["params_total"] == found["params_active"] == 8030261248
    assert found["flops_per_token"] == 51470401536
    assert found["flops_per_token_full_attention"] == 57912852480
    assert sum(found["breakdown"].values()) == found["flops_per_token"]
    assert "L^2/2" in found["convention"]
    assert report(model("llama3_8b"), 8192)["flops_per_token"] == found["flops_per_token"]
    assert report(DENSE, 128)["params_total"] == 3115264
    mixture = report("deepseek_v3_mtp", 4096)
    assert mixture["params_total"] > mixture["params_active"] and mixture["breakdown"]["experts"] > 0
    assert sum(mixture["breakdown"].values()) == pytest.approx(mixture["flops_per_token"], rel=1e-12)


_WITHOUT_THE_MODELS = """
import sys
from pentad.models.costs import flops
flops.report("deepseek_v2", 64)
sys.exit("torch" in sys.modules)
"""


def test_counting_imports_no_torch() -> None:
    assert subprocess.run([sys.executable, "-c", _WITHOUT_THE_MODELS], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "seq_len", "message"),
    [
        ("llama3-8b", 8, "did you mean llama3_8b"),
        ("zzz", 8, "models: deepseek_v2, .*, gpt2"),
        ("llama3_8b", 0, "at least 1, got 0"),
        ("gpt2", 2048, r"model\.max_positions: 1024 learned positions are fewer than train\.seq_len=2048"),
    ],
)
def test_report_errors(name: str, seq_len: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        report(name, seq_len)
