import collections

import pytest
from open_clip import SimpleTokenizer

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import (
    MAX_CAPTION_BYTES,
    MAX_CAPTION_CHARACTERS,
    CaptionRule,
    EmptyCaptions,
    caption_id,
    field_of,
    read_json,
)
from dist_siglip.errors import UserError


def test_ids_fit_int64_and_tell_captions_apart():
    ids = [caption_id(f"caption {i}") for i in range(20_000)]
    assert len(set(ids)) == 20_000
    assert all(0 <= i < 2**63 for i in ids)
    assert max(ids) > 2**62  # all 63 bits are used


def test_white_space_at_the_ends_does_not_count():
    assert caption_id("  a fox\n") == caption_id("a fox")
    assert caption_id("a  fox") != caption_id("a fox")


def test_id_never_changes():
    # Recomputed with `printf 'ein Füchslein' | b2sum -l 64`, shifted right by one bit.
    assert caption_id("ein Füchslein") == 0xE66F009D59DA7D02 >> 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a fox", "a fox"),
        (b"\xef\xbb\xbf a fox \r\n", "a fox"),
        ("ein Füchslein 🦊".encode(), "ein Füchslein 🦊"),
        (b"x" * MAX_CAPTION_BYTES, "x" * MAX_CAPTION_CHARACTERS),
        (b"x" * (MAX_CAPTION_CHARACTERS - 1) + b" y", "x" * (MAX_CAPTION_CHARACTERS - 1)),
    ],
)
def test_captions_are_stripped_and_capped(data, text):
    assert CaptionRule().choose([("txt", data)], (0,)) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t\xc2\xa0", "empty"),
        (b"caf\xe9", "not UTF-8"),
        (b"x" * (MAX_CAPTION_BYTES + 1), "at most 1048576"),
    ],
)
def test_bad_captions_are_named(data, reason):
    with pytest.raises(BadSampleError, match=reason):
        CaptionRule().choose([("txt", data)], (0,))


JSON = b'{"caption": ["", " one ", "two"], "seo": {"alt": "three"}, "n": [1], "none": null}'


@pytest.mark.parametrize(
    ("rule", "members", "text"),
    [
        ({"json_field": "caption"}, [("json", JSON)], "one"),
        ({"json_field": "seo.alt"}, [("json", JSON)], "three"),
        ({"members": ("json", "txt")}, [("json", JSON), ("txt", b"four")], "one"),
        ({"members": ("json", "txt"), "json_field": "none"}, [("json", JSON), ("txt", b"4")], "4"),
        ({"members": ("json", "txt"), "json_field": "x"}, [("json", JSON), ("txt", b"4")], "4"),
        ({}, [("txt", b"first\nsecond")], "first\nsecond"),
        ({"split_lines": True}, [("txt", b"\n first\r\nsecond\n")], "first"),
    ],
)
def test_the_first_caption_that_is_not_empty_is_taken(rule, members, text):
    assert CaptionRule(**rule).choose(members, (0,)) == text


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\r"])
def test_only_line_ends_separate_captions(letter):
    text = f"a red{letter}fox"
    rule = CaptionRule(split_lines=True)
    assert rule.all_of([("txt", f"{text}\r\na hen\n".encode())]) == [text, "a hen"]


def test_a_field_that_some_objects_of_a_list_lack_is_read_from_the_others():
    rule = CaptionRule(members=("json",), json_field="sentences.raw")
    data = b'{"sentences": [{"tokens": []}, {"raw": "a hen"}]}'
    assert rule.all_of([("json", data)]) == ["a hen"]


def test_texts_without_a_token_are_empty():
    """open_clip's SigLIP takes punctuation away before it looks for tokens."""
    siglip, clip = (SimpleTokenizer(clean=clean) for clean in ("canonicalize", "lower"))
    texts = ["...", "!!!", "?!", "-", "\0\0", "&nbsp;", "\u200b", "a.", "&amp;", "7", "ä", "狐"]
    kept = {"siglip": ["\u200b", "a.", "7", "ä", "狐"], "clip": [*texts[:4], *texts[6:]]}
    kept["none"] = kept["clip"]
    for name, tokenizer in (("siglip", siglip), ("clip", clip), ("none", None)):
        is_empty = EmptyCaptions(tokenizer)
        assert [text for text in texts if not is_empty(text)] == kept[name]
        if tokenizer is not None:
            nothing, *rows = tokenizer(["", *texts])
            tokenless = [text for text, row in zip(texts, rows, strict=True) if row.equal(nothing)]
            assert [text for text in texts if is_empty(text)] == tokenless


def test_the_first_caption_with_a_token_is_taken():
    is_empty = EmptyCaptions(SimpleTokenizer(clean="canonicalize"))
    rule = CaptionRule(members=("txt", "json"), split_lines=True)
    members = [("txt", b"...\n-"), ("json", b'{"caption": ["!!!", "a hen"]}')]
    assert rule.choose(members, (0,), is_empty=is_empty) == "a hen"
    with pytest.raises(BadSampleError, match="caption is empty"):
        rule.choose(members[:1], (0,), is_empty=is_empty)


def test_members_after_the_first_caption_are_not_read():
    def members():
        yield "txt", b"a fox"
        raise AssertionError

    assert CaptionRule().choose(members(), (0,)) == "a fox"


def test_random_captions_follow_the_place_alone_and_spread_evenly():
    rule = CaptionRule(members=("txt", "json"), pick="random", split_lines=True)
    members = [("txt", b"a\nb\n"), ("json", JSON)]
    chosen = [rule.choose(members, (0, 0, place, 0)) for place in range(4000)]
    assert chosen == [rule.choose(members, (0, 0, place, 0)) for place in range(4000)]
    counts = collections.Counter(chosen)
    assert set(counts) == {"a", "b", "one", "two"}
    assert all(abs(count - 1000) < 120 for count in counts.values())  # four standard deviations
    next_epoch = [rule.choose(members, (0, 1, place, 0)) for place in range(4000)]
    assert sum(a == b for a, b in zip(chosen, next_epoch, strict=True)) < 1200


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "JSON cannot be read"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"caption": ' + b"9" * 5000 + b"}", "JSON cannot be read"),
        (b"[1]", "JSON holds a list, not an object"),
        (b'{"other": "x"}', "JSON has no field 'caption'"),
        (b'{"caption": 7}', "holds a int, not a string"),
        (b'{"caption": ["x", null]}', "holds a NoneType, not a string"),
        (b'{"caption": ["", " "]}', "caption is empty"),
        (b"{" + b" " * MAX_CAPTION_BYTES + b"}", "at most 1048576"),
    ],
)
def test_bad_json_is_a_bad_sample_with_a_reason(data, reason):
    with pytest.raises(BadSampleError, match=reason):
        CaptionRule(members=("json",)).choose([("json", data)], (0,))


def test_a_field_may_hold_a_dot():
    assert field_of({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert read_json(b'{"a": {"b": {"c": 3}}}')["a"]["b"] == {"c": 3}
    with pytest.raises(BadSampleError, match=r"no field 'b\.c'"):
        field_of({"a": {"b": 1}}, "a.b.c")


def test_a_field_of_each_object_of_a_list_is_a_list_of_captions():
    """As in the annotations of Karpathy for COCO and Flickr30k."""
    rule = CaptionRule(members=("json",), json_field="sentences.raw")
    data = b'{"imgid": 0, "sentences": [{"raw": "a hen", "tokens": ["a"]}, {"raw": "a bird"}]}'
    assert rule.all_of([("json", data)]) == ["a hen", "a bird"]
    for broken in (b'{"sentences": [{"raw": "a hen"}, 3]}', b'{"sentences": [{"tokens": []}]}'):
        with pytest.raises(BadSampleError, match=r"no field '(sentences\.)?raw'"):
            rule.all_of([("json", broken)])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"members": ()}, r"captions.members \(\[\]\) must name one"),
        ({"pick": "last"}, r"captions.pick \(last\) must be first or random"),
        ({"json_field": ""}, "captions.json_field"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(rule, message):
    with pytest.raises(UserError, match=message):
        CaptionRule(**rule).check()
