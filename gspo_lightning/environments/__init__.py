"""Several turns in one completion: what an environment answers becomes tokens that do not train."""

from gspo_lightning.environments.conversations import Conversations
from gspo_lightning.environments.episode import (
    COLUMN,
    Environment,
    EnvironmentReward,
    Episode,
    Turn,
    shown,
    transcript,
)
from gspo_lightning.environments.messages import Messages
