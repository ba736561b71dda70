"""What a run needs to stop at any instant and go on exactly."""

from gspo_lightning.checkpoint.files import find_checkpoint
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint
