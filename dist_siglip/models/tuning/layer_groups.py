"""Layer groups of the towers: head, blocks and stem, found by the names of parameters.

A tower is a stem (embeddings), blocks one after another, and a head (last norm, pooling,
projection). Names tell which is which, for open_clip's own towers, those of timm and those of
transformers.
"""

import re
from typing import NamedTuple

from torch import nn

from dist_siglip.data.samples.cached_features import Tower

_IMAGE_PREFIX = "clip.visual."
# A numbered block, in a numbered stage or not: "blocks.3.", "stages.1.blocks.0.", "layer2.0.".
_BLOCK = re.compile(
    r"(?:^|\.)(?:resblocks|blocks|layers?|block|stages)\.(\d+)\.(?:blocks\.(\d+)\.|(?=downsample))?"
    r"|(?:^|\.)layer(\d+)\.(\d+)\."
)
_IS_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers?|block|stages|layer\d)\.\d+$")
_HEAD = re.compile(
    r"(?:trunk\.|transformer\.|encoder\.)*(?:ln_post|proj|attn_pool|attnpool|head|norm|fc_norm|fc"
    r"|ln_final|text_projection|pooler|final_layer_norm|ln_f)(?:\.|$)"
)


class LayerGroup(NamedTuple):
    """The layer group of a parameter.

    Attributes:
        tower: "image" or "text".
        groups_behind: groups between it and the end of its tower: 0 in the head, 1 in the last
            block, and so on; the stem has one more than the first block.
    """

    tower: Tower
    groups_behind: int


def lies_in_block(name: str) -> bool:
    """Whether a parameter of this name lies in a numbered block, of a tower or a fusion head.

    Example:
        >>> lies_in_block("clip.visual.transformer.resblocks.3.mlp.c_fc.weight")
        True
        >>> lies_in_block("clip.visual.proj"), lies_in_block("clip.token_embedding.weight")
        (False, False)
    """
    return bool(_BLOCK.search(name))


def layer_groups(encoder: nn.Module) -> dict[str, LayerGroup]:
    """Find the layer group of each parameter of a dual encoder, by its name.

    Args:
        encoder: a ``DualEncoder``.

    Returns:
        A group for every name of ``encoder.named_parameters()``.
    """
    found: dict[str, LayerGroup] = {}
    towers: dict[Tower, list[tuple[str, str]]] = {"image": [], "text": []}
    for name, _ in encoder.named_parameters():
        if name.startswith(_IMAGE_PREFIX):
            towers["image"].append((name, name.removeprefix(_IMAGE_PREFIX)))
        else:
            short = name.removeprefix("clip.").removeprefix("text.")
            towers["text"].append((name, short))
    for tower, names in towers.items():
        keys = [_block_of(short) for _, short in names]
        blocks = {key: number for number, key in enumerate(dict.fromkeys(filter(None, keys)))}
        for (name, short), key in zip(names, keys, strict=True):
            if key is not None:
                behind = len(blocks) - blocks[key]
            else:
                behind = 0 if _HEAD.match(short) else len(blocks) + 1
            found[name] = LayerGroup(tower, behind)
    return found


def block_names(module: nn.Module) -> list[str]:
    """Names of the blocks of a tower or of an encoder, outermost ones only.

    Example:
        >>> tower = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))})
        >>> block_names(tower)
        ['blocks.0', 'blocks.1']
    """
    found: list[str] = []
    for name, _ in module.named_modules():
        if _IS_BLOCK.search(name) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _block_of(name: str) -> tuple[int, int] | None:
    """Return the numbers that tell a block of a tower from the others, or None outside of them.

    Example:
        >>> _block_of("trunk.blocks.11.norm1.weight"), _block_of("trunk.stages.2.blocks.1.gamma")
        ((11, 0), (2, 1))
        >>> _block_of("trunk.patch_embed.proj.weight") is None
        True
    """
    match = _BLOCK.search(name)
    if match is None:
        return None
    first, second = match[1] or match[3], match[2] or match[4] or "0"
    return int(first), int(second)
