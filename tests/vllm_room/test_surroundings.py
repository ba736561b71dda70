"""What knows of an engine apart: configs, checkpoints, the command that starts one."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gspo_lightning.checkpoint.fingerprints import settings
from gspo_lightning.doctor.engine import engine
from gspo_lightning.doctor.examine import sampling
from gspo_lightning.policy.policy import Policy, PolicyConfig
from gspo_lightning.policy.settings import _made, plain
from gspo_lightning.run import vllm_serve
from gspo_lightning.sampling import GroupSampler, Sampler
from gspo_lightning.vllm import serve
from gspo_lightning.vllm.ahead import AsyncSampler
from gspo_lightning.vllm.local import EngineConfig
from gspo_lightning.vllm.sampler import VLLMSampler
from support import fake_sglang
from support.environments import Talker
from support.fake_vllm import serving
from support.pages import blocks
from support.prompts import PROMPTS, batch_of
from support.repository import ROOT
from support.tiny_models import build_model


def test_a_run_may_go_on_with_another_server_and_not_with_another_dtype():
    flat = {
        f"model.init_args.sampler.init_args.{name}": 1
        for name in ("server", "transport", "timeout", "engine.sleep", "engine.dtype", "group_size")
    }
    kept = [key.removeprefix("model.init_args.sampler.init_args.") for key in settings(flat)]
    assert kept == ["engine.dtype", "group_size"]
    inner = {key.replace("sampler.init", "sampler.init_args.inner.init"): 1 for key in flat}
    assert len(settings(inner)) == 2  # the same where AsyncSampler is around it


def test_a_checkpoint_leads_to_no_server():
    sampler = VLLMSampler(4, 12, 0.5, server="http://1.2.3.4:5", engine=EngineConfig("bfloat16"))
    kept = json.loads(json.dumps(plain(sampler)))
    assert kept["init_args"]["engine"]["dtype"] == "bfloat16"
    ahead = json.loads(json.dumps(plain(AsyncSampler(sampler))))
    for made in (_made(Sampler, kept), _made(Sampler, ahead)):
        assert type(made) is GroupSampler
        assert (made.group_size, made.max_new_tokens, made.temperature) == (4, 12, 0.5)


def test_an_environment_is_named_in_a_checkpoint_and_settings_that_nobody_read_are_dropped():
    sampler = VLLMSampler(4, 12, server="http://1.2.3.4:5", environment=Talker(), max_turns=3)
    made = _made(Sampler, json.loads(json.dumps(plain(sampler))))
    again = _made(Sampler, json.loads(json.dumps(plain(made))))
    for each in (made, again):
        assert (each.max_turns, each.environment.what) == (3, "support.environments.Talker")
    older = plain(GroupSampler(4))
    older["init_args"] |= {"max_turns": 4, "environment_seconds": 2.0}  # once they were not refused
    assert _made(Sampler, older).max_turns == 8


def config_of(**sampler):
    given = {"max_new_tokens": 40, "server": "http://10.0.0.2:8001", "server_class": None}
    engine = plain(EngineConfig(tensor_parallel_size=2, sleep=True))
    init = given | {"engine": engine} | sampler
    policy = {"path": "a b", "dtype": "bfloat16", "revision": "v1", "trust_remote_code": True}
    return {
        "model": {
            "init_args": {
                "sampler": {"class_path": "gspo_lightning.VLLMSampler", "init_args": init},
                "policy": policy,
                "evaluation": {"max_new_tokens": 50},
            }
        },
        "data": {"init_args": {"max_prompt_tokens": 32}},
    }


def test_a_server_is_started_as_the_run_wants_it():
    url, words = vllm_serve.server_of(config_of(), 0, "python")
    pairs = dict(pairwise(words))
    assert url == "http://10.0.0.2:8001"
    assert (pairs["--host"], pairs["--port"]) == ("10.0.0.2", "8001")
    assert (pairs["--model"], pairs["--dtype"], pairs["--revision"]) == ("a b", "bfloat16", "v1")
    assert pairs["--max-model-len"] == "82"  # the longer one of training and evaluation
    assert pairs["--tensor-parallel-size"] == "2"
    assert {"--enable-sleep-mode", "--trust-remote-code", "--enable-scale-out"} <= {*words}
    assert "--enforce-eager" not in words
    ahead = config_of()
    inner = ahead["model"]["init_args"]["sampler"]
    around = {"class_path": "gspo_lightning.AsyncSampler", "init_args": {"inner": inner, "lag": 1}}
    ahead["model"]["init_args"]["sampler"] = around
    assert vllm_serve.server_of(ahead, 0, "python") == (url, words)
    line = serve.written(words)
    assert line.startswith("VLLM_SERVER_DEV_MODE=1 ") and "--model 'a b' " in line


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_build_for_cpus_reads_prompts_in_one_piece(tmp_path, monkeypatch, on_cpu):
    """Asked of the interpreter that has vLLM, which here is a package of two lines."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    platform = f"class current_platform:\n    is_cpu = staticmethod(lambda: {on_cpu})\n"
    (tmp_path / "vllm" / "platforms.py").write_text(platform)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for longest, at_once in ((40, "4096"), (9000, "9032")):
        words = vllm_serve.server_of(config_of(max_new_tokens=longest), 0, sys.executable)[1]
        assert ("--no-enable-chunked-prefill" in words) == on_cpu
        assert dict(pairwise(words)).get("--max-num-batched-tokens") == (
            at_once if on_cpu else None
        )


@pytest.mark.parametrize(
    ("sampler", "number", "said"),
    [
        ({"server": None}, 0, "sampler.server is null"),
        ({"server": ["http://a:1", "http://b:2"]}, 2, "--number 2: sampler.server has 2"),
        ({}, 1, "--number 1: sampler.server has 1"),
        ({"server_class": "mine.Engine"}, 0, "asks no vLLM"),
    ],
)
def test_no_server_is_started_for_a_run_that_asks_none(sampler, number, said):
    with pytest.raises(ValueError, match=said):
        vllm_serve.server_of(config_of(**sampler), number, "python")


def test_the_command_reads_a_config_as_the_training_does(at_the_root, capsys):
    words = ["--config", "arithmetic", "--config", "sampler/vllm_server", "--print"]
    code = vllm_serve.main([*words, "--max_new_tokens", "20", "--", "--seed", "3"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "--max-model-len 52 " in out and out.endswith(" --seed 3\n") and out.count("\n") == 1
    assert vllm_serve.main(["--config", "arithmetic", "--print"]) == 2
    assert "add --config sampler/vllm_server" in capsys.readouterr().err


def test_a_python_without_vllm_is_refused_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setattr(vllm_serve, "read", lambda words: config_of())
    assert vllm_serve.main(["--python", "/no/python"]) == 2
    assert "--python /no/python: No such file" in capsys.readouterr().err
    assert vllm_serve.main(["--python", "false"]) == 2
    assert "false has no vllm: docs/vllm.md says how" in capsys.readouterr().err


def test_it_is_said_when_a_server_is_ready_and_nothing_of_it_is_left(capfd):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    code = vllm_serve.start(url, ["sh", "-c", "sleep 100 & sleep 1; exit 3"])
    server.shutdown()
    server.server_close()
    out, err = capfd.readouterr()
    assert code == 3 and out.startswith(f"ready  {url}") and "warning" not in err


def test_the_doctor_shortens_what_a_sampler_around_another_draws(tokenizer):
    policy = Policy(build_model("qwen3"), tokenizer)
    known = {"seed": 0, "global_rank": 0, "device": "cpu"}
    sampler = AsyncSampler(GroupSampler(2, 12), lag=0)
    module = SimpleNamespace(sampler=sampler, policy=policy, **known)
    data, drawn = SimpleNamespace(draw=lambda counts: batch_of(PROMPTS)), []
    trainer = SimpleNamespace(world_size=1, datamodule=data, strategy=None)
    sampling(trainer, module, len(PROMPTS), 3, drawn)
    assert drawn[0].completion_ids.shape[1] == 3


@pytest.mark.parametrize(
    ("off", "status"), [(0.0, "ok"), (2e-3, "warning"), (1.0, "error")], ids=str
)
def test_the_doctor_compares_an_engine_with_the_policy(model_dir, tokenizer, off, status):
    with serving(build_model("qwen3", seed=5)) as fake:
        sampler = VLLMSampler(4, 6, server=fake.url)
        sampler.reach(PolicyConfig(str(model_dir)), 16)
        policy = Policy(build_model("qwen3"), tokenizer)
        known = {"policy": policy, "sampler": sampler, "device": torch.device("cpu")}
        known["health"] = SimpleNamespace(width=3e-4)

        def send():
            sampler.take_weights(policy, 0)
            with torch.no_grad():  # what a server might have made of them
                for parameter in fake.worker.model_runner.model.parameters():
                    parameter += off * torch.randn(parameter.shape)

        torch.manual_seed(0)
        found = engine(SimpleNamespace(send_weights=send, **known), PROMPTS)
    assert found.status == status, found
    assert fake.url in found.text and "up to 1024 tokens" in found.text
    assert found.value["same"] == found.value["prompts"] == 4 or off


def test_the_adapter_of_the_page_draws_with_the_weights_it_was_given(
    model_dir, tokenizer, monkeypatch
):
    (block,) = [b for b in blocks(ROOT / "docs/vllm.md")[0] if b.language == "python"]
    assert len(block.text.splitlines()) < 70
    adapter = ModuleType("adapter")
    exec(block.text, adapter.__dict__)
    monkeypatch.setitem(sys.modules, "adapter", adapter)
    policy = Policy(build_model("qwen3"), tokenizer)
    with fake_sglang.serving(build_model("qwen3", seed=5)) as url:
        sampler = VLLMSampler(3, 6, server=url, server_class="adapter.SGLang", noise_limit=1e-5)
        with pytest.raises(ValueError, match="texts of 1024 tokens at most"):
            sampler.reach(PolicyConfig(str(model_dir)), 2000)
        sampler.reach(PolicyConfig(str(model_dir)), 16)
        for steps in range(2):
            sampler.take_weights(policy, steps)
            samples = sampler.sample(policy, batch_of(PROMPTS), seed=0)
            greedy = sampler.like(1, 6, 0.0).sample(policy, batch_of(PROMPTS), seed=0)
            own = GroupSampler(1, 6, 0.0).sample(policy, batch_of(PROMPTS), seed=0)
            assert greedy.texts == own.texts and len(samples) == 3 * len(PROMPTS)
            with torch.no_grad():
                policy.model.model.embed_tokens.weight += 0.02
