"""The base class of benchmarks, and the model as they see it.

A benchmark is a class whose constructor arguments are its settings; a configuration names it by its
class path. It gets two encoders and their input format, asks nothing else of the model, and returns
numbers. All ranks share the work and all have the result.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.batch import ImageNormalizer
from dist_siglip.data.samples.transforms import Preprocessing
from dist_siglip.errors import UserError
from dist_siglip.models.dual_encoder import DualEncoder, PatchTokens

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class EvaluatedModel(NamedTuple):
    """A dual encoder as benchmarks see it.

    Every rank calls the encoders equally often, with rows or without: towers that are sharded
    gather their weights in every call. ``dist_siglip.evaluation.encoding`` keeps to that.

    Attributes:
        encode_image: (B, 3, H, W) uint8 as ``evaluation_transform(inputs)`` makes them, or
            normalised floats, on any device, to (B, D) float32 rows of length 1 on ``device``.
        encode_text: (B, L) token ids, likewise.
        tokenizer: list of B strings to (B, L) token ids.
        inputs: preprocessing of the model.
        logit_scale: multiplier of the model.
        logit_bias: bias of the model, added.
        device: where features are.
        encode_patches: pixels as ``encode_image`` takes them, to patch tokens; None if there is no
            way to them.
        note_progress: called by what computes long without an encoder.
        encode_image_tokens: pixels to the rows of ``encode_image`` and (B, T, C) patch tokens, in
            one pass; None if there is no way to them.
    """

    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    inputs: Preprocessing
    logit_scale: float
    logit_bias: float
    device: torch.device
    encode_patches: Callable[[Tensor], PatchTokens] | None = None
    note_progress: Callable[[], None] = lambda: None
    encode_image_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(
        cls,
        encoder: DualEncoder,
        inputs: Preprocessing,
        *,
        logit_scale: float,
        logit_bias: float,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> "EvaluatedModel":
        """Wrap towers that are on their device and in evaluation mode.

        Args:
            encoder: the towers.
            inputs: preprocessing of the model.
            logit_scale: multiplier of the model.
            logit_bias: bias of the model, added.
            device: of the towers.
            precision: makes the context the towers run in, such as autocast.
        """
        normalizer = ImageNormalizer(inputs.mean, inputs.std)

        @torch.no_grad()
        def encode_image(pixels: Tensor) -> Tensor:
            with precision():
                return encoder.encode_image(normalizer.pixels(pixels.to(device, non_blocking=True)))

        @torch.no_grad()
        def encode_patches(pixels: Tensor) -> PatchTokens:
            with precision():
                pixels = normalizer.pixels(pixels.to(device, non_blocking=True))
                return encoder.encode_patches(pixels)

        @torch.no_grad()
        def encode_image_tokens(pixels: Tensor) -> tuple[Tensor, Tensor]:
            with precision():
                pixels = normalizer.pixels(pixels.to(device, non_blocking=True))
                return encoder.encode_image_tokens(pixels)

        @torch.no_grad()
        def encode_text(tokens: Tensor) -> Tensor:
            with precision():
                return encoder.encode_text(tokens.to(device, non_blocking=True))

        return cls(
            encode_image,
            encode_text,
            inputs.tokenizer,
            inputs,
            logit_scale,
            logit_bias,
            device,
            encode_patches,
            encode_image_tokens=encode_image_tokens,
        )


class BenchmarkResult(NamedTuple):
    """What a benchmark found; equal on every rank.

    Attributes:
        metrics: name to number.
        details: what is no single number, as JSON can hold it.
    """

    metrics: dict[str, float]
    details: dict[str, Any]

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """Metrics of each part, such as a language, by name: ``parts`` of the details."""
        found: dict[str, dict[str, float]] = self.details.get("parts", {})
        return found


class Benchmark(ABC):
    """One benchmark with its settings.

    Args:
        name: of this benchmark among those of a run; letters, digits and ``_ . -``. Its file is
            called so, and its metrics begin with it.

    Attributes:
        task: what kind it is, in the words of CLIP_benchmark where that has one.
        dataset: what its file calls the data set; the name, unless somebody says another.
        parts_are_languages: whether the parts of its results are languages, not data sets.
    """

    task: ClassVar[str]
    parts_are_languages: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = self.dataset = name

    def check(self) -> None:
        """Find what is wrong with settings and files before anything is started.

        A subclass checks its own and calls this one.

        Raises:
            UserError: if the name is no file name.
        """
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"name ({self.name!r}) of a benchmark must be letters, digits and _ . -, and begin "
                "with a letter or digit"
            )

    def check_towers(self, towers: DualEncoder) -> None:  # noqa: B027 - most have no demands
        """Find what is wrong with a model before anything is started.

        Raises:
            UserError: if it has no part that this benchmark needs.
        """

    @abstractmethod
    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Evaluate a model.

        Distributed contract: every rank calls it with the same settings and takes its share; every
        rank gets the same result, which does not depend on the number of ranks. Nothing random is
        drawn from the global generators.

        Args:
            model: what to evaluate.
            group: process group; the default one if None.

        Raises:
            UserError: if something cannot be read; on every rank.
        """


def check_languages(languages: Iterable[str], of: str) -> None:
    """Refuse languages of a file that no file can be called by; their results have their names.

    Raises:
        UserError: naming the first one; ``of`` says where they stand.
    """
    for each in languages:
        if not _NAME.fullmatch(each):
            raise UserError(
                f"{of}: language ({each[:40]!r}) must be letters, digits and _ . -, and begin with "
                "a letter or digit"
            )


def check_benchmarks(benchmarks: list[Benchmark]) -> None:
    """Check every benchmark, and that no two have one name."""
    names = [benchmark.name for benchmark in benchmarks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(
            f"benchmarks have the name {repeated[0]!r} twice; give each a name of its own"
        )
    for benchmark in benchmarks:
        benchmark.check()
