"""One training step of many pairs in micro-batches, and what it needs, in MiB, as JSON.

Run in a process of its own: ``python -m tests.support.micro_memory PAIRS MICRO_BATCH_SIZE``.
"""

import json
import sys
from pathlib import Path

import torch

from dist_siglip.losses import LogitScaleBias, siglip_loss
from dist_siglip.models import DualEncoder, encode_in_micro_batches
from tests.support.tiny_models import network_of

WIDTH, CHUNK_ROWS = 16, 512
TOWER = {"width": 32, "layers": 2}
ARCHITECTURE = {
    "embed_dim": WIDTH,
    "vision_cfg": {**TOWER, "image_size": 8, "head_width": 16, "patch_size": 4},
    "text_cfg": {**TOWER, "heads": 2, "context_length": 4, "vocab_size": 40},
}


def status(name):
    """Read a line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def kept_bytes(encoder, images, texts):
    """Bytes that autograd keeps for backward, beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encoder(images, texts)
    assert all(feature.requires_grad for feature in features)
    return sum(storages.values())


def main(num_pairs, micro_batch_size):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = DualEncoder(network_of(ARCHITECTURE)).train()
    logits = LogitScaleBias()
    parameters = [*encoder.parameters(), *logits.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    images = torch.randn(num_pairs, 3, 8, 8)
    texts = torch.randint(1, 40, (num_pairs, 4))

    def step(rows):
        features = encode_in_micro_batches(encoder, images[rows], texts[rows], micro_batch_size)
        loss = siglip_loss(*features, *logits(), chunk_rows=CHUNK_ROWS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    # Copies: a slice would count the storage of all images.
    part = (images[:micro_batch_size].clone(), texts[:micro_batch_size].clone())
    activations = kept_bytes(encoder, *part)
    step(slice(0, 2))  # libraries, gradients, optimizer state
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    loss = step(slice(0, num_pairs))
    mib = 2**20
    sys.stdout.write(
        json.dumps(
            {
                "loss": loss,
                "peak": (status("VmHWM") - before) / mib,
                "activations_of_micro_batch": activations / mib,
                "activations_of_all": activations / mib * num_pairs / micro_batch_size,
                "features_and_gradients": 10 * num_pairs * WIDTH * 4 / mib,
                "loss_tiles": 16 * CHUNK_ROWS**2 * 4 / mib,
            }
        )
        + "\n"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
