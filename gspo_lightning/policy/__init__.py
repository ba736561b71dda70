"""What the trained model is: how it is loaded, checked, given adapters, exported, and spoken to."""

from gspo_lightning.policy.chat import Chat
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import Policy, PolicyConfig, load_policy, load_tokenizer
from gspo_lightning.policy.reads import check_lengths
