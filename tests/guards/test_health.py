import json
import warnings
from pathlib import Path

import pytest

from gspo_lightning.callbacks.files import AdaptiveKL
from gspo_lightning.guards.health import LONG, PATIENCE, RULES, START, STEADY, Health, what_fits
from gspo_lightning.kl import MultiplicativeKL, ProportionalKL
from gspo_lightning.objectives import Objective
from support.command import REAL, checkpoints, run
from support.repository import ROOT

WELL = {
    "train/clip_fraction_sequences": 0.1,
    "train/clip_fraction_tokens": 0.1,
    "rollout/truncated_fraction": 0.1,
    "env/out_of_turns": 0.0,
    "rollout/flat_best_fraction": 0.2,
    "rollout/flat_worst_fraction": 0.2,
    "rollout/flat_groups_kept": 0.0,
    "policy/entropy": 0.5,
    "policy/ratio_noise": 0.0,
    "policy/sampler_noise": 0.0,
    "train/kl_divergence": 0.01,
    "train/kl_coef": 0.2,
    "train/avg_response_length": 20.0,
    "train/reward": 0.5,
    "reward/group_std": 0.4,
    "sampler/ess": 0.9,
    "sampler/log_ratio_std": 0.05,
}
NAMES = {name.rpartition("/")[2]: name for name in WELL}


def figures(**changes):
    """Figures of a healthy rollout, but for some, named by their last part."""
    return WELL | {NAMES[name]: value for name, value in changes.items()}


def watch(objective=Objective(), steps=4, rule=None, **options):  # noqa: B008
    health = Health(objective, steps, limit=100, **options)
    health.begin([AdaptiveKL(rule or MultiplicativeKL(target=0.01, maximum=1.0))])
    return health


def said(health, rollouts):
    """Each message, with the number of the rollout in which it was said."""
    messages = []
    for number, rollout in enumerate(rollouts, start=1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            health.check(rollout)
        messages += [(number, str(warning.message)) for warning in caught]
    return messages


CASES = [  # rule, figures that show it, figures that just do not, cause, setting
    ("unclipped", {"clip_fraction_sequences": 0.0}, {"clip_fraction_sequences": 0.01},
     "does nothing", "clip_low"),
    ("overclipped", {"clip_fraction_sequences": 0.61}, {"clip_fraction_sequences": 0.6},
     "61% of the ratios are clipped", "learning_rate"),
    ("truncated", {"truncated_fraction": 0.51}, {"truncated_fraction": 0.5},
     "51% of the completions hit the limit of 100 tokens", "max_new_tokens"),
    ("truncated", {"truncated_fraction": 0.9, "out_of_turns": 0.8}, {"truncated_fraction": 0.5},
     "80% of the episodes had no turn left", "sampler.max_turns"),
    ("flat_best", {"flat_best_fraction": 0.5, "flat_worst_fraction": 0.11},
     {"flat_best_fraction": 0.5, "flat_worst_fraction": 0.1}, "all best (50%)", "harder prompts"),
    ("flat_worst", {"flat_best_fraction": 0.11, "flat_worst_fraction": 0.5},
     {"flat_best_fraction": 0.1, "flat_worst_fraction": 0.5}, "all worst (50%)", "easier ones"),
    ("draws", {"flat_groups_kept": 3.0}, {"flat_groups_kept": 0.0},
     "left 3 of a rollout's groups", "model.max_draws"),
    ("entropy", {"entropy": 0.049}, {"entropy": 0.051}, "from 0.5 to 0.049", "entropy_coef"),
    ("kl", {"kl_divergence": 0.041, "kl_coef": 1.0}, {"kl_divergence": 0.04, "kl_coef": 1.0},
     "far above its target of 0.01, and kl_coef is at its ceiling of 1", "maximum or target"),
    ("kl_above", {"kl_divergence": 0.041, "kl_coef": 0.99},
     {"kl_divergence": 0.04, "kl_coef": 0.99}, "while kl_coef went from 0.2 to 0.99", "rollouts"),
    ("kl_below", {"kl_divergence": 0.0024, "kl_coef": 0.81},
     {"kl_divergence": 0.0026, "kl_coef": 0.81}, "at a kl_coef of 0.81, 4 times", "its maximum"),
    ("kl_below", {"kl_divergence": 0.0024, "kl_coef": 0.81},
     {"kl_divergence": 0.0024, "kl_coef": 0.79}, "a quarter of its target of 0.01", "factor_up"),
    ("noise", {"ratio_noise": 1.01e-4}, {"ratio_noise": 0.99e-4},
     "noise of 1.0e-04", "policy.dtype float32"),
    ("noise", {"sampler_noise": 9e-3}, {"sampler_noise": 0.99e-4},
     "30 times the clip range of 3.0e-04", "trainer.precision 32-true"),
    ("length", {"avg_response_length": 40.0}, {"avg_response_length": 30.0},
     "grew from 20 to", "overlong_ramp"),
    ("length", {"avg_response_length": 40.0}, {"avg_response_length": 40.0, "reward": 0.6},
     "grew from 20 to", "overlong_ramp"),
    ("length", {"avg_response_length": 99.0, "reward": 0.9},
     {"avg_response_length": 79.0, "reward": 0.9}, "grew from 20 to", "overlong_ramp"),
    ("variance", {"group_std": 0.0}, {"group_std": 0.02}, "do not differ", "data.path"),
    ("mismatch", {"ess": 0.49}, {"ess": 0.5}, "5.0e-02 nats) that weights between them leave 49%",
     "model.mismatch.correction to mean"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "sick", "well", "cause", "setting"), CASES)
def test_a_sign_that_lasts_is_said_once_with_cause_and_setting(rule, sick, well, cause, setting):
    health = watch()
    start, patience = [figures()] * START, RULES[rule].patience
    messages = said(health, start + [figures(**sick)] * 3 * max(patience, 10))
    assert len(messages) == 1, messages
    number, text = messages[0]
    assert number >= START + patience
    assert cause in text and setting in text
    assert said(watch(), start + [figures(**well)] * 3 * max(patience, 10)) == []


@pytest.mark.parametrize("rule", sorted({case[0] for case in CASES} - {"length"}))
def test_a_sign_must_last(rule):
    sick = next(case[1] for case in CASES if case[0] == rule)
    patience = RULES[rule].patience
    health = watch()
    assert said(health, [figures()] * START) == []
    for _ in range(3):
        assert said(health, [figures(**sick)] * (patience - 1) + [figures()]) == []
    assert [n for n, _ in said(health, [figures(**sick)] * patience)] == [patience]


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(RULES)


def test_the_documentation_lists_every_rule():
    text = (ROOT / "docs" / "doctor.md").read_text().partition("## Run health")[2]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    listed = {row[1].strip(" `"): int(row[3]) for row in rows}
    assert listed == {name: rule.patience for name, rule in RULES.items()}


def test_a_far_sampler_is_reported_by_what_corrects_for_it():
    sick = [figures(ess=0.4)] * STEADY
    ((_, text),) = said(watch(correction="sequence"), sick)
    assert "correction sequence is for shorter completions" in text and text.endswith("to mean")
    assert said(watch(correction="mean"), sick) == []


def test_one_step_per_rollout_cannot_clip_and_is_not_reported():
    assert said(watch(steps=1), [figures(clip_fraction_sequences=0.0)] * 2 * PATIENCE) == []


def test_flat_groups_cannot_clip_and_are_not_called_unclipped():
    flat = figures(clip_fraction_sequences=0.0, group_std=0.0)
    assert [text[:30] for _, text in said(watch(), [flat] * 2 * PATIENCE)] == [
        "the rewards do not differ with"
    ]


def test_a_token_ratio_is_judged_by_its_tokens():
    """Among the hundreds of tokens of a row one is nearly always clipped."""
    tokens = Objective(ratio="token", clip_low=0.2, clip_high=0.2)
    many = figures(clip_fraction_sequences=0.99, clip_fraction_tokens=0.1)
    assert said(watch(tokens), [many] * 10) == []
    many = figures(clip_fraction_sequences=0.99, clip_fraction_tokens=0.7)
    assert "70% of the ratios" in said(watch(tokens), [many] * 10)[0][1]


def test_a_rule_without_a_ceiling_is_never_at_it_and_may_be_too_slow():
    """The coefficient of a horizon far too long creeps while KL is at twelve times its target."""
    rule, coef, rollouts = ProportionalKL(target=0.05, horizon=2000), 0.05, []
    for _ in range(LONG):
        rollouts.append(figures(kl_divergence=0.6, kl_coef=coef))
        coef = rule.next_coef(coef, 0.6, sequences=32)
    ((number, text),) = said(watch(rule=rule), rollouts)
    assert number == LONG
    assert "(now 0.6), while kl_coef went from 0.0502 to 0.0515: the rule is too slow" in text


def test_noise_comes_with_what_fits():
    """A third of the range: three times the noise as range, or as many tokens as average it out."""
    ((_, text),) = said(watch(), [figures(sampler_noise=9e-3, avg_response_length=12.0)] * 2)
    assert "(clip_low 0.027, clip_high 0.036)" in text  # 3 * 9e-3, and as the range is shaped
    assert "97,000 tokens or more instead of 12" in text  # 12 * (3 * 9e-3 / 3e-4) ** 2
    summed = Objective("sequence_sum", clip_low=0.2, clip_high=0.2)
    assert "33 tokens or less instead of 300" in what_fits(0.2, summed, tokens=300)  # sum grows
    tokens = Objective("token", clip_low=0.2, clip_high=0.2)
    assert "tokens or" not in what_fits(0.2, tokens, tokens=300)  # each token has its own


def test_a_clip_range_that_does_not_fit_comes_with_the_spread_of_the_ratio():
    spread = {"policy/sequence_log_ratio_std": 4.4e-3}
    for clipped in (0.0, 0.9):
        rollout = figures(clip_fraction_sequences=clipped) | spread
        ((_, text),) = said(watch(), [rollout] * PATIENCE)
        assert "(log s spreads by 4.4e-03; `gspo doctor` proposes a range)" in text


def test_an_entropy_that_is_nothing_from_the_start_is_collapse():
    assert "collapsed" in said(watch(), [figures(entropy=0.004)] * 20)[0][1]


def test_a_token_clip_range_on_a_sequence_ratio_is_reported():
    with pytest.warns(UserWarning, match="0.2 never clips a length-normalised ratio"):
        Health(Objective(clip_low=0.2, clip_high=0.2), 4).begin([])
    Health(Objective(ratio="token", clip_low=0.2, clip_high=0.2), 4).begin([])
    Health(Objective(ratio="sequence_sum", clip_low=0.2, clip_high=0.2), 4).begin([])


@pytest.mark.parametrize("cut", [1, START + 2, START + STEADY + 1])
def test_a_resumed_run_says_the_same_at_the_same_rollout(cut):
    rollouts = [figures()] * START + [figures(entropy=0.01, group_std=0.0)] * 10
    whole = watch()
    expected = said(whole, rollouts)
    assert len(expected) == 2
    first, second = watch(), watch()
    messages = said(first, rollouts[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))  # plain values
    messages += [(n + cut, text) for n, text in said(second, rollouts[cut:])]
    assert messages == expected
    assert second.state_dict() == whole.state_dict()


def test_rules_read_only_what_all_ranks_share():
    """Seconds and memory are a rank's own: a stop that hangs on them would leave others waiting."""

    class Recorder(dict):
        read: set = set()  # noqa: RUF012

        def get(self, name, default=None):
            self.read.add(name)
            return super().get(name, default)

    health = watch()
    for cut in (0.1, 0.9) * START:
        health.check(Recorder(figures(kl_divergence=0.05, truncated_fraction=cut)))
    assert {name.partition("/")[0] for name in Recorder.read} <= {
        *("train", "policy", "rollout", "reward", "sampler", "env"),
    }
    assert Recorder.read == set(WELL) - {"train/clip_fraction_tokens"}


def test_stop_when_must_name_rules():
    with pytest.raises(ValueError, match=r"model.stop_when: there is no rule 'entrop', did you"):
        Health(Objective(), 4, ["entrop"])


def test_only_a_named_rule_stops():
    for names, stops in ((["entropy"], False), (["entropy", "truncated"], True)):
        health = watch(stop_when=names)
        messages = said(health, [figures(truncated_fraction=0.9)] * 10)
        assert len(messages) == 1
        assert (health.stopped is not None) == stops
    assert health.stopped == messages[0][1]
    assert health.stopped.endswith("the run ends here (model.stop_when: truncated)")


@pytest.mark.filterwarnings("always::UserWarning")
def test_stop_when_ends_the_run_with_a_checkpoint_and_continuing_goes_on(
    capsys, monkeypatch, tmp_path, model_dir
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    Path("prompts.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n' * 4)
    Path("real.yaml").write_text(REAL.replace("path: policy", f"path: {model_dir}"))
    command = "fit --config real.yaml --data.num_rollouts 12 --data.prompts_per_rollout 4"
    command += " --model.sampler.max_new_tokens 4 --trainer.accelerator cpu"
    code, _, err = run(capsys, f"{command} --model.stop_when ['variance']")  # no answer is right
    assert code == 1, err
    *_, truncated, why, go_on = err.splitlines()
    assert truncated.startswith("warning: 1") and "hit the limit of 4 tokens" in truncated
    assert why.startswith("warning: the rewards do not differ within groups")
    assert why.endswith("; the run ends here (model.stop_when: variance)")
    assert f"rollout={STEADY:06d}.ckpt; continue with: gspo fit" in go_on
    assert checkpoints() == [f"rollout={STEADY:06d}.ckpt"]
    code, _, err = run(capsys, f"{command} --model.stop_when ['variance'] --ckpt_path last")
    assert code == 0, err
    assert "do not differ" not in err
    assert checkpoints()[-1] == "rollout=000012.ckpt"
