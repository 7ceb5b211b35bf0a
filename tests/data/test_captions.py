from dist_siglip.data.captions import caption_id


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
