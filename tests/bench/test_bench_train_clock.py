"""The clock of ``bench train`` cuts a real step where Lightning, loss and autograd say so."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from dist_siglip.bench import train_clock as bench_train_clock
from dist_siglip.bench.train_clock import PHASES, PhaseLine, StepClock
from dist_siglip.data import ImageTextBatch
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss
from dist_siglip.training.module import SigLipModule
from tests.support.clock import CountedClock
from tests.support.tiny_models import ARCHITECTURES, inputs_of, write_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
]

NAP = 0.02  # seconds
CLOCK = CountedClock()


def test_a_line_adds_up_phases_after_the_first_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_train_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    line = PhaseLine(torch.device("cpu"))
    for step in range(1, 4):
        for phase, seconds in (("data", 1), ("towers", 5), ("loss", 2), ("towers", 3)):
            line.enter(phase)
            now[0] += seconds * step
        line.end_step()
    assert line.seconds(1) == {"data": 5, "towers": 40, "loss": 10, "optimizer": 0, "rest": 0}
    assert line.seconds(2)["towers"] == 24


class Sleeps(torch.autograd.Function):
    """Takes its time in forward, or in backward."""

    @staticmethod
    def forward(context, value, in_forward, in_backward):
        context.in_backward = in_backward
        CLOCK.sleep(in_forward)
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        CLOCK.sleep(context.in_backward)
        return gradient, None, None


class SleepyLoss(nn.Module):
    def __init__(self, in_forward=0.0, in_backward=0.0):
        super().__init__()
        self.naps = (in_forward, in_backward)

    def forward(self, images, texts, logit_scale, logit_bias):
        loss = siglip_loss(Sleeps.apply(images, *self.naps), texts, logit_scale, logit_bias)
        return Sleeps.apply(loss, 0.0, 0.0)


class SleepyData(torch.utils.data.Dataset):
    def __init__(self, nap=0.0):
        self.nap = nap

    def __len__(self):
        return 7

    def __getitem__(self, index):
        CLOCK.sleep(self.nap)
        images, texts = inputs_of(ARCHITECTURES["clip"], 4)
        ids = torch.arange(4)
        return ImageTextBatch(images, texts, ids, ids, ids >= 0, ids < 0)


class SleepyAdamW(torch.optim.AdamW):
    nap = 0.0

    def step(self, closure=None):
        loss = super().step(closure)
        CLOCK.sleep(self.nap)
        return loss


def measured(folder, module, data=None, first_step=2):
    """Train 6 steps and read what the clock wrote."""
    path = folder / "clock.json"
    run = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=2,
        callbacks=[StepClock(str(path), first_step)],
    )
    run.fit(module, torch.utils.data.DataLoader(data or SleepyData(), batch_size=None))
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def quick_products(monkeypatch):
    monkeypatch.setattr(bench_train_clock, "time", CLOCK)
    monkeypatch.setattr(bench_train_clock, "gemm_rate", lambda device, dtype: 1e9)


@pytest.fixture
def build(tmp_path):
    config = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    return lambda loss=None: SigLipModule(config, loss=loss)


def test_every_phase_of_a_step_has_its_time(build, tmp_path):
    found = measured(tmp_path, build())
    assert tuple(found["seconds"]) == PHASES
    assert min(found["seconds"].values()) > 0
    assert (found["steps"], found["gemm_flops_per_second"]) == (4, 1e9)
    assert found["peak_bytes"] > 50e6
    assert 0 < found["processor_seconds"] < time.process_time()


def longest(found):
    """The phase with the naps of the 4 steps; the others hold looks at the clock."""
    seconds = found["seconds"]
    phase = max(seconds, key=seconds.__getitem__)
    assert seconds[phase] == pytest.approx(4 * NAP, rel=0.01)
    assert sum(seconds.values()) == pytest.approx(4 * NAP, rel=0.01)
    return phase


@pytest.mark.parametrize("naps", [(NAP, 0.0), (0.0, NAP)], ids=["forward", "backward"])
def test_the_loss_is_timed_in_both_directions(build, tmp_path, naps):
    assert longest(measured(tmp_path, build(SleepyLoss(*naps)))) == "loss"


@pytest.mark.parametrize("naps", [(NAP, 0.0), (0.0, NAP)], ids=["forward", "backward"])
def test_towers_are_timed_in_both_directions(build, tmp_path, naps):
    module = build()
    encode = module.towers.encode_image
    module.towers.encode_image = lambda images: Sleeps.apply(encode(images), *naps)
    assert longest(measured(tmp_path, module)) == "towers"


def test_waiting_for_a_batch_is_data(build, tmp_path):
    assert longest(measured(tmp_path, build(), SleepyData(NAP))) == "data"


def test_the_step_of_the_optimizer_is_timed(build, tmp_path, monkeypatch):
    monkeypatch.setattr(SleepyAdamW, "nap", NAP)
    module = build()
    optimizer = SleepyAdamW(module.parameters(), lr=1e-4)
    module.configure_optimizers = lambda: optimizer
    module._log_training = lambda *arguments: None
    assert longest(measured(tmp_path, module)) == "optimizer"


def test_other_callbacks_are_the_rest(build, tmp_path):
    module = build()
    module.on_train_batch_start = lambda batch, batch_idx: CLOCK.sleep(NAP)
    assert longest(measured(tmp_path, module)) == "rest"


@pytest.mark.parametrize("first_step", [0, 6])
def test_a_clock_without_a_step_to_measure_is_refused(build, tmp_path, first_step):
    with pytest.raises(UserError, match=rf"first_step \({first_step}\) must be at least 1"):
        measured(tmp_path, build(), first_step=first_step)
