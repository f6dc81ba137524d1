"""The parser behind fit, validate, test and predict: errors and help that can be read.

jsonargparse says what it tried; a user needs to know which option, where it stands and
what it takes. So its complaints become `OptionError`s, and `explained` adds where it was given.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.cli import LightningArgumentParser

from minigpt.errors import ConfigError, chain
from minigpt.reading import LARGEST_CONFIG, read_text, read_yaml, reason_of, refusing

_KEY = re.compile(r'Parser key "([\w.]+)":\s*')
_UNKNOWN = (
    re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'"),
    re.compile(r"Subcommand '(?:\w+)' does not accept option '([\w.]+)'"),
    re.compile(r"Option '([\w.]+)' is not accepted"),
    re.compile(r"unrecognized arguments: --([\w.]+)"),
)
_NO_CLASS = (
    re.compile(r"Expected a dot import path string: (\S+)"),
    re.compile(r"Problem with given class_path '([\w.]+)':\s+module '[\w.]+' has no attribute"),
)
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
# Options that take names of files, which may look like other YAML: null, 5, or #c, a comment.
_FILES = re.compile(
    r"--(data\.(init_args\.)?(train|val|exam|predict|cache_dir)|predictions"
    r"|model\.(init_args\.)?(init_from|tokenizer|chat_template))"
)
_LISTS = (".train", ".val", ".exam")
# Lines of a complaint that say how jsonargparse looks for values.
_INTERNALS = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
)
_TYPES = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}
_CLASSES = {
    "model": "The stages are PretrainModule, SFTModule, DPOModule, KTOModule, GRPOModule, "
    "RewardModule and LoRAModule.",
    "data": "There are PretrainDataModule, SFTDataModule (for LoRA, too), DPODataModule (for "
    "reward models, too), KTODataModule and GRPODataModule.",
    "trainer.logger": "Lightning's loggers have short names, such as CSVLogger; others are named "
    "by their path: package.module.Class.",
    "trainer.callbacks": "Lightning's callbacks have short names, such as EarlyStopping; others "
    "are named by their path: package.module.Class.",
}
_SHORT_NAMES = (
    *({*loggers.__all__, *callbacks.__all__} - {"Logger", "Callback"}),  # these two are bases
    *re.findall(r"\w+Module\b", _CLASSES["model"] + _CLASSES["data"]),
)
# Two ways to say one thing, of which the one given last counts.
ALTERNATIVES = (
    ("trainer.max_steps", "trainer.max_epochs"),
    ("trainer.val_check_interval", "validate.every"),
)


class OptionError(ConfigError):
    """A complaint about one option, which does not say yet where the option was given.

    Args:
        problem: what is wrong, in words.
        key: dotted path of the option, without `init_args`; "" for none.
        options: for an unknown name, those that might have been meant.
        unknown: that name; by default the last of `key`.
    """

    def __init__(
        self, problem: str, key: str = "", options: Sequence[str] = (), unknown: str = ""
    ) -> None:
        self.problem = problem
        self.key = key
        self.options = options
        self.unknown = (unknown or key).rpartition(".")[2]
        super().__init__(f"{key}: {problem}" if key else problem)


class HelpFormatter(DefaultHelpFormatter):
    """Keeps the lines of the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(LightningArgumentParser):
    """A parser whose errors are MiniGPT's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the parser's complaint as an error about one option."""
        parsers: list[Any] = [self]
        for action in self._actions:
            parsers += getattr(action, "_name_parser_map", {}).values()  # those of verbs
        options = [action.dest for parser in parsers for action in parser._actions]
        raise as_option_error(message, ex, options) from ex


def as_option_error(message: str, ex: BaseException | None, options: Sequence[str]) -> OptionError:
    """Turn a complaint of jsonargparse into one about an option."""
    inner = next((e for e in chain(ex) if isinstance(e, OptionError)), None)
    key, problem = "", message
    if match := _KEY.match(message):
        key, problem = match[1], message[match.end() :]
    if inner is not None:
        path = f"{key}.{inner.key}".strip(".")
        return OptionError(inner.problem, path, inner.options, inner.unknown)
    for pattern in _UNKNOWN:
        if match := pattern.search(problem):
            name = ".".join(match.groups())
            return OptionError("there is no such option", f"{key}.{name}".strip("."), options)
    for pattern in _NO_CLASS:
        if match := pattern.search(problem):
            return OptionError(f"there is no class {match[1]}", key, _SHORT_NAMES, match[1])
    if match := _NO_MODULE.search(problem):
        package = match[1].partition(".")[0]
        text = f"the package {package} is not installed: pip install it, or leave the class out"
        return OptionError(text, key)
    if "arguments are required" in problem:
        missing = problem.rpartition(": ")[2]
        if ".model" not in missing:
            return OptionError(f"{missing} must be given, too", key)
        return OptionError("no model and no data are given; name a config with --config FILE")
    return OptionError(in_words(problem), key)


def in_words(problem: str) -> str:
    """Shorten a complaint about a value to one line, without Python's names of types."""
    problem, _, value = problem.partition("Given value: ")
    problem = problem.partition("Given value type")[0]
    lines = [line.strip().removeprefix("- ") for line in problem.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_INTERNALS)]
    if all(line.startswith("Expected a ") for line in lines):
        lines[1:] = [line.removeprefix("Expected a ") for line in lines[1:]]
    text = " or ".join(lines)
    text = re.sub(r"<class '([\w.]+)'>", lambda m: _TYPES.get(m[1], m[1].split(".")[-1]), text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = text.replace("Expected a ", "must be ").replace(". Got value: ", ", but is ")
    return text if "but is" in text or not value else f"{text}, but is {value:.60}"


def explained(error: OptionError, args: Sequence[str]) -> ConfigError:
    """Return the parser's error, with the place where its option was given, and a remedy.

    Args:
        error: about the option.
        args: the command line.
    """
    names = sorted({name.rpartition(".")[2] for name in error.options} - {error.unknown})
    close = difflib.get_close_matches(error.unknown, names, 1, 0.78)
    remedy = f"Did you mean {close[0]}? " if close else ""
    location = locate(error.key, args) if error.key else ""
    remedy += _CLASSES.get(error.key) or (
        "`minigpt fit --help` lists the options, and `--model.help CLASS` those of a stage."
        if error.options
        else "See: minigpt fit --help"
    )
    return ConfigError(
        f"{location}: {error.problem}. {remedy}" if location else f"{error}. {remedy}"
    )


def locate(key: str, args: Sequence[str]) -> str:
    """Return where an option is given: `file:line: path`, or as it stands on the command line."""
    for arg in args:
        name = arg.partition("=")[0]
        if name.startswith("--") and name[2:].replace("init_args.", "") == key:
            return name
    for file in reversed(list(config_files(args))):
        tree = yaml.compose(read_text(file, LARGEST_CONFIG))
        if position := follow(tree, key.split(".")):
            line, path = position
            return f"{file}:{line}: {path}"
    return key


def follow(node: Any, parts: list[str], path: str = "") -> tuple[int, str] | None:
    """Follow a dotted path in a YAML file; return its line and its full path."""
    if not isinstance(node, yaml.MappingNode):
        return None
    below = {name.value: (name, value) for name, value in node.value}
    step = parts[0] if parts[0] in below else "init_args"
    if step not in below:
        return None
    name, value = below[step]
    full = f"{path}.{step}".strip(".")
    rest = parts if step != parts[0] else parts[1:]
    return follow(value, rest, full) if rest else (name.start_mark.line + 1, full)


def config_files(args: Sequence[str]) -> Iterator[Path]:
    """Yield the config files named on a command line."""
    for index, arg in enumerate(args):
        name, given, value = arg.partition("=")
        if name in ("-c", "--config"):
            following = args[index + 1 : index + 2]
            yield from map(Path, [value] if given else following)


def replaced_options(args: Sequence[str]) -> dict[str, str]:
    """Return each option that a later config, or the command line, replaces, with its alternative.

    The last word counts: `--trainer.max_epochs 3` behind a config with `max_steps: 280` makes
    three epochs. Where one source gives both options, both hold.
    """
    sources = list(_given_options(args))
    replaced = {}
    for alternatives in ALTERNATIVES:
        last = dict.fromkeys(alternatives, -1)  # number of the last source that gives each
        for position, given in enumerate(sources):
            last |= {key: position for key in alternatives if given.get(key) not in (None, -1)}
        if -1 not in last.values() and len(set(last.values())) > 1:
            earlier, later = sorted(last, key=lambda key: last[key])
            replaced[earlier] = later
    return replaced


def _given_options(args: Sequence[str]) -> Iterator[dict[str, object]]:
    """Yield what each config file, and then the command line, gives in `ALTERNATIVES`' sections."""
    keys = [key for alternatives in ALTERNATIVES for key in alternatives]
    sections = {key.partition(".")[0] for key in keys}
    for file in config_files(args):
        config = read_yaml(file)
        given = [(name, config.get(name)) for name in sections]
        yield {
            f"{name}.{key}": value
            for name, section in given
            if isinstance(section, dict)
            for key, value in section.items()
        }
    options: dict[str, object] = {}
    for index, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        key = option.removeprefix("--")
        text = value if equals else "".join(args[index + 1 : index + 2])
        if key in keys:
            options[key] = None if text in ("", "null", "-1") else text
        elif key in sections and isinstance(tree := _tree(text), dict):  # {max_epochs: 3}
            options |= {f"{key}.{name}": value for name, value in tree.items()}
    yield options


def _tree(text: str) -> object:
    """Return the YAML of an option, or of the file that it names, None where there is none."""
    try:
        return read_yaml(Path(text)) if Path(text).is_file() else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):  # which the parser will refuse
        return None


def check_configs(args: Sequence[str]) -> None:
    """Refuse config files that are missing, no YAML, or no mapping.

    Raises:
        ConfigError: with the file and the line.
    """
    for file in config_files(args):
        content = _content(file)
        # jsonargparse takes one whose options are all null for a string.
        values = list(content.values()) if isinstance(content, dict) else [None]
        if values and all(value is None for value in values):
            raise ConfigError(
                f"{file}: a config must hold options such as `run_dir: outputs/sft`, but this one "
                f"holds {'nothing' if content is None else repr(content)[:60]}."
            )


def check_sections(options: Namespace) -> None:
    """Refuse sections that are null, such as `trainer:` above lines that are all comments.

    Args:
        options: of a verb, as they are parsed.

    Raises:
        OptionError: for the first one.
    """
    empty = [name for name in ("trainer", "checkpoint", "validate") if options[name] is None]
    for name in ("model", "data"):
        groups = _groups(pkgutil.resolve_name(options[name].class_path))
        values = options[name].get("init_args", Namespace()).items(branches=True)
        empty += [f"{name}.{key}" for key, value in values if value is None and key in groups]
    if empty:
        raise OptionError("it holds no options: give some, or leave it out", empty[0])


def _groups(chosen: type) -> set[str]:
    """Return the parameters of a class, also of its bases, whose default is a group of options."""
    signatures = [inspect.signature(each.__init__) for each in chosen.__mro__]  # type: ignore[misc]
    parameters = [p for signature in signatures for p in signature.parameters.values()]
    return {parameter.name for parameter in parameters if is_dataclass(parameter.default)}


def _content(file: Path) -> object:
    with refusing(f"{file}: the config", ConfigError, verb="cannot be read"):
        try:
            return read_yaml(file)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: the config is not UTF-8. Convert it.") from error
        except OSError as error:
            raise ConfigError(
                f"{file}: the config cannot be read: {reason_of(error)}. Check the name; relative "
                "paths start at the current directory."
            ) from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file}{_yaml_problem(error)}") from error


def with_file_names(args: Sequence[str]) -> list[str]:
    """Return a command line in which jsonargparse reads names of existing files as such.

    Else it would read some as other YAML. Several behind an option that takes a list, such as a
    shell makes of `texts/*.jsonl`, become that list.
    """
    out: list[str] = []
    option, values = "", list[str]()  # the last option if it takes files, and its values so far
    for arg in args:
        name, given, value = arg.partition("=")
        if arg.startswith("-"):
            takes_files = _FILES.fullmatch(name) is not None
            option, values = "" if given or not takes_files else name, []
            out.append(f"{name}={_as_name(name, value)}" if given and takes_files else arg)
        elif values and option.endswith(_LISTS):
            values.append(arg)
            out[-1] = json.dumps(values)
        else:
            out.append(_as_name(option, arg) if option and not values else arg)
            values.append(arg)
    return out


def _as_name(option: str, value: str) -> str:
    try:
        is_plain = yaml.safe_load(value) == value
    except yaml.YAMLError:
        is_plain = False
    if is_plain or not os.path.exists(value):
        return value
    if option.endswith(_LISTS):
        return json.dumps([value])
    return os.path.join(os.curdir, value)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{position}: invalid YAML: {problem}. Mend the indentation or brackets there."
