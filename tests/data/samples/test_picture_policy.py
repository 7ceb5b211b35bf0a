import pytest

from dist_siglip.data.samples.picture_policy import BEFORE_THE_SETTINGS, PicturePolicy
from dist_siglip.errors import UserError


@pytest.mark.parametrize("colour", ["#ff0080", "#FF0080", "rgb(255, 0, 128)"])
def test_one_colour_has_one_name(colour):
    assert PicturePolicy(transparency=colour).transparency == "#ff0080"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transparency": "whit"}, r"transparency \(whit\) must be a colour .* or drop"),
        ({"transparency": "#ffffff80"}, r"transparency \(#ffffff80\) must be a colour"),
        ({"transparency": None}, r"transparency \(None\) must be a colour .* needs quotes"),
        ({"exif_orientation": "turn"}, r"exif_orientation \(turn\) must be ignore or apply"),
        ({"truncated_pictures": "skip"}, r"truncated_pictures \(skip\) must be replace or use"),
        ({"max_image_pixels": 0}, r"max_image_pixels \(0\) must be at least 1"),
    ],
)
def test_what_is_no_policy_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        PicturePolicy(**settings)


def test_a_wrong_word_in_the_config_of_a_model_names_the_config():
    with pytest.raises(UserError, match=r"preprocessing of local-dir:x: transparency \(7\)"):
        PicturePolicy.of_preprocessing({"transparency": 7}, "local-dir:x")


def test_a_run_of_before_goes_on_as_it_began():
    of_model = PicturePolicy(transparency="red", exif_orientation="apply")
    old = of_model.of_run({"max_image_pixels": 10})
    assert old == PicturePolicy(**BEFORE_THE_SETTINGS, max_image_pixels=10)
    assert of_model.of_run({"transparency": "blue"}).transparency == "#0000ff"
