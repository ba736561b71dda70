"""What each logged figure is called, means, and in which order people see it.

Decides titles, units, descriptions and the two first groups of TensorBoard. The names under which
figures are logged are decided where they are counted; of those that a run makes up itself (its
reward terms, its k of pass@k) the pattern stands here.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Curve(NamedTuple):
    """A figure as people see it.

    Attributes:
        title: In a picture.
        unit: Of its axis.
        meaning: One or two sentences.
    """

    title: str
    unit: str
    meaning: str


SHARE = "share, 0 to 1"
NATS = "nats per token"
SECONDS = "seconds per rollout"

TABLE = {
    # train
    "train/reward": Curve(
        "Reward",
        "mean",
        "Reward of the completions sampled for training: the weighted sum of "
        "all terms, as the advantages see it.",
    ),
    "train/kl_divergence": Curve(
        "KL divergence",
        NATS,
        "How far the policy is from the reference: the k3 estimate, mean "
        "per sequence, then over sequences, before the updates of the rollout.",
    ),
    "train/clip_fraction_sequences": Curve(
        "Clip fraction",
        "share of sequences",
        "Sequences with a token whose ratio is clipped. With a sequence ratio, all tokens are: "
        "such a sequence teaches nothing in its step.",
    ),
    "train/avg_response_length": Curve(
        "Length", "tokens, mean", "Tokens of a completion, with the one that ends it."
    ),
    "policy/entropy": Curve(
        "Entropy",
        NATS,
        "How undecided the policy is about its next token, as it is updated. "
        "Near 0 the completions of a group are copies of each other, and nothing is learned.",
    ),
    "train/policy_loss": Curve(
        "Policy loss",
        "loss",
        "Clipped surrogate, mean over the optimizer steps. It says little: "
        "near 0 by construction, whether the policy learns or not.",
    ),
    "train/entropy_loss": Curve(
        "Entropy loss", f"−coefficient × {NATS}", "Bonus for entropy as a loss."
    ),
    "train/kl_loss": Curve(
        "KL loss",
        f"coefficient × {NATS}",
        "Penalty for the distance from the reference, as a loss.",
    ),
    "train/relative_advantage": Curve(
        "Relative advantage",
        "mean",
        "Mean advantage: 0 up to rounding, unless rewards are missing.",
    ),
    "train/kl_coef": Curve("KL coefficient", "coefficient", "Of the KL penalty in this rollout."),
    "train/clip_fraction_tokens": Curve(
        "Clip fraction of tokens",
        SHARE,
        "Tokens whose ratio is outside of the clip range: the "
        "unit in which the GSPO paper reports its 15 %.",
    ),
    # policy
    "policy/grad_norm": Curve(
        "Gradient norm", "norm", "Before clipping to `max_grad_norm`, mean over optimizer steps."
    ),
    "policy/ratio_min": Curve("Least ratio", "ratio", "Least importance ratio of the rollout."),
    "policy/ratio_max": Curve(
        "Greatest ratio", "ratio", "Greatest importance ratio of the rollout."
    ),
    "policy/ratio_noise": Curve(
        "Ratio noise",
        NATS,
        "Spread of log-ratios before any weight has moved: rounding alone. "
        "Keep it below a third of the clip range.",
    ),
    "policy/sampler_noise": Curve(
        "Sampler noise", NATS, "The same between the sampler's log-probs and the policy's own."
    ),
    "sampler/noise_after_sync": Curve(
        "Engine's noise",
        NATS,
        "Root mean square between the log-probs of an engine apart and the policy's own, in a few "
        "short completions behind each update: whether the engine has the policy's weights.",
    ),
    "policy/token_log_ratio_std": Curve(
        "Spread of token log-ratios", "nats", "How far single tokens move within a rollout."
    ),
    "policy/sequence_log_ratio_std": Curve(
        "Spread of log-ratios",
        NATS,
        "How far sequences move within a rollout: the quantity "
        "that a sequence ratio's clip range is set against.",
    ),
    "policy/old_from_sampler": Curve(
        "Old log-probs from the sampler",
        "0 or 1",
        "Whether the sampler's log-probs were used; else a pass recomputed them.",
    ),
    "policy/kl_clamped_tokens": Curve(
        "Clamped KL", "tokens", "Tokens whose distance to the reference was beyond 20 nats."
    ),
    "policy/clip_range": Curve("Clip range", "width", "The narrower side of the clip range."),
    # sampler
    "sampler/log_ratio_mean": Curve(
        "Sampler's log-ratio",
        NATS,
        "Log-prob under the policy, before its updates, minus that under the sampler: mean over "
        "tokens.",
    ),
    "sampler/log_ratio_std": Curve(
        "Spread of the sampler's log-ratios", "nats", "The same: standard deviation over tokens."
    ),
    "sampler/sequence_log_ratio_std": Curve(
        "Spread of the sampler's log-ratios by sequence",
        NATS,
        "The same, of each sequence's mean: to be set against the clip range.",
    ),
    "sampler/kl": Curve(
        "KL of sampler and policy",
        NATS,
        "How far the policy, before its updates, is from what drew the completions: the k3 "
        "estimate, mean per sequence, then over sequences.",
    ),
    "sampler/ess": Curve(
        "Effective sample size",
        SHARE,
        "What exact weights from sampler to policy, e to the sum of the log-ratios, would leave of "
        "the sequences: their sum squared, over their number and the sum of their squares.",
    ),
    "sampler/weight_mean": Curve(
        "Weight of sequences", "mean", "Of the policy loss; where `model.mismatch` weighs."
    ),
    "sampler/capped": Curve(
        "Capped weights", SHARE, "Sequences whose weight `mismatch.cap` bounds."
    ),
    "sampler/masked": Curve(
        "Masked sequences", SHARE, "Sequences that a limit of `model.mismatch` takes out."
    ),
    "sampler/version_lag": Curve(
        "Age of the sampler's weights", "rollouts", "Of `AsyncSampler`: 1 while it is ahead."
    ),
    # reward
    "reward/group_std": Curve(
        "Reward spread", "standard deviation", "Within groups. At 0 nothing can be learned."
    ),
    "reward/missing": Curve(
        "Missing rewards",
        "completions",
        "Completions that no term could score, or that were masked.",
    ),
    "reward/overlong": Curve("Overlong penalty", "mean", "Of completions close to the limit."),
    # rollout
    "rollout/truncated_fraction": Curve(
        "Truncated", SHARE, "Completions that hit the limit of `max_new_tokens`."
    ),
    "rollout/flat_best_fraction": Curve(
        "Solved groups",
        SHARE,
        "Groups whose rewards are all equal, at the rollout's best: they teach nothing any more.",
    ),
    "rollout/flat_worst_fraction": Curve(
        "Hopeless groups",
        SHARE,
        "Groups whose rewards are all equal, at the rollout's worst: they teach nothing yet.",
    ),
    "rollout/flat_groups_kept": Curve(
        "Flat groups kept", "groups", "What `drop_flat_groups` could not replace."
    ),
    "rollout/prompts_drawn": Curve(
        "Prompts drawn", "prompts", "With those drawn to replace others."
    ),
    "rollout/tokens": Curve("Tokens", "tokens", "Sampled in the rollout, on all ranks."),
    # critic
    "critic/value_loss": Curve("Value loss", "loss", "Of the critic, mean over optimizer steps."),
    "critic/value_mean": Curve("Values", "mean", "What the critic expects, per token."),
    "critic/clip_fraction": Curve("Clipped values", SHARE, "Tokens whose value moved too far."),
    "critic/grad_norm": Curve("Critic's gradient norm", "norm", "Before clipping."),
    "critic/explained_variance": Curve(
        "Explained variance",
        "at most 1",
        "1: the critic knew every return; 0: no better than their mean.",
    ),
    # optim
    "optim/learning_rate": Curve("Learning rate", "rate", "In this rollout."),
    "optim/skipped_steps": Curve(
        "Skipped steps", "optimizer steps", "Left out: nothing to learn in them, or a fault."
    ),
    "optim/faults": Curve(
        "Faults", "optimizer steps", "Skipped for NaN or infinities; each is written to `faults/`."
    ),
    # turns with an environment
    "env/turns": Curve("Turns", "turns, mean", "Turns of the policy in a completion."),
    "env/tokens": Curve(
        "Words of the environment",
        "tokens, mean",
        "Of a completion; they are read and not trained.",
    ),
    "env/out_of_turns": Curve(
        "Out of turns", SHARE, "Episodes that `max_turns` ended; they count as truncated."
    ),
    "env/errors": Curve(
        "Errors of the environment",
        "completions per rollout",
        "Each costs its own completion; `on_error` of the `EnvironmentReward` decides.",
    ),
    "env/timeouts": Curve(
        "Timeouts of the environment",
        "completions per rollout",
        "Episodes that gave no answer in `environment_seconds`.",
    ),
    # time
    "time/tokens_per_second": Curve(
        "Sampling speed",
        "tokens per second",
        "Of the first phase; of all three with `AsyncSampler`.",
    ),
    "time/rollout": Curve("Sampling", SECONDS, "First phase: completions are sampled."),
    "time/environment": Curve(
        "Environment", SECONDS, "Part of the first phase: waiting for an environment's answers."
    ),
    "time/score": Curve("Scoring", SECONDS, "Second phase: rewards, reference, old log-probs."),
    "time/optimise": Curve("Optimising", SECONDS, "Third phase: the optimizer steps."),
    "time/sync": Curve(
        "Sending weights",
        SECONDS,
        "To an engine apart from the policy: before the first phase; behind it, where it is ahead.",
    ),
    "time/reward": Curve("Rewards", SECONDS, "Part of the second phase."),
    "time/reference": Curve("Reference", SECONDS, "Part of the second phase."),
    "time/old_logprobs": Curve("Old log-probs", SECONDS, "Part of the second phase."),
    "time/values": Curve("Values", SECONDS, "Of the critic, part of the second phase."),
    # warm starts and reward models
    "train/loss": Curve("Loss", "nats", "Of the batch: the training's own objective."),
    "train/learning_rate": Curve("Learning rate", "rate", "In this optimizer step."),
    "train/accuracy": Curve("Accuracy", SHARE, "Pairs that the model puts right."),
    "train/margin": Curve("Margin", "score", "Chosen minus rejected, mean."),
    "val/loss": Curve("Held-out loss", "nats", "The same as in training, on held-out data."),
    "val/accuracy": Curve("Held-out accuracy", SHARE, "Held-out pairs that the model puts right."),
    "val/margin": Curve("Held-out margin", "score", "Chosen minus rejected, mean."),
    # val
    "val/accuracy_greedy": Curve(
        "Held-out accuracy",
        SHARE,
        "Held-out prompts whose most likely completion is correct "
        "(`evaluation.correct` at or above `threshold`).",
    ),
    "val/accuracy_sampled": Curve(
        "Held-out accuracy, sampled",
        SHARE,
        "Correct ones among completions of held-out prompts, sampled at `evaluation.temperature`.",
    ),
    "val/reward": Curve("Held-out reward", "mean", "Of completions sampled for held-out prompts."),
    "val/response_length": Curve("Held-out length", "tokens, mean", "Of the sampled completions."),
    "val/truncated_fraction": Curve("Held-out truncated", SHARE, "Of the sampled completions."),
}
# Names that a run makes up, after those above.
PATTERNS = {
    r"val/pass_at_(\d+)": Curve(
        "pass@{0}",
        SHARE,
        "Chance that one of {0} completions of a held-out prompt is correct, "
        "unbiased (arXiv:2107.03374).",
    ),
    r"val/reward_(.+)": Curve(
        "Held-out {0}", "mean", "Reward term `{0}` on held-out prompts, without its weight."
    ),
    r"memory/(\w+?)_gib(?:_(\w+))?": Curve(
        "Memory, {0}",
        "GiB",
        "Highest memory in the phase `{0}`; of another device than the "
        "policy's where the name ends with one.",
    ),
    "time/waiting_gradient": Curve(
        "Waiting, gradient",
        SECONDS,
        "Part of the third phase: for the mean of gradients over ranks, what is left of it when "
        "this rank has computed its own. With ddp; fsdp2 waits within its passes, unmeasured.",
    ),
    r"time/waiting_(\w+)": Curve(
        "Waiting, {0}",
        SECONDS,
        "In sums and gathers over all ranks in the phase `{0}`, most of it for the slowest. Where "
        "there are several ranks.",
    ),
    r"reward/(.+)": Curve(
        "Reward {0}",
        "mean or count",
        "Reward term `{0}` without its weight, or what a term counts.",
    ),
}

# TensorBoard sorts groups by name, opens the first two and pins nothing: a group that begins with a
# digit is the first screen. Only TensorBoard gets these; every figure keeps its own name.
LEARNING, HEALTH = "1 learning", "2 health"
FIRST_SCREEN = {
    "train/reward": f"{LEARNING}/1 reward",
    "val/accuracy_greedy": f"{LEARNING}/2 held-out accuracy",
    "train/kl_divergence": f"{LEARNING}/3 KL divergence",
    "train/clip_fraction_sequences": f"{LEARNING}/4 clip fraction",
    "train/avg_response_length": f"{LEARNING}/5 length",
    "policy/entropy": f"{LEARNING}/6 entropy",
    "reward/group_std": f"{HEALTH}/1 reward spread",
    "rollout/flat_best_fraction": f"{HEALTH}/2 solved groups",
    "rollout/flat_worst_fraction": f"{HEALTH}/3 hopeless groups",
    "rollout/truncated_fraction": f"{HEALTH}/4 truncated",
    "policy/grad_norm": f"{HEALTH}/5 gradient norm",
    "policy/sequence_log_ratio_std": f"{HEALTH}/6 spread of log-ratios",
}
HELD_OUT_REWARD = f"{LEARNING}/2 held-out reward"  # where nothing says what is correct
PICTURE = tuple(name for name, tag in FIRST_SCREEN.items() if tag.startswith(LEARNING))
# Charts of TensorBoard's custom scalars, memory and time last: title, and what the names match.
LAYOUT = {
    "Does it learn?": {
        "reward": ["train/reward$", "val/reward$"],
        "held-out accuracy": ["val/accuracy_"],
        "KL divergence": ["train/kl_divergence$"],
        "clip fraction": ["train/clip_fraction_"],
        "length": ["train/avg_response_length$", "val/response_length$"],
        "entropy": ["policy/entropy$"],
    },
    "Is it healthy?": {
        "reward spread within groups": ["reward/group_std$"],
        "groups without spread": ["rollout/flat_.*_fraction$"],
        "truncated": [".*/truncated_fraction$"],
        "gradient norm": [".*/grad_norm$"],
        "spread of log-ratios": ["policy/.*_log_ratio_std$"],
        "noise of log-ratios": ["policy/.*_noise$"],
        "sampler and policy": ["sampler/(kl|ess|log_ratio_std)$"],
        "pass@k": ["val/pass_at_"],
        "turns": ["env/turns$"],
        "reward terms": ["reward/(?!group_std|missing|overlong)"],
    },
    "Losses": {
        "policy loss": ["train/policy_loss$"],
        "KL and entropy loss": ["train/(kl|entropy)_loss$"],
        "KL coefficient": ["train/kl_coef$"],
        "learning rate": [".*/learning_rate$"],
        "critic": ["critic/(value_loss|explained_variance)$"],
    },
    "Time and memory": {
        "seconds per rollout": ["time/(rollout|score|optimise)$"],
        "tokens per second": ["time/tokens_per_second$"],
        "memory, GiB": ["memory/"],
    },
}


def curve(name: str) -> Curve | None:
    """Title, unit and meaning of a figure; None of one that is not this package's.

    >>> curve("val/pass_at_4").title, curve("mine/figure")
    ('pass@4', None)
    """
    name = re.sub("^test/", "val/", name)
    if name in TABLE:
        return TABLE[name]
    for pattern, made in PATTERNS.items():
        if found := re.fullmatch(pattern, name):
            return Curve(*(text.format(*found.groups()) for text in made))
    return None


def first_screen(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that TensorBoard shows first, by the names that put them there.

    >>> first_screen({"time/score": 2.0, "val/reward": 0.5, "train/reward": 0.25})
    {'1 learning/1 reward': 0.25, '1 learning/2 held-out reward': 0.5}
    """
    names = dict(FIRST_SCREEN)
    if "val/accuracy_greedy" not in figures:
        names["val/reward"] = HELD_OUT_REWARD
    found = {tag: figures[name] for name, tag in names.items() if name in figures}
    return dict(sorted(found.items()))


def description(tag: str) -> str:
    """What TensorBoard shows of a tag, in Markdown.

    >>> description("1 learning/6 entropy")[-45:]
    'learned. In nats per token: `policy/entropy`.'
    """
    names = {HELD_OUT_REWARD: "val/reward"} | {tag: name for name, tag in FIRST_SCREEN.items()}
    name = names.get(tag, tag)
    found = curve(name)
    return "" if found is None else f"{found.meaning} In {found.unit}: `{name}`."
