"""A run of ``open_clip_train`` for ``bench train``, in open_clip's own virtual environment.

Copied beside a run and executed there, so it imports nothing of this package. Training itself is
open_clip's; changed is what a comparison needs: the model may be a JSON config, its shuffle buffer
is full before the first batch, as it is in a long run, and on a CPU DistributedDataParallel
is not given a device, which torch refuses there. At the end the first rank prints its peak memory.

    python train_peer.py FILE    # JSON: {"model_config": path or null, "arguments": [...]}

torchrun takes ``--logs`` for an option of its own, hence the file.
"""

import json
import os
import resource
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

PEAK = "peak bytes:"


def main() -> None:
    """Train, then print the peak memory of the first rank."""
    import open_clip
    import torch

    data: Any = import_module("open_clip_train.data")
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if given["model_config"] is not None:
        open_clip.add_model_config(given["model_config"])
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL
    parallel = torch.nn.parallel.DistributedDataParallel

    def without_cpu_device(model: Any, device_ids: Any, **settings: Any) -> Any:
        on_gpu = all(torch.device(device).type == "cuda" for device in device_ids)
        return parallel(model, device_ids=device_ids if on_gpu else None, **settings)

    torch.nn.parallel.DistributedDataParallel = without_cpu_device  # type: ignore[misc, assignment]
    import_module("open_clip_train.main").main(given["arguments"])
    if os.environ.get("RANK", "0") == "0":
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        sys.stdout.write(f"{PEAK} {peak}\n")


if __name__ == "__main__":
    main()
