import json
import logging
import random
import shlex
import string

import pytest

from dist_siglip.cli import main
from dist_siglip.cli.logs import set_up_logging
from dist_siglip.runs import collect_provenance
from dist_siglip.system.redaction import redact

# What a person may type into a URL; white space, quotes and brackets end it everywhere.
LEGAL = "-._~!$&'()*+,;=:@/?#[]%|^`{}\\" + string.ascii_letters + string.digits
SCHEMES = ("http", "https", "s3", "gs", "hf", "HTTPS", "ftp")
WINDOW = 6


def secret(draw):
    return "".join(draw.choice(LEGAL) for _ in range(draw.randint(12, 30)))


def url_with(draw, password, signature):
    scheme, slashes = draw.choice(SCHEMES), draw.choice(("//", "//", "//", "/"))
    if scheme == "ftp":
        slashes = "//"
    user = draw.choice(("me", "AKIA12", "")) + ":"
    if scheme not in ("s3", "gs", "hf") and draw.random() < 0.3:
        user = ""
    userinfo = f"{user}{password}@" if password else ""
    query = f"{draw.choice('?#')}sig={signature}" if signature else ""
    host = draw.choice(("host", "host:8080", "[::1]:80", "bucket"))
    return f"{scheme}:{slashes}{userinfo}{host}/set/{{00..11}}.tar{query}"


CONTEXTS = (
    lambda url: url,
    repr,
    lambda url: f"train_shards ({url!r}) names a missing file {url!r}; allowed: a .tar file",
    lambda url: f"cannot open {url}: the server answered 403",
    lambda url: repr([url, "https://other/x.tar", url]),
    lambda url: json.dumps({"data": {"train_shards": [url, url]}}),
    lambda url: f"--data.train_shards={url}",
    lambda url: f"{url}::{url}",
    lambda url: f"https://other/x.tar,{url}",
    lambda url: f"shard.{url} it's",
)


def windows(text):
    return {text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1)}


@pytest.mark.parametrize("seed", range(20))
def test_no_part_of_a_secret_is_ever_shown(seed):
    draw = random.Random(seed)
    for _ in range(200):
        password = secret(draw) if draw.random() < 0.7 else ""
        signature = secret(draw) if not password or draw.random() < 0.5 else ""
        url = url_with(draw, password, signature)
        hidden = windows(password) | windows(signature)
        for context in CONTEXTS:
            text = redact(context(url))
            shown = {part for part in hidden if part in text}
            assert not shown, (url, context(url), text)
            assert redact(text) == text
        assert not any(part in shlex.join([redact(url)]) for part in hidden)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a.tar?sig=1#x", "https://host/a.tar?..."),
        ("https://me:p/w@host/a.tar", "https://...@host/a.tar"),
        ("s3://AKIA1:wJalr/XUtn@bucket/a.tar", "s3://...@bucket/a.tar"),
        ("https://host/a.tar?sig=a@b", "https://..."),
        ("https://me:p?w@host/a.tar", "https://..."),
        ("https:/me:pw@host/a.tar", "https:/host/a.tar"),
        ("https://me:pw word@host/a.tar", "https://... word@host/a.tar"),
        ("ftp://me:pw@host/a.tar is no shard", "ftp://host/a.tar is no shard"),
        (
            "'https://me:pw@h/a.tar', 'https://h/b.tar?x=1'",
            "'https://h/a.tar', 'https://h/b.tar?...'",
        ),
        ("--trainer.logger.init_args.api_key=a1b2", "--trainer.logger.init_args.api_key=..."),
        ("logger:\n  api_key: a1b2\n  x: 1", "logger:\n  api_key: ...\n  x: 1"),
        ("{'api_key': 'a1 b2', 'x': 1}", "{'api_key': '...', 'x': 1}"),
        (r'"{\"wandb_api_key\": \"a1b2\"}"', r'"{\"wandb_api_key\": \"...\"}"'),
        ("{password: 'a1", "{password: '..."),
        (
            "pipe:curl -H 'Authorization: Bearer a1b2' x",
            "pipe:curl -H 'Authorization: Bearer ...' x",
        ),
        ("AWS_SECRET_ACCESS_KEY=a1b2 HF_TOKEN=c3", "AWS_SECRET_ACCESS_KEY=... HF_TOKEN=..."),
    ],
)
def test_secrets_are_cut_out(text, shown):
    assert redact(shown) == shown
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/data/train/00000.tar",
        "https://host:8080/set/{00000..00127}.tar",
        "http://[::1]:80/a.tar",
        "s3://bucket/img@2x.tar, gs://bucket/a.tar",
        "hf://datasets/me/set@main/a.tar",
        "shard 'https://host/a.tar' is cut short; see https://docs.example/page.",
        "https://host/a.tar?...: the server answered 500; attempt 2 follows",
        "levels3: 5, data.seed: 0, class dist_siglip.losses::x, 12:30",
        "model: hf-hub:me/repository, local-dir:/data/x@y",
        "api_key: null, password: '', token_type: int32, tokens: true, key: 5",
    ],
)
def test_what_holds_no_secret_is_not_touched(text):
    assert redact(text) == text


URL = "https://me:PASS/WORD@host/a.tar?sig=SIGNATURE"


def assert_clean(text):
    assert "a.tar" in text or "https://..." in text
    for part in ("PASS", "WORD", "SIGNATURE"):
        assert part not in text


def test_the_command_in_the_provenance_of_a_run_is_clean():
    command = ["dist-siglip", "fit", f"--data.train_shards=['{URL}']", "--data.val_shards", URL]
    command += ["--trainer.logger.init_args.api_key", "PASS/WORD", "--run_dir", "x"]
    found = collect_provenance(command, world_size=1)["command"]
    assert_clean(found)
    assert found.endswith("--trainer.logger.init_args.api_key ... --run_dir x")


def test_every_line_of_the_log_is_clean(tmp_path, capsys):
    logger = logging.getLogger("dist_siglip")
    before = list(logger.handlers)
    set_up_logging(tmp_path / "log.txt")
    try:
        logger.warning("source %s", {"shards": URL})
    finally:
        for handler in set(logger.handlers) - set(before):
            logger.removeHandler(handler)
    assert_clean((tmp_path / "log.txt").read_text())


def test_what_the_command_line_says_last_is_clean(capsys):
    assert main(["data", "check", URL]) == 2
    assert_clean(capsys.readouterr().err)
    assert main([URL]) == 2
    assert_clean(capsys.readouterr().err)
