"""Locations and list files that try to start a command, read elsewhere, or fill the memory."""

import pytest

from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from tests.support.hostile import ALLOWED, GOOD, in_child, listing, put

INJECTIONS = [
    "pipe:touch {root}/pwned",
    "pipe:touch${{IFS}}{root}/pwned",
    "{root}/data/a.tar::pipe:touch {root}/pwned",
    "{{{root}/data/a.tar,pipe:touch {root}/pwned}}",
    "{{p,P}}ipe:touch {root}/pwned",
    "p{{ip}}e:touch {root}/pwned",
    "PIPE:touch {root}/pwned",
    "|touch {root}/pwned",
    "{root}/data/a.tar;touch {root}/pwned",
    "$(touch {root}/pwned)",
    "`touch {root}/pwned`",
    "${{HOME}}/a.tar",
    "file:{root}/data/a.tar",
    "file:///etc/passwd",
    "gopen:touch {root}/pwned",
    "simplecache::http://127.0.0.1/a.tar",
    "http://127.0.0.1/zip://a.tar::file:///etc/passwd",
    "zip://a.tar::/etc/passwd",
    "local:///etc/passwd",
    "ssh://host/a.tar",
    "git://host/a.tar",
    "python://os.system",
    "http://",
    "s3://",
    "http://127.0.0.1/a.tar\nSet-Cookie: x",
    "{root}/data/a.tar\0.tar",
    "{{a..z}}" * 8,
    "{{,,,,,,,,,{{a}}}}" * 12,
    "{{0..9999999999}}",
    "{{0.." + "9" * 5000 + "}}",
    "~\ud800/a.tar",
    "{{" * 3000 + "}}" * 3000,
    "{{a,{{b,{{c",
    "a}}b{{",
]


@pytest.mark.parametrize("number", range(len(INJECTIONS)))
@pytest.mark.parametrize("in_file", [False, True])
def test_injection_into_a_location_is_refused(root, monkeypatch, number, in_file):
    put(root, GOOD)
    spec = INJECTIONS[number].format(root=root)
    if in_file:
        (root / "data" / "list.txt").write_bytes(spec.encode("utf-8", "surrogatepass"))
        spec = str(root / "data" / "list.txt")

    def started(*arguments, **options):
        raise AssertionError("a command was started")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("os.system", started)

    def expand():
        try:
            return expand_shards(spec)
        except UserError as error:
            return str(error)

    outcome = in_child(expand, more_bytes=300 << 20)
    assert isinstance(outcome, str), outcome[:5]
    assert "\n" not in outcome
    assert listing(root) <= ALLOWED | {"data/list.txt"}


LIST_FILES = {
    "not text": (b"\x80\xff\xfe" * 9, "not a text file in UTF-8"),
    "empty": (b"", "names no shard"),
    "only comments": (b"# a.tar\n\n", "names no shard"),
    "a list in a list": (b"list.txt\n", "stands in a list file"),
    "a shard twice": (b"a.tar\n./a.tar\n", "twice"),
    "a missing shard": (b"../nothing.tar\n", "a missing file"),
    "a device": (b"/dev/zero\n", "a missing file"),
}


@pytest.mark.parametrize("name", LIST_FILES)
def test_hostile_list_file_is_refused(root, name):
    put(root, GOOD)
    data, message = LIST_FILES[name]
    (root / "data" / "list.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        expand_shards(str(root / "data" / "list.txt"))
