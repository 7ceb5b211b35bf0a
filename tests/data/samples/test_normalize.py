import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from dist_siglip.data.samples.batch import ImageNormalizer, ImageTextBatch

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


@pytest.mark.gpu
def test_the_device_agrees_to_rounding():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    normalize = ImageNormalizer(MEAN, STD)
    torch.testing.assert_close(normalize.pixels(pixels.cuda()).cpu(), normalize.pixels(pixels))
