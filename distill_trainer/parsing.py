"""Dataclasses of settings from one YAML or JSON file and command-line flags."""

import difflib
import json
import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from distill_trainer.arguments import DistillationArguments
from distill_trainer.errors import ConfigurationError
from distill_trainer.input_arguments import DataArguments, ModelArguments

# What `settings_text` is written to in a run's folder.
SETTINGS_FILE = "training_config.yaml"


class OneLineParser(ArgumentParser):
    """Ends with exit code 2 and one line that says what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and end."""
        self.exit(2, f"error: {message}\n")


class PlainLoader(yaml.BaseLoader):
    """Loader of YAML with all values as text, that refuses a name given twice with a `ValueError`."""

    def construct_mapping(self, node, deep=False):
        """The mapping of a node."""
        return _unique((name.value, None) for name, _ in node.value) and super().construct_mapping(node, deep=deep)


class SettingsParser(HfArgumentParser):
    """Parser of dataclasses from a file and flags, that raises `ConfigurationError` where argparse prints and exits.

    `HfArgumentParser` reads either a file or flags, and takes the values of a file as they come. Here the settings of
    the file become flags before the user's own, so both have the same names, aliases and types, and the later wins.

    Args:
        types: The dataclasses. The help of a field is its metadata `help`, further names its metadata `aliases`.
    """

    def __init__(self, types: Iterable[Any]) -> None:
        usage = "%(prog)s [CONFIG.yaml | CONFIG.json] [--field value ...]"
        super().__init__(types, usage=usage)
        self.add_argument("--config", help="The YAML or JSON file, if it is not the first argument.")
        self.source = ""

    def parse_settings(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """One object of each dataclass.

        Args:
            argv: `[FILE] [--field value ...]` or `--config FILE [--field value ...]`; the file may be left out. None
                takes the command line of this process.

        Raises:
            ConfigurationError: If the file cannot be read, or a name or a value cannot be used; in one line.
        """
        namespace = self.read_settings(argv)
        try:
            return self.parse_dict(vars(namespace), allow_extra_keys=True)
        except ConfigurationError:
            raise
        except (ValueError, TypeError, ImportError, OSError) as error:
            # TrainingArguments raises these for its own fields.
            raise ConfigurationError(_one_line(error)) from error

    def read_settings(self, argv: list[str] | None = None) -> Namespace:
        """The values of all fields as they were given, or their defaults; see `parse_settings`."""
        flags = self._read_flags(sys.argv[1:] if argv is None else argv)
        given, words = self.parse_known_args(flags)
        files = [*words, *([given.config] if given.config is not None else [])]
        if len(files) > 1 or any(word.startswith("-") for word in files):
            raise ConfigurationError(f"The command line must hold one config file and flags, got {' '.join(files)}.")
        namespace = Namespace()
        if files:
            self.source = f"{files[0]}: "
            file_flags, structures = self._read_file(Path(files[0]))
            self.parse_args(file_flags, namespace)
            vars(namespace).update(structures)
            self.source = ""
        self.parse_known_args(flags, namespace)
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise `message`, in our own words where it is about a wrong type."""
        message = _one_line(message)
        if wrong := re.fullmatch(r"argument --(\w+)\S*: invalid (\w+) value: '(.*)'", message):
            message = "{} must be of type {}, got {}.".format(*wrong.groups())
        raise ConfigurationError(self.source + re.sub(r"^argument --(\w+)[^:\s]*:", r"\1:", message))

    def fields(self, *, in_file: bool) -> dict[str, str]:
        """The field that each name sets, in a file or as a flag."""
        return {
            option[2:].replace("-", "_"): action.dest
            for action in self._actions
            for option in action.option_strings
            if option.startswith("--") and not (in_file and (action.nargs == 0 or action.dest == "config"))
        }

    def _check_names(self, given: Iterable[str], *, in_file: bool) -> dict[str, str]:
        """`fields`; raises if a name is not known, or if two names of one field are given."""
        known = self.fields(in_file=in_file)
        seen: dict[str, str] = {}
        for name in given:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                self.error(f"{name} is not a known setting. The nearest is {nearest}.")
            other = seen.setdefault(known[name], name)
            if other != name:
                self.error(f"{other} and {name} are two names of {known[name]}, got both. Give one.")
        return known

    def _read_flags(self, argv: list[str]) -> list[str]:
        """`argv` with underscores in the names of its flags, after these have been checked."""
        flags, given = [], []
        for word in argv:
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                given.append(name.replace("-", "_"))
                word = f"--{given[-1]}{equals}{value}"
            flags.append(word)
        self._check_names(given, in_file=False)
        return flags

    def _read_file(self, path: Path) -> tuple[list[str], dict[str, Any]]:
        """The settings of a file: as flags where a flag can say it, the others as values of their fields."""
        settings = {str(name).replace("-", "_"): value for name, value in self._load(path).items()}
        known = self._check_names(settings, in_file=True)
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        flags: list[str] = []
        structures: dict[str, Any] = {}
        for name, value in settings.items():
            hint = hints[known[name]]
            options = (hint,) if get_origin(hint) in (None, list) else get_args(hint)
            accepted = {get_origin(option) or option for option in options}
            if value is not None and not isinstance(value, (dict, list)):
                flags.append(f"--{name}={value}")
            elif type(value) not in accepted:
                self.error(f"{name} must be {'a list' if list in accepted else 'one value'}, got {json.dumps(value)}.")
            elif isinstance(value, list) and any(item is None or isinstance(item, (dict, list)) for item in value):
                self.error(f"{name} must be a list of plain values, got {json.dumps(value)}.")
            elif value and isinstance(value, list) and not {str, type(None)} <= accepted:
                flags.extend([f"--{name}", *map(str, value)])
            else:  # null, a mapping, an empty list, or a list for a field whose flag takes a single text
                structures[known[name]] = value
        return flags, structures

    def _load(self, path: Path) -> dict[Any, Any]:
        """The mapping in a file. YAML's values stay text: YAML itself reads 1e-3 as text, no as false, 2:5 as 125."""
        if path.suffix not in (".yaml", ".yml", ".json"):
            self.error("the config file must end in .yaml, .yml or .json.")
        try:
            content = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                settings = json.loads(content, object_pairs_hook=_unique)
            else:
                settings = yaml.load(content, Loader=PlainLoader)
        except OSError as error:
            self.error(f"the config file cannot be read ({error.strerror}).")
        except (ValueError, yaml.YAMLError) as error:
            self.error(f"the config file is no valid {'JSON' if path.suffix == '.json' else 'YAML'} ({error}).")
        if not isinstance(settings, dict) or not settings:
            self.error("the config file must hold `field: value` pairs.")
        return settings if path.suffix == ".json" else {name: _yaml_value(value) for name, value in settings.items()}


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, DistillationArguments]:
    """The settings of one run; flags win over the file, the file over the defaults.

    Args:
        argv: `[CONFIG.yaml | CONFIG.json] [--field value ...]`. `--config FILE` may name the file as well, and flags
            may be written with `-` or `_`. None takes the command line of this process.

    Raises:
        ConfigurationError: If the file cannot be read, or a name or a value cannot be used; in one line.
    """
    model, text, training = _parser().parse_settings(argv)
    if training.data_curriculum != "none" and (text.streaming or text.use_dynamic_batching):
        raise ConfigurationError(
            f"data_curriculum must be none with {'streaming' if text.streaming else 'use_dynamic_batching'}, "
            f"got {training.data_curriculum}. It needs all windows beforehand, and their order for itself."
        )
    if text.use_dynamic_batching:
        if training.train_sampling_strategy not in ("random", "group_by_length"):
            raise ConfigurationError(
                "train_sampling_strategy must be group_by_length with use_dynamic_batching, "
                f"got {training.train_sampling_strategy}."
            )
        training.train_sampling_strategy = "group_by_length"
    if training.project != "huggingface":
        os.environ["WANDB_PROJECT"] = training.project  # the only place where the Trainer's wandb callback looks
    return model, text, training


def fields_of(names: Iterable[str]) -> set[str]:
    """The fields that these names set, further names of a field included; unknown ones stay as they are."""
    known = _parser().fields(in_file=False)
    plain = (name.replace("-", "_") for name in names)
    return {known.get(name, name) for name in plain}


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a mapping; readers of YAML and JSON would keep the last of a name without a word."""
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"{name} is given twice")
        mapping[name] = value
    return mapping


def training_settings(argv: list[str] | None = None) -> dict[str, Any]:
    """The settings that are not the defaults, as a config file holds them: what trains the same student again.

    Without tokens, and without what publishes a run or continues one.

    Args:
        argv: See `parse_arguments`, which has accepted it.
    """
    parser = _parser()
    defaults, given = vars(parser.read_settings([])), vars(parser.read_settings(argv))
    elsewhere = ("config", "resume_from_checkpoint"), ("hub_", "push_to_hub")
    return {
        name: value
        for name, value in given.items()
        if value != defaults[name] and name not in elsewhere[0] and not name.startswith(elsewhere[1])
    }


def settings_text(settings: dict[str, Any]) -> str:
    """The content of a config file with these settings."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)


def _parser() -> SettingsParser:
    parser = SettingsParser([ModelArguments, DataArguments, DistillationArguments])
    parser.add_argument(
        "--use_wandb",
        dest="report_to",
        nargs="?",
        const="true",
        default=SUPPRESS,
        type=lambda value: "wandb" if string_to_bool(value) else "none",
        help="Short for --report_to wandb.",
    )
    return parser


def _yaml_value(value: Any) -> Any:
    """Null as None, and what is inside a mapping as JSON reads it; all else stays text, for the fields' types."""
    if isinstance(value, dict):
        return _json_value(value)
    return None if value in ("", "~", "null", "Null", "NULL") else value


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_value(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_json_value(inner) for inner in value]
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
