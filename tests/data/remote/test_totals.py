from dist_siglip.data.remote.totals import CacheTotals, add_to_totals, read_totals


def test_events_add_up(tmp_path):
    file, locks = str(tmp_path / "totals"), str(tmp_path / "locks")
    assert read_totals(file) == CacheTotals()
    for _ in range(3):
        add_to_totals(file, locks, CacheTotals(hits=1, downloaded_bytes=2**40))
    assert read_totals(file) == CacheTotals(hits=3, downloaded_bytes=3 * 2**40)


def test_a_broken_file_begins_anew_and_a_link_is_not_followed(tmp_path):
    file, locks = tmp_path / "totals", str(tmp_path / "locks")
    file.write_bytes(b"junk")
    add_to_totals(str(file), locks, CacheTotals(hits=1))
    assert read_totals(str(file)).hits == 1
    victim = tmp_path / "victim"
    victim.write_text("precious")
    file.unlink()
    file.symlink_to(victim)
    add_to_totals(str(file), locks, CacheTotals(hits=1))
    assert victim.read_text() == "precious"
