"""Pictures that are not plain RGB, as open_clip and transformers see them through an export."""

import io
import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from dist_siglip.data import ImageNormalizer, Preprocessing, evaluation_transform
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.interop.export import export_model
from tests.support.exports import NATIVE, built_from
from tests.support.hostile import chunk
from tests.support.pngs import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, numbers, png_of
from tests.support.shards import encode, photo

SIZE = (90, 70)
COLOURS = np.asarray(photo(*SIZE)).astype(np.int64)
GREYS = COLOURS[..., :1]
STEPS, GREY_STEPS = COLOURS // 32 * 32, GREYS // 32 * 32
ALPHA = ((np.asarray(photo(*SIZE, 5).convert("L")).astype(np.int64) - 90) * 6).clip(0, 255)
COLOURS_ALPHA = np.concatenate([COLOURS, ALPHA[..., None]], axis=-1)
GREYS_ALPHA = np.concatenate([GREYS, ALPHA[..., None]], axis=-1)
TABLE = photo(*SIZE).quantize(64)
INDICES = np.asarray(TABLE).astype(np.int64)[..., None]
PLTE = chunk(b"PLTE", bytes(TABLE.getpalette()[:192]))
COLOUR, GREY_VALUE = STEPS[30, 40].tolist(), int(GREY_STEPS[30, 40, 0])


def key(*values):
    return chunk(b"tRNS", numbers(*values))


# What every library sees alike when it is handed the file.
PLAIN = {
    "RGB": encode(photo(*SIZE)),
    "RGB of 16 bits": png_of(RGB, 16, COLOURS * 257),
    "grey": encode(photo(*SIZE).convert("L")),
    "RGB JPEG": encode(photo(*SIZE), "JPEG"),
    "grey JPEG": encode(photo(*SIZE).convert("L"), "JPEG"),
    "CMYK JPEG": encode(photo(*SIZE).convert("CMYK"), "JPEG"),
    "WebP": encode(photo(*SIZE), "WEBP"),
}
# Colours that count as transparent: open_clip does as "drop" does.
KEYED = {
    "RGB, a colour": png_of(RGB, 8, STEPS, key(*COLOUR)),
    "RGB of 16 bits, a colour": png_of(RGB, 16, STEPS * 257, key(*(257 * c for c in COLOUR))),
    "grey, a value": png_of(GREY, 8, GREY_STEPS, key(GREY_VALUE)),
}
# open_clip resizes these otherwise, whatever alpha there is.
RESIZED_OTHERWISE = {
    "1 bit": encode(photo(*SIZE).convert("1")),
    "1 bit, a value": png_of(GREY, 1, GREYS // 128, key(1)),
    "palette": png_of(PALETTE, 8, INDICES, PLTE),
    "palette, alphas": png_of(PALETTE, 8, INDICES, PLTE, chunk(b"tRNS", bytes(range(0, 256, 4)))),
    "palette, an entry": png_of(PALETTE, 8, INDICES, PLTE, chunk(b"tRNS", b"\xff\xff\0")),
    "RGBA": png_of(RGBA, 8, COLOURS_ALPHA),
    "RGBA of 16 bits": png_of(RGBA, 16, COLOURS_ALPHA * 257),
    "LA": png_of(GREY_ALPHA, 8, GREYS_ALPHA),
    "LA of 16 bits": png_of(GREY_ALPHA, 16, GREYS_ALPHA * 257),
    "WebP with alpha": encode(Image.fromarray(COLOURS_ALPHA.astype(np.uint8)), "WEBP"),
}
# What Pillow itself reads otherwise than the file says.
READ_OTHERWISE = {
    "grey of 2 bits, a value": png_of(GREY, 2, GREYS // 64, key(2)),
    "grey of 16 bits": png_of(GREY, 16, GREYS * 257),
    "grey of 16 bits, a value": png_of(GREY, 16, GREY_STEPS * 257, key(257 * GREY_VALUE)),
}
AS_ON_WHITE = PLAIN | KEYED | RESIZED_OTHERWISE


def flat(image, colour="#ffffff"):
    """What docs/export.md tells users of open_clip to do."""
    ground = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return built_from(NATIVE["clip"], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def read_by_open_clip(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "open_clip"
    export_model(built, folder, to="open_clip")
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return lambda image: transform(image)[None]


@pytest.fixture(scope="module")
def read_by_transformers(built, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 22):
        pytest.skip("versions of before drop alpha")
    folder = tmp_path_factory.mktemp("export") / "hf"
    export_model(built, folder, to="hf")
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    return lambda image: processor(images=image, return_tensors="pt").pixel_values


def off_by(built, data, transparency, pixels):
    """Largest difference of pixels from ours, of 255."""
    policy = PicturePolicy(transparency=transparency)
    ours = evaluation_transform(Preprocessing.of(built))(EncodedPicture(data, policy))
    ours = ImageNormalizer(built.mean, built.std).pixels(ours[None])
    scale = 255 * torch.tensor(built.std).reshape(1, 3, 1, 1)
    return float(((ours - pixels).abs() * scale).max())


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("name", [*PLAIN, *KEYED])
def test_open_clip_drops_alpha_as_drop_does(name, built, read_by_open_clip):
    data = (PLAIN | KEYED)[name]
    assert off_by(built, data, "drop", read_by_open_clip(opened(data))) < 1e-3


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("name", RESIZED_OTHERWISE)
def test_open_clip_resizes_before_it_drops_alpha(name, built, read_by_open_clip):
    data = RESIZED_OTHERWISE[name]
    assert off_by(built, data, "drop", read_by_open_clip(opened(data))) > 20


@pytest.mark.parametrize("name", AS_ON_WHITE)
def test_open_clip_sees_our_pixels_of_pictures_that_are_flat_already(
    name, built, read_by_open_clip
):
    data = AS_ON_WHITE[name]
    assert off_by(built, data, "#ffffff", read_by_open_clip(flat(opened(data)))) < 1e-3


@pytest.mark.parametrize("name", AS_ON_WHITE)
def test_transformers_lays_pictures_on_white_as_we_do(name, built, read_by_transformers):
    data = AS_ON_WHITE[name]
    assert off_by(built, data, "#ffffff", read_by_transformers(opened(data))) < 1e-3


@pytest.mark.parametrize("name", READ_OTHERWISE)
def test_what_pillow_reads_otherwise_is_known(name, built, read_by_open_clip, read_by_transformers):
    data = READ_OTHERWISE[name]
    for pixels in (read_by_open_clip(flat(opened(data))), read_by_transformers(opened(data))):
        assert off_by(built, data, "#ffffff", pixels) > 20


@pytest.mark.parametrize(
    ("to", "file", "section"),
    [
        ("open_clip", "open_clip_config.json", "preprocess_cfg"),
        ("hf", "preprocessor_config.json", None),
        ("safetensors", "open_clip_config.json", "preprocess_cfg"),
    ],
)
def test_an_export_states_the_policy_and_is_read_back_with_it(to, file, section, built, tmp_path):
    if to == "hf":
        pytest.importorskip("transformers")
    policy = PicturePolicy(transparency="#102030", exif_orientation="apply")
    export_model(replace(built, pictures=policy), tmp_path / "out", to=to)
    written = json.loads((tmp_path / "out" / file).read_text())
    written = written[section] if section else written
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    for each in (written, said):
        assert (each["transparency"], each["exif_orientation"]) == ("#102030", "apply")
    assert build_dual_encoder(f"local-dir:{tmp_path / 'out'}").pictures == policy
