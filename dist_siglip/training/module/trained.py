"""Towers of a trained run as they are used: weights loaded, adapters folded in.

A run folder says which model it trained; a checkpoint holds its weights. The weights the run
started from are not needed, only the config and the tokenizer of the model.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.errors import UserError
from dist_siglip.models import BuiltModel, build_dual_encoder
from dist_siglip.models.build import with_num_patches
from dist_siglip.models.tuning import LoraSettings, add_adapters, merge_adapters
from dist_siglip.models.weights import load_towers, read_weights
from dist_siglip.runs import RunFolder, newest_sound_checkpoint
from dist_siglip.system.regular_file import read_regular
from dist_siglip.system.yaml_text import MOST_BYTES, load_yaml

logger = logging.getLogger(__name__)


def load_trained(
    *,
    run_dir: str | None = None,
    ckpt_path: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    weights_average: bool | None = None,
    num_patches: int | None = None,
) -> BuiltModel:
    """Load the model of a run, or one by name, on the CPU and in evaluation mode.

    Args:
        run_dir: folder of a run. Its newest sound checkpoint is taken.
        ckpt_path: another checkpoint of that run.
        model: in place of a run, as ``model.model`` of a run names it.
        pretrained: weights of ``model``, as ``model.pretrained`` names them.
        weights_average: True takes the average that the checkpoint or the weights hold, False what
            it is an average of; None the average of a run, of other weights what they put first.
        num_patches: most patches of a picture (NaFlex); None is as the run or the model says.

    Returns:
        Towers, preprocessing and tokenizer; ``start_scale`` and ``start_bias`` are the trained
        scale and the trained bias in its absolute form.

    Raises:
        UserError: if neither or both are named, a file is missing or damaged, or the checkpoint
            is not of that run's model.
    """
    if (run_dir is None) == (model is None):
        raise UserError("name either run_dir, a run that has a checkpoint, or model")
    if model is not None:
        if ckpt_path is not None:
            raise UserError(f"ckpt_path ({ckpt_path}) is of a run; name its run_dir, not model")
        built = build_dual_encoder(
            model, pretrained, weights_average=weights_average, num_patches=num_patches
        )
        if not built.weights_loaded:
            logger.warning(
                "model %s has random weights (%s, ...); name pretrained weights",
                model,
                min(built.random_parameters),
            )
    elif pretrained is not None:
        raise UserError(f"pretrained ({pretrained}) is of model; with run_dir leave it out")
    else:
        built = _of_run(RunFolder(Path(str(run_dir))), ckpt_path, weights_average)
        built = with_num_patches(built, num_patches)
    built.encoder.eval().requires_grad_(False)
    return built


def load_start(run_dir: str) -> BuiltModel:
    """Load the weights that a run started from, with their scale and bias.

    Raises:
        UserError: if the run started at random, or its weights are gone.
    """
    settings = read_config(RunFolder(Path(run_dir)))["model"]
    built = build_dual_encoder(
        settings["model"],
        settings.get("pretrained"),
        image_size=settings.get("image_size"),
        context_length=settings.get("context_length"),
        kept_positions=settings.get("kept_positions") or 0,
        weights_average=settings.get("weights_average"),
        num_patches=settings.get("num_patches"),
    )
    if not built.weights_loaded:
        raise UserError(
            f"run_dir ({run_dir}) started at random: there are no weights to average it with"
        )
    logits = settings.get("logits") or {}
    scale, bias = logits.get("start_scale"), logits.get("start_bias")
    return replace(
        built,
        start_scale=built.start_scale if scale is None else scale,
        start_bias=built.start_bias if bias is None else bias,
    )


def _of_run(folder: RunFolder, ckpt_path: str | None, average: bool | None) -> BuiltModel:
    config = read_config(folder)
    settings, data = config["model"], config.get("data")
    checkpoint = newest_sound_checkpoint(folder) if ckpt_path is None else Path(ckpt_path)
    if checkpoint is None:
        raise UserError(f"run_dir ({folder.path}) has no checkpoint; train it, or name another")
    built = build_dual_encoder(
        settings["model"],
        settings.get("pretrained"),
        image_size=settings.get("image_size"),
        context_length=settings.get("context_length"),
        num_patches=settings.get("num_patches"),
        with_weights=False,
    )
    towers: tuple[Tower, ...] = ("image", "text")
    for tower in towers:
        adapters = (settings.get(f"{tower}_tower") or {}).get("lora")
        if adapters is not None:
            add_adapters(built.encoder, tower, LoraSettings(**adapters))
    weights = read_weights(checkpoint, average=average)
    load_towers(built.encoder.clip, weights, checkpoint)
    merge_adapters(built.encoder)
    if weights.logit_scale is None or weights.logit_bias is None:
        raise UserError(f"checkpoint ({checkpoint}) holds no scale and bias; name one of fit")
    logger.info("loaded %s", checkpoint)
    return replace(
        built,
        start_scale=weights.logit_scale,
        start_bias=weights.logit_bias,
        own_scale=weights.logit_scale,
        own_bias=weights.logit_bias,
        random_parameters=frozenset(),
        trained_global_batch=weights.global_batch_size,
        trained_steps=weights.global_step,
        pictures=built.pictures.of_run(data if isinstance(data, Mapping) else {}),
        prefix_dims=_prefix_dims(settings.get("loss")),
    )


def _prefix_dims(loss: Any) -> tuple[int, ...]:
    """Prefixes that the loss of a configuration, or the base of it, is computed at."""
    if not isinstance(loss, Mapping):
        return ()
    settings = loss.get("init_args") or {}
    if not str(loss.get("class_path")).endswith("MatryoshkaLoss"):
        return _prefix_dims(settings.get("base"))
    return tuple(sorted(settings["dims"], reverse=True))


def read_config(folder: RunFolder) -> Mapping[str, Any]:
    """Read the resolved configuration of a run, whose group "model" names one.

    Raises:
        UserError: if there is none, or it names no model.
    """
    try:
        content = load_yaml(read_regular(folder.config, MOST_BYTES).decode())
        settings = content["model"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"run_dir ({folder.path}) holds no readable config.yaml of a run "
            f"({' '.join(str(error).split())[:120]}); name the folder that fit wrote"
        ) from error
    if not isinstance(settings, Mapping) or not settings.get("model"):
        raise UserError(f"{folder.config} names no model; name the folder that fit wrote")
    return dict(content)
