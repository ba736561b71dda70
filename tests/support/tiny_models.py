"""Policies, reward models, a tokenizer and rollouts small enough to build in code.

All sizes differ (P=2, G=3, L=4, T=5), so that a transposed axis fails.
"""

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from gspo_lightning.rollout import Rollout, completion_mask

PAD, EOS, VOCABULARY = 0, 1, 32
P, G, L, T = 2, 3, 4, 5

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DENSE_FIRST = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
OWN = {  # what an architecture has of its own; windows are shorter than any text here
    "gemma2": {"sliding_window": 3, "final_logit_softcapping": 2.0},  # every other layer, all
    "mistral": {"sliding_window": 3},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "granite": {"logits_scaling": 0.5, "embedding_multiplier": 2.0},  # logits over 0.5
    "cohere": {"logit_scale": 0.25},
    "gpt_oss": EXPERTS | {"num_local_experts": 4, "sliding_window": 3},  # attention sinks
    "qwen3_next": EXPERTS
    | {  # one recurrent layer, one with attention
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "shared_expert_intermediate_size": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # one short convolution
    # a dense layer, then one of experts with a shared one
    "deepseek_v3": EXPERTS
    | DENSE_FIRST
    | {
        "num_key_value_heads": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": EXPERTS | DENSE_FIRST,
    "ernie4_5_moe": EXPERTS
    | {"moe_layer_start_index": 1, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "mamba": {"state_size": 4},
    "recurrent_gemma": {"lru_width": 16, "block_types": ["recurrent", "attention"]},
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Chain sums, one token per symbol: "7+9=" -> "7+9=16, answer: 16"."""
    symbols = ["<pad>", "<eos>", "<unk>", *"0123456789", *"+-*=", ", ", "answer: ", " ", "\n"]
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"answer: |, |[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # no spaces between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def build_model(architecture: str = "qwen3", seed: int = 0, **options: Any) -> PreTrainedModel:
    """Two random float32 layers without dropout; weights large enough for varied logits."""
    common = {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    decoder = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    if architecture == "gpt2":  # learned absolute positions
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        decoder = drop | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    settings = common | decoder | OWN.get(architecture, {}) | options
    config = AutoConfig.for_model(architecture, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def build_rollout(seed: int = 0, with_ref: bool = True) -> Rollout:
    """P prompts of unequal length with G completions each: full, truncated and very short ones."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, 20, (P, L), generator=generator)
    prompt_mask = torch.ones(P, L, dtype=torch.bool)
    prompt_mask[1, :2] = False  # two tokens shorter than the other
    prompts = prompts.masked_fill(~prompt_mask, PAD)
    completion_ids = torch.randint(3, 20, (P * G, T), generator=generator)
    for row, length in enumerate([5, 3, 1, 4, 2, 5]):
        if row:  # row 0 is truncated, row 5 ends at the last allowed position
            completion_ids[row, length - 1] = EOS
            completion_ids[row, length:] = PAD
    mask, finished = completion_mask(completion_ids, [EOS])

    def logprobs() -> torch.Tensor:
        values = -torch.rand(P * G, T, generator=generator) * 3
        return values.masked_fill(~mask, 0)

    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0])
    advantages = torch.tensor([0.5, -0.5, 0.0, -0.4, -0.2, 0.6])
    return Rollout(
        prompt_ids=prompts.repeat_interleave(G, 0),
        prompt_mask=prompt_mask.repeat_interleave(G, 0),
        completion_ids=completion_ids,
        mask=mask,
        finished=finished,
        rows=[{"prompt": f"{p}", "row": p * G + g} for p in range(P) for g in range(G)],
        texts=[f"text {row}" for row in range(P * G)],
        group_size=G,
        old_logprobs=logprobs(),
        ref_logprobs=logprobs() if with_ref else None,
        rewards=rewards,
        reward_parts={"correct": rewards},
        advantages=advantages[:, None].expand(-1, T).clone(),
    )


def save_reward_model(path, tokenizer, num_labels):
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=num_labels,
        pad_token_id=0,
        initializer_range=0.3,
    )
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
