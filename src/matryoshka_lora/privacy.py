"""Tokens and paths of this machine: how they look in a text, and values without them.

A token is a secret that lets its owner into an account. A path is an absolute one of two parts or more: it may name a
user, a project or a disk.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PureWindowsPath
from typing import Any

_TOKEN = re.compile(
    rb"""
    (?<![A-Za-z0-9])(?:
        (?:hf_|api_org_)[A-Za-z0-9]{30,}             # Hugging Face
      | sk-(?=[\w-]*[0-9])[\w-]{20,}                 # OpenAI, Anthropic and others
      | gh[opsur]_[A-Za-z0-9]{36,}                   # GitHub
      | github_pat_\w{22,}
      | glpat-[\w-]{20,}                             # GitLab
      | xox[abeoprs]-[\w-]{10,}                      # Slack
      | AKIA[0-9A-Z]{16}                             # Amazon
      | AIza[\w-]{35}                                # Google
      | wandb_v1_\w{20,}                             # Weights & Biases
      | eyJ[\w-]{10,}\.eyJ[\w-]{10,}                 # a signed web token
    )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----
    | (?<=://)[^/\s:@"'<>]+:[^/\s@"'<>]+(?=@)        # name and password in an address
    """,
    re.VERBOSE,
)
# Of POSIX, but not that of a web address; another user's home; of Windows, whose strokes JSON doubles: a single one
# before n, r or t is JSON's for the end of a line and the like.
_PART = rb"[\w\x80-\xff.+@%=,-]+"
_PATH = re.compile(
    rb"""
      (?:(?<![\w\x80-\xff./~*<>})\]\\-])|(?<=file://))(?!/(?:v[0-9]+|api)/)/(?:PART/)+(?:PART)?
    | (?<![\w\x80-\xff./~\\-])~[A-Za-z](?:PART)?/(?:PART/)*(?:PART)?
    | (?<![A-Za-z0-9])[A-Za-z]:(?:\\\\PART|\\(?![nrt])PART)+
    """.replace(b"PART", _PART),
    re.VERBOSE,
)
_SECRET_KEY = re.compile(
    r"(?:(?:hf|hub|push_to_hub|auth|use_auth|access|api|bearer)_?)?token|(?:\w*_)?(?:api_?key|password|passwd|secret"
    r"|secret_key|private_key|credentials?)",
    re.IGNORECASE,
)
_MARK = re.compile(r"\.\.\./[0-9a-f]{8}/")
"""What `marked` puts in the place of a path's folders."""


def find_private(data: bytes) -> Iterator[tuple[int, str]]:
    """Where a text, in UTF-8, holds what looks like a token or a path of a machine: the byte, and what it is."""
    for pattern, what in ((_TOKEN, "what looks like a token"), (_PATH, "an absolute path of a machine")):
        for found in pattern.finditer(data):
            yield found.start(), what


def tokens_in(value: Any) -> list[str]:
    """The dotted names of the texts in nested mappings and lists that hold a token, or are called one."""
    return [name for name, key, text in _texts(value) if _is_token(key, text)]


def paths_in(value: Any) -> list[str]:
    """The dotted names of the texts in nested mappings and lists that hold a path of a machine."""
    return [name for name, _, text in _texts(value) if _replace(text, _last) != text]


def marks_in(value: Any) -> list[str]:
    """The dotted names of the texts in nested mappings and lists of which `marked` has taken a part."""
    return [name for name, _, text in _texts(value) if _MARK.search(text)]


def shown(value: Any) -> Any:
    """A value, or nested mappings and lists, as anybody may see it: without tokens, and of a path its last part."""
    return _without(value, lambda text: _MARK.sub("", _replace(text, _last)))


def marked(value: Any) -> Any:
    """As `shown`, with a hash of the rest of each path, by which two places of one name are told apart."""
    return _without(value, lambda text: _replace(text, lambda path: f".../{_hash(path)}/{_last(path)}"))


def _texts(value: Any, name: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    """Each text with its dotted name and the last part of that; the text of a key has the name of its mapping."""
    if isinstance(value, str):
        yield name, key, value
    elif isinstance(value, Mapping):
        for own, below in value.items():
            yield from _texts(own, name)
            yield from _texts(below, f"{name}.{own}" if name else str(own), str(own))
    elif isinstance(value, (list, tuple, set)):
        for below in value:
            yield from _texts(below, name, key)


def _is_token(key: str, text: Any) -> bool:
    return isinstance(text, str) and bool(_SECRET_KEY.fullmatch(key) or _TOKEN.search(text.encode()))


def _without(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return "" if _is_token("", value) else change(value)
    if isinstance(value, Mapping):
        return {
            _without(key, change): _without(below, change)
            for key, below in value.items()
            if not _is_token(str(key), below) and not _is_token("", key)
        }
    if isinstance(value, (list, tuple, set)):
        return [_without(below, change) for below in value if not _is_token("", below)]
    return value


def _replace(text: str, change: Callable[[str], str]) -> str:
    """A text with each of its paths changed; a line that begins with one is a path, which may have spaces in it."""
    if "\n" not in text and (_PATH.match(text.encode()) or PureWindowsPath(text).is_absolute()):
        return change(text)
    return _PATH.sub(lambda found: change(found[0].decode()).encode(), text.encode()).decode()


def _last(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def _hash(path: str) -> str:
    folders = path.rstrip("/\\").removesuffix(_last(path))
    return hashlib.sha256(folders.encode()).hexdigest()[:8]
