import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import Compose, Normalize, ToTensor

from dist_siglip.data.samples.batch import ImageNormalizer, ImageTextBatch
from dist_siglip.errors import UserError
from dist_siglip.models import DualEncoder
from dist_siglip.models.dual_encoder import encode_tower_in_micro_batches
from tests.support.micro_memory import ARCHITECTURE
from tests.support.tiny_models import network_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_every_byte_becomes_what_torchvision_makes_of_it():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    pixels[1] = pixels[1].flip(-1)
    theirs = Compose([ToTensor(), Normalize(MEAN, STD)])
    expected = [theirs(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels]
    assert torch.equal(ImageNormalizer(MEAN, STD).pixels(pixels), torch.stack(expected))


def test_floats_pass_and_other_fields_stay():
    batch = ImageTextBatch(torch.rand(2, 3, 4, 4), *(torch.arange(2) for _ in range(5)))
    normalize = ImageNormalizer(MEAN, STD)
    assert normalize(batch).images is batch.images
    changed = normalize(batch._replace(images=torch.zeros(2, 3, 4, 4, dtype=torch.uint8)))
    assert changed.images.dtype == torch.float32
    assert all(a is b for a, b in zip(changed[1:], batch[1:], strict=True))


def test_half_precision_is_rounded_once():
    pixels = torch.randint(0, 256, (300, 3, 4, 4), dtype=torch.uint8)
    normalize = ImageNormalizer(MEAN, STD)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(normalize.pixels(pixels, dtype), normalize.pixels(pixels).to(dtype))


SHAPE = (3, 8, 8)


class PictureBytes(TorchDispatchMode):
    """Largest picture in floats that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.shape[1:] == SHAPE:
            self.largest = max(self.largest, made.numel() * made.element_size())
        return made


def test_micro_batches_normalise_no_more_than_their_rows_in_the_precision_of_the_run(monkeypatch):
    """Half the bytes of float32 for the rows of one micro-batch, not those of the batch."""
    monkeypatch.setattr("dist_siglip.data.samples.batch._WIDE_ROWS", 4)
    encoder = DualEncoder(network_of(ARCHITECTURE), ImageNormalizer(MEAN, STD))
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    exact = encoder.encode_image(encoder.normalizer.pixels(images))
    assert torch.equal(encoder.encode_image(images), exact)
    with torch.autocast("cpu", torch.bfloat16):
        expected = encoder.encode_image(encoder.normalizer.pixels(images))
        with PictureBytes() as seen:
            found = encode_tower_in_micro_batches(encoder.encode_image, images, 16)
            found.sum().backward()
        with PictureBytes() as whole:
            encode_tower_in_micro_batches(encoder.encode_image, images, 64)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert seen.largest == 16 * 3 * 8 * 8 * 2
    assert whole.largest == 64 * 3 * 8 * 8 * 2


def test_bytes_without_a_normalizer_are_refused():
    encoder = DualEncoder(network_of(ARCHITECTURE))
    with pytest.raises(UserError, match=r"images \(torch.uint8\) must be normalised floats"):
        encoder.encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.gpu
def test_the_device_agrees_to_rounding():
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    normalize = ImageNormalizer(MEAN, STD)
    torch.testing.assert_close(normalize.pixels(pixels.cuda()).cpu(), normalize.pixels(pixels))
