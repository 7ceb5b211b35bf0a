"""Parts of the acceptance run about training and evaluation, and the tests that need a GPU.

Each returns plain values for JSON, "summary" being a sentence; "skipped" says why there is nothing
to say.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer

from dist_siglip.cli import main
from dist_siglip.data.handwriting import write_handwriting_shards
from dist_siglip.doctor.gpu_sizes import PartError, Sizes, read_command, wait_for
from dist_siglip.metrics import retrieval_ranks_both_ways

_TESTS = Path(__file__).parents[2] / "tests"
_NEEDS_GPU = re.compile(r"mark\.gpu|on_devices")
_FIRST_STRICT_STEP = 3  # before it libraries choose kernels and buffers are made
_LOG_EVERY = 10


def run_tests(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Run the tests that need a GPU, where the sources are at hand."""
    chosen = list(sizes.tests) or [
        str(path)
        for path in sorted(_TESTS.rglob("test_*.py"))
        if _NEEDS_GPU.search(path.read_text(encoding="utf-8"))
    ]
    if not chosen:
        return {"skipped": "no tests at hand: run it in a checkout of the sources"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", *(() if sizes.tests else ("-m", "gpu")), *chosen]
        done = subprocess.run(command, capture_output=True, text=True, cwd=_TESTS.parent)
        if not report.exists():
            raise RuntimeError(f"pytest ended with code {done.returncode}: {done.stdout[-600:]}")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    failed = [
        f"{case.get('classname')}::{case.get('name')}: {problem.get('message')}"[:400]
        for case in suite.iter("testcase")
        for problem in (*case.iter("failure"), *case.iter("error"))
    ]
    counts = {kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")}
    found = {**counts, "failed_tests": [{"test": test} for test in failed]}
    if failed:
        raise PartError(f"{len(failed)} of {counts['tests']} tests failed", found)
    return {**found, "summary": f"{counts['tests']} tests, {counts['skipped']} of them skipped"}


class StrictSteps(Callback):
    """Writes how often the host waited for the device in each step, from the third on.

    Args:
        path: of the JSON to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._step = 0
        self._waits: Counter[int] = Counter()
        self._places: Counter[str] = Counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to count; what is between two steps counts for the first of them."""
        self._step = batch_idx
        if batch_idx == _FIRST_STRICT_STEP:
            warnings.filterwarnings("always", message="called a synchronizing")
            self._show, warnings.showwarning = warnings.showwarning, self._note
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End before the last step, after which a checkpoint is written."""
        if batch_idx != trainer.max_steps - 2:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = self._show
        steps = range(_FIRST_STRICT_STEP, batch_idx + 1)
        found = {
            "waits": {step: self._waits[step] for step in steps},
            "places": dict(self._places.most_common(10)),
        }
        self.path.write_text(json.dumps(found))

    def _note(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if "synchronizing" not in str(message):
            self._show(message, category, filename, lineno, file, line)
            return
        self._waits[self._step] += 1
        self._places[f"{filename.partition('site-packages/')[2] or filename}:{lineno}"] += 1


def fit_without_waiting(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Train on shards with averaged weights and the usual log; no step may wait for the device."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_handwriting_shards(
            Path(folder, "data"), num_train_pairs=4 * sizes.fit_batch, num_val_pairs=8
        )
        path = Path(folder, "strict.json")
        settings = {
            "run_dir": f"{folder}/run",
            "model": {"model": sizes.fit_model},
            "data": {
                "train_shards": shards.train,
                "global_batch_size": sizes.fit_batch,
                "workers_per_rank": 2,
                "train_crop_scale": None,
            },
            "trainer": {
                "accelerator": "gpu" if device.type == "cuda" else "cpu",
                "devices": 1,
                "max_steps": sizes.fit_steps,
                "log_every_n_steps": _LOG_EVERY,
                "callbacks": [
                    {"class_path": "dist_siglip.training.callbacks.WeightAverage"},
                    {
                        "class_path": f"{StrictSteps.__module__}.StrictSteps",
                        "init_args": {"path": str(path)},
                    },
                ],
            },
        }
        config = Path(folder, "settings.yaml")
        config.write_text(json.dumps(settings))  # JSON is YAML
        if code := main(["fit", "--config", str(config)]):
            raise RuntimeError(f"fit ended with code {code}; its log says why")
        found = json.loads(path.read_text())
    waits = {int(step): number for step, number in found["waits"].items()}
    silent = [step for step in waits if (step + 1) % _LOG_EVERY]
    told = sum(waits[step] for step in silent)
    rows = [{"step": step, "waits": number} for step, number in waits.items() if number]
    places = [{"line": line, "waits": number} for line, number in found["places"].items()]
    result = {"steps": len(waits), "waits": rows, "places": places}
    if told:
        where = places[0]["line"] if places else "?"
        raise PartError(f"{told} waits in {len(silent)} steps that are not logged: {where}", result)
    text = (
        f"no wait in {len(silent)} steps that are not logged, {sum(waits.values())} in the others"
    )
    return {**result, "summary": text}


def time_training(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Time training as ``fit`` does it, with towers as written and compiled."""
    rows = []
    for is_compiled in sizes.compiled:
        options: dict[str, Any] = {
            "local_batch_size": sizes.train_batch,
            "warmup_steps": 10,
            "steps": sizes.train_steps,
            "rounds": 1,
            "pictures": max(64, 2 * sizes.train_batch),
            "device": device.type,
            "precision": "bf16-mixed" if device.type == "cuda" else "32-true",
            "compile_towers": str(is_compiled).lower(),
            "workers_per_rank": max(1, min(16, len(os.sched_getaffinity(0)) - 2)),
        }
        if sizes.train_model is not None:
            options["model"] = sizes.train_model
        (row,) = read_command("bench", "train", **options)
        rows.append({"compiled": is_compiled, **row})
    text = ", ".join(
        f"{row['mfu']:.0%} MFU {'compiled' if row['compiled'] else 'as written'} "
        f"({row['samples_per_second']:,.0f} pairs/s)"
        for row in rows
    )
    return {"training": rows, "summary": text}


def rank_candidates(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Rank many candidates both ways, and check some of the ranks in float64."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (sizes.candidates, sizes.embed_dim)
    images, noise = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    images, texts = F.normalize(images, dim=1), F.normalize(images + 12 * noise, dim=1)
    ids = torch.arange(sizes.candidates, device=device)
    retrieval_ranks_both_ways(images[:256], texts[:256], ids[:256], ids[:256])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait_for(device)
    started = time.perf_counter()
    found, _ = retrieval_ranks_both_ways(images, texts, ids, ids)
    wait_for(device)
    seconds = time.perf_counter() - started
    some = ids[:: max(1, sizes.candidates // 256)]
    scores = images[some].double() @ texts.double().T
    own = scores.gather(1, some[:, None])
    expected = (scores >= own - 1e-9 * (1 + own.abs())).sum(dim=1)
    wrong = int((expected != found[some]).sum())
    result = {"candidates": sizes.candidates, "seconds": seconds, "wrong_ranks": wrong}
    if device.type == "cuda":
        result["peak_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    if wrong:
        raise PartError(f"{wrong} of {len(some)} ranks differ from float64", result)
    return {**result, "summary": f"{sizes.candidates:,} candidates both ways in {seconds:.2f} s"}
