"""A recipe's text, changed key by key at its top level, so that comments and order stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kt_sft.cli.migrate_keys import MigrateError

_COMMENT = re.compile(r"\s+(#.*)$")
_HEADING = re.compile(r"^(#+\s*)(ktransformers|kt)\s*$", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a block, of which YAML readers silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise MigrateError(f"{key.value} stands twice, again in line {key.start_mark.line + 1}; keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, what: str) -> tuple[str, dict[str, Any]]:
    """A YAML file's text and content.

    Args:
        path: The file; JSON is YAML, too.
        what: What the file ought to be, for messages.

    Raises:
        MigrateError: It cannot be read, is not YAML, or holds no mapping of names.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:  # line ends as they are
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise MigrateError(f"{path} cannot be read: {error}") from error
    try:
        content = yaml.load(text, _Loader)
    except MigrateError as error:
        raise MigrateError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise MigrateError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise MigrateError(f"{path} is no {what}: it holds no `key: value` lines at its top level")
    return text, content


class RecipeText:
    """The text of a recipe in block style.

    Args:
        text: YAML with a mapping at the top level. One written in braces, as JSON is, is written anew: it has no
            comments that could be kept.
    """

    def __init__(self, text: str) -> None:
        if _top(text).flow_style:
            text = yaml.safe_dump(yaml.safe_load(text), sort_keys=False, allow_unicode=True)
        self._lines = text.splitlines(keepends=True)
        self._newline = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
        self._nodes: dict[str, tuple[yaml.Node, yaml.Node]] = {
            key.value: (key, value) for key, value in _top(text).value
        }

    def comment(self, *path: str) -> str:
        """The comment behind a value on its line, with its `#`, or "".

        Args:
            path: A top-level key, or one and a key in its block.
        """
        pair: tuple[yaml.Node, yaml.Node] | None = self._nodes.get(path[0])
        for name in path[1:]:
            if pair is None or not isinstance(pair[1], yaml.MappingNode):
                return ""
            pair = next(((key, value) for key, value in pair[1].value if key.value == name), None)
        if pair is None or not isinstance(pair[1], yaml.ScalarNode):
            return ""
        end = pair[1].end_mark
        found = _COMMENT.match(self._lines[end.line][end.column :].rstrip("\r\n")) if self._lines else None
        return found.group(1) if found else ""

    def rewrite(self, removed: Iterable[str], replaced: Mapping[str, str], inserted: list[str]) -> str:
        """The text without some keys and with others.

        Args:
            removed: Top-level keys to take out, with their comments on the same lines.
            replaced: Top-level key -> its new value, as YAML writes it.
            inserted: Lines that take the place of the first key taken out, or come last where there is none.
        """
        gone: set[int] = set()
        first = len(self._lines)
        for name in removed:
            if name in self._nodes:
                start, end = self._span(name)
                gone.update(range(start, end))
                first = min(first, start)
        lines: list[str] = []
        for number, line in enumerate([*self._lines, ""]):
            if number == first:
                if lines and not lines[-1].endswith("\n"):
                    lines[-1] += self._newline
                lines += [f"{text}{self._newline}" for text in inserted]
            if number not in gone:
                lines.append(line)
        text = "".join(lines)
        for name, value in replaced.items():
            text = re.sub(rf"(?m)^({re.escape(name)}\s*:[ \t]+)[^\s#]+", rf"\g<1>{value}", text, count=1)
        return "".join(_renamed(line) for line in text.splitlines(keepends=True))

    def _span(self, name: str) -> tuple[int, int]:
        """The lines of a key and its value, without the comments and empty lines that follow it."""
        key, value = self._nodes[name]
        start, end = key.start_mark.line, value.end_mark.line + (value.end_mark.column > 0)
        end = max(end, start + 1)
        while end > start + 1 and (not self._lines[end - 1].strip() or self._lines[end - 1].startswith("#")):
            end -= 1
        return start, end


def _top(text: str) -> yaml.MappingNode:
    node = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode), "read_mapping lets nothing else through"
    return node


def _renamed(line: str) -> str:
    """A heading that says nothing but the other backend's name gets ours."""
    found = _HEADING.match(line.rstrip("\r\n"))
    return line if found is None else f"{found.group(1)}routed experts: kt_sft{line[len(line.rstrip()) :]}"
