"""Small shards, a tiny model and what its embeddings must be, computed one sample at a time."""

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.models.build import build_dual_encoder
from tests.support.hugging_face import write_folder
from tests.support.shards import caption, picture
from tests.support.tiny_models import ARCHITECTURES, write_config

COUNTS = (7, 1, 12, 5)


def build_tiny(folder, kind="clip"):
    """A tiny model with random weights, always the same; "hf" is a folder of transformers."""
    torch.manual_seed(0)
    if kind == "hf":
        write_folder(folder / kind, "siglip2")
        return build_dual_encoder(f"local-dir:{folder / kind}", image_size=32)
    return build_dual_encoder(write_config(folder / f"{kind}.json", ARCHITECTURES[kind]))


def table_of(shards, **options):
    return build_pair_table(shards, image_extensions=("png",), **options)


@torch.no_grad()
def expected_rows(built, sample_ids):
    """Features of samples of ``write_shards``: open_clip's transform, fp32, no batches."""
    preprocess = image_transform_v2(
        PreprocessCfg(
            size=built.image_size,
            mean=built.mean,
            std=built.std,
            interpolation=built.interpolation,
            resize_mode=built.resize_mode,
        ),
        is_train=False,
    )
    towers = built.encoder.eval()
    images = [towers.encode_image(preprocess(picture(i))[None]) for i in sample_ids]
    texts = [towers.encode_text(built.tokenizer([caption(i)])) for i in sample_ids]
    return torch.cat(images).numpy(), torch.cat(texts).numpy()


def load_rows(folder, name, counts=COUNTS):
    """All rows of img_emb or text_emb, shard after shard."""
    width = len(str(len(counts)))
    files = [folder / name / f"{name}_{n:0{width}d}.npy" for n in range(len(counts))]
    return np.concatenate([np.load(file) for file in files])
