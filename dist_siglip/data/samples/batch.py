"""The batch of a training step: collation, pieces of it, and normalisation of pixels."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.data.samples.identity import caption_id, caption_ids_of
from dist_siglip.data.samples.patches import is_packed
from dist_siglip.data.samples.regions import Region

_PICTURES = frozenset({"images", "views", "local_views"})  # fields
_WIDE_ROWS = 128  # pictures that are float32 at once on their way to another precision


class ImageTextBatch(NamedTuple):
    """Pairs of pictures and captions on one rank; row i of every field belongs to pair i.

    Attributes:
        images: (B, 3, H, W) uint8, which the image tower normalises, or floats that are; (B, 3,
            0, 0) where image_features stand in. Of a NaFlex tower packed patches, (B, 1 + N, 3
            p^2).
        texts: (B, L) int64, token ids; (B, 0) where text_features stand in.
        caption_ids: (B,) int64 >= 0; equal captions, those of equal tokens, have equal ids.
        sample_ids: (B,) int64, index of the sample in the data set, in shard order. For a
            substitute, the id of the sample that is shown.
        valid: (B,) bool; False where an evaluation must not count the row (padding of the last
            batch, or a sample that could not be decoded). Always True in training.
        substituted: (B,) bool; True where the sample due here could not be decoded and
            another one stands in for it.
        image_features: (B, D) float32, L2-normalised, of a locked tower; None: it sees images.
        text_features: likewise for texts.
        picture_ids: (B,) int64 >= 0; equal pictures have equal ids. None: they are not known.
        draws: (B,) int64 >= 0, random numbers of seed, epoch and position, which all that is drawn
            about a pair on the device is made of. None: they are not known.
        teacher_image_features: (B, d_1 + ... + d_K) float32, stored rows of K teachers side by
            side, each block L2-normalised by itself. None: no teacher has stored rows.
        teacher_text_features: likewise for texts, those of ``more_texts`` behind: (B, K * D).
        teacher_texts: (B, L_1 + ...) int64, token ids of the same captions for teachers with
            tokenizers of their own, side by side. None: there are none.
        more_texts: (B, K - 1, L) int64, token ids of further captions, where K captions of each
            pair train together. None: K is 1.
        more_caption_ids: (B, K - 1) int64 >= 0, theirs.
        region_texts: (B, L) int64, token ids of the text of a region of each picture. None: there
            are no regions.
        region_boxes: (B, 4) float32, its top, left, bottom and right in shares of the image; 0
            where the picture has no region.
        views: (B, 3, H, W) uint8, augmented crops of the pictures for a teacher. None: no objective
            asks for them.
        local_views: (B, V, 3, h, w) uint8, V small ones of each.
        negative_texts: (B, n, L) int64, token ids of texts that do not belong to the picture. None:
            there are none.
        negatives_exist: (B, n) bool; False where a picture has fewer, or the text is a caption of
            it after all.
    """

    images: Tensor
    texts: Tensor
    caption_ids: Tensor
    sample_ids: Tensor
    valid: Tensor
    substituted: Tensor
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    picture_ids: Tensor | None = None
    draws: Tensor | None = None
    teacher_image_features: Tensor | None = None
    teacher_text_features: Tensor | None = None
    teacher_texts: Tensor | None = None
    more_texts: Tensor | None = None
    more_caption_ids: Tensor | None = None
    region_texts: Tensor | None = None
    region_boxes: Tensor | None = None
    views: Tensor | None = None
    local_views: Tensor | None = None
    negative_texts: Tensor | None = None
    negatives_exist: Tensor | None = None

    def all_texts(self) -> Tensor:
        """Return (K * B + B * n, L) token ids: first captions of all pairs, second ones, ...

        Behind the captions are the negative texts, those of a picture one after the other.
        """
        further = [] if self.more_texts is None else [*self.more_texts.unbind(dim=1)]
        if self.negative_texts is not None:
            further.append(self.negative_texts.flatten(0, 1))
        return torch.cat([self.texts, *further]) if further else self.texts


class BatchPieces(NamedTuple):
    """Consecutive rows of one batch, as loader processes handed them over.

    Attributes:
        pieces: in the order of the rows; not empty.
    """

    pieces: tuple[ImageTextBatch, ...]

    def join(self, device: torch.device) -> ImageTextBatch:
        """Make one batch of the pieces on a device, without waiting for it.

        The pictures of a piece go from where they are to their place, once; what is small is joined
        before it travels.

        Args:
            device: of the batch. Pieces in page-locked memory go to a CUDA device while the host
                goes on, and torch gives that memory out again when they have arrived.
        """
        fields = zip(*self.pieces, strict=True)
        return ImageTextBatch._make(
            (_pictures if name in _PICTURES else _joined)(parts, device)
            for name, parts in zip(ImageTextBatch._fields, fields, strict=True)
        )


def _pictures(every: tuple[Tensor | None, ...], device: torch.device) -> Tensor | None:
    parts = [part for part in every if part is not None]
    if not parts:
        return None
    rows = sum(map(len, parts))
    joined = torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, device=device)
    for place, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        place.copy_(part, non_blocking=True)
    return joined


def _joined(parts: tuple[Tensor | None, ...], device: torch.device) -> Tensor | None:
    found = [part for part in parts if part is not None]
    if not found:
        return None
    joined = torch.cat(found)
    if device.type == "cuda":
        joined = joined.pin_memory()
    return joined.to(device, non_blocking=True)


def picture_ids_of(batch: ImageTextBatch) -> Tensor:
    """Return the ids of a batch's pictures; where they are not known each is its own."""
    return batch.sample_ids if batch.picture_ids is None else batch.picture_ids


class PairSample(NamedTuple):
    """One pair, decoded and transformed, its caption still a string.

    Attributes:
        image: (3, H, W) uint8; (3, 0, 0) if image_features is given.
        caption: stripped text.
        sample_id: index of the sample that is shown.
        is_valid: whether an evaluation counts it.
        is_substitute: whether it stands in for a sample that could not be decoded.
        image_features: (D,) float32, in place of the image.
        text_features: (D,) float32, in place of the caption's tokens.
        picture_id: of the picture; None counts every sample's as its own.
        caption_id: that was stored with text_features, if it was.
        draw: random number of seed, epoch and position, in [0, 2**63).
        teacher_image_features: (d_1 + ... + d_K,) float32, see ``ImageTextBatch``.
        teacher_text_features: likewise; those of ``more_captions`` behind.
        more_captions: stripped texts that train together with ``caption``.
        region: of the picture, its box in shares of the image; None where nobody asks for regions.
        view: (3, H, W) uint8, see ``ImageTextBatch.views``.
        local_views: (V, 3, h, w) uint8.
        negatives: texts that do not belong to the picture, "" in place of missing ones.
    """

    image: Tensor
    caption: str
    sample_id: int
    is_valid: bool
    is_substitute: bool
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    picture_id: int | None = None
    caption_id: int | None = None
    draw: int = 0
    teacher_image_features: Tensor | None = None
    teacher_text_features: Tensor | None = None
    more_captions: tuple[str, ...] = ()
    region: Region | None = None
    view: Tensor | None = None
    local_views: Tensor | None = None
    negatives: tuple[str, ...] = ()


class PairCollator:
    """Stack samples into a batch; captions are tokenized here, all at once, and identified.

    All samples have as many ``more_captions``, and as many ``negatives``.

    Args:
        tokenizer: list of B strings to (B, L) token ids. Must be picklable where loader processes
            are spawned.
        teacher_tokenizers: of teachers whose tokens are not those of ``tokenizer``.
    """

    def __init__(
        self,
        tokenizer: Callable[[list[str]], Tensor],
        teacher_tokenizers: Sequence[Callable[[list[str]], Tensor]] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._teacher_tokenizers = tuple(teacher_tokenizers)

    def __call__(self, samples: Sequence[PairSample]) -> ImageTextBatch:
        """Collate B samples in their order."""
        captions = [sample.caption for sample in samples]
        text_features = _stacked([sample.text_features for sample in samples])
        if text_features is not None:
            texts = torch.empty(len(samples), 0, dtype=torch.long)
            caption_ids = torch.tensor([_stored_caption_id(sample) for sample in samples])
        else:
            columns = zip(*(sample.more_captions for sample in samples), strict=True)
            every = captions + [text for column in columns for text in column]
            texts = self._tokenizer(every).long()
            caption_ids = caption_ids_of(self._tokenizer, every, texts)
        (texts, more_texts), (caption_ids, more_ids) = (
            _first_and_more(rows, len(samples)) for rows in (texts, caption_ids)
        )
        negative_texts, negatives_exist = self._negatives(samples, caption_ids, more_ids)
        regions = [sample.region for sample in samples if sample.region is not None]
        region_texts = self._tokenizer([each.text for each in regions]) if regions else None
        picture_ids = [s.sample_id if s.picture_id is None else s.picture_id for s in samples]
        return ImageTextBatch(
            images=torch.stack([sample.image for sample in samples]),
            texts=texts,
            caption_ids=caption_ids,
            sample_ids=torch.tensor([sample.sample_id for sample in samples]),
            valid=torch.tensor([sample.is_valid for sample in samples]),
            substituted=torch.tensor([sample.is_substitute for sample in samples]),
            image_features=_stacked([sample.image_features for sample in samples]),
            text_features=text_features,
            picture_ids=torch.tensor(picture_ids),
            draws=torch.tensor([sample.draw for sample in samples]),
            teacher_image_features=_stacked([each.teacher_image_features for each in samples]),
            teacher_text_features=_stacked([each.teacher_text_features for each in samples]),
            teacher_texts=self._texts_of_teachers(captions),
            more_texts=more_texts,
            more_caption_ids=more_ids,
            region_texts=None if region_texts is None else region_texts.long(),
            region_boxes=torch.tensor([each.box for each in regions]) if regions else None,
            views=_stacked([each.view for each in samples]),
            local_views=_stacked([each.local_views for each in samples]),
            negative_texts=negative_texts,
            negatives_exist=negatives_exist,
        )

    def _negatives(
        self, samples: Sequence[PairSample], caption_ids: Tensor, more_ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokenize negative texts, and tell which are there and no captions of their picture."""
        every = [text for sample in samples for text in sample.negatives]
        if not every:
            return None, None
        tokens = self._tokenizer(every).long()
        ids = caption_ids_of(self._tokenizer, every, tokens).view(len(samples), -1, 1)
        own = caption_ids[:, None]
        if more_ids is not None:
            own = torch.cat([own, more_ids], dim=1)
        exist = torch.tensor([bool(text) for text in every]).view(len(samples), -1)
        exist &= (ids != own[:, None]).all(dim=2)
        return tokens.view(*exist.shape, -1), exist

    def _texts_of_teachers(self, captions: list[str]) -> Tensor | None:
        if not self._teacher_tokenizers:
            return None
        return torch.cat([each(captions).long() for each in self._teacher_tokenizers], dim=1)


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else None


def _first_and_more(rows: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Part the rows of first captions from those of others, (B, K - 1, ...)."""
    if len(rows) == count:
        return rows, None
    first, *more = rows.split(count)
    return first, torch.stack(more, dim=1)


def _stored_caption_id(sample: PairSample) -> int:
    """Id of a caption that is not tokenized; of a file without ids, that of the text."""
    return caption_id(sample.caption) if sample.caption_id is None else sample.caption_id


class ImageNormalizer:
    """Turn (B, 3, H, W) uint8 into floats, (value / 255 - mean) / std for each channel.

    As float32 to the last bit what torchvision's ``ToTensor`` and ``Normalize`` make of each
    picture on the CPU. Floats pass unchanged.

    Args:
        mean: of red, green and blue, on the scale 0 to 1.
        std: likewise, > 0.

    Example:
        >>> bright = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
        >>> ImageNormalizer((0.5, 0.5, 0.5), (0.5, 0.5, 0.25)).pixels(bright).flatten()
        tensor([1., 1., 2.])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean = tuple(mean)
        self._std = tuple(std)
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: ImageTextBatch) -> ImageTextBatch:
        """Normalise the images of a batch, on the device they are on."""
        return batch._replace(images=self.pixels(batch.images))

    def pixels(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalise (B, 3, H, W) pixels, or packed patches (B, 1 + N, 3 p^2) but for their row 0.

        Args:
            images: uint8, or floats, which pass unchanged.
            dtype: of the result, rounded once from float32. What is live as float32 beside it is
                128 pictures.
        """
        if images.is_floating_point():
            return images
        mean, std = self._constants(images.device)
        if dtype == torch.float32 and not is_packed(images):
            return images.to(torch.float32).div_(255).sub_(mean).div_(std)
        found = images.to(dtype)
        places, values = found, images
        if is_packed(images):  # row 0 stays; behind it colours stand last
            mean, std = mean.flatten(), std.flatten()
            places, values = (each[:, 1:].unflatten(-1, (-1, 3)) for each in (found, images))
        for place, part in zip(places.split(_WIDE_ROWS), values.split(_WIDE_ROWS), strict=True):
            place.copy_(part.to(torch.float32).div_(255).sub_(mean).div_(std))
        return found

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and std, (3, 1, 1), sent to a device once: each copy may wait for it."""
        if device not in self._by_device:
            mean = torch.tensor(self._mean, device=device).reshape(3, 1, 1)
            std = torch.tensor(self._std, device=device).reshape(3, 1, 1)
            self._by_device[device] = mean, std
        return self._by_device[device]
