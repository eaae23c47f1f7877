"""Options of a command from YAML files, in place of words of its command line.

argparse checks both alike. jsonargparse, which read them before, passed on what YAML makes of a value: a number for a
text, one text for a list.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import InputError, one_line, require

Add = Callable[[argparse.ArgumentParser], None]
"""Gives a parser the options of a command."""


def read_yaml(path: str | os.PathLike[str], purpose: str) -> Any:
    """What a YAML file holds.

    Raises:
        InputError: it cannot be read, or is not YAML; PyYAML is missing, whose ``purpose`` is named.
    """
    yaml = require("yaml", purpose, extra="train")
    try:
        return yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {one_line(error)}") from error


def with_files(
    files: Sequence[str], words: Sequence[str], add: Add, program: str
) -> tuple[argparse.Namespace, list[str]]:
    """The options of ``words``, and of ``files`` what these do not name; those that are repeated add to each other.

    Returns them, and the words that are none.

    Raises:
        InputError: a file holds no option, one that ``add`` does not give, or a value that it does not take.
    """
    given = argparse.Namespace()
    for file in files:
        options = _FileParser(file)
        add(options)
        for action in options._actions:
            action.required, action.default = False, argparse.SUPPRESS
        options.parse_args(_words(file, options, program), given)
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    add(parser)
    for action in parser._actions:
        action.required = action.required and not hasattr(given, action.dest)
    return parser.parse_known_args(words, given)


class _FileParser(argparse.ArgumentParser):
    def __init__(self, file: str) -> None:
        super().__init__(add_help=False)
        self.file = file

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.file}: {message.removeprefix('argument --')}.")


def _words(file: str, parser: argparse.ArgumentParser, program: str) -> list[str]:
    """The file as a command line."""
    content = read_yaml(file, "Reading options from a file")
    if not isinstance(content, dict) or not content:
        raise InputError(f"{file} holds no options; write a name and a value a line.")
    actions = {action.dest: action for action in parser._actions}
    words, last = [], []
    for name, value in content.items():
        if name not in actions:
            raise InputError(f"{file} names the option {name}, which is none; {program} --help lists them, without _.")
        action, values = actions[name], value if isinstance(value, list) else [value]
        option = next(iter(action.option_strings), "")
        is_one = action.nargs is None and not isinstance(action, argparse._AppendAction)
        if value is None or value == []:
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise InputError(f"{file} has {value!r} for {name}, which is true or false.")
            words += [option] * value
        elif (is_one and isinstance(value, list)) or any(isinstance(x, bool | dict | list) for x in values):
            raise InputError(f"{file} has {value!r} for {name}; give {'one value' if is_one else 'a list of values'}.")
        elif not option:
            last = ["--", str(value)]
        elif action.nargs is None:
            words += [f"{option}={x}" for x in values]
        else:
            words += [option, *map(str, values)]
    return words + last
