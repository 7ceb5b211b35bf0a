import json

import pytest
import torch

from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation import FolderRetrieval
from dist_siglip.evaluation.files.captions import count_full
from tests.support.benchmark_models import image_map, known_model, text_map
from tests.support.shards import picture, tokenize

COUNT = 11


def save(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        picture(number).save(folder / f"p{number}.png")


def captions(number, language):
    return [f"{language} {number} way {way}" for way in range(1 + number % 2)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def crossmodal(tmp_path):
    """Crossmodal-3600's captions.jsonl; picture 3 has no German caption."""
    save(tmp_path / "images")
    rows = []
    for number in range(COUNT):
        row = {"image/key": f"p{number}", "image/locale": "de"}
        for language in ("de", "en"):
            if (number, language) != (3, "de"):
                own = captions(number, language)
                row[language] = {"caption": own, "caption/tokenized": own}
        rows.append(row)
    write_lines(tmp_path / "captions.jsonl", rows)
    return tmp_path


def oracle(numbers, texts):
    """CLIP_benchmark on some pictures and the captions of each."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

    class Model:
        encode_image = staticmethod(image_map)
        encode_text = staticmethod(text_map)

    transform = evaluation_transform(known_model().inputs)
    pixels = torch.stack([transform(picture(number)) for number in numbers])
    return theirs.evaluate(
        Model, [(pixels, texts)], tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )


def test_every_language_is_that_of_clip_benchmark(crossmodal):
    found = FolderRetrieval(str(crossmodal)).evaluate(known_model())
    assert list(found.parts) == ["de", "en"]
    for language, metrics in found.parts.items():
        numbers = [n for n in range(COUNT) if (n, language) != (3, "de")]
        expected = oracle(numbers, [captions(n, language) for n in numbers])
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)
        assert found.details["languages"][language]["pictures"] == len(numbers)
    for name, mean in found.metrics.items():
        values = [metrics[name] for metrics in found.parts.values()]
        assert mean == pytest.approx(sum(values) / 2)
    assert 0 < found.metrics["text_retrieval_recall@5"] < 1


def test_the_first_caption_alone_is_what_clip_benchmark_takes(crossmodal):
    benchmark = FolderRetrieval(str(crossmodal), languages=["en"], most_captions=1)
    found = benchmark.evaluate(known_model())
    expected = oracle(range(COUNT), [captions(n, "en")[:1] for n in range(COUNT)])
    assert {name: found.parts["en"][name] for name in expected} == pytest.approx(expected)


def write_urban(folder):
    save(folder / "image")
    (folder / "caption").mkdir()
    for number in range(COUNT):
        text = "\n".join([*captions(number, "en"), "x" * 30])
        (folder / "caption" / f"p{number}.txt").write_text(text)


def write_docci(folder):
    save(folder / "images")
    rows = [
        {"image_file": f"p{n}.png", "description": captions(n, "en")[0], "split": split}
        for n in range(COUNT)
        for split in ("test" if n else "train",)
    ]
    write_lines(folder / "docci_descriptions.jsonlines", rows)


def write_karpathy(folder):
    save(folder / "val2014")
    rows = [
        {
            "filepath": "val2014",
            "filename": f"p{n}.png",
            "split": "test" if n else "val",
            "sentences": [{"raw": text} for text in captions(n, "en")],
        }
        for n in range(COUNT)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": rows}))


def write_own(folder):
    save(folder)
    rows = [{"image": f"p{n}.png", "captions": captions(n, "en")} for n in range(COUNT)]
    rows[0]["captions"] = "a text alone"
    write_lines(folder / "captions.jsonl", rows)


@pytest.mark.parametrize(
    ("write", "numbers", "texts"),
    [
        (write_urban, range(COUNT), lambda n: [" ".join([*captions(n, "en"), "x" * 30])]),
        (write_docci, range(1, COUNT), lambda n: captions(n, "en")[:1]),
        (write_karpathy, range(1, COUNT), lambda n: captions(n, "en")),
        (write_own, range(COUNT), lambda n: captions(n, "en") if n else ["a text alone"]),
    ],
)
def test_every_layout_gives_what_clip_benchmark_finds(tmp_path, write, numbers, texts):
    write(tmp_path)
    benchmark = FolderRetrieval(str(tmp_path), top_k=[1, 5, 10])
    benchmark.check()
    found = benchmark.evaluate(known_model())
    expected = oracle(numbers, [texts(n) for n in numbers])
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.parts == {}
    full = found.details["languages"]["en"]["captions_that_fill_the_context"]
    assert full == (COUNT if write is write_urban else 0)


def test_captions_that_fill_the_context_are_counted():
    assert count_full(tokenize, ["a" * 23, "a" * 24, "a" * 99]) == 2


def test_unknown_languages_are_refused(crossmodal):
    with pytest.raises(UserError, match=r"languages \(\['xx'\]\) .* among those of .*: de, en"):
        FolderRetrieval(str(crossmodal), languages=["de", "xx"]).check()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "cannot be read"),
        ('{"image": "p0.png"}', "field 'captions' is missing"),
        ('{"image": "p0.png", "captions": [""]}', "text that is not empty"),
        ('{"image": "p0.png", "captions": []}', "has no caption that counts"),
        ('{"image": "gone.png", "captions": "a"}', "no picture 'gone.png'"),
        ("[]", "cannot be used"),
        (json.dumps({"image": "p" * 300, "captions": "a"}), "no picture 'ppp"),
        (
            '{"image": "p0.png", "captions": {"../../de": "a"}}',
            r"language \('../../de'\) .* letters",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(tmp_path, content, match):
    save(tmp_path)
    (tmp_path / "captions.jsonl").write_text(content)
    with pytest.raises(UserError, match=match) as caught:
        FolderRetrieval(str(tmp_path)).check()
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has neither captions\.jsonl"):
        FolderRetrieval(str(tmp_path)).check()
    write_urban(tmp_path)
    (tmp_path / "image" / "p3.png").unlink()
    with pytest.raises(UserError, match="1 files of image/ and caption/ are no pairs, first p3"):
        FolderRetrieval(str(tmp_path)).check()
    with pytest.raises(UserError, match=r"top_k \(\[0\]\)"):
        FolderRetrieval(str(tmp_path), top_k=[0]).check()
    with pytest.raises(UserError, match=r"most_captions \(0\) must be at least 1"):
        FolderRetrieval(str(tmp_path), most_captions=0).check()
