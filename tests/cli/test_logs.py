"""RUN/log.txt outlives a full disk, and says itself that lines had to wait."""

import logging

from dist_siglip.cli.logs import _InFile


def test_the_log_itself_goes_on_when_there_is_room_again(tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.symlink_to("/dev/full")
    ours = logging.getLogger("dist_siglip")
    handler = _InFile(path)
    ours.addHandler(handler)
    try:
        ours.warning("first")
        ours.warning("second")
        path.unlink()
        ours.warning("third")
    finally:
        ours.removeHandler(handler)
    lines = path.read_text().splitlines()
    assert [lines[0], lines[2], lines[3]] == ["first", "second", "third"]
    assert lines[1].startswith(f"the log cannot be written to {path} (No space left on device)")
    assert lines[4] == "the log can be written again: 4 lines waited for it"
    assert "Traceback" not in capsys.readouterr().err
