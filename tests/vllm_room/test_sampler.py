"""Against a server that answers as vLLM's does; the real one: test_real_engine."""

import threading
import time

import pytest
import torch

from gspo_lightning import LoRAConfig
from gspo_lightning.logprobs import samples_logprobs
from gspo_lightning.policy.policy import LoRAPolicy, Policy, PolicyConfig
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.vllm import EngineError, server
from gspo_lightning.vllm.engine import beside
from gspo_lightning.vllm.local import EngineConfig
from gspo_lightning.vllm.sampler import VLLMSampler
from gspo_lightning.vllm.weights import Weights
from support.fake_vllm import serving
from support.forked import on_ranks
from support.observers import Outputs
from support.prompts import PROMPTS, batch_of
from support.tiny_models import build_model, build_tokenizer
from support.tiny_run import run


@pytest.fixture
def policy(tokenizer):
    return Policy(build_model("qwen3"), tokenizer)


@pytest.fixture
def config(model_dir):
    return PolicyConfig(str(model_dir))


def reached(fake, config, *urls, **options):
    sampler = VLLMSampler(3, 6, server=[fake.url, *urls], start_timeout=0.2, **options)
    sampler.reach(config, 16)
    return sampler


def move(policy, scale=0.05):
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            if parameter.requires_grad:
                noise = torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(number)
                )
                parameter += scale * noise


def off(policy, samples):
    """Largest distance of the sampler's log-probs from the policy's."""
    own = samples_logprobs(policy.model, samples, 1.0).logprobs
    return (own - samples.logprobs)[samples.mask].abs().max().item()


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["disk", "broadcast"])
def test_completions_are_drawn_with_the_weights_as_they_are(fake, policy, config, transport):
    sampler = reached(fake, config, transport=transport)
    batch = batch_of(PROMPTS)
    for steps in range(3):
        sampler.take_weights(policy, steps)
        samples = sampler.sample(policy, batch, seed=4)
        assert off(policy, samples) < 1e-5
        assert sampler.figures["sampler/noise_after_sync"] < 1e-5
        assert fake.weights.endswith(f"/{steps}")
        move(policy)
    greedy = sampler.like(1, 6, 0.0)  # with the weights before the last move
    assert len(samples) == 3 * len(PROMPTS) and off(policy, samples) > 1e-3
    sampler.take_weights(policy, 3)
    expected = GroupSampler(1, 6, 0.0).sample(policy, batch, seed=0)
    found = greedy.sample(policy, batch, seed=0)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert found.texts == expected.texts and found.logprobs is None


@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "experts"])
def test_an_engine_computes_what_the_policy_does(tokenizer, config, kind):
    how = {"tie_word_embeddings": kind != "untied"}
    name = "qwen3_moe" if kind == "experts" else "qwen3"
    policy = Policy(build_model(name, **how), tokenizer)
    if kind == "lora":
        policy = LoRAPolicy(build_model(name, **how), tokenizer, LoRAConfig(rank=2))
    move(policy)
    before = {name: tensor.clone() for name, tensor in policy.named_parameters()}
    sent = dict(Weights(policy))
    assert all(torch.equal(before[name], own) for name, own in policy.named_parameters())
    plain = build_model(name, seed=9, **how)
    if kind == "experts":  # one tensor for each expert, as in a checkpoint
        assert "model.layers.0.mlp.experts.3.down_proj.weight" in sent
        return
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= sent.keys()
    plain.load_state_dict(sent, strict=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, policy.model(ids).logits)


def test_the_same_seed_draws_the_same_alone_or_in_a_batch(fake, policy, config):
    sampler = reached(fake, config)
    sampler.take_weights(policy, 0)
    first = sampler.sample(policy, batch_of(PROMPTS), seed=4)
    again = sampler.sample(policy, batch_of(PROMPTS), seed=4)
    alone = sampler.sample(policy, batch_of(PROMPTS[:1]), seed=4)
    other = sampler.sample(policy, batch_of(PROMPTS), seed=5)
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert torch.equal(first.logprobs, again.logprobs)
    length = alone.completion_ids.shape[1]
    assert torch.equal(first.completion_ids[:3, :length], alone.completion_ids)
    assert first.texts != other.texts
    assert len(set(first.texts)) > 1


def test_weights_are_sent_when_they_have_moved_and_nothing_old_is_kept(fake, policy, config):
    sampler = reached(fake, config)
    for steps, anew in ((0, False), (0, False), (4, False), (4, True), (4, False)):
        sampler.take_weights(policy, steps, anew)
    assert fake.asked.count("gspo_load") == 4
    start = fake.asked.index("gspo_load") - 1
    order = ["/pause", "gspo_load", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert fake.asked[start : start + 5] == order


def test_prompts_are_dealt_over_servers_that_all_get_the_weights(fake, policy, config):
    with serving(build_model("qwen3", seed=6)) as second:
        for transport in ("disk", "broadcast"):
            sampler = reached(fake, config, second.url, transport=transport)
            sampler.take_weights(policy, 0)
            assert off(policy, sampler.sample(policy, batch_of(PROMPTS), seed=4)) < 1e-5
            move(policy)
        asked = [each.asked.count("/inference/v1/generate") for each in (fake, second)]
    assert asked[0] == asked[1] == len(PROMPTS) * 2  # half of the prompts and of the probes, twice


def test_the_engine_samples_beside_the_trainer_with_the_weights_it_was_given(fake, policy, config):
    sampler, batch = reached(fake, config), batch_of(PROMPTS)
    assert sampler.apart and not VLLMSampler.apart.fget(
        VLLMSampler(server=fake.url, engine=EngineConfig(sleep=True))
    )
    fake.slow = 0.05
    before = sampler.begin(policy, batch, seed=4)
    kept = build_model("qwen3")
    kept.load_state_dict(policy.model.state_dict())
    move(policy)
    sampler.take_weights(policy, 1)  # waits: it would end what is drawn
    assert before.done()
    assert off(Policy(kept, policy.tokenizer), before.result()) < 1e-5
    assert off(policy, sampler.sample(policy, batch, seed=4)) < 1e-5


def test_no_more_requests_wait_at_one_time_than_servers_take(fake, policy, config, monkeypatch):
    monkeypatch.setattr(server, "AT_ONCE", 2)
    at_once, most, lock = [], [], threading.Lock()

    def watched(body):
        with lock:
            at_once.append(body)
            most.append(len(at_once))
        time.sleep(0.02)
        with lock:
            at_once.pop()
        return fake.complete(body["token_ids"], body["sampling_params"])

    fake.extra["/inference/v1/generate"] = watched
    sampler = reached(fake, config)
    sampler.take_weights(policy, 0)
    samples = sampler.draw(policy, batch_of([*PROMPTS, *PROMPTS]), seed=4)
    assert max(most) == 2 and len(most) == 8 and off(policy, samples) < 1e-5


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_trains_and_evaluates_with_the_engine(fake, model_dir, tmp_path):
    seen = Outputs()
    sampler = VLLMSampler(4, 6, server=fake.url)
    run(tmp_path, model_dir, 2, callbacks=[seen], sampler=sampler)
    metrics = [output["metrics"] for output in seen.all]
    assert all(each["sampler/noise_after_sync"] < 1e-5 for each in metrics)
    assert all(each["policy/sampler_noise"] < 1e-5 for each in metrics)
    assert all(each["policy/old_from_sampler"] == 1 for each in metrics)
    assert all(each["time/sync"] > 0 for each in metrics)
    assert fake.asked.count("gspo_load") == 2
    assert fake.weights.endswith("/2")  # optimizer steps before the second rollout


def drawn_on(rank, url, model_dir, broken):
    """Two ranks that share a server: what each of them draws."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    policy = Policy(build_model("qwen3"), build_tokenizer())
    sampler = VLLMSampler(2, 4, server=url)
    sampler.reach(PolicyConfig(str(model_dir)), 16 if not (broken and rank) else 9999)
    sampler.take_weights(policy, 0)
    samples = sampler.sample(policy, batch_of(PROMPTS[rank::2]), seed=rank)
    return off(policy, samples), samples.prompt_mask.sum(1).tolist()


def test_ranks_share_a_server_and_each_gets_its_own_rows(fake, model_dir):
    found = on_ranks(drawn_on, fake.url, model_dir, False)
    assert [lengths for _, lengths in found] == [[3, 3, 5, 5], [1, 1, 2, 2]]
    assert max(distance for distance, _ in found) < 1e-5
    assert fake.asked.count("gspo_load") == 1


def test_what_one_rank_is_refused_for_ends_all_of_them(fake, model_dir):
    first, second = on_ranks(drawn_on, fake.url, model_dir, True)
    assert first == second
    assert "max_model_len 1024, and the longest text of this run has 9999 tokens" in first


def sharded_run(rank, url, model_dir, folder):
    from lightning.pytorch import Callback

    from gspo_lightning import FSDP2
    from gspo_lightning.data.prompts import PromptData
    from support.tiny_run import make_module, make_trainer, write_prompts

    noise = []

    class Noise(Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            noise.append(outputs["metrics"]["sampler/noise_after_sync"])

    module = make_module(model_dir, sampler=VLLMSampler(4, 6, server=url))
    path = write_prompts(folder / f"prompts{rank}.jsonl")
    data = PromptData(str(path), prompts_per_rollout=2, num_rollouts=2, val_path=str(path))
    options = {"strategy": FSDP2(), "devices": 2, "use_distributed_sampler": False}
    options |= {"val_check_interval": 2, "check_val_every_n_epoch": None}
    make_trainer(folder, callbacks=[Noise()], **options).fit(module, data)
    return noise


@pytest.mark.slow
def test_a_sharded_policy_is_gathered_for_the_engine(fake, model_dir, tmp_path):
    found = on_ranks(sharded_run, fake.url, model_dir, tmp_path, seconds=120)
    assert found[0] == found[1] and len(found[0]) == 2, found
    assert max(found[0]) < 1e-5
    assert fake.asked.count("gspo_load") == 3  # two rollouts and an evaluation


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_server_that_starts_late_is_waited_for(policy, config, monkeypatch, caplog):
    monkeypatch.setattr(server, "PAUSE", 0.05)
    with serving(build_model("qwen3")) as fake:
        late = time.monotonic() + 0.3
        fake.extra["/health"] = lambda _: {} if time.monotonic() > late else 503
        sampler = VLLMSampler(3, 6, server=fake.url, start_timeout=20)
        sampler.reach(config, 16)
    (line,) = caplog.messages
    assert line.startswith(f"sampler.server: {fake.url}/health: 503")
    assert "start it with: gspo vllm-serve" in line


def other_size(fake):
    fake.worker.model_runner.model_config.hf_text_config = build_model(
        "qwen3", hidden_size=8
    ).config


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: f.extra.update({"/health": 503}), "not ready within 0.2 s (sampler.start_timeo"),
        (lambda f: f.extra.update({"/version": {"version": "0.11.2"}}), "is vLLM 0.11.2, and 0.32"),
        (lambda f: f.extra.update({"/server_info": 404}), "not started for this trainer; start it"),
        (lambda f: f.config.update(logprobs_mode="raw_logprobs"), "logprobs_mode 'raw_logprobs'"),
        (lambda f: f.config.update(max_model_len=15), "max_model_len 15, and the longest text of"),
        (lambda f: setattr(f.worker, "gspo_half", True), "has half of an update that failed"),
        (other_size, "another model, tiny, than policy.path"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(fake, config, spoil, said):
    spoil(fake)
    with pytest.raises((ValueError, EngineError)) as error:
        reached(fake, config)
    assert said in str(error.value) and fake.url in str(error.value)
    assert "\n" not in str(error.value)
    assert "/pause" not in fake.asked


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: setattr(f, "says", "other.1/8"),
            "weights other.1/8, not with .*another",
        ),
        (lambda f: f.extra.update({"/inference/v1/generate": 500}), "/inference/v1/generate: 500"),
        (lambda f: setattr(f, "slow", 1.0), "no answer within 0.4 s \\(sampler.timeout\\)"),
        (
            lambda f: f.extra.update(
                {"/inference/v1/generate": lambda b: aborted(f, b)},
            ),
            "ended a completion with 'abort'",
        ),
        (lambda f: move(f.worker.model_runner), "sampler.noise_limit: .* more than 0.0001"),
    ],
)
def test_a_server_that_fails_later_ends_the_run_with_a_line(fake, policy, config, spoil, said):
    fake.worker.model_runner.parameters = fake.worker.model_runner.model.parameters
    sampler = reached(fake, config, timeout=0.4, noise_limit=1e-4)
    sampler.take_weights(policy, 0)
    spoil(fake)
    with pytest.raises(EngineError, match=said) as error:
        sampler.sample(policy, batch_of(PROMPTS), seed=4)
    assert "\n" not in str(error.value)


def aborted(fake, body):
    found = fake.complete(body["token_ids"], body["sampling_params"])
    for choice in found["choices"]:
        choice["finish_reason"] = "abort"
    return found


@pytest.mark.parametrize("transport", ["disk", "broadcast"])
def test_a_server_with_half_an_update_is_refused_until_it_is_restarted(
    fake, policy, config, transport
):
    sampler = reached(fake, config, transport=transport, timeout=5.0)
    fake.worker.model_runner.breaks = True
    with pytest.raises(EngineError, match=r"/collective_rpc gspo_\w+: 500 no memory left"):
        sampler.take_weights(policy, 0)
    fake.worker.model_runner.breaks = False
    with pytest.raises(ValueError, match=r"half of an update that failed.*restart the server"):
        reached(fake, config)
    fake.worker = type(fake.worker)(fake.worker.model_runner.model)  # restarted
    reached(fake, config).take_weights(policy, 0)


def test_a_folder_that_the_server_does_not_see_is_no_half_update(fake, policy, config, tmp_path):
    sampler = reached(fake, config, folder=str(tmp_path))
    run = fake.worker.gspo_load
    fake.worker.gspo_load = lambda folder: run(f"/elsewhere{folder}")
    with pytest.raises(EngineError, match=r"no weights in /elsewhere.* on the server's machine"):
        sampler.take_weights(policy, 0)
    reached(fake, config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"server": "127.0.0.1:8000"}, "sampler.server must be an address with its port"),
        ({"server": "http://a:80{port}"}, "sampler.server must be an address with its port"),
        ({"server": "http://a:1", "transport": "mail"}, "sampler.transport must be disk or"),
        ({"server": "http://a:1", "timeout": 0}, "sampler.timeout must be above 0"),
        ({"server": "http://a:1", "group_size": 0}, "sampler.group_size must be >= 1"),
        ({"server": ["http://a:1", "http://b:1"], "server_class": "x.Y"}, "wants one address"),
        ({"engine": EngineConfig(tensor_parallel_size=2)}, "needs a server"),
    ],
)
def test_settings_are_checked_at_the_door(options, said):
    with pytest.raises(ValueError, match=said):
        VLLMSampler(**options)


def test_an_engine_in_this_process_needs_vllm(config):
    with pytest.raises(ImportError, match=r"sampler.server is null.*docs/vllm.md"):
        VLLMSampler().reach(config, 16)


def test_threads_that_wait_for_a_server_keep_no_process():
    before = {*threading.enumerate()}
    waits = threading.Event()
    future = beside(waits.wait)
    (own,) = {*threading.enumerate()} - before
    assert own.daemon and not future.done()
    waits.set()
    assert future.result()
