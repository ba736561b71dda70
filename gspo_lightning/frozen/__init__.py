"""The frozen models, reference policy and reward models, on devices of their own."""

from gspo_lightning.frozen.models import (
    FrozenModels,
    ReferencePolicy,
    ReferenceSync,
    check_reference,
)
from gspo_lightning.frozen.reward_model import RewardModel
