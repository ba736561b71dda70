"""vLLM itself, built for CPUs; `make vllm-test` runs these, in an environment of their own."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.vllm import EngineError
from gspo_lightning.vllm.local import EngineConfig
from gspo_lightning.vllm.sampler import VLLMSampler
from support.demo_run import arguments, killed
from support.forked import free_port, on_ranks
from support.repository import PYTHONPATH, ROOT
from support.run_folder import assert_same, scalars, state
from support.vllm_runs import (
    FOLDER,
    LONGEST,
    QUICK,
    policy_of,
    prompts_of,
    reads_more_than_fits_into_a_step,
    shows_its_worth,
    talks_like_the_policy,
    update,
)

spec = importlib.util.find_spec("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(spec is None or spec.origin is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # its own, as it is imported
    pytest.mark.usefixtures("at_the_root"),
]


@contextmanager
def served(url, folder):
    """A server as `gspo vllm-serve` starts it; its process."""
    small = "{enforce_eager: true, gpu_memory_utilization: 0.03}"
    line = [sys.executable, "-m", "gspo_lightning", "vllm-serve"]
    line += ["--config", "configs/arithmetic.yaml", "--config", "configs/sampler/vllm_server.yaml"]
    line += ["--model.init_args.sampler.init_args", f"{{server: '{url}', engine: {small}}}"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "VLLM_LOGGING_LEVEL": "ERROR"}
    said = folder / f"server{url[-5:]}.txt"
    with said.open("w") as out:  # a pipe that nobody reads would stop it
        process = subprocess.Popen(line, env=environment, stdout=out, stderr=out)
    try:
        while "\nready " not in said.read_text():
            assert process.poll() is None, said.read_text()[-2000:]
            time.sleep(0.5)
        yield process
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def address():
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def server(address, tmp_path_factory):
    os.chdir(ROOT)
    with served(address, tmp_path_factory.mktemp("server")) as process:
        yield process


def reached(url, **options):
    sampler = VLLMSampler(4, 40, server=url, engine=EngineConfig(**QUICK), **options)
    sampler.reach(PolicyConfig(FOLDER), LONGEST)
    return sampler


def test_the_engine_in_this_process_is_the_policy():
    done = subprocess.run(
        [sys.executable, "-m", "support.vllm_runs"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


@pytest.mark.parametrize("transport", ["disk", "broadcast"])
def test_a_server_is_the_policy(server, address, transport):
    shows_its_worth(reached(address, transport=transport))


def test_a_server_talks_like_the_policy(server, address):
    sampler = reached(address)
    reads_more_than_fits_into_a_step(sampler)
    talks_like_the_policy(sampler)


def drawn_on(rank, address, transport):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    sampler = reached(address, transport=transport)
    policy = policy_of()
    update(policy, 1)
    sampler.take_weights(policy, 1)
    samples = sampler.sample(policy, prompts_of(policy, 6), seed=rank)
    return sampler.figures["sampler/noise_after_sync"], samples.texts


def test_two_ranks_with_two_servers_and_with_one(server, address, tmp_path):
    second = f"http://127.0.0.1:{free_port()}"
    with served(second, tmp_path):
        both = [address, second]
        found = [
            on_ranks(drawn_on, urls, transport, seconds=120)
            for urls in (both, [address])
            for transport in ("disk", "broadcast")
        ]
    assert all(one == found[0] for one in found)  # the same texts, whoever drew them
    (noise, texts), (other_noise, other_texts) = found[0]
    assert max(noise, other_noise) < 1e-5 and texts != other_texts


def test_another_trainer_s_weights_are_seen(server, address):
    policy = policy_of()
    first, second = reached(address), reached(address)
    first.take_weights(policy, 3)
    second.take_weights(policy, 3)
    with pytest.raises(EngineError, match="another trainer has sent it its own"):
        first.sample(policy, prompts_of(policy, 2), seed=0)
    second.sample(policy, prompts_of(policy, 2), seed=0)


def test_another_model_is_refused(server, address, model_dir):
    sampler = VLLMSampler(4, 40, server=address)
    with pytest.raises(ValueError, match=r"another model, .*policy, than policy.path .*: vocab_si"):
        sampler.reach(PolicyConfig(str(model_dir)), LONGEST)


OVERLAY = """
data: {init_args: {num_rollouts: 4}}
trainer:
  num_sanity_val_steps: 0
  val_check_interval: 4
  callbacks: [{class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 1}}]
model:
  init_args:
    sampler:
      class_path: gspo_lightning.VLLMSampler
      init_args:
        group_size: 8
        max_new_tokens: 40
        server: SERVER
        start_timeout: 120
        engine: {enforce_eager: true, gpu_memory_utilization: 0.03}
"""


def fit(overlay, folder, *options, code=0):
    done = subprocess.run(
        [sys.executable, "train.py", *arguments(overlay, folder, *options)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("where", ["here", "server"])
def test_a_killed_run_goes_on_bit_for_bit(server, address, where, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(OVERLAY.replace("SERVER", address if where == "server" else "null"))
    fit(overlay, tmp_path / "whole")
    killed(overlay, tmp_path / "killed", 2)
    fit(overlay, tmp_path / "killed", "--ckpt_path", "auto")
    whole, again = (state(tmp_path / name, 4) for name in ("whole", "killed"))
    for part in ("state_dict", "optimizer_states"):  # a summary in there has its seconds
        assert_same(whole[part], again[part])


def test_a_lost_server_ends_the_run_with_a_line_and_auto_goes_on(tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(OVERLAY.replace("SERVER", url).replace("rollouts: 4", "rollouts: 40"))
    with served(url, tmp_path) as first:
        run = subprocess.Popen(
            [sys.executable, "train.py", *arguments(overlay, tmp_path / "run")],
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in run.stdout:
            if line.startswith("rollout  2/40"):
                break
        kill_all(first.pid)
        err = run.communicate(timeout=120)[1]
    assert run.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: sampler.server: {url}/")
    assert "continue with: " in err
    with served(url, tmp_path):
        fit(overlay, tmp_path / "run", "--ckpt_path", "auto", "--data.num_rollouts", "4")


def kill_all(pid):
    """SIGKILL for the server's own processes, which are a group of theirs."""
    import psutil

    for child in psutil.Process(pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    time.sleep(0.5)


def test_the_demo_learns_as_with_the_sampler_in_the_policy(server, address, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(OVERLAY.replace("SERVER", address).replace("rollouts: 4", "rollouts: 20"))
    plain = tmp_path / "plain.yaml"
    plain.write_text("data: {init_args: {num_rollouts: 20}}\ntrainer: {num_sanity_val_steps: 0}\n")
    rewards = {}
    for name, config in (("vllm", overlay), ("group", plain)):
        for seed in range(3):
            folder = tmp_path / f"{name}{seed}"
            fit(config, folder, "--seed_everything", str(seed))
            last = [value for _, value in scalars(folder)["train/reward"]][-5:]
            rewards.setdefault(name, []).append(sum(last) / len(last))
    print(f"mean reward of rollouts 16 to 20, three seeds: {rewards}")
    spread = torch.tensor(rewards["group"]).std() + torch.tensor(rewards["vllm"]).std()
    means = {name: sum(values) / 3 for name, values in rewards.items()}
    assert abs(means["vllm"] - means["group"]) < 2 * spread
