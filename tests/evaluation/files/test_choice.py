import json

import pytest
import torch
from PIL import Image

from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation import CaptionChoice
from tests.support.benchmark_models import image_map, known_model, text_map
from tests.support.shards import picture, tokenize

QUESTIONS = range(40)


def save(folder, names, side=20):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        picture(number, side).save(folder / name)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def caption(question, which):
    return f"{which} is in {question * question}"


@pytest.fixture
def winoground(tmp_path):
    """examples.jsonl as published: names of pictures lack their ending."""
    stems = [[f"ex_{q}_img_{i}" for i in (0, 1)] for q in QUESTIONS]
    save(tmp_path / "images", [f"{stem}.png" for pair in stems for stem in pair])
    rows = [
        {
            "id": q,
            "image_0": stems[q][0],
            "image_1": stems[q][1],
            "caption_0": caption(q, "a"),
            "caption_1": caption(q, "b"),
            "collapsed_tag": "Object" if q % 2 else "Relation",
        }
        for q in QUESTIONS
    ]
    write_lines(tmp_path / "examples.jsonl", rows)
    return tmp_path


def write_sugarcrepe(folder, task="swap_att"):
    save(folder / "val2017", [f"{q:012d}.png" for q in QUESTIONS])
    rows = {
        str(3 * q): {
            "filename": f"{q:012d}.png",
            "caption": caption(q, "yes"),
            "negative_caption": caption(q, "no"),
        }
        for q in QUESTIONS
    }
    (folder / f"{task}.json").write_text(json.dumps(rows))


def oracle(images, captions):
    """CLIP_benchmark on (Q, I) pictures and (Q, C) captions."""
    theirs = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")

    class Model:
        encode_image = staticmethod(image_map)
        encode_text = staticmethod(text_map)

    transform = evaluation_transform(known_model().inputs)
    pixels = torch.stack([torch.stack([transform(each) for each in own]) for own in images])
    return theirs.evaluate(Model, [(pixels, captions)], tokenize, "cpu", amp=False)


def test_winoground_is_that_of_clip_benchmark(winoground):
    found = CaptionChoice(str(winoground)).evaluate(known_model())
    images = [[picture(2 * q + i) for i in (0, 1)] for q in QUESTIONS]
    expected = oracle(images, [[caption(q, which) for which in "ab"] for q in QUESTIONS])
    assert found.metrics == pytest.approx(expected)
    assert 0 < found.metrics["acc"] < found.metrics["text_acc"] < 1
    kinds = found.details["questions"]["examples"]["kinds"]
    assert {kind: row["questions"] for kind, row in kinds.items()} == {"Object": 20, "Relation": 20}
    mean = (kinds["Object"]["acc"] + kinds["Relation"]["acc"]) / 2
    assert mean == pytest.approx(found.metrics["acc"])


def test_sugarcrepe_is_that_of_clip_benchmark_in_each_part(tmp_path):
    write_sugarcrepe(tmp_path, "swap_att")
    write_sugarcrepe(tmp_path, "add_obj")
    found = CaptionChoice(str(tmp_path)).evaluate(known_model())
    captions = [[caption(q, which) for which in ("yes", "no")] for q in QUESTIONS]
    expected = oracle([[picture(q)] for q in QUESTIONS], captions)
    assert expected.pop("image_acc") == 1  # of one picture: says nothing, and is left out
    assert found.metrics == pytest.approx(expected)
    assert found.parts == {"add_obj": found.metrics, "swap_att": found.metrics}
    assert 0 < found.metrics["acc"] < 1


def test_aro_cuts_pictures_to_their_boxes_and_averages_relations(tmp_path):
    """Loops in float64 over the cut pictures."""
    save(tmp_path / "images", ["a.png"], side=60)
    rows = [
        {
            "image_path": "a.png",
            "bbox_x": q % 30,
            "bbox_y": q % 20,
            "bbox_w": 20 + q % 7,
            "bbox_h": 15,
            "true_caption": caption(q, "true"),
            "false_caption": caption(q, "false"),
            "relation_name": "on" if q % 3 else "under",
        }
        for q in range(78)
    ]
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(rows))
    found = CaptionChoice(str(tmp_path)).evaluate(known_model())
    transform, whole = evaluation_transform(known_model().inputs), picture(0, 60)
    hits = {"on": [], "under": []}
    for row in rows:
        left, top = row["bbox_x"], row["bbox_y"]
        box = (left, top, left + row["bbox_w"], top + row["bbox_h"])
        image = image_map(transform(whole.crop(box))[None])[0].tolist()
        right, wrong = (
            sum(a * b for a, b in zip(image, text, strict=True))
            for text in text_map(tokenize([row["true_caption"], row["false_caption"]])).tolist()
        )
        hits[row["relation_name"]].append(right > wrong)
    shares = [sum(own) / len(own) for own in hits.values()]
    assert found.metrics["macro_acc"] == pytest.approx(sum(shares) / 2)
    assert found.metrics["acc"] == pytest.approx(sum(map(sum, hits.values())) / 78)
    assert found.metrics["acc"] != pytest.approx(found.metrics["macro_acc"])


def test_the_layout_of_ones_own_takes_any_number_of_choices(tmp_path):
    save(tmp_path, ["a.png", "b.png", "c.png"])
    rows = [
        {"images": ["a.png"], "captions": ["one", "two", "three", "four"], "kind": "order"},
        {"images": ["b.png", "c.png"], "captions": ["five"]},
    ]
    write_lines(tmp_path / "choices.jsonl", rows)
    images = image_map(
        torch.stack([evaluation_transform(known_model().inputs)(picture(i)) for i in range(3)])
    ).double()
    texts = text_map(tokenize(["one", "two", "three", "four", "five"])).double()
    first = (images[0] @ texts[:4].T).argmax() == 0
    second = images[1] @ texts[4] > images[2] @ texts[4]
    found = CaptionChoice(str(tmp_path)).evaluate(known_model()).metrics
    assert found["text_acc"] == (int(first) + 1) / 2
    assert found["image_acc"] == (1 + int(second)) / 2
    assert found["acc"] == (int(first) + int(second)) / 2


def test_a_tie_is_wrong(tmp_path):
    """Two equal pictures: CLIP_benchmark's argmax would take the first, and be right."""
    for name in ("a.png", "b.png"):
        picture(0).save(tmp_path / name)
    rows = [{"images": ["a.png", "b.png"], "captions": ["one", "one"]}]
    write_lines(tmp_path / "choices.jsonl", rows)
    found = CaptionChoice(str(tmp_path)).evaluate(known_model()).metrics
    assert found == {"text_acc": 0, "image_acc": 0, "acc": 0}


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "has no question"),
        ([{"images": ["a.png"]}], "field 'captions' is missing"),
        ([{"images": ["a.png"], "captions": ["one"]}], "of one of them several"),
        ([{"images": ["a.png"], "captions": ["one", ""]}], "text that is not empty"),
        ([{"images": ["gone.png"], "captions": ["one", "two"]}], "no picture 'gone.png'"),
        ([["a.png"]], "cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(tmp_path, rows, match):
    save(tmp_path, ["a.png"])
    write_lines(tmp_path / "choices.jsonl", rows)
    with pytest.raises(UserError, match=match) as caught:
        CaptionChoice(str(tmp_path)).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["x", "w"])
@pytest.mark.parametrize("number", ["1e999", "NaN", '"wide"', "[]"])
def test_a_box_that_is_none_is_told_in_one_line(tmp_path, side, number):
    save(tmp_path, ["a.png"])
    box = {"bbox_x": "0", "bbox_y": "0", "bbox_w": "9", "bbox_h": "9", f"bbox_{side}": number}
    sides = ", ".join(f'"{name}": {value}' for name, value in box.items())
    row = f'{{"image_path": "a.png", "true_caption": "one", "false_caption": "two", {sides}}}'
    (tmp_path / "visual_genome_relation.json").write_text(f"[{row}]")
    with pytest.raises(UserError, match="cannot be used: ") as caught:
        CaptionChoice(str(tmp_path)).check()
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no examples.jsonl \(Winoground\), add_att"):
        CaptionChoice(str(tmp_path)).check()


def test_a_picture_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    write_lines(tmp_path / "choices.jsonl", [{"images": ["a.png"], "captions": ["one", "two"]}])
    with pytest.raises(UserError, match=r"a\.png cannot be used"):
        CaptionChoice(str(tmp_path)).evaluate(known_model())
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    row = {"image_path": "a.png", "bbox_x": 20, "bbox_y": 0, "bbox_w": 5, "bbox_h": 5}
    row |= {"true_caption": "one", "false_caption": "two", "attributes": ["red", "big"]}
    (tmp_path / "choices.jsonl").unlink()
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=r"its box \[20, 0, 25, 5\] is empty, or outside"):
        CaptionChoice(str(tmp_path)).evaluate(known_model())
