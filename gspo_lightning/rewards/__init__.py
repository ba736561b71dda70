"""What a completion is worth: reward terms, their weighted sum, verifiers, a time limit."""

from gspo_lightning.rewards.calls import RewardError
from gspo_lightning.rewards.code_tests import CodeTests
from gspo_lightning.rewards.failed import score_or_keep
from gspo_lightning.rewards.given import GivenRewards, as_terms
from gspo_lightning.rewards.left_out import check_present, terms_left_out
from gspo_lightning.rewards.terms import (
    MarkedAnswer,
    RewardTerm,
    Scores,
    check_signatures,
    check_terms,
    columns_needed,
    count_names,
    load_whitening_state,
    overlong_penalty,
    ramp_tokens,
    row_checks,
    score,
    whitening_state,
)
from gspo_lightning.rewards.text_rewards import (
    CosineLength,
    LengthBonus,
    RepetitionPenalty,
    SoftOverlong,
    same_language,
    variety,
)
from gspo_lightning.rewards.time_limit import TimeLimit
from gspo_lightning.rewards.trl import TRLReward
from gspo_lightning.rewards.verifiers import (
    ExactMatch,
    LastNumber,
    MathVerify,
    RegexMatch,
    TagCount,
    TagFormat,
    ValidJSON,
)
from gspo_lightning.rewards.words import ChoiceLetter, WordMatch
