import open_clip
import pytest

from dist_siglip.errors import UserError
from dist_siglip.evaluation.classification import fill, read_classes, read_templates


def test_the_lists_are_those_of_open_clip():
    assert read_classes("imagenet", []) == list(open_clip.IMAGENET_CLASSNAMES)
    for word, templates in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        filled = [fill(template, "red fox") for template in read_templates(word, [])]
        assert filled == [template("red fox") for template in templates]


def test_a_yaml_of_the_user_may_hold_both(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('classes: [cat, "no"]\ntemplates: ["a photo of a {c}."]\n')
    assert read_classes(str(path), []) == ["cat", "no"]
    assert read_templates(str(path), []) == ["a photo of a {c}."]


def test_a_yaml_of_the_user_may_be_a_list(tmp_path):
    path = tmp_path / "classes.yml"
    path.write_text("- cat\n- dog\n")
    assert read_classes(str(path), []) == ["cat", "dog"]


@pytest.mark.parametrize("folder", ["", "test"])
def test_the_files_of_clip_benchmark_are_found_beside_or_above_the_shards(tmp_path, folder):
    (tmp_path / "classnames.txt").write_text("cat \nround dog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}, a pet\n")
    shards = [str(tmp_path / folder / "0.tar")]
    assert read_classes(None, shards) == ["cat", "round dog"]
    assert read_templates(None, shards) == ["{c}, a pet"]


def test_a_template_can_ask_for_nothing_but_the_name():
    assert fill("{c.__class__} {0!r} {c}", "cat") == "{c.__class__} {0!r} cat"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("classes: 3\n", "must be a YAML list of strings"),
        ("- yes\n- no\n", "must be a YAML list of strings"),
        ("- [\n", "cannot be read"),
        ("!!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("- cat\n", r"classes \(1\) must be at least two"),
        ('- cat\n- ""\n', "none of them empty"),
    ],
)
def test_a_file_that_holds_no_names_is_refused_in_one_line(tmp_path, content, match):
    path = tmp_path / "classes.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=match) as caught:
        read_classes(str(path), [])
    assert "\n" not in str(caught.value)


def test_names_that_are_nowhere_are_asked_for():
    with pytest.raises(UserError, match=r'give "imagenet", a list, or a text or YAML file'):
        read_classes(None, ["s3://bucket/0.tar"])
    with pytest.raises(UserError, match=r"templates \(nowhere.txt\) cannot be read: No such file"):
        read_templates("nowhere.txt", [])
    with pytest.raises(UserError, match="must say where the name goes"):
        read_templates(["a photo"], [])
