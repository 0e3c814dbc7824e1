"""YAML text <-> plain values. What a file can do is bounded: it builds no objects, repeats no key and stays as large
as it looks, since an alias of an alias of a list can stand for more values than there is memory."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from meamtm.errors import ConfigError
from meamtm.files import whole_file

MOST_BYTES = 1 << 20
"""Settings are kilobytes."""
INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
BREAKS = frozenset("\x85\u2028\u2029")
"""Line breaks of Unicode."""


class _Loader(yaml.SafeLoader):
    """Reads numbers, words, lists and mappings, each where it stands."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases, whatever they stand for."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, f"*{event.anchor} stands for a value; write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuses a key that comes twice, of which one value would silently be lost."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key is a word, not a list or mapping", key_node.start_mark)
            if key_node.value in seen:
                raise ConstructorError(None, None, f"the key {key_node.value} comes twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float | str:
        """Reads a number; one that neither Python nor PyYAML writes so (1.10, or 010, which is 8 to YAML) stays the
        text that it is: a name loses nothing, and keys that are numbers read it all the same."""
        construct = self.construct_yaml_int if node.tag == INT else self.construct_yaml_float
        number, text = construct(node), self.construct_scalar(node)
        return number if text in (str(number), str(number).replace("e", ".0e")) else text


for tag in (INT, FLOAT):
    _Loader.add_constructor(tag, _Loader.construct_number)
# A date stays the text that it is: no key wants one, and a name may look like one.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_value(text: str) -> Any:
    """Reads a YAML value; raises yaml.YAMLError where it is none, or one too deep to read."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError as error:
        raise yaml.YAMLError("too many brackets within each other") from error
    except ValueError as error:  # of a number too long to read
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads one YAML mapping, as data only."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; name an existing YAML file, for example one of configs/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); name a YAML file") from error
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{path}: longer than {MOST_BYTES:,} characters; settings are not, name a YAML file of them")
    try:
        tree = read_value(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}{line}: not valid YAML ({problem}); correct it") from error
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not keys and values; write KEY: VALUE lines")
    return tree or {}


def write_tree(path: Path, tree: Mapping[str, Any], header: str = "") -> None:
    """Writes a tree with a comment above it, whole or not at all."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    text = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
    if BREAKS & set(text):  # which PyYAML writes as they are and reads as spaces
        text = yaml.safe_dump(dict(tree), sort_keys=False)
    with whole_file(path) as scratch:
        scratch.write_text(comment + text, encoding="utf-8")
