"""Class paths that changed when the package got rooms, and what they are now.

A config with an old path is refused in one line that says the new one; a checkpoint whose config
had it is compared as if it had the new one, so that a run begun before goes on.
"""

# By module, or by class where the module's name is a room's now and holds something else.
MOVED = {
    "gspo_lightning.checkpoint_io": "gspo_lightning.checkpoint.io",
    "gspo_lightning.classifier": "gspo_lightning.frozen",
    "gspo_lightning.experiment": "gspo_lightning.compare.experiment",
    "gspo_lightning.gae": "gspo_lightning.critic.gae",
    "gspo_lightning.lora": "gspo_lightning.policy",
    "gspo_lightning.predictions": "gspo_lightning.callbacks",
    "gspo_lightning.preferences": "gspo_lightning.data",
    "gspo_lightning.progress": "gspo_lightning",
    "gspo_lightning.reward_model": "gspo_lightning.supervised",
    "gspo_lightning.sft": "gspo_lightning.supervised",
    "gspo_lightning.signals": "gspo_lightning.checkpoint.signals",
    "gspo_lightning.supervised.PreferenceData": "gspo_lightning.data.PreferenceData",
    "gspo_lightning.supervised.SFTData": "gspo_lightning.data.SFTData",
    "gspo_lightning.text_rewards": "gspo_lightning.rewards",
    "gspo_lightning.text_scores": "gspo_lightning.rewards",
    "gspo_lightning.time_limit": "gspo_lightning.rewards",
    "gspo_lightning.tracing": "gspo_lightning",
    "gspo_lightning.verifiers": "gspo_lightning.rewards",
}


def moved(path: str) -> str:
    """The class path as it is now; one that never changed comes back as it is.

    >>> moved("gspo_lightning.verifiers.MathVerify"), moved("mine.reward")
    ('gspo_lightning.rewards.MathVerify', 'mine.reward')
    """
    if path in MOVED:
        return MOVED[path]
    module, _, name = path.rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else path
