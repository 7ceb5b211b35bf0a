"""``quickstart``: the main job on data that every installation has.

Writes webdataset shards of handwritten numbers, then does what ``fit`` does with the settings of
``quickstart.yaml`` beside this file, and prints one table. With several devices Lightning starts
this same command again for the other ranks; they find the shards written and join the run.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from dist_siglip import models
from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.parser import CommandParser, parser_of_function
from dist_siglip.cli.run.training import train
from dist_siglip.cli.table import print_evaluation, print_path, read_evaluation
from dist_siglip.data.handwriting import write_handwriting_shards
from dist_siglip.distributed import is_first_process, leave_process_groups
from dist_siglip.errors import check_least
from dist_siglip.runs import RunFolder

logger = logging.getLogger(__name__)

SETTINGS = Path(__file__).with_name("quickstart.yaml")
ARCHITECTURE = Path(models.__file__).with_name("handwriting.json")
RECALL_FLOOR = 0.5


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``quickstart`` and run it."""
    return quickstart(**parser(command).parse_args(list(arguments)).as_dict())


def parser(command: str) -> CommandParser:
    """Return the parser of the options: the signature of ``quickstart``."""
    return parser_of_function(command, quickstart)


def quickstart(
    out: str = "runs/quickstart", steps: int | None = None, devices: int = 2, seed: int = 0
) -> int:
    """Train a small dual encoder on handwritten numbers, evaluate it, and leave a report.

    Exit code 1 if recall@1 stays below 0.5 in either direction.

    Args:
        out: folder of the run; shards go to its ``data`` folder. A second call goes on with an
            unfinished run, shows a finished one, and refuses one with other settings.
        steps: optimizer steps. Null takes those of the recipe.
        devices: data-parallel processes.
        seed: of data, weights and order.
    """
    started = time.monotonic()
    check_least(1, steps=steps, devices=devices)
    check_least(0, seed=seed)
    set_up_logging()
    folder = RunFolder(Path(out).resolve())
    shards = write_handwriting_shards(folder.path / "data", seed=seed)
    arguments = ["fit", "--config", str(SETTINGS), "--run_dir", str(folder.path)]
    arguments += ["--model.model", str(ARCHITECTURE)]
    arguments += ["--data.train_shards", json.dumps(shards.train)]
    arguments += ["--data.val_shards", json.dumps(shards.val)]
    arguments += ["--trainer.devices", str(devices), "--seed_everything", str(seed)]
    if steps is not None:
        arguments += ["--trainer.max_steps", str(steps)]
    code = train(arguments).exit_code
    leave_process_groups()
    if code:
        return code
    if not is_first_process():
        return 0
    extra = {
        "training pairs per second": f"{_pairs_per_second(folder):.0f} on {devices} processes",
        "this call took": f"{time.monotonic() - started:.0f} s",
    }
    print_evaluation(folder, extra)
    print_path("run folder", folder.path)
    print_path("report", folder.report)
    return _judge(folder)


def _judge(folder: RunFolder) -> int:
    """Compare recall@1 with the floor."""
    metrics = read_evaluation(folder)
    worst = min(metrics["image_to_text_recall@1"], metrics["text_to_image_recall@1"])
    if worst < RECALL_FLOOR:
        logger.warning(
            "recall@1 (%.3f) is below the floor (%.1f); train longer: --steps", worst, RECALL_FLOOR
        )
        return 1
    return 0


def _pairs_per_second(folder: RunFolder) -> float:
    """Median over the logged steps of the whole run."""
    lines = map(json.loads, folder.metrics.read_text(encoding="utf-8").splitlines())
    rates = [line["train/pairs_per_second"] for line in lines if "train/pairs_per_second" in line]
    return median(rates) if rates else 0.0
