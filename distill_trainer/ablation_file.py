"""The file of an ablation: settings of all runs, what each variant changes, and the seeds."""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill_trainer.errors import ConfigurationError
from distill_trainer.parsing import PlainLoader, fields_of, parse_arguments

CONFIG = "config.yaml"
MOST_SEED = 999_999_999
# What an ablation sets for every run: it trains, and is scored here.
FIXED = {
    "run_baseline": "false",
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": "true",
}
# What only a run by itself does, with its own seed and folder.
UNUSED = ("skip_eval", "lm_eval_tasks", "push_to_hub", "resume_from_checkpoint", "seed", "output_dir")
# Bytes, of a folder's name.
LONGEST_FOLDER = 255


@dataclass
class Ablation:
    """What an ablation's file says.

    Attributes:
        variants: Settings of each variant by its name, on top of `settings`.
        settings: Settings of all variants.
        reference: The variant that the others are compared with.
        seeds: A seed draws other documents and batches.
        jobs: Runs at a time, each in a process of its own with its share of the cores.
        flags: Flags of the command line, which win over all of these.
        folder: Where the results go.
    """

    variants: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    reference: str
    seeds: list[int]
    jobs: int = 1
    flags: list[str] = field(default_factory=list)
    folder: Path = Path("outputs/ablation")


def read_ablation(argv: Sequence[str] | None = None) -> Ablation | None:
    """The ablation that the first argument names: a YAML file with `variants`. None for anything else.

    Raises:
        ConfigurationError: If the file has `variants` and cannot be used.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--output_dir", "--output-dir")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        own, flags = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        if not any(argument.startswith("--output") for argument in arguments):
            return None
        raise ConfigurationError("--output_dir must name a folder.") from error
    path = Path(own.config or (flags.pop(0) if flags else ""))
    if path.suffix not in (".yaml", ".yml") or not path.is_file() or {"-h", "--help"} & set(flags):
        return None
    try:
        # Plain text as for all config files: their parser knows the types.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the parser of the settings says what is wrong
    if not isinstance(content, dict) or "variants" not in content:
        return None
    variants, seeds = content.pop("variants"), content.pop("seeds", ["0"])
    jobs, reference = content.pop("jobs", "1"), content.pop("reference", "")
    if not isinstance(variants, dict) or not variants or not all(isinstance(v, dict) for v in variants.values()):
        raise ConfigurationError(f"{path}: variants must be a mapping of names to mappings of settings.")
    if not isinstance(reference, str) or reference not in variants:
        raise ConfigurationError(f"{path}: reference must be one of the variants, got {reference or 'none'}.")
    if not isinstance(seeds, list) or not seeds or not all(re.fullmatch(r"\d{1,9}", str(seed)) for seed in seeds):
        raise ConfigurationError(
            f"{path}: seeds must be a list of whole numbers from 0 to {MOST_SEED:,}, got {seeds}."
        )
    if not re.fullmatch(r"[1-9]\d{0,3}", str(jobs), re.ASCII):
        raise ConfigurationError(f"{path}: jobs must be from 1 to 9999, got {jobs}.")
    named = content.pop("output_dir", str(Ablation.folder))
    _check_names(path, variants, content, flags)
    if not isinstance(named, str) or named in ("", "~", "null"):
        raise ConfigurationError(f"{path}: output_dir must name a folder, got {named or 'none'}.")
    folder = Path(own.output_dir or named)
    ablation = Ablation(variants, content, reference, [int(seed) for seed in seeds], int(jobs), flags, folder)
    runs = [run_folder(ablation, name, seed) for name in variants for seed in ablation.seeds]
    for run in runs:
        if (length := len(run.name.encode())) > LONGEST_FOLDER:
            raise ConfigurationError(
                f"{path}: the name of a variant must make a folder's name of at most {LONGEST_FOLDER} bytes, "
                f"got {length}. Shorten it."
            )
        if runs.count(run) > 1:
            raise ConfigurationError(f"{path}: two runs would share the folder {run}. Name variants and seeds apart.")
    return ablation


def _check_names(path: Path, variants: dict[str, dict[str, Any]], settings: dict[str, Any], flags: list[str]) -> None:
    """Raise if a variant has no usable name, or if a setting cannot be told from another."""
    if not all(str(name).strip() for name in variants):
        raise ConfigurationError(f"{path}: the name of a variant must not be empty.")
    given = fields_of(flag.split("=")[0][2:] for flag in flags if flag.startswith("--"))
    for name in sorted((given | fields_of(settings) | fields_of(set().union(*variants.values()))) & {*FIXED, *UNUSED}):
        raise ConfigurationError(
            f"{path}: {name} must be left out, since an ablation trains and scores its runs itself."
        )
    for name, changes in variants.items():
        # The flag would win over the variant, whose row would tell of something else.
        for field_name in sorted(given & fields_of(changes)):
            raise ConfigurationError(
                f"--{field_name} must be left out, since the variant {name} changes it. Change it in the file instead."
            )


def run_folder(ablation: Ablation, name: str, seed: int) -> Path:
    """Where the result of one variant and seed goes."""
    plain = "".join(character if character.isalnum() else "_" for character in name)
    return ablation.folder / f"{plain}-{seed}"


def settings_of(ablation: Ablation, name: str, seed: int) -> dict[str, Any]:
    """The settings of one run, as text."""
    own = {"seed": str(seed), "output_dir": str(run_folder(ablation, name, seed))}
    return {**ablation.settings, **ablation.variants[name], **FIXED, **own}


def check_settings(name: str, settings: dict[str, Any], flags: list[str]) -> None:
    """Parse the settings of a variant as its run will.

    Raises:
        ConfigurationError: If one is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        try:
            parse_arguments([str(path), *flags])
        except ConfigurationError as error:
            raise ConfigurationError(f"variant {name}: {str(error).removeprefix(f'{path}: ')}") from error


def made_with(settings: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """What decides whether a result may be kept, in whatever order the flags were given."""
    words: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not words:
            words.append([])
        words[-1].append(word)
    # Stable: of a flag that is given twice the later one counts.
    return {"settings": settings, "flags": sum(sorted(words, key=lambda flag: flag[0].split("=")[0]), [])}
