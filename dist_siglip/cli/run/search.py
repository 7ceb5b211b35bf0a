"""``search``: the best pictures for a text or a picture, printed or on a page of this machine."""

import json as json_text
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dist_siglip.cli.parser import CommandParser, call, introduction_of
from dist_siglip.data.remote import CacheSettings
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS
from dist_siglip.errors import UserError, check_least
from dist_siglip.evaluation.embed.stored_rows import SOURCE_FILE, read_object
from dist_siglip.evaluation.encoding import choose_device
from dist_siglip.evaluation.search import Hit, PictureSearch
from dist_siglip.evaluation.search.pictures import ShardPictures
from dist_siglip.evaluation.search.server import MOST_BODY_BYTES, SearchServer
from dist_siglip.models.build import BuiltModel
from dist_siglip.report.history import printable
from dist_siglip.system.regular_file import read_regular
from dist_siglip.training.module.trained import load_trained

_MODEL_OPTIONS = ("run_dir", "ckpt_path", "model", "pretrained")


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``search`` and run it."""
    return call(search, parser(command), arguments)


def parser(command: str) -> CommandParser:
    """Return the parser of the options: the signature of ``search``."""
    made = CommandParser(prog=f"dist-siglip {command}", description=introduction_of(search))
    made.add_argument("index", type=str, help="Folder that embed wrote, with rows of pictures.")
    # Words, not a JSON list.
    made.add_argument(
        "queries",
        nargs="*",
        type=str,
        default=[],
        metavar="QUERY",
        help="Texts, or files of pictures; none with --serve.",
    )
    made.add_function_arguments(search, as_group=False, skip={"index", "queries", "serve"})
    # A flag, not a value.
    made.add_argument("--serve", action="store_true", help="Serve the page, until Ctrl-C.")
    return made


def search(
    index: str,
    queries: list[str],
    *,
    k: int = 10,
    json: bool = False,
    serve: bool = False,
    host: str = "127.0.0.1",
    port: int = 8765,
    run_dir: str | None = None,
    ckpt_path: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    shards: str | list[str] | None = None,
    device: str = "auto",
    exact: bool = False,
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
) -> int:
    """Find the best pictures for a text or a picture among embedded ones.

    The folder is one that embed wrote, with rows of pictures; it remembers its run or model and its
    shards. With --serve a page of this machine takes texts and pictures, and shows what is found.

    Args:
        index: folder that embed wrote, with rows of pictures.
        queries: texts, or files of pictures; none with --serve.
        k: pictures of a printed answer.
        json: print JSON instead of tables.
        serve: serve the page, until Ctrl-C.
        host: address the page is served at; with another than this one, everybody who can reach
            the machine may search and see the pictures.
        port: of the page; 0 takes a free one.
        run_dir: run whose model made the folder, where that has moved; or give a model.
        ckpt_path: another checkpoint of that run than its newest.
        model: open_clip name, JSON config, local-dir:PATH or hf-hub:ORG/REPO.
        pretrained: open_clip tag of the model, or a file of weights.
        shards: where the pictures of the page are now, if they have moved; as embed takes them.
        device: "auto" takes the GPU, or the CPU; or cpu, cuda, cuda:1, ...
        exact: look at all rows, also where there is an index.
        cache: copies of remote shards.
    """
    folder = Path(index)
    check_least(1, k=k)
    if serve == bool(queries):
        raise UserError(
            f"query ({queries[0]}) is typed on the page; leave it out with --serve"
            if queries
            else "query is missing: give a text or a picture after the folder, or --serve"
        )
    pictures = [_read_picture(query) for query in queries]
    source = read_object(folder / SOURCE_FILE)
    given = {
        "run_dir": run_dir,
        "ckpt_path": ckpt_path,
        "model": model,
        "pretrained": pretrained,
    }
    built = _model(folder, source, given)
    found = PictureSearch(folder, built, device=choose_device(device, 0), exact=exact)
    if serve:
        cache.check()
        copies = ShardPictures(found.rows, found.built.pictures, shards=shards, cache=cache)
        return _serve(SearchServer(found, copies, host=host, port=port))
    answers = []
    for query, data in zip(queries, pictures, strict=True):
        try:
            hits = found.by_text(query, k) if data is None else found.by_picture(data, k)
        except BadSampleError as error:
            raise UserError(f"query ({query}): {error}; give a JPEG, PNG or WebP") from error
        answers.append((query, "text" if data is None else "picture", hits))
    if json:
        content = [
            {"query": query, "kind": kind, "method": found.method, "pictures": _facts(hits)}
            for query, kind, hits in answers
        ]
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
        return 0
    for query, kind, hits in answers:
        _print(query, kind, hits, len(found.rows), found.method)
    return 0


def _read_picture(query: str) -> bytes | None:
    """Read a query that names a picture; None if it is a text.

    Raises:
        UserError: if it ends like the name of a picture and none can be read.
    """
    path = Path(query)
    ends_so = path.suffix.lower().lstrip(".") in PICTURE_EXTENSIONS
    try:
        if not ends_so and not path.is_file():
            return None
        return read_regular(path, MOST_BODY_BYTES)
    except (OSError, ValueError) as error:
        if not ends_so:  # too long for a name
            return None
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"query ({query}) cannot be read ({reason}); name a picture that is there, or give a "
            "text without that ending"
        ) from error


def _model(folder: Path, source: dict[str, Any], given: dict[str, str | None]) -> BuiltModel:
    """Load the model that is named, or else the one that a folder remembers."""
    remembered = {
        name: source[name] for name in _MODEL_OPTIONS if isinstance(source.get(name), str)
    }
    is_named = given["run_dir"] is not None or given["model"] is not None
    chosen: dict[str, Any] = (
        dict(given) if is_named else remembered | {k: v for k, v in given.items() if v is not None}
    )
    if not chosen.get("run_dir") and not chosen.get("model"):
        raise UserError(f"index ({folder}) does not say its model; name it by --run_dir or --model")
    average, num_patches = source.get("weights_average"), source.get("num_patches")
    return load_trained(
        **chosen,
        weights_average=average if isinstance(average, bool) else None,
        num_patches=num_patches if isinstance(num_patches, int) else None,
    )


def _serve(server: SearchServer) -> int:
    """Serve until a person interrupts."""
    if not server.is_local:
        Console(stderr=True).print(
            "everybody who can reach this machine may search and see the pictures", style="bold"
        )
    sys.stdout.write(
        f"serving {len(server.search.rows):,} pictures at {server.url} (Ctrl-C ends)\n"
    )
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0


def _facts(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "score": hit.score,
            "row": hit.row,
            "key": hit.place.key,
            "shard": hit.place.shard,
            "place": hit.place.place,
            "caption": hit.place.caption,
        }
        for rank, hit in enumerate(hits, start=1)
    ]


def _print(query: str, kind: str, hits: Sequence[Hit], count: int, method: str) -> None:
    table = Table(
        title=escape(f"{kind}: {printable(query)}"),
        caption=f"{len(hits)} best of {count:,} pictures by cosine ({method.replace('_', '-')})",
    )
    table.add_column("score", justify="right")
    table.add_column("key", overflow="fold")
    table.add_column("shard", overflow="fold")
    table.add_column("caption", overflow="fold")
    for hit in hits:
        row = (f"{hit.score:.3f}", hit.place.key, hit.place.shard, hit.place.caption)
        table.add_row(*(escape(printable(each)) for each in row))
    Console().print(table)
