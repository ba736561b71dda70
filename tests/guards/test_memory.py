import gc
import os
from pathlib import Path

import pytest
import torch

from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.guards import memory
from gspo_lightning.guards.memory import peaks, reset_peaks
from support.tiny_run import run

CPU = torch.device("cpu")
LINUX = Path("/proc/self/clear_refs").exists()


def peak():
    return peaks([CPU])[CPU]


def test_the_peak_of_a_phase_is_what_it_held_at_most():
    reset_peaks([CPU])
    before = peak()
    block = torch.ones(64 * 2**20)  # 0.25 GiB
    del block
    assert peak() - before == pytest.approx(0.25, abs=0.02)


@pytest.mark.skipif(not LINUX, reason="needs the kernel's switch")
def test_a_new_phase_has_a_peak_of_its_own():
    block = torch.ones(64 * 2**20)
    high = peak()
    del block
    gc.collect()
    reset_peaks([CPU])
    assert high - peak() > 0.2


def test_the_peaks_of_a_gpu_are_those_of_its_allocator(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", seen.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: (d.index + 1) * 2**30)
    cards = [torch.device("cuda", 0), torch.device("cuda", 1)]
    reset_peaks(cards)
    assert seen == cards
    assert peaks(cards) == {cards[0]: 1.0, cards[1]: 2.0}


def test_each_phase_logs_its_peak(tmp_path, model_dir):
    figures = run(tmp_path, model_dir, reference=ReferencePolicy(device="cpu")).trainer
    logged = {k: v for k, v in figures.callback_metrics.items() if k.startswith("memory/")}
    assert logged.keys() == {f"memory/{name}_gib" for name in ("rollout", "score", "optimise")}
    assert all(0.05 < value < 16 for value in logged.values())


def test_nothing_grows_over_fifty_rollouts(tmp_path, model_dir):
    from lightning.pytorch import Callback

    class Resident(Callback):
        def __init__(self):
            self.mib, self.tensors = [], []

        def on_train_batch_end(self, *_):
            status = Path("/proc/self/status").read_text()
            self.mib.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
            if len(self.mib) in (10, 35, 60):
                gc.collect()
                self.tensors.append(
                    sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
                )

    resident = Resident()
    options = {"kl_coef": 0.1, "reference": ReferencePolicy(device="cpu")}
    run(tmp_path, model_dir, 60, callbacks=[resident], **options)
    first, last = resident.mib[10:20], resident.mib[50:60]
    growth = sum(last) / 10 - sum(first) / 10
    assert growth < 8, f"{growth:.1f} MiB over 40 rollouts"
    assert len(set(resident.tensors)) == 1  # a kept rollout of this size is no megabyte


def test_available_memory_is_the_least_that_anyone_allows(monkeypatch, tmp_path):
    meminfo, limit, use = (tmp_path / name for name in ("meminfo", "max", "current"))
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:    700 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, use),))
    cpu = torch.device("cpu")
    assert memory.available(cpu) == 700 * 1024  # no container
    assert memory.capacity(cpu) == 900 * 1024
    limit.write_text("max\n")
    use.write_text("100000\n")
    assert memory.available(cpu) == 700 * 1024
    limit.write_text("500000\n")
    assert memory.available(cpu) == 400000 and memory.capacity(cpu) == 500000
    meminfo.unlink()
    limit.unlink()
    assert memory.available(cpu) == os.sysconf("SC_AVPHYS_PAGES") * 4096
