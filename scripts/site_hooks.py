"""Hooks of mkdocs: what pages show or link outside of docs/ (pictures, scripts, tables) becomes part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?:\.\./)+([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside of docs/ that its pages name, at the path that they have in the project."""
    added = set()
    for page in files.documentation_pages():
        for target in LINK.findall(Path(page.abs_src_path).read_text()):
            inside = target in added or files.get_file_from_path(target) is not None
            if inside or not (ROOT / target).is_file():
                continue
            added.add(target)
            content = (ROOT / target).read_bytes()
            # Markdown, scripts and tables are shown as they are: as pages they would have links of their own.
            name = target if target.endswith((".png", ".svg")) else f"{target}.txt"
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to these files."""

    def inside(found: re.Match[str]) -> str:
        target = found[1]
        if not (ROOT / target).is_file():
            return found[0]
        up = "../" * page.file.src_uri.count("/")
        return f"]({up}{target if target.endswith(('.png', '.svg')) else target + '.txt'}"

    return LINK.sub(inside, markdown)
