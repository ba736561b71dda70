"""Every config, and the one of docs/own_run.md, is parsed and instantiated as train.py does it."""

import itertools
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
import yaml

from gspo_lightning.callbacks.files import AdaptiveKL
from gspo_lightning.compare.settings import TRIED
from gspo_lightning.critic.critic import CriticConfig
from gspo_lightning.frozen.models import RewardModel
from gspo_lightning.kl import MultiplicativeKL, ProportionalKL
from gspo_lightning.module import GSPOModule
from gspo_lightning.objectives import Objective
from gspo_lightning.supervised.reward_model import RewardModelModule
from gspo_lightning.supervised.sft import SFTModule
from support.command import instantiated, run
from support.repository import ROOT
from support.tiny_run import write_prompts

pytestmark = pytest.mark.usefixtures("at_the_root")

OVERLAYS = {
    "base.yaml",
    "origin.yaml",
    "sft_arithmetic_moe.yaml",
}  # not alone
CONFIGS = sorted({path.name for path in (ROOT / "configs").glob("*.yaml")} - OVERLAYS)
TASKS, ALGORITHMS, KL, HARDWARE, MODELS = (
    sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml"))
    for folder in ("task", "algorithm", "kl", "hardware", "model")
)
FILES = sorted(
    str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").glob("**/*.yaml")
)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_instantiated(name, tmp_path):
    cli = instantiated("--config", ROOT / "configs" / name, "--trainer.default_root_dir", tmp_path)
    assert isinstance(cli.model, (GSPOModule, RewardModelModule, SFTModule))


@pytest.mark.parametrize("name", FILES)
def test_config_begins_with_what_it_is(name):
    assert (ROOT / "configs" / name).read_text().startswith("# ")


def test_the_command_line_can_take_back_what_a_config_sets():
    """Also of keys so deep that jsonargparse takes their null for a text."""
    module = instantiated(
        *("--config", "configs/arithmetic.yaml", "--model.policy.lora={rank: 4}"),
        *("--model.policy.lora=null", "--model.sampler.batch_size=5"),
        *("--model.sampler.batch_size", "null", "--model.policy.stop_strings=null"),
    ).model
    policy = module.policy_config
    assert (policy.lora, policy.stop_strings, module.sampler.batch_size) == (None, None, None)


def test_the_demo_is_what_the_readme_says():
    cli = instantiated("--config", "configs/arithmetic.yaml")
    assert cli.model.objective.ratio == "sequence"
    assert cli.model.objective.aggregation == "sequence_mean"
    assert cli.model.sampler.temperature == 1.0
    longest = max(
        len(cli.model.tokenizer(row)["input_ids"])
        for line in (ROOT / "data/arithmetic/demos.jsonl").read_text().splitlines()
        for row in [yaml.safe_load(line)["completion"]]
    )
    assert longest + 1 <= cli.model.sampler.max_new_tokens  # else right answers are cut off


# ---- base.yaml with overlays on top -------------------------------------------------------------


@pytest.fixture
def stack(model_dir, tmp_path, monkeypatch):
    """Instantiate base.yaml and overlays, in a folder with every file that they name."""
    for name in ("gsm8k/train", "gsm8k/test", "preference/prompts", "preference/heldout"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_prompts(tmp_path / "data" / f"{name}.jsonl")
    for name in ("arithmetic", "scenarios"):
        (tmp_path / "data" / name).symlink_to(ROOT / "data" / name)
    (tmp_path / "models" / "reward").mkdir(parents=True)
    (tmp_path / "models" / "reward" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def build(*names, options=()):
        files = [("--config", ROOT / "configs" / f"{name}.yaml") for name in ("base", *names)]
        # this machine may have no GPU; what a hardware overlay says of it is read by a test below
        here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
        policy = ["--model.policy.path", model_dir]
        return instantiated(*itertools.chain(*files), *here, *policy, *options)

    return build


def kl_callbacks(cli):
    return [c for c in cli.trainer.callbacks if isinstance(c, AdaptiveKL)]


GSPO = Objective("sequence", "clip", "sequence_mean", 3e-4, 4e-4)
# name: objective, advantages, KL coefficient, dynamic sampling, overlong slope, steps per epoch
ROWS = {
    "gspo": (GSPO, "normalized", 0.0, False, None, 4),
    "gspo_token": (
        Objective("sequence_token", "clip", "sequence_mean", 3e-4, 4e-4),
        *("normalized", 0.0, False, None, 4),
    ),
    "grpo": (
        Objective("token", "clip", "sequence_mean", 0.2, 0.2),
        *("normalized", 0.04, False, None, 1),
    ),
    "dapo": (
        Objective("token", "clip", "token_mean", 0.2, 0.28),
        *("normalized", 0.0, True, 205, 16),  # a fifth of 1,024 tokens
    ),
    "dr_grpo": (
        Objective("token", "clip", "fixed_length", 0.2, 0.2),
        *("relative", 0.0, False, None, 4),
    ),
    "cispo": (
        Objective("token", "cispo", "token_mean", 1.0, 4.0),
        *("normalized", 0.0, True, 205, 4),
    ),
    "gspo_sum": (
        Objective("sequence_sum", "clip", "sequence_mean", 0.2, 0.2),
        *("normalized", 0.0, False, None, 4),
    ),
    "ppo": (
        Objective("token", "clip", "token_mean", 0.2, 0.2),
        *("gae", 0.02, False, None, 8),
    ),
    "origin_sequence": (
        Objective("sequence_sum", "clip", "sequence_mean", 0.2, 0.2),
        *("relative", 0.2, False, None, 1),
    ),
    "origin_token": (
        Objective("token", "clip", "fixed_length", 0.2, 0.2),
        *("relative", 0.2, False, None, 1),
    ),
}


@pytest.mark.parametrize("name", ROWS)  # the others: test_algorithms holds their papers' numbers
def test_an_algorithm_is_its_row(stack, name):
    # the limit of base.yaml, of which the slopes are a fifth
    long = ["--model.sampler.max_new_tokens", "1024"]
    cli = stack("task/gsm8k", "hardware/cpu", f"algorithm/{name}", options=long)
    model = cli.model
    row = (model.objective, model.advantages, model.kl_coef, model.drop_flat_groups)
    assert (*row, model.overlong_ramp, model.num_minibatches) == ROWS[name]
    assert (model.reference is not None) == (model.kl_coef > 0)
    origin = name.startswith("origin")
    assert (model.num_epochs, model.entropy_coef) == ((4, 0.01) if origin else (1, 0.0))
    sampler = (model.sampler.group_size, model.sampler.temperature)
    assert sampler == {"ppo": (1, 1.0)}.get(name, (4, 0.7) if origin else (8, 1.0))
    assert model.critic_config == (CriticConfig() if name == "ppo" else None)
    # as many completions for each, or a comparison would be one of budgets
    size = cli.datamodule.prompts_per_rollout * model.sampler.group_size
    assert size == (64 if origin else 128)


def test_the_stack_that_base_shows_is_instantiated(stack):
    text = (ROOT / "configs" / "base.yaml").read_text()
    base, *overlays = re.findall(r"--config ([a-z]\S*)", text)
    assert base == "base"
    kinds = [name.partition("/")[0] for name in overlays]
    assert kinds == ["task", "hardware", "algorithm", "kl"]
    cli = stack(*overlays)
    assert (cli.model.frozen.device, len(kl_callbacks(cli))) == ("policy", 1)


def test_base_alone_is_gspo(stack):
    model = stack("task/gsm8k").model
    assert (model.objective, model.advantages, model.reference) == (GSPO, "normalized", None)


def test_a_slope_is_a_share_of_the_limit_or_a_number_of_tokens(stack):
    names = ("task/arithmetic", "hardware/cpu", "algorithm/dapo")  # at most 40 tokens
    assert stack(*names).model.overlong_ramp == 8
    assert stack(*names, options=["--model.overlong_ramp", "5"]).model.overlong_ramp == 5
    with pytest.raises(ValueError, match=r"overlong_ramp must be in \[1, 40\] tokens.*got 205"):
        stack(*names, options=["--model.overlong_ramp", "205"])


@pytest.mark.parametrize(
    ("task", "kl"), [("gsm8k", kl) for kl in KL] + [(t, "adaptive") for t in TASKS if t != "gsm8k"]
)
def test_every_task_and_every_kl_overlay_go_together(stack, task, kl):
    cli = stack(f"task/{task}", "hardware/cpu", "algorithm/gspo", f"kl/{kl}")
    assert (cli.model.reference is None) == (kl == "off")
    assert len(kl_callbacks(cli)) == (kl in ("adaptive", "origin"))
    assert cli.model.kl_coef == (0.04 if kl in ("fixed", "following") else 0.0)
    assert len([c for c in cli.trainer.callbacks if type(c).__name__ == "CurvePlot"]) == 1
    if kl == "adaptive":
        assert kl_callbacks(cli)[0].rule == ProportionalKL(target=0.05, rollouts=2)
    if kl == "origin":
        assert kl_callbacks(cli)[0].rule == MultiplicativeKL(0.01, minimum=0.01, maximum=1.0)
        assert kl_callbacks(cli)[0].coef == 0.2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_takes_a_kl_overlay_on_top(stack, algorithm):
    names = ("task/gsm8k", "hardware/two_gpu", f"algorithm/{algorithm}", "kl/adaptive")
    cli = stack(*names)
    assert cli.model.reference is not None and cli.model.frozen.device == "cuda:1"
    assert len(kl_callbacks(cli)) == 1


def test_the_defaults_of_base_fit_each_other(stack):
    """Rounding within the clip range, a prompt read once, a KL rule that can answer in the run."""
    cli = stack("task/gsm8k", "kl/adaptive")
    model, (adaptive,) = cli.model, kl_callbacks(cli)
    assert str(cli.trainer.precision) == "32-true" and model.policy_config.dtype == "float32"
    assert model.micro_batch_size == model.sampler.group_size
    coef, rollouts = adaptive.coef, cli.datamodule.num_rollouts
    for _ in range(rollouts // 10):
        coef = adaptive.rule.next_coef(coef, 1.0, sequences=32)
    assert coef > 5 * adaptive.coef


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", ["gsm8k", "arithmetic"])
def test_a_kind_of_model_goes_on_any_task_and_under_any_algorithm(stack, name, task):
    model = stack(f"task/{task}", "hardware/cpu", f"model/{name}").model
    found = model.optimizer_config.learning_rate, model.objective.clip_high
    assert found == {"small": (2e-4, 5e-3), "lora": (1e-5, 4e-4)}[name]
    assert (model.policy_config.lora is not None) == (name == "lora")
    model = stack(f"task/{task}", f"model/{name}", "algorithm/dapo").model
    assert model.objective.clip_high == 0.28


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_kind_of_model_trains_on_the_embedded_task(tmp_path, capsys, name):
    files = ("base", "task/arithmetic", f"model/{name}", "hardware/cpu")
    config = " ".join(f"--config configs/{file}.yaml" for file in files)
    small = "--data.num_rollouts 1 --data.prompts_per_rollout 4 --trainer.limit_val_batches 0"
    code, _, err = run(capsys, f"fit {config} {small} --trainer.default_root_dir {tmp_path}/run")
    assert code == 0, err
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_every_line_of_the_page_on_settings_is_a_config_and_stands_there(
    stack, model_dir, tmp_path
):
    page = (ROOT / "docs" / "choosing_settings.md").read_text()
    for model in ("chat/policy", "chat/open", "base/policy"):
        shutil.copytree(model_dir, tmp_path / "made" / model)
    for name in ("train", "heldout"):
        write_prompts(tmp_path / "made" / "base" / f"{name}.jsonl")
    seen = set()
    for name, options in TRIED.items():
        assert f"\n| {name} |" in page
        settings = frozenset(word for word in options.split() if not word[0].isdigit())
        if settings in seen:
            continue  # other numbers for the same settings
        seen.add(settings)
        options = options.replace("configs/", f"{ROOT}/configs/")
        options = options.replace("{made}", str(tmp_path / "made"))
        assert isinstance(stack("task/arithmetic", options=shlex.split(options)).model, GSPOModule)


def test_grpos_penalty_can_be_switched_off(stack):
    model = stack("task/gsm8k", "algorithm/grpo", "kl/off").model
    assert (model.reference, model.kl_coef) == (None, 0.0)


@pytest.mark.parametrize(
    ("hardware", "device", "accelerator", "devices"),
    [
        ("cpu", "cpu", "cpu", 1),
        ("fsdp2", "policy", "gpu", "auto"),
        ("one_gpu", "policy", "gpu", 1),
        ("two_gpu", "cuda:1", "gpu", [0]),
    ],
)
def test_a_machine_places_policy_reference_and_reward_model(
    stack, monkeypatch, hardware, device, accelerator, devices
):
    said = yaml.safe_load((ROOT / "configs" / "hardware" / f"{hardware}.yaml").read_text())
    assert (said["trainer"]["accelerator"], said["trainer"]["devices"]) == (accelerator, devices)
    model = stack("task/preference", f"hardware/{hardware}", "algorithm/grpo").model
    assert isinstance(model.rewards["taste"].fn, RewardModel)
    places = {}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(
        "gspo_lightning.frozen.models.check_model_folder", lambda *_: None
    )  # it is empty
    policy = SimpleNamespace(type="cuda", index=0)
    for part in (RewardModel, type(model.reference)):
        monkeypatch.setattr(part, "load", lambda self, *a: places.update({self: a[-1]}), False)
        monkeypatch.setattr(part, "__hash__", object.__hash__, False)
    model.frozen.load(model.policy_config, policy, with_reference=True)
    found = {"policy" if place is policy else str(place) for place in places.values()}
    assert (len(places), found) == (2, {device})


def test_hardware_has_an_overlay_for_every_test_above():
    assert HARDWARE == ["cpu", "fsdp2", "one_gpu", "two_gpu"]
    assert set(ROWS) <= set(ALGORITHMS)


@pytest.mark.parametrize("machine", [(), ("hardware/cpu",)])
def test_the_origins_numbers(stack, machine):
    cli = stack("task/arithmetic", "origin", *machine)
    model = cli.model
    assert model.objective == Objective("sequence_sum", "clip", "sequence_mean", 0.2, 0.2)
    sampler = model.sampler
    assert (sampler.group_size, sampler.max_new_tokens, sampler.temperature) == (4, 128, 0.7)
    assert (model.num_epochs, model.num_minibatches, model.entropy_coef) == (4, 1, 0.01)
    assert model.frozen.device == ("cpu" if machine else "cuda:1")
    (adaptive,) = kl_callbacks(cli)
    assert (adaptive.coef, adaptive.warmup) == (0.2, 0)
    rule = MultiplicativeKL(0.01, factor_up=1.5, factor_down=0.5, minimum=0.01, maximum=1.0)
    assert adaptive.rule == rule
    said = yaml.safe_load((ROOT / "configs" / "origin.yaml").read_text())["trainer"]
    assert (said["accelerator"], said["devices"]) == ("gpu", [0])


def test_the_gsm8k_reward_reads_the_number_behind_the_mark(stack):
    term = stack("task/gsm8k").model.rewards["right"]
    right = [
        "6 * 12 = 72\n#### 72",
        "#### 72\nIn 3 steps.",
        "The answer is 72.\n3",
        r"\boxed{72} of 3",
    ]
    wrong = ["#### 73", "#### 72\n#### 3", "The answer is 7, not\n72.", "none", "", "5 * 72"]
    rows = [{"answer": "72"}] * 10
    assert term.fn(rows, right + wrong) == [1.0] * 4 + [0.0] * 6


def test_few_shot_prompts_go_on_top_of_a_task(stack):
    cli = stack("task/gsm8k", "sampler/few_shot")
    assert cli.model.policy_config.stop_strings == ["\nQ:"]
    assert not cli.datamodule.chat_template


def test_the_whole_config_of_the_pages_is_instantiated(tmp_path, model_dir):
    text = (ROOT / "docs" / "own_run.md").read_text()
    found = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    blocks = [block for block in found if "\nmodel:" in block]
    assert blocks
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "my_rewards.py").write_text(
        "def polite(rows, completions):\n    return [float('please' in c) for c in completions]\n"
    )
    sys.path.insert(0, str(tmp_path))
    for i, block in enumerate(blocks):
        config = tmp_path / f"readme{i}.yaml"
        config.write_text(block)
        cli = instantiated(
            "--config", config,
            "--model.init_args.policy.path", model_dir,
            "--data.init_args.path", prompts,
            "--data.init_args.val_path", prompts,
            "--trainer.default_root_dir", tmp_path / "run",
        )  # fmt: skip
        assert isinstance(cli.model, GSPOModule)
    sys.path.remove(str(tmp_path))


def test_a_text_that_begins_like_a_comment_is_a_text(tmp_path, model_dir):
    """In a file and on the command line."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    settings = {
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path / "run")},
        "model": {
            "class_path": "gspo_lightning.GSPOModule",
            "init_args": {
                "policy": {"path": str(model_dir)},
                "rewards": {
                    "right": {
                        "fn": {
                            "class_path": "gspo_lightning.rewards.LastNumber",
                            "init_args": {"pattern": "####(.*)"},
                        }
                    }
                },
            },
        },
        "data": {
            "class_path": "gspo_lightning.PromptData",
            "init_args": {"path": str(prompts), "system_prompt": "# Rules\nBe brief."},
        },
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = ["--config", config, "--data.chat_template=true"]
    cli = instantiated(*command)
    assert cli.model.rewards["right"].fn.patterns[0].pattern == "####(.*)"
    assert cli.datamodule.system_prompt == "# Rules\nBe brief."
    assert instantiated(*command, "--data.system_prompt", "# x").datamodule.system_prompt == "# x"
    assert instantiated(*command, "--data.system_prompt", "null").datamodule.system_prompt is None
