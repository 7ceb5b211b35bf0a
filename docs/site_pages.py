"""Pages of the site that no file of docs/ holds: the reference, and pages of other folders.

A hook of mkdocs, and an extension of griffe, which reads the docstrings. The reference has a page
for each package or module with an ``__all__`` and an entry for each of its names. Links are
written for readers of the repository; here they lead to the page of the site, and those to files
that are no page become plain text.
"""

import ast
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = "dist_siglip"
# Pages outside of docs/ -> what they are on the site; the README's place has the start page.
ELSEWHERE = {
    "slurm/README.md": "slurm.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
START = "README.md"
_PACKAGE = """::: {}
    options:
      members: false
      show_root_heading: false
      show_root_toc_entry: false"""


def public_names(file: Path) -> list[str]:
    """Read the ``__all__`` of a module without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def packages() -> dict[str, list[str]]:
    """Find every package and module with public names, by dotted name, the root first."""
    found = {}
    for file in (ROOT / PACKAGE).rglob("*.py"):
        dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found[dotted.removesuffix(".__init__")] = public_names(file)
    return {name: found[name] for name in sorted(found) if found[name]}


def reference_pages() -> Iterator[tuple[str, str]]:
    """Write the pages of the reference: path on the site and Markdown."""
    all_names = packages()
    home = {name: p for p in reversed(all_names) if p != PACKAGE for name in all_names[p]}
    for package, names in all_names.items():
        lines = [f"# {package}", _PACKAGE.format(package)]
        for name in names:
            if package == PACKAGE and (at := home.get(name)):
                lines.append(f"- [`{name}`]({at}.md#{at}.{name})")
            else:
                lines.append(f"::: {package}.{name}\n    options:\n      heading_level: 2")
        yield f"reference/{package}.md", "\n\n".join(lines) + "\n"


def site_path(target: str) -> str | None:
    """Return the page of the site for a file of the repository, or None."""
    if target == START:
        return "index.md"
    if target.startswith("docs/") and (ROOT / target).is_file():
        return target.removeprefix("docs/")
    return ELSEWHERE.get(target)


def relinked(markdown: str, source: str, page: str) -> str:
    """Turn the links of ``source`` into those of its page on the site."""

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        name, hash_sign, anchor = target.partition("#")
        if not name or "://" in target:
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        goal = site_path(file)
        if goal is None:
            return text
        relative = os.path.relpath(goal, posixpath.dirname(page) or ".")
        return f"{mark}[{text}]({relative}{hash_sign}{anchor})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the reference to the navigation."""
    for source, page in ELSEWHERE.items():
        text = relinked((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    pages = dict(reference_pages())
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    config.nav = [*(config.nav or []), {"Reference": list(pages)}]
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead the links of the pages in docs/ to pages of the site."""
    if page.file.generated_by is not None:
        return markdown
    return relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


class Examples(Extension):
    """Shows what follows ``Example:`` as code; griffe knows the plural alone."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Rename the heading."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
