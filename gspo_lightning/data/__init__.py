"""Which rows a step sees, in which order, and how a run goes on in them."""

from gspo_lightning.data.demonstrations import SFTBatch, SFTData
from gspo_lightning.data.preferences import PreferenceData
from gspo_lightning.data.prompts import PromptData, collate_prompts
