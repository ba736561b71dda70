"""What the trained model is: how it is loaded, checked, given adapters and exported."""

from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import Policy, PolicyConfig, load_policy, load_tokenizer
from gspo_lightning.policy.reads import check_lengths
