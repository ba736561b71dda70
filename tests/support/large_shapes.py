"""Configs of models too large to load in a test: shapes alone, on the meta device."""

QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
}
QWEN3_32B = QWEN3 | {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 25600,
}
