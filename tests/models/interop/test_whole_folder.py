import pytest

from dist_siglip.errors import UserError
from dist_siglip.models.interop.export import MARK, whole_folder


def export_to(folder, content, *, overwrite=False):
    with whole_folder(folder, overwrite=overwrite) as beside:
        (beside / MARK).write_text(content)


def test_the_folder_and_its_parents_appear_at_the_end(tmp_path):
    folder = tmp_path / "a" / "b"
    with whole_folder(folder, overwrite=False) as beside:
        (beside / "file").write_text("x")
        assert not folder.exists()
    assert (folder / "file").read_text() == "x"
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


def test_after_an_error_there_is_what_was_there_before(tmp_path):
    export_to(tmp_path / "out", "first")
    with pytest.raises(TypeError):
        export_to(tmp_path / "out", 2, overwrite=True)
    assert (tmp_path / "out" / MARK).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_replaced_on_request_only(tmp_path):
    export_to(tmp_path / "out", "first")
    with pytest.raises(UserError, match="holds an export; name another"):
        export_to(tmp_path / "out", "second")
    export_to(tmp_path / "out", "second", overwrite=True)
    assert (tmp_path / "out" / MARK).read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_of_others_are_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files of others"):
            export_to(tmp_path, "x", overwrite=overwrite)
    with pytest.raises(UserError, match="is a file"):
        export_to(tmp_path / "thesis.tex", "x")
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        export_to(tmp_path / "thesis.tex" / "out", "x")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    export_to(tmp_path / "out", "x")
    assert (tmp_path / "out" / MARK).read_text() == "x"
