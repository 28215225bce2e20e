"""What `mkdocs build` makes besides the pages of docs/: the reference, and pages of other folders of the repository."""

from __future__ import annotations

import ast
import html
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[2]
SHOWN = {"docs": "", "research/pages": "research", "examples": "examples"}
"""Folders of the repository, and where the site has their files."""

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r'<picture>\n<source [^>]*srcset="([^"]+)">\n<img alt="([^"]*)" src="([^"]+)">\n</picture>')
_TYPER = [sys.executable, "-m", "typer", "matryoshka_lora.cli.main", "utils", "docs", "--name", "matryoshka"]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the study and the examples."""
    from mkdocs.structure.files import File

    research = ROOT / "research/pages"
    found = [*research.glob("*.md"), *research.glob("*.json"), *research.glob("*/*.md"), *research.glob("*/*.png")]
    found += [file for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".sh")]
    for file in sorted(found):
        files.append(File.generated(config, site_path(str(file.relative_to(ROOT))) or "", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the generated parts into a page, and let its links lead to where the site has their targets."""
    here = page.file.src_uri
    source = Path(page.file.abs_src_path).relative_to(ROOT)
    for mark, make in GENERATED.items():
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", make())

    # GitHub chooses by the reader's system, the site by its own button.
    markdown = _PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", markdown)

    def on_site(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        there = site_path(posixpath.normpath(f"{source.parent.as_posix()}/{target}"))
        if there is None or files.get_file_from_path(there) is None:
            # A link inside docs/ that leads nowhere stays, so that the build fails.
            return link[0] if there is not None and source.parts[0] == "docs" else text
        return f"[{text}]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(on_site, markdown)


def site_path(path: str) -> str | None:
    """Where the site has a file of the repository, or None."""
    for folder, shown in SHOWN.items():
        if path.startswith(f"{folder}/"):
            return posixpath.join(shown, path.removeprefix(f"{folder}/"))
    return None


def command_line() -> str:
    """Every verb and option, as typer writes them."""
    made = subprocess.run(_TYPER, capture_output=True, text=True, check=True, cwd=ROOT)
    _, _, verbs = made.stdout.partition("\n## ")
    return html.unescape(f"## {verbs}")


def config_keys() -> str:
    """The keys of a training config that are ours, the words they may have, and the defaults that are not TRL's."""
    package = griffe.load("matryoshka_lora", search_paths=[ROOT / "src"])

    def value(name: str) -> Any:
        return ast.literal_eval(str(package[name].value).removeprefix("Literal"))

    lines = [f"**Top level**: {_code(value('training.config._OURS'))}, and every field of TRL's `SFTConfig`."]
    lines += [
        f"**`lora`**: every field of PEFT's `LoraConfig`; `r` is {package['training.config.DEFAULT_RANK'].value}."
    ]
    lines += [f"**`nesting`**: {_code(value('training.config._NESTING'))}."]
    lines += [f"**`{key}`**: {_code(value(name))}." for key, name in _WORDS.items()]
    rules = re.findall(r'Rule\("([\w-]+)"', (ROOT / "src/matryoshka_lora/rules.py").read_text())
    lines += [f"**`nesting.rule`**: {_code(rules)}."]
    rows = [f"| `{key}` | `{default}` |" for key, default in value("training.config._TRAINING_DEFAULTS").items()]
    table = "\n".join(["| field | default |", "|---|---|", *rows])
    return "\n\n".join([*lines, "## Defaults that differ from TRL's", table])


_WORDS = {
    "quantization": "models.Quantization",
    "nesting.scaling": "nesting.Scaling",
    "nesting.reorder": "state.By",
    "nesting.deploy": "state.Deploy",
}


def _code(words: Any) -> str:
    return ", ".join(f"`{word}`" for word in words)


GENERATED = {"command line": command_line, "config keys": config_keys}
