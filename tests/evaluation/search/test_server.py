"""The search page's server, asked as a browser asks, and as nobody should."""

import http.client
import json
import socket
import threading
import time
from contextlib import suppress

import pytest

from dist_siglip.data.remote import CacheSettings
from dist_siglip.errors import UserError
from dist_siglip.evaluation.search import PictureSearch, server
from dist_siglip.evaluation.search.pictures import ShardPictures
from dist_siglip.evaluation.search.server import SearchServer
from tests.evaluation.search.test_search import CPU, best_of, embedded
from tests.support.embedding import COUNTS, build_tiny, expected_rows
from tests.support.shards import caption, encode, picture, write_shard

EVIL = '<img src=x onerror="document.title=1">"\'</script><script>alert(1)</script>'


def shards_with_evil_words(folder):
    """As ``write_shards``, but the caption and the key of one sample are HTML."""
    folder.mkdir(parents=True)
    first, paths = 0, []
    for number, count in enumerate(COUNTS):
        members = []
        for i in range(first, first + count):
            words = EVIL if i == 8 else caption(i)
            members.append((f"{i:06d}", {"png": encode(picture(i)), "txt": words.encode()}))
        paths.append(str(write_shard(folder / f"{number:05d}.tar", members)))
        first += count
    return paths


def start(folder, **options):
    """A server of a tiny model in a thread: (server, rows of the model)."""
    built = build_tiny(folder)
    out = embedded(shards_with_evil_words(folder / "shards"), built, folder / "index")
    found = PictureSearch(out, built, device=CPU)
    found.rows.keep()
    copies = ShardPictures(found.rows, built.pictures, shards=None, cache=CacheSettings())
    made = SearchServer(found, copies, **{"host": "127.0.0.1", "port": 0} | options)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made, built


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    made, built = start(tmp_path_factory.mktemp("server"))
    yield made, expected_rows(built, range(sum(COUNTS)))
    made.shutdown()
    made.server_close()


def ask(made, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", made.server_address[1], timeout=20)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), content


def raw(made, data, wait=20):
    """Send bytes as they are; what comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", made.server_address[1]), timeout=wait) as link:
        with suppress(OSError):  # it may have hung up before the last byte
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
        parts = []
        try:
            while part := link.recv(65_536):
                parts.append(part)
        except ConnectionResetError:
            pass
    return b"".join(parts)


def found_in(content):
    return [each["row"] for each in json.loads(content)["pictures"]]


def test_texts_rows_and_pictures_are_answered(running):
    made, (images, texts) = running
    status, _, content = ask(made, "/search?text=pair%20number%204&k=5")
    assert (status, found_in(content)) == (200, best_of(images, texts[4], 5)[0])
    status, _, content = ask(made, "/search?row=3&k=4")
    assert (status, found_in(content)) == (200, best_of(images, images[3], 4, but=3)[0])
    status, _, content = ask(made, "/search?k=3", "POST", encode(picture(9)))
    assert (status, found_in(content)) == (200, best_of(images, images[9], 3)[0])
    first = json.loads(content)["pictures"][0]
    assert (first["key"], first["shard"]) == ("000009", "00002.tar")
    status, headers, content = ask(made, first["picture"])
    assert (status, headers["Content-Type"], content[:4]) == (200, "image/png", b"\x89PNG")
    assert "immutable" in headers["Cache-Control"]
    about = json.loads(ask(made, "/about")[2])
    assert (about["pictures"], about["dim"], about["method"]) == (25, 8, "exact")
    assert about["examples"][0] == "pair number 0"
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/icon.svg", "image")):
        status, headers, content = ask(made, path)
        assert (status, len(content) > 100) == (200, True)
        assert headers["Content-Type"].startswith(kind)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    status, headers, content = ask(made, "/", "HEAD")
    assert (status, content, int(headers["Content-Length"]) > 100) == (200, b"", True)


def refused(made, path, **more):
    status, headers, content = ask(made, path, **more)
    assert headers["Content-Type"] == "application/json"
    words = json.loads(content)
    assert list(words) == ["error"]
    assert "\n" not in words["error"]
    assert "Traceback" not in words["error"]
    return status, words["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page.css/../../server.py",
        "/picture/0000000000000000/1",
        "/picture/{id}/../1",
        "/picture/{id}/%2e%2e%2fembed.json",
        "/picture/{id}/1/2",
        "/embed.json",
        "/index/embed.json",
        "/page.html",
        "/search/",
    ],
)
def test_no_path_leads_to_a_file(running, path):
    made, _ = running
    path = path.format(id=made.folder_id)
    assert refused(made, path)[0] in (400, 404)
    assert b"root:" not in raw(made, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/search", "text must have 1 to 1000"),
        ("/search?text=", "text must have"),
        ("/search?text=%20%0a", "text must have"),
        ("/search?text=" + "a" * 1001, "text must have"),
        ("/search?text=a&k=0", "k must be 1 to 200"),
        ("/search?text=a&k=201", "k must be"),
        ("/search?text=a&k=1e3", "k must be"),
        ("/search?text=a&k=" + "9" * 5000, "k must be"),
        ("/search?text=a&k=%D9%A3", "k must be"),
        ("/search?row=25", "row must be 0 to 24"),
        ("/search?row=-1", "row must be"),
        ("/search?text=%ff", "cannot be read"),
        ("/search?" + "&".join(f"a{n}=1" for n in range(20)), "cannot be read"),
        ("/picture/{id}/25", "row must be"),
        ("/picture/{id}/-1", "row must be"),
    ],
)
def test_what_is_out_of_bounds_is_one_line(running, path, line):
    made, _ = running
    status, words = refused(made, path.format(id=made.folder_id))
    assert (status, line in words) == (400, True)


@pytest.mark.parametrize(
    "method", ["PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "GETT"]
)
def test_another_method_is_refused(running, method):
    made, _ = running
    status, words = refused(made, "/", method=method)
    assert (status, words) == (501, "the method must be GET or POST")


def test_post_goes_to_the_search_alone(running):
    made, _ = running
    for path in ("/", "/about", f"/picture/{made.folder_id}/1"):
        assert refused(made, path, method="POST", body=b"x")[0] == 405


def test_a_broken_picture_is_one_line_and_the_next_one_is_found(running):
    made, _ = running
    whole = encode(picture(9))
    bodies = [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        whole[:60],
        whole[:200],
        b"<svg/>",
        b"\0" * 5000,
    ]
    for body in bodies:
        status, words = refused(made, "/search", method="POST", body=body)
        assert status == 422, words
    huge = encode(picture(1).resize((1, 1))).replace(
        b"\0\0\0\1\0\0\0\1", (30_000).to_bytes(4, "big") * 2, 1
    )
    status, words = refused(made, "/search", method="POST", body=huge)
    assert status == 422
    status, _, content = ask(made, "/search?k=1", "POST", whole)
    assert (status, found_in(content)) == (200, [9])


def test_a_huge_body_is_refused_before_it_is_read(running):
    made, _ = running
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    answer = raw(made, head % (server.MOST_BODY_BYTES + 1) + b"x" * 3_000_000)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"a picture may have 32 MiB" in answer
    for headers, status in (
        (b"", b"411"),
        (b"Transfer-Encoding: chunked\r\n", b"411"),
        (b"Content-Length: 3\r\nContent-Length: 4\r\n", b"411"),
        (b"Content-Length: -3\r\n", b"400"),
        (b"Content-Length: 0x10\r\n", b"400"),
        (b"Content-Length: %s\r\n" % (b"9" * 400), b"400"),
    ):
        request = b"POST /search HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\nabc"
        assert raw(made, request).startswith(b"HTTP/1.1 " + status), headers


def test_requests_that_are_no_requests_are_refused(running):
    made, _ = running
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 300 + b"\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    ):
        answer = raw(made, data)
        assert b"Traceback" not in answer
        assert b" 200 " not in answer[:20], data[:60]
    assert ask(made, "/about")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.7", "", "[::2]"]
)
def test_another_host_gets_nothing(running, host):
    made, _ = running
    for path in ("/", "/about", "/search?text=a", f"/picture/{made.folder_id}/1"):
        status, words = refused(made, path, Host=host)
        assert (status, made.url in words) == (421, True)


def test_tunnels_and_names_of_this_machine_are_answered(running):
    made, _ = running
    for host in ("localhost", "localhost:9000", "127.0.0.1:1", "[::1]:8765", "LOCALHOST"):
        assert ask(made, "/about", Host=host)[0] == 200, host


def test_other_sites_may_not_ask(running):
    made, _ = running
    assert refused(made, "/about", Sec_Fetch_Site="cross-site")[0] == 403
    assert refused(made, "/about", Sec_Fetch_Site="same-site")[0] == 403
    assert ask(made, "/", Sec_Fetch_Site="cross-site")[0] == 200  # a link may lead to the page
    body = encode(picture(9))
    for origin in ("https://evil.example", "null", "http://localhost"):
        more = {"method": "POST", "body": body, "Origin": origin}
        assert refused(made, "/search", **more)[0] == 403
    own = f"http://127.0.0.1:{made.server_address[1]}"
    status, _, _ = ask(made, "/search", "POST", body, Origin=own, Sec_Fetch_Site="same-origin")
    assert status == 200
    assert "Access-Control-Allow-Origin" not in ask(made, "/about")[1]


def test_evil_words_come_as_text_in_json(running):
    made, _ = running
    content = ask(made, "/search?row=8&k=25")[2] + ask(made, "/search?row=1&k=25")[2]
    assert b"onerror" in content  # the words are there, and of a type that is never a page
    headers = ask(made, "/search?row=1&k=25")[1]
    assert headers["Content-Type"] == "application/json"


def test_clients_that_say_nothing_hold_nobody_up(running, monkeypatch):
    made, _ = running
    monkeypatch.setattr(server._Handler, "timeout", 0.5)
    links = [
        socket.create_connection(("127.0.0.1", made.server_address[1]), timeout=20)
        for _ in range(server._CONNECTIONS + 20)
    ]
    for link in links[::2]:
        with_body = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nabc"
        try:
            link.sendall(with_body)
        except OSError:  # one too many
            continue
    deadline = time.monotonic() + 60
    while True:
        try:
            assert ask(made, "/about")[0] == 200
            break
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    for link in links:
        link.close()


def test_more_requests_at_once_than_it_takes_are_asked_to_come_again(running, monkeypatch):
    made, _ = running
    monkeypatch.setattr(server, "_WAIT_SECONDS", 0.1)
    taken = [made.slots.acquire(blocking=False) for _ in range(server._AT_ONCE)]
    try:
        assert all(taken)
        assert refused(made, "/about") == (503, "too many requests at once; try again")
    finally:
        for _ in taken:
            made.slots.release()
    assert ask(made, "/about")[0] == 200


def test_a_defect_is_one_line_to_the_browser_and_whole_in_the_log(running, monkeypatch, caplog):
    made, _ = running

    for kind in (RuntimeError, ValueError):

        def fail(*_, kind=kind):
            raise kind("a defect with /secret/path")

        caplog.clear()
        monkeypatch.setattr(PictureSearch, "by_text", fail)
        assert refused(made, "/search?text=a") == (500, "the search failed; see its log")
        assert "/secret/path" in caplog.text


def test_threads_share_one_model(running):
    made, (images, texts) = running
    answers, threads = {}, []
    for number in range(12):

        def run(number=number):
            answers[number] = found_in(
                ask(made, f"/search?text=pair%20number%20{number % 7}&k=4")[2]
            )

        threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rows in answers.items():
        assert rows == best_of(images, texts[number % 7], 4)[0]


def test_an_address_that_is_taken_or_none_is_one_line(running):
    made, _ = running
    for host, port in (
        ("127.0.0.1", made.server_address[1]),
        ("256.1.1.1", 0),
        ("a\0b", 0),
        ("127.0.0.1", 70_000),
    ):
        with pytest.raises(UserError, match=r"cannot be listened at .*; give another port"):
            SearchServer(made.search, made.pictures, host=host, port=port)


def test_an_open_server_answers_to_addresses_and_not_to_names_of_others(running):
    made, _ = running
    opened = SearchServer(made.search, made.pictures, host="0.0.0.0", port=0)
    try:
        assert not opened.is_local
        assert made.is_local
        assert opened.url.startswith("http://localhost:")
        assert opened.allows("192.168.3.4:8765")
        assert opened.allows(f"{socket.gethostname()}:80")
        assert not opened.allows("evil.example:8765")
    finally:
        opened.server_close()
