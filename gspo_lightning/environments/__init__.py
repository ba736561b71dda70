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
from gspo_lightning.environments.games import GuessNumber
from gspo_lightning.environments.messages import Messages
from gspo_lightning.environments.scripted import ScriptedUser
from gspo_lightning.environments.start import LeftOut, check_rewards, check_start
from gspo_lightning.environments.talk import Talk
from gspo_lightning.environments.tool_environment import ToolEnvironment
from gspo_lightning.environments.tools import PythonTool, SearchTool, calculate
