"""A tiny config for every type of causal language model that transformers knows, built by rule.

Decides how a config is shrunk: sizes by the name of their field, layers to one of each kind. Types
that need more stand in ``OWN``, each with its reason; ``VARIANTS`` are types with settings of which
one is known to make numbers depend on a batch.
"""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, PAD, EOS = 32, 0, [1, 5, 9]
WINDOW = 9  # tokens; texts are longer
LAYERS = 4  # at most: one of each kind

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _named(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, Any] = {
    **_named("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCABULARY),
    **_named("hidden_size d_model n_embd embedding_size embedding_dim emb_dim", 16),
    **_named("word_embed_proj_dim input_embedding_size output_embedding_size lru_width", 16),
    **_named("num_hidden_layers n_layer n_layers num_layers num_blocks num_layers_per_stack", 2),
    **_named("decoder_layers encoder_layers num_decoder_layers num_encoder_layers", 2),
    **_named("num_attention_heads n_head n_heads num_heads attention_heads", 2),
    **_named("encoder_attention_heads decoder_attention_heads swa_num_attention_heads", 2),
    **_named("num_encoder_attention_heads num_decoder_attention_heads linear_num_heads", 2),
    **_named("num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups", 1),
    **_named("head_dim d_head attention_head_dim swa_head_dim kv_channels dim_head", 8),
    **_named("attention_head_size linear_head_dim index_head_dim v_head_dim", 8),
    **_named("linear_key_head_dim linear_value_head_dim qk_nope_head_dim qk_rope_head_dim", 8),
    **_named("qk_head_dim hidden_size_global", 16),
    **_named("encoder_hash_byte_group_vocab", 64),
    **_named("linear_num_key_heads linear_num_value_heads", 2),
    **_named("intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner dff dim_ff", 32),
    **_named("ffn_hidden_size feed_forward_size n_inner intermediate_size_mlp", 32),
    **_named("dense_intermediate_size attention_hidden_size", 32),
    **_named("moe_intermediate_size shared_intermediate_size expert_ffn_hidden_size", 16),
    **_named("shared_expert_intermediate_size shared_experts_intermediate_size", 16),
    **_named("moe_shared_expert_intermediate_size", 16),
    **_named("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_named("num_experts_per_tok num_experts_per_token moe_topk moe_k", 2),
    **_named("n_group num_expert_group topk_group n_groups", 1),
    **_named("q_lora_rank kv_lora_rank o_lora_rank hc_lowrank laurel_rank adapter_rank", 8),
    **_named("hidden_size_per_layer_input gated_norm_rank router_hidden_size", 8),
    "o_groups": 2,
    # many: a score is a sum of what each head has above zero, and with few heads it is often zero,
    # so that scores are equal and a change of length decides which tokens are seen
    "index_n_heads": 16,
    **_named("index_topk sliding_window window_size attention_window_size", WINDOW),
    **_named("local_attention attention_chunk_size sliding_window_size", WINDOW),
    **_named("max_position_embeddings n_positions max_seq_len n_ctx max_target_positions", 64),
    **_named("context_length model_max_length max_source_positions", 64),
    **_named("mamba_n_heads mamba_num_heads", 4),
    **_named("mamba_d_head mamba_head_dim mamba_headdim", 8),
    **_named("mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank", 8),
    **_named("chunk_size mamba_chunk_size", 4),
    **_named("rotary_dim", 4),
    **_named("first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": EOS[0],
    "is_decoder": True,
    "causal": True,  # types of encoders read what comes after a token without it
    "initializer_range": 0.2,  # logits that differ
    "block_size": 4,
}

LINEAR = "linear_attention"
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}

INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": 32,
}

WINDOWED = {
    "per_layer_config": {
        2: {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "head_dim": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        }
    }
}

# what a type needs beyond the rule, and why
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("its attention layers are named by number", MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("its inner width must fit its heads", MAMBA | {"mamba_d_ssm": 32}),
    "granitemoehybrid": (
        "without a list every layer is recurrent",
        MAMBA | {"layer_types": [LINEAR, "full_attention"]},
    ),
    "jamba": (
        "its attention and its experts come in periods",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": "auto"},
    ),
    "recurrent_gemma": (
        "its attention comes third",
        {"block_types": ["recurrent", "attention"]},
    ),
    "zamba": (
        "its shared block needs two places, its widths come from others",
        {
            "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "mamba_dt_rank": "auto",
            "attention_hidden_size": None,
            "attention_head_dim": None,
        },
    ),
    "zamba2": (
        "its shared block needs two places, its widths come from others",
        {
            "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "n_mamba_heads": 4,
        },
    ),
    "lfm2": (
        "without a list no layer is a convolution",
        {"layer_types": ["conv", "full_attention"]},
    ),
    "lfm2_moe": ("it has no list of its own", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": ("its inner width must fit its heads", {"num_heads": 4, "n_groups": 1}),
    "rwkv": ("its inner width must be its own", {"attention_hidden_size": None}),
    "diffllama": ("it halves its key-value heads", {"num_key_value_heads": 2}),
    "dots1": ("its default has no shared expert and does not run", {"n_shared_experts": 1}),
    "zaya": ("it takes one expert a token", {"num_experts_per_tok": 1}),
    "gpt_neo": ("its layers come in pairs", {"attention_types": [[["global", "local"], 1]]}),
    "codegen": ("its projection is cut into four", {"n_head": 4}),
    "cohere_compass_text": (
        "its default has no rotary embedding for its layers",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1e4}
                for kind in ("sliding_attention", "full_attention")
            },
        },
    ),
    "dbrx": (
        "its default attention has no rotary base",
        {
            "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "hrm_text": ("it counts its layers itself", {"num_layers_per_stack": None}),
    "qwen4_exp_text": ("its indexer has no sizes by default", INDEXER),
    "qwen4_exp": ("its indexer has no sizes by default", {"text_config": INDEXER}),
    "gemma3n_text": ("layers that share keys need one of their kind before", SHARED_KEYS),
    "reformer": (
        "its positions are two tables whose sizes multiply and add up",
        {
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [8, 8],
            "attn_layers": ["local", "lsh"],
            "num_buckets": 4,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
        },
    ),
    "xlstm": (
        "its widths are rounded up to 64",
        {"hidden_size": 64, "embedding_dim": None, "num_blocks": None, "chunk_size": 64},
    ),
    "cohere": ("its logits would hardly differ", {"logit_scale": 0.5}),
    "cohere2": ("its logits would hardly differ", {"logit_scale": 0.5}),
    "cohere2_moe": ("its logits would hardly differ", {"logit_scale": 0.5}),
    "inkling_text": ("its logits would hardly differ", {"logits_mup_width_multiplier": 1.0}),
    "minicpm3": ("its logits would be far apart", {"dim_model_base": 16}),
    "blt": ("it hashes bytes", {"encoder_hash_byte_group_size": [3]}),
    "deepseek_v4": ("it is slow", {"hc_sinkhorn_iters": 2}),
    "xmod": ("it has adapters of a language", {"default_language": "en_XX"}),
    "dots3_note_text": ("its windowed layers have sizes of their own", WINDOWED),
    "dots3_note": (
        "its windowed layers have sizes of their own, its other towers must end in its width",
        {
            "text_config": WINDOWED,
            "vision_config": {"adapter_in_dim": 16, "adapter_out_dim": 16},
            "audio_config": {"adapter_out_dim": 16, "adapter_input_size": 16},
        },
    ),
}
# types that no config of ours makes a model of, and why
UNBUILT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "it drafts for another model and does not run alone",
    "gemma4_unified_assistant": "it drafts for another model and does not run alone",
    "emu3": "transformers saves a part of its config, which it does not load again",
    "mllama": "transformers saves a part of its config, which it does not load again",
    "musicgen": "its causal model is built from a part of its config only",
    "musicgen_melody": "its causal model is built from a part of its config only",
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [2.0, 3.0, 4.0, 8.0],
    "original_max_position_embeddings": 27,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

# settings of which one is known, or likely, to make numbers depend on a batch
VARIANTS: dict[str, dict[str, Any]] = {
    "phi3/longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 27},
    "llama/longrope": {"rope_parameters": LONGROPE},
    "llama/dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 27},
    "qwen3/dynamic": {"rope_parameters": DYNAMIC | {"original_max_position_embeddings": 27}},
    "llama/yarn": {"rope_parameters": YARN},
    "qwen3_moe/router_logits": {"output_router_logits": True},
    "mixtral/router_logits": {"output_router_logits": True},
    "mixtral/jitter": {"router_jitter_noise": 0.1},
    "phimoe/input_jitter": {"input_jitter_noise": 0.1},
    "gpt2/short": {"n_positions": 12},
    "opt/short": {"max_position_embeddings": 12},
    "gpt2/layer_scale": {"scale_attn_by_inverse_layer_idx": True},
    "doge/fresh": {},
    "llama/dropout": {"attention_dropout": 0.5},
    "opt/layerdrop": {"layerdrop": 0.5},
    "llama/no_cache": {"use_cache": False},
    "qwen2/windows": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma4_text/shared_keys": SHARED_KEYS | {"num_kv_shared_layers": 2},
    "gemma4_text/experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "falcon/alibi": {"alibi": True},
    "falcon/new_decoder": {"new_decoder_architecture": True},
    "bert/encoder": {"is_decoder": False},
    "xlm/encoder": {"causal": False},
    "olmo/clipped": {"clip_qkv": 0.5},
    "gemma3_text/bidirectional": {"use_bidirectional_attention": True},
}
# settings of the policy besides its path
POLICY: dict[str, dict[str, Any]] = {
    name: {"attention": "eager"} for name in ("gemma2/eager", "gpt_oss/eager", "deepseek_v32/eager")
}
VARIANTS |= {name: {} for name in POLICY}
# variants whose weights are as transformers draws them: parts at zero hide what they do
FRESH = {"doge/fresh"}
# tokens of the prompts, where the usual ones do not do
TEXTS: dict[str, tuple[int, ...]] = {
    name: (24, 5) for name in ("phi3/longrope", "llama/longrope", "llama/dynamic", "qwen3/dynamic")
}


def small_config(kind: type, **own: Any) -> Any:
    """Shrink a class of configs; ``own`` settings stay as they are."""
    default = kind()
    known = {field.name for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in SMALL.items() if name in known}
    for name, value in list(settings.items()):
        if type(value) is int and vars(default).get(name) == 0:
            settings[name] = 0  # switched off
    if "kv_lora_rank" in known and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # latent attention
    count_name = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    settings |= _layers(default, known, count_name)
    for name, sub in kind.sub_configs.items():
        made = vars(default).get(name)
        within = own.get(name, {})
        if made is not None and isinstance(within, dict):
            own[name] = small_config(type(made) if sub is AutoConfig else sub, **within)
    config = kind(**settings | own)
    own_layers = config.to_dict().get("per_layer_config")
    if own_layers and "per_layer_config" not in own:  # sizes of single layers: twice the others'
        doubled = {
            layer: {name: 2 * settings.get(name, value) for name, value in sizes.items()}
            for layer, sizes in own_layers.items()
        }
        config = kind(**settings | own | {"per_layer_config": doubled})
    return config


def _layers(default: Any, known: set[str], count_name: str) -> dict[str, Any]:
    """The first layer of each kind, from all lists that have one entry a layer."""
    count = vars(default).get(count_name)
    lists = {
        name: value
        for name in known
        if isinstance(value := vars(default).get(name), list)
        and len(value) == count
        and len(set(map(str, value))) < count  # not the numbers of layers
    }
    if not lists:
        return {}
    first: dict[tuple, int] = {}
    for layer, kinds in enumerate(zip(*lists.values(), strict=True)):
        first.setdefault(tuple(map(str, kinds)), layer)
    chosen = list(first.values())[:LAYERS]
    while len(chosen) < 2:
        chosen.append(chosen[-1])
    shrunk = {name: [value[layer] for layer in chosen] for name, value in lists.items()}
    return {count_name: len(chosen)} | shrunk


def config_of(name: str) -> Any:
    """The tiny config of a type or of a variant (``TYPE-...``, see ``VARIANTS``)."""
    base = name.partition("/")[0]
    own = dict(OWN.get(base, ("", {}))[1])
    if name in VARIANTS:
        own |= VARIANTS[name]
    return small_config(CONFIG_MAPPING[base], **own)
