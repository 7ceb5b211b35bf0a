"""What a start of ``fit`` imports, on one thread."""

import gc
import importlib
from contextlib import suppress

import torch

import dist_siglip.cli.run.training
import dist_siglip.report
import tests.support.torchrun

# Lightning looks for them when it opens a log, which imports them.
for _name in ("tensorboard", "s3fs", "gcsfs", "adlfs"):
    with suppress(ImportError):
        importlib.import_module(_name)

torch.set_num_threads(1)
# What was imported is never collected: looking at it would copy it into every process.
gc.collect()
gc.freeze()
__all__ = ["dist_siglip", "tests"]
