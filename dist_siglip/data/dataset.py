"""What is the sample in a given slot?

``PairDataset[slot]`` is a function of the slot: which bytes, which crop, and which substitute if
they are bad, whoever asks and in which process. So resumed, resharded and re-workered runs see the
same pictures to the last bit.
"""

import logging
from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dist_siglip.data.batch import PairSample
from dist_siglip.data.decode import decode_caption, decode_image, sniff_media_type
from dist_siglip.data.faults import BadSampleError
from dist_siglip.data.fetch import ShardReader
from dist_siglip.data.pairs import PairTable
from dist_siglip.data.randomness import draw_substitute, seeded_generators
from dist_siglip.data.slot import Slot
from dist_siglip.errors import UserError

_LOGGER = logging.getLogger(__name__)
_ATTEMPTS = 20  # substitutes tried for one slot
_NAMED = 20  # bad samples named by each process; then every hundredth


class PairDataset(Dataset[PairSample]):
    """Map-style data set, indexed by ``Slot``.

    A sample that cannot be read or decoded is logged with shard and key, and a substitute is
    drawn from the key of the slot and the attempt: ten times from the same shard, then from all.
    So every other sample stays where it is.

    Args:
        table: where the members are.
        transform: PIL picture to (3, H, W) tensor; random draws are seeded by
            the key of the slot.
        seed: >= 0.
        max_image_pixels: largest picture that is decoded.
        is_evaluation: mark substitutes as not valid, so that they do not count.
    """

    def __init__(
        self,
        table: PairTable,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int,
        max_image_pixels: int,
        is_evaluation: bool = False,
    ) -> None:
        self.table = table
        self._transform = transform
        self._seed = seed
        self._max_image_pixels = max_image_pixels
        self._is_evaluation = is_evaluation
        self._reader = ShardReader()
        self._num_bad = 0

    def __len__(self) -> int:
        return self.table.num_samples

    def __getitem__(self, slot: Slot) -> PairSample:
        """Return the sample of a slot, or its substitute.

        Raises:
            UserError: if a sample and 20 substitutes in a row are bad.
        """
        sample_id = slot.sample_id
        for attempt in range(1, _ATTEMPTS + 2):
            try:
                image, caption = self._decode(sample_id, slot)
            except BadSampleError as error:
                self._report(sample_id, error)
                sample_id = self._substitute(slot, attempt)
                continue
            is_substitute = attempt > 1
            return PairSample(
                image=image,
                caption=caption,
                sample_id=sample_id,
                is_valid=not (slot.is_padding or (self._is_evaluation and is_substitute)),
                is_substitute=is_substitute,
            )
        raise UserError(
            f"sample {self.table.describe(slot.sample_id)} and {_ATTEMPTS} substitutes are all "
            "bad (see the warnings above); repair the shards"
        )

    def raw(self, sample_id: int) -> tuple[bytes, str, str]:
        """Return a sample as it is stored.

        Returns:
            (encoded picture, its media type such as ``"image/png"``, caption).

        Raises:
            BadSampleError: if it cannot be read.
        """
        data = self._reader.read(self.table.image_span(sample_id))
        caption = decode_caption(self._reader.read(self.table.caption_spans(sample_id)[0][1]))
        return data, sniff_media_type(data), caption

    def _decode(self, sample_id: int, slot: Slot) -> tuple[Tensor, str]:
        """Read, decode and transform one sample with the randomness of a slot."""
        caption = decode_caption(self._reader.read(self.table.caption_spans(sample_id)[0][1]))
        data = self._reader.read(self.table.image_span(sample_id))
        image = decode_image(data, max_pixels=self._max_image_pixels)
        with seeded_generators(*slot.key(self._seed)):
            return self._transform(image), caption

    def _substitute(self, slot: Slot, attempt: int) -> int:
        """Draw a sample to stand in: at first of the same shard, which is open and at hand."""
        first, stop = 0, len(self)
        if attempt <= _ATTEMPTS // 2:
            first, stop = self.table.shard_range(slot.sample_id)
        return first + draw_substitute(stop - first, *slot.key(self._seed), attempt)

    def _report(self, sample_id: int, error: BadSampleError) -> None:
        """Count a bad sample and name it; every one at first, then now and then."""
        self._num_bad += 1
        if self._num_bad <= _NAMED or self._num_bad % 100 == 0:
            _LOGGER.warning(
                "bad sample %d in this process: %s: %s; another sample stands in",
                self._num_bad,
                self.table.describe(sample_id),
                error,
            )
