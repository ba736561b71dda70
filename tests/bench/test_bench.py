"""The benchmark: what it counts, that the work is the same, and how runs become figures."""

import argparse
import gc
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import make_models, trl_gspo
from gspo_lightning.bench import __main__ as bench
from gspo_lightning.bench import cases as bench_runs
from gspo_lightning.bench import parts as bench_parts
from gspo_lightning.bench import report as bench_report
from gspo_lightning.bench import scaling as bench_scaling
from gspo_lightning.bench import worker as bench_worker
from gspo_lightning.bench.cases import BenchError, Case
from gspo_lightning.bench.limits import (
    Shape,
    Work,
    data_sheet,
    measured_peak,
    products_alone,
    roofline,
    shape_of,
)
from gspo_lightning.bench.samplers import GenerateSampler
from gspo_lightning.engine import products
from gspo_lightning.guards.memory import reset_peaks
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.policy import Policy
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.sampling import GroupSampler
from support.tiny_models import build_model
from support.tiny_run import write_prompts

WORK = Work(prompts=(3, 4), lengths=(2, 1, 5, 3))


# ---- what is counted -----------------------------------------------------------------------------


def test_linear_layers_cost_what_a_counter_of_flops_finds():
    model, prompt, length = build_model("qwen3"), 4, 5
    ids = torch.randint(3, 20, (1, prompt)), torch.randint(3, 20, (1, length))
    masks = [torch.ones_like(part, dtype=torch.bool) for part in ids]
    completion_logprobs(model, ids[0], masks[0], ids[1], masks[1])  # tries once what it can do
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        completion_logprobs(model, ids[0], masks[0], ids[1], masks[1])
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    linear = shape_of(model)
    linear = Shape(linear.body, linear.head, attention=0, cache=0)
    assert Work((prompt,), (length,)).forward_flops(linear) == found["aten.mm"]


def test_attention_counts_each_pair_of_a_token_and_one_it_sees():
    pairs = 0
    for p, prompt in enumerate(WORK.prompts):
        pairs += sum(1 for i in range(prompt) for j in range(prompt) if j <= i)  # once per group
        for length in WORK.lengths[2 * p : 2 * p + 2]:
            whole = prompt + length - 1  # the last token is drawn and not read
            pairs += sum(1 for i in range(prompt, whole) for j in range(whole) if j <= i)
    assert WORK.attended == pairs
    assert WORK.forward_flops(Shape(0, 0, attention=6, cache=0)) == 4 * 6 * pairs


def test_a_completion_runs_until_its_last_token_is_drawn():
    assert [WORK.running(step) for step in range(6)] == [4, 3, 2, 1, 1, 0]


def test_a_shape_counts_every_weight_that_is_multiplied():
    model = build_model("qwen3")  # D 16, 2 layers, 2 heads of 8, 1 of keys, 32 wide, V 32
    attention, feed_forward = 16 * (16 + 8 + 8) + 16 * 16, 3 * 16 * 32
    assert shape_of(model) == Shape(
        body=2 * (attention + feed_forward), head=32 * 16, attention=2 * 16, cache=2 * 2 * 8
    )


def test_the_shape_of_a_model_that_also_sees_is_that_of_its_text():
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision | {"intermediate_size": 8}
    )
    assert shape_of(AutoModelForCausalLM.from_config(config)) == shape_of(build_model("qwen3"))


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, (989e12, 3.35e12)),
        ("NVIDIA H100 PCIe", torch.bfloat16, (756e12, 2.0e12)),
        ("NVIDIA H100 80GB HBM3", torch.float32, (67e12, 3.35e12)),
        ("NVIDIA L40S", torch.bfloat16, (362e12, 0.864e12)),
        ("NVIDIA L4", torch.bfloat16, (121e12, 0.3e12)),
        ("NVIDIA GeForce GTX 1080", torch.bfloat16, None),
    ],
)
def test_data_sheets_are_found_by_the_name_of_the_gpu(name, dtype, expected):
    assert data_sheet(name, dtype) == expected


def test_the_roofline_reads_weights_each_step_and_the_cache_of_what_runs():
    found = roofline(Shape(10, 7, 5, cache=3), WORK, width=2, flops=1e3, bandwidth=1e2)
    cached = 4 + (5 + 6 + 7 + 8) + (5 + 6)  # positions that completion tokens read, row by row
    assert found["rollout"] == pytest.approx(2 * (5 * (10 + 7) + 3 * cached) / 1e2)
    assert found["optimise"] == pytest.approx(3 * WORK.forward_flops(Shape(10, 7, 5, 3)) / 1e3)


def test_matrix_products_alone_do_the_flops_of_the_work(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)  # its FLOPs are not counted
    model = build_model("qwen3")
    shape = shape_of(model)
    linear = Shape(shape.body, shape.head, 0, 0)
    with FlopCounterMode(display=False) as counter:
        seconds = products_alone(model, WORK, updates=1)
    # sampling and a forward pass alike, and twice that for the backward pass
    assert counter.get_total_flops() == 4 * WORK.forward_flops(linear)
    assert all(value > 0 for value in seconds.values())


def test_the_peak_is_measured_where_no_data_sheet_says_it():
    assert measured_peak(torch.device("cpu"), torch.float32, size=64) > 1e6


# ---- one run -------------------------------------------------------------------------------------


def options(model_dir, prompts, *more):
    parser = argparse.ArgumentParser()
    bench_worker.add_arguments(parser)
    sizes = ["--steps=2", "--warmup=1", "--prompts-per-rollout=4", "--group-size=2"]
    sizes += ["--max-new-tokens=6", "--updates=2"]
    return parser.parse_args([f"--model={model_dir}", f"--prompts={prompts}", *sizes, *more])


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # set by the run, taken back by the fixture
    return write_prompts(tmp_path / "prompts.jsonl", count=10)


@pytest.fixture(scope="module")
def plain(model_dir, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        path = write_prompts(tmp_path_factory.mktemp("bench") / "prompts.jsonl", count=10)
        return bench_worker.run(options(model_dir, path))


def test_a_run_takes_the_prompts_in_the_order_of_the_file(plain):
    lengths = [2 * (1 + i % 4) for i in range(10)]  # "1=", "1+2=", ... as write_prompts makes them
    drawn = [lengths[i % 10] for i in range(12)]
    assert [list(rollout["prompts"]) for rollout in plain["rollouts"]] == [drawn[4:8], drawn[8:12]]


def test_a_run_counts_what_it_drew(plain):
    lengths = [n for rollout in plain["rollouts"] for n in rollout["lengths"]]
    assert len(lengths) == 2 * 4 * 2 and all(1 <= n <= 6 for n in lengths)
    assert plain["tokens"] == sum(lengths) / 2
    assert plain["mean_length"] == sum(lengths) / 16


@pytest.mark.parametrize("unit", ["wall_seconds", "cpu_seconds"])
def test_the_phases_of_a_run_are_parts_of_its_total(plain, unit):
    seconds = dict(plain[unit])
    assert seconds["reference"] == 0
    assert all(seconds[name] > 0 for name in ("rollout", "reward", "old_logprobs", "optimise"))
    total = seconds.pop("total")
    assert all(value < total for value in seconds.values())


def test_options_of_a_run_change_it(plain, model_dir, prompts):
    changed = ["--kl-coef=0.1", "--sampler=one_by_one", "--micro-batches=2"]
    changed += ["--settings", '{"overlong_ramp": 2}']
    result = bench_worker.run(options(model_dir, prompts, *changed))
    assert result["cpu_seconds"]["reference"] > 0
    assert result["engine"] == "gspo_lightning one_by_one"
    assert result["rollouts"] != plain["rollouts"]


def test_micro_batches_and_settings_reach_the_module(monkeypatch, model_dir, prompts):
    class Seen(Exception):
        pass

    def module(*args, **kwargs):
        raise Seen(kwargs)

    monkeypatch.setattr(bench_worker, "TimedModule", module)
    changed = ["--micro-batches=2", "--settings", '{"max_grad_norm": 3.0}']
    with pytest.raises(Seen) as seen:
        bench_worker.run(options(model_dir, prompts, *changed))
    (settings,) = seen.value.args
    assert (settings["micro_batch_size"], settings["max_grad_norm"]) == (2, 3.0)


def test_the_peak_of_memory_sees_what_was_freed_again(monkeypatch, model_dir, prompts):
    def greedy(rows, completions):
        torch.ones(400 * 2**18)  # 400 MiB, touched; earlier tests leave no such block behind
        return [0.0] * len(rows)

    monkeypatch.setattr(bench_worker, "letters_a_to_m", greedy)
    gc.collect()
    reset_peaks([torch.device("cpu")])  # of the tests before
    result = bench_worker.run(options(model_dir, prompts))
    assert 300 < result["peak_mib"] - result["base_mib"] < 600


def test_peaks_of_the_process_are_read_from_the_kernel():
    assert 0 < bench_worker.resident() <= trl_gspo.resident("VmHWM")
    assert bench_worker.resident() == pytest.approx(trl_gspo.resident("VmRSS"), rel=0.1)


@pytest.mark.parametrize(("one_by_one", "calls"), [(True, 6), (False, 1)])
def test_generate_is_called_once_or_for_each_completion(monkeypatch, tokenizer, one_by_one, calls):
    model = build_model("qwen3", eos_token_id=[1, 5])
    policy, widths = Policy(model, tokenizer), []
    plain_generate = model.generate

    def generate(ids, attention_mask, **kwargs):
        widths.append((ids.shape[1], bool(attention_mask.all())))
        return plain_generate(ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    mask = torch.tensor([[True] * 4, [False, False, True, True]])
    batch = PromptBatch(torch.randint(3, 20, (2, 4)), mask, [{}, {}])
    samples = GenerateSampler(3, 5, one_by_one).sample(policy, batch, seed=0)
    assert len(widths) == calls
    assert widths == ([(4, True)] * 3 + [(2, True)] * 3 if one_by_one else [(4, False)])
    assert samples.prompt_mask.tolist() == mask.repeat_interleave(3, 0).tolist()
    ends = torch.isin(samples.completion_ids, torch.tensor([1, 5])) & samples.mask
    assert (ends.any(1) == samples.finished).all() and (ends.sum(1) <= 1).all()


# ---- models and prompts of known length ----------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make_models.SIZES, "tiny", (32, 1, 2, 1, 16, 64, 300))
        text = make_models.corpus(num_files=3)
        patch.setattr(make_models, "corpus", lambda: text)
        make_models.main(
            [f"--out={folder}", "--models", "tiny", "--lengths", "full", "geo4", "--prompts", "16"]
        )
    return folder


@pytest.mark.parametrize("lengths", ["full", "geo4"])
def test_the_weights_set_the_lengths_of_completions(made, lengths):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made / f"tiny-{lengths}")
    policy = Policy(model, AutoTokenizer.from_pretrained(made / f"tiny-{lengths}"))
    prompt = torch.randint(2, 300, (4, 8), generator=torch.Generator().manual_seed(0))
    batch = PromptBatch(prompt, torch.ones_like(prompt, dtype=torch.bool), [{}] * 4)
    samples = GroupSampler(64, 40).sample(policy, batch, seed=0)
    drawn = samples.mask.sum(1).float()
    if lengths == "full":
        assert (drawn == 40).all()
    else:  # mean 4, standard deviation 3.5, 256 completions: 4 standard errors
        assert drawn.mean() == pytest.approx(4, abs=0.9)
        assert drawn.std() == pytest.approx(3.5, abs=1.2)


def test_prompts_are_between_five_eighths_and_the_whole_length(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "tiny-full")
    rows = [json.loads(line) for line in (made / "tiny-16.jsonl").read_text().splitlines()]
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    assert len(rows) == 64 and min(lengths) == 10 and max(lengths) == 16


# ---- runs become figures -------------------------------------------------------------------------


def a_run(case, name, repeat, seconds, **more):
    phases = dict.fromkeys(bench_report.PHASES, 0.0) | {
        "total": seconds,
        "rollout": seconds / 4,
        "optimise": seconds / 2,
    }
    run = {
        "case": case,
        "name": name,
        "repeat": repeat,
        "options": {"device": "cpu", "kl_coef": 0.0},
        "cpu_seconds": phases,
        "wall_seconds": {phase: 10 * value for phase, value in phases.items()},
        "tokens": 11.0,
        "mean_length": 2.75,
        "prompt_tokens": 7.0,
        "rollouts": [{"prompts": WORK.prompts, "lengths": WORK.lengths}],
        "base_mib": 100.0,
        "peak_mib": 150.0,
        "device_peak_mib": None,
        "versions": {"torch": torch.__version__},
    }
    return run | more


LIMITS = {"body": 10, "head": 7, "attention": 5, "cache": 3, "measured_flops": 1e3}
LIMITS |= {"rollout": 0.1, "optimise": 0.25}
RUNS = [
    a_run("S/1/2/3", "gspo_lightning", 0, 2.0, limits=LIMITS),
    a_run("S/1/2/3", "trl", 0, 6.0, peak_mib=200.0),
    a_run("S/1/2/3", "gspo_lightning", 1, 4.0, limits=LIMITS),
    a_run("S/1/2/3", "trl", 1, 10.0, peak_mib=200.0),
]


def cells(table, row):
    return [cell.strip() for cell in table.splitlines()[row].strip("|").split("|")]


def test_ratios_are_taken_within_a_repeat():
    table = bench_report.ratio_table(RUNS, "cpu_seconds")
    found = dict(zip(cells(table, 0), cells(table, 2), strict=True))
    assert found["whole step"] == "2.75 (2.50-3.00)"  # 6/2 and 10/4
    assert found["peak memory"] == "0.75" and found["above start"] == "0.50"


def test_seconds_are_medians_over_repeats():
    table = bench_report.seconds_table(RUNS, "cpu_seconds")
    assert cells(table, 2)[:4] == ["S/1/2/3", "gspo_lightning", "3", "0.75"]
    assert cells(table, 3)[:3] == ["S/1/2/3", "trl", "8"]


def test_utilisation_is_needed_flops_over_seconds_and_peak():
    forward = WORK.forward_flops(Shape(10, 7, 5, 3))
    (run,) = RUNS[:1]
    rollout, optimise, step = bench_report.utilisation([run], RUNS, "cpu_seconds")
    assert rollout == pytest.approx(forward / 0.5 / 1e3)
    assert optimise == pytest.approx(3 * forward / 1.0 / 1e3)
    assert step == pytest.approx(4 * forward / 2.0 / 1e3)
    with_kl = run | {"options": {"device": "cpu", "kl_coef": 0.1}}
    shares = bench_report.utilisation([with_kl], RUNS, "cpu_seconds")
    assert shares == pytest.approx((rollout, optimise, step * 5 / 4))
    assert bench_report.utilisation(RUNS[1:2], RUNS[1:2], "cpu_seconds") is None


def test_a_data_sheet_goes_before_a_measurement():
    assert bench_report.peak_flops([{"limits": LIMITS | {"sheet_flops": 5e3}}]) == 5e3


def test_distance_to_the_limit_is_seconds_over_the_least_possible():
    table = bench_report.limit_table(RUNS, "cpu_seconds")
    assert cells(table, 2)[2:8] == ["0.75", "0.1", "7.5", "1.5", "0.25", "6.0"]
    assert len(table.splitlines()) == 3  # nothing is known of trl's


def test_seconds_are_of_the_wall_clock_on_a_gpu_only():
    assert bench_report.unit_of(RUNS) == "cpu_seconds"
    on_gpu = [RUNS[0] | {"options": {"device": "cuda"}}]
    assert bench_report.unit_of(on_gpu) == "wall_seconds"


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def engines(monkeypatch):
    """Engines that take no time, and the order in which they were called."""
    calls = []

    def one_run(case, name, options):
        calls.append((str(case), name, options.prompts_per_rollout))
        seconds = {"gspo_lightning": 1.0, "trl": 3.0}[name]
        run = a_run("", name, 0, seconds * case.limit, limits=LIMITS)
        return {key: value for key, value in run.items() if key not in ("case", "name", "repeat")}

    monkeypatch.setattr(bench_runs, "one_run", one_run)
    monkeypatch.setattr(bench_scaling, "one_run", one_run)
    monkeypatch.setattr(bench_runs.importlib.util, "find_spec", lambda name: True)
    return calls


def test_engines_run_in_turn_and_every_run_is_a_line(engines, tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    command = ["--cases", "S/32/64/8", "S/32/geo/4/kl", "--repeats", "2", f"--out={out}"]
    assert bench.main(command) == 0
    names = ["gspo_lightning", "trl"] * 2
    cases = ["S/32/64/8"] * 4 + ["S/32/geo/4/kl"] * 4
    assert engines == [(case, name, 8) for case, name in zip(cases, names * 2, strict=True)]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == names * 2
    # 11 tokens; a quarter of 64 and of 192 seconds is the rollout
    speeds = [line["rollout_tokens_per_second"] for line in lines[:2]]
    assert speeds == pytest.approx([11 / 16, 11 / 48])
    flops = WORK.forward_flops(Shape(10, 7, 5, 3))
    assert [line["mfu"]["optimise"] for line in lines[:2]] == pytest.approx(
        [3 * flops / seconds / 1e3 for seconds in (32, 96)]
    )
    text = capsys.readouterr().out
    assert f"1 thread(s), torch {torch.__version__}" in text
    assert "python -m gspo_lightning.bench --cases S/32/64/8" in text
    assert re.search(r"\| S/32/geo/4/kl \| trl +\| 3.00 \(3.00-3.00\) \|", text)


def test_quick_is_one_tiny_case(engines, tmp_path):
    bench.main(["--quick", f"--out={tmp_path / 'runs.jsonl'}"])
    assert engines == [("S/32/8/4", "gspo_lightning", 8), ("S/32/8/4", "trl", 8)]


def test_every_table_holds_cases_that_can_be_run():
    for texts in bench.TABLES.values():
        assert [str(Case.parse(text)) for text in texts] == texts


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["--cases", "S/32/8"], "a case is MODEL/PROMPT/LENGTH/GROUP or that and /kl"),
        (
            ["--cases", "XL/32/8/4"],
            "model of S, M, 0.6B, such as S/32/geo/8, got 'XL/32/8/4'",
        ),
        (["--repeats", "0"], "argument --repeats: must be >= 1, got 0"),
        (["--settings", "[]"], "argument --settings: invalid json_object value: '[]'"),
        (["--table", "main", "--quick"], "not allowed with argument"),
    ],
)
def test_a_wrong_option_is_named(capsys, command, line):
    with pytest.raises(SystemExit) as error:
        bench.main(command)
    assert error.value.code == 2
    assert line in capsys.readouterr().err


def refusal(capsys, *command):
    assert bench.main(list(command)) == 2
    return capsys.readouterr().err


def test_what_is_not_there_is_said_before_the_first_run(monkeypatch, capsys):
    monkeypatch.setattr(bench_runs.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'gspo_lightning[peers]'" in refusal(capsys, "--quick")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "this machine has no CUDA device" in refusal(capsys, "--device=cuda")
    error = refusal(capsys, "--cases", "S/32/8/5", "--prompts-per-rollout", "2")
    assert error.startswith("error: S/32/8/5: 2 prompts x 5 completions cannot be cut into 4")


def test_both_engines_are_given_the_same_work(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(bench_runs, "in_process", lambda c, threads: commands.append(c) or {})
    monkeypatch.setattr(bench_runs, "assets", lambda case, options: ("model", "prompts"))
    parsed = bench.parse(["--steps=5", "--warmup=2", "--updates=8", "--micro-batches=2"])
    for name in ("gspo_lightning", "trl"):
        bench_runs.one_run(Case.parse("S/32/geo/16/kl"), name, parsed)
    ours, theirs = commands
    assert ours[:3] == ["-m", "gspo_lightning.bench", "worker"]
    mine = vars(bench.parse(ours[2:]))
    trls = vars(trl_gspo.arguments(theirs[1:]))
    shared = mine.keys() & trls.keys()
    assert len(shared) == len(trls) - 1  # all but --gradient-checkpointing
    assert {name: mine[name] for name in shared} == {name: trls[name] for name in shared}
    assert (mine["group_size"], mine["max_new_tokens"], mine["kl_coef"]) == (16, 128, 0.05)
    assert (mine["steps"], mine["warmup"], mine["updates"]) == (5, 2, 8)


def test_a_run_that_fails_ends_the_comparison_with_its_output(capfd):
    with pytest.raises(BenchError, match="ended with exit code 3"):
        bench_runs.in_process(["-c", "print('no taste'); raise SystemExit(3)"], 1)
    assert "no taste" in capfd.readouterr().err


def test_threads_are_those_asked_for():
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    assert bench_runs.in_process(["-c", code], 3)["OMP_NUM_THREADS"] == "3"


def test_scaling_moves_one_factor_at_a_time_and_draws_each(engines, tmp_path, capsys):
    picture = tmp_path / "new" / "scaling.png"
    command = ["scaling", "--engines", "gspo_lightning", "trl", f"--picture={picture}"]
    assert bench.main([*command, f"--out={tmp_path / 'runs.jsonl'}"]) == 0
    assert picture.stat().st_size > 10_000
    # four factors of four values; the base, on each of them, once
    assert len(engines) == len(set(engines)) == 2 * (4 * 4 - 3)
    assert ("S/256/64/8", "trl", 8) in engines and ("S/32/64/8", "trl", 32) in engines
    table = capsys.readouterr().out
    assert table.count("gspo_lightning | ") == 16


def test_the_two_ways_to_log_probs_agree():
    model = build_model("qwen3")
    prompt = torch.randint(3, 20, (1, 4)).expand(3, -1)
    completion = torch.randint(3, 20, (3, 5))
    plain, own = (way(model, prompt, completion) for way in bench_parts.LOGPROBS.values())
    torch.testing.assert_close(plain, own)


def test_the_log_probs_are_timed_and_weighed():
    # large enough that memory which earlier tests have left cannot hold it
    sizes = {"vocabulary": 80_000, "hidden": 32, "sequences": 4, "tokens": 120, "threads": 1}
    sizes["frozen"] = False
    found = bench_parts.measure_loss(argparse.Namespace(way="full logits", **sizes))
    logits = 4 * (120 + 8) * 80_000 * 4 / 2**20  # 156 MiB
    assert logits < found["extra_mib"] < 8 * logits
    assert found["cpu_seconds"] > 0
    assert found["gradients_mib"] > 80_000 * 32 * 4 / 2**20


def test_writing_and_continuing_from_checkpoints_is_timed(
    monkeypatch, tmp_path, model_dir, prompts, capsys
):
    monkeypatch.chdir(tmp_path)
    command = ["checkpoint", f"--model={model_dir}", f"--prompts={prompts}", "--writes=3"]
    assert bench.main([*command, "--starts=1"]) == 0
    out = capsys.readouterr().out
    size, middle, longest, cpu = (float(c) for c in cells(out, 6))
    assert size > 0.02 and 0 < middle <= longest and cpu > 0
    fresh, continued, ratio = ([float(c) for c in cells(out, row)[1:]] for row in (10, 11, 12))
    assert min(fresh + continued) > 0
    assert ratio == pytest.approx([b / a for a, b in zip(fresh, continued, strict=True)], rel=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]  # nothing stays


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_knows_its_memory_and_limits(model_dir, prompts):
    result = bench_worker.run(options(model_dir, prompts, "--device=cuda", "--dtype=bfloat16"))
    assert result["device_peak_mib"] > 0
    assert {"rollout", "optimise", "measured_flops"} <= result["limits"].keys()
    assert bench_report.report([result | {"case": "S/1/2/3", "name": "here", "repeat": 0}])


def test_trl_does_the_same_work(model_dir, prompts, plain):
    pytest.importorskip("trl")
    sizes = ["--steps=2", "--warmup=1", "--prompts-per-rollout=4", "--group-size=2"]
    sizes += ["--max-new-tokens=6", "--updates=2", "--kl-coef=0.1"]
    script = str(bench_runs.SCRIPTS / "trl_gspo.py")
    arguments = [script, f"--model={model_dir}", f"--prompts={prompts}", *sizes]
    theirs = bench_runs.in_process(arguments, 1)
    assert plain.keys() - theirs.keys() == {"limits"}
    assert [r["prompts"] for r in theirs["rollouts"]] == [
        list(r["prompts"]) for r in plain["rollouts"]
    ]
    assert [len(r["lengths"]) for r in theirs["rollouts"]] == [8, 8]
    seconds = dict(theirs["cpu_seconds"])
    total = seconds.pop("total")
    assert all(seconds[n] > 0 for n in ("rollout", "old_logprobs", "reference", "optimise"))
    assert sum(seconds.values()) == pytest.approx(total, rel=0.2)  # medians of two steps


def test_trl_waits_for_the_gpu_before_it_reads_a_clock(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    clocks = [trl_gspo.Clock(device) for device in ("cpu", "cuda")]
    for clock in clocks:
        clock.add("rollout", clock.read())
    assert len(waited) == 2
    assert clocks[0].now["rollout"][0] >= 0
    assert SimpleNamespace(**clocks[1].now).rollout[1] >= 0
