"""A step that is not logged makes the host wait for nothing."""

import pytest
import torch
from lightning.pytorch import Callback

from dist_siglip.training.callbacks import Preemption, SkipBadSteps, Throughput, WeightAverage
from dist_siglip.training.module import SigLipModule
from tests.support.meta_device import MetaStrategy, Uploads, imitate_cuda
from tests.support.processes import run_ranks
from tests.support.sync_ranks import count_all
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import batches_of, fit, locked_module


@pytest.mark.e2e
def test_no_value_is_read_and_no_collective_asked_for_in_a_step(tmp_path):
    """Steps 2 to 5 of two ranks; the count notices Lightning's broadcast, and a loss that is read.

    The features travel point to point, and DDP reduces inside its own code.
    """
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])
    for ours, lightnings, reading in run_ranks(count_all, 2, model, str(tmp_path)):
        # Communicators are not split while anything is under way: nowhere after the start.
        assert ours == {"waits": [], "calls": [], "late groups": 0}
        assert lightnings["calls"] == ["broadcast"] * 4
        assert len(lightnings["waits"]) == 4
        assert len(reading["waits"]) == 4


class OverError(Exception):
    """Steps enough: the end of a run reads what was found in them."""


class Watch(Callback):
    """Notes what the second to the fourth step copy to the device."""

    def __init__(self):
        self.uploads = Uploads()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            self.uploads.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 3:
            self.uploads.__exit__(None, None, None)
            raise OverError


def train_on_a_device(model, folder, monkeypatch, **settings):
    """Four steps of a module where a read of the host fails; return copies to the device."""
    imitate_cuda(monkeypatch)
    module, watch = locked_module(model, **settings), Watch()
    callbacks = [Preemption(agree_every_steps=100), SkipBadSteps(), Throughput(), WeightAverage()]
    with pytest.raises(OverError), torch.compiler.set_stance("force_eager"):
        fit(
            module,
            folder,
            batches_of(5),
            strategy=MetaStrategy(),
            accelerator="auto",
            callbacks=[*callbacks, watch],
            log_every_n_steps=100,
            gradient_clip_val=1.0,
        )
    return watch.uploads.found


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_step_reads_nothing_from_its_device_and_copies_its_batch_alone(
    tmp_path, monkeypatch, micro_batch_size
):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])
    settings = {"micro_batch_size": micro_batch_size}
    found = train_on_a_device(model, tmp_path, monkeypatch, **settings)
    assert set(found) == {"batch_to"}
    assert len(found) == 2 * 6  # batches of the third and the fourth step


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_read_would_be_noticed(tmp_path, monkeypatch):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])
    own = SigLipModule.training_step
    monkeypatch.setattr(
        SigLipModule, "training_step", lambda module, *args: own(module, *args).cpu()
    )
    with pytest.raises(NotImplementedError, match="no data"):
        train_on_a_device(model, tmp_path, monkeypatch)


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path):
    """CUDA itself raises wherever the host would wait, in steps 3 to 6."""
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])
    module = locked_module(model)

    class Strict(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if 2 < batch_idx < 6 else "default")

    try:
        callbacks = [Preemption(agree_every_steps=100), SkipBadSteps(), Throughput(), Strict()]
        fit(
            module,
            tmp_path,
            batches_of(8),
            accelerator="gpu",
            callbacks=callbacks,
            log_every_n_steps=100,
            gradient_clip_val=1.0,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
