import collections

import pytest
from open_clip import SimpleTokenizer

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import (
    MAX_CAPTION_BYTES,
    MAX_CAPTION_CHARACTERS,
    CaptionRule,
    EmptyCaptions,
    field_of,
    read_json,
)
from dist_siglip.data.samples.identity import caption_id
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


SEVERAL = [
    ("txt", b" alt "),
    ("json", b'{"caption": ["", "one", "two"], "seo": {"long": "three"}, "none": null}'),
    ("syn.json", b'{"syn_text": ["four", "five"]}'),
]
MEMBERS = ("txt", "json", "syn.json")


def rule_of(**settings):
    rule = CaptionRule(**{"members": MEMBERS, **settings})
    rule.check()
    return rule


def test_fields_with_weights_come_together_each_by_the_pick():
    weights = {"seo.long": 1.0, "caption": 1.0, "TXT": 2.0, "syn.json:syn_text": 0.5}
    first = rule_of(weights=weights)
    assert first.choose_each(SEVERAL, (0,)) == ["three", "one", "alt", "four"]
    drawn = rule_of(weights=weights, pick="random")
    seen = {tuple(drawn.choose_each(SEVERAL, (0, place))) for place in range(60)}
    assert {each[1:] for each in seen} == {
        (caption, "alt", synthetic) for caption in ("one", "two") for synthetic in ("four", "five")
    }
    for rule in (first, drawn.always_first()):
        assert rule.choose(SEVERAL, (3,)) == "three"
        assert rule.all_of(SEVERAL) == ["three"]
    assert rule_of().choose_each(SEVERAL, (0,)) == ["alt"]


def test_a_sample_without_a_field_shows_the_first_that_it_has():
    rule = rule_of(weights={"none": 1.0, "seo.long": 1.0, "x": 1.0, "txt": 1.0})
    assert rule.choose_each(SEVERAL, (0,)) == ["three", "three", "three", "alt"]
    assert rule.choose_each(SEVERAL[:1], (0,)) == ["alt"] * 4
    assert rule.choose(SEVERAL, (0,)) == "three"
    with pytest.raises(BadSampleError, match="no field 'x'"):
        rule.choose_each([("json", b"{}")], (0,))
    with pytest.raises(BadSampleError, match="caption is empty"):
        rule.choose_each([("txt", b"  ")], (0,))


def test_one_field_is_the_rule_of_its_member_to_the_draw():
    for settings in ({}, {"pick": "random"}):
        plain = CaptionRule(members=("json",), **settings)
        named = rule_of(weights={"caption": 3.0}, **settings)
        for place in range(30):
            expected = plain.choose(SEVERAL[1:2], (7, place))
            assert named.choose_each(SEVERAL, (7, place)) == [expected]


@pytest.mark.parametrize("lacks", [False, True])
def test_fields_are_drawn_by_their_probabilities_of_those_there_are(lacks):
    chances = {"txt": 0.2, "seo.long": 0.5, "syn.json:syn_text": 0.3, "none": 0.0}
    rule = rule_of(probabilities=chances, pick="random")
    members = SEVERAL[1:] if lacks else SEVERAL
    count = 1500
    texts = [rule.choose(members, (1, 0, place)) for place in range(count)]
    assert texts == [rule.choose(members, (1, 0, place)) for place in range(count)]
    assert texts != [rule.choose(members, (1, 1, place)) for place in range(count)]
    shares = {text: number / count for text, number in collections.Counter(texts).items()}
    whole = 0.8 if lacks else 1.0
    expected = {"three": 0.5 / whole, "four": 0.15 / whole, "five": 0.15 / whole}
    if not lacks:
        expected["alt"] = 0.2
    assert shares == pytest.approx(expected, abs=5 * 0.5 / count**0.5)
    assert rule.choose_each(members, (1, 0, 5)) == [texts[5]]
    assert rule.always_first().choose(members, (0,)) == ("three" if lacks else "alt")


def test_a_field_of_probability_0_serves_samples_that_have_no_other():
    rule = rule_of(probabilities={"txt": 0.0, "seo.long": 1.0})
    assert {rule.choose(SEVERAL, (place,)) for place in range(20)} == {"three"}
    assert rule.choose(SEVERAL[:1], (0,)) == "alt"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {}}, r"captions.weights \({}\) must name a field"),
        ({"weights": {"txt": 0.0}}, r"captions.weights.txt \(0.0\) must be above 0"),
        ({"weights": {"txt": 1.0, "a": -1.0}}, r"captions.weights.a \(-1.0\) must be above 0"),
        ({"weights": {"txt": float("nan")}}, r"captions.weights.txt \(nan\) must be above 0"),
        ({"probabilities": {"txt": -0.5, "a": 1.5}}, r"captions.probabilities.txt \(-0.5\) must"),
        ({"probabilities": {"txt": 0.5, "a": 0.4}}, "must sum to 1, not 0.9"),
        ({"weights": {"foo:a": 1.0}}, r"weights.foo:a: its member \(foo\) is not one of"),
        ({"weights": {"a": 1.0}, "members": ("txt",)}, r"weights.a: its member \(json\)"),
        ({"weights": {"txt": 1.0}, "probabilities": {"txt": 1.0}}, "are both set"),
    ],
)
def test_fields_and_shares_that_cannot_be_are_refused_in_a_line(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        rule_of(**settings)
    assert "\n" not in str(caught.value)
