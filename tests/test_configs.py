import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from distill_trainer.ablation_file import check_settings, read_ablation, settings_of
from distill_trainer.parsing import parse_arguments

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path.name for path in CONFIGS.iterdir() if path.name != "ablation.yaml")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(name: str) -> dict:
    return {key: value for part in parse_arguments([str(CONFIGS / name)]) for key, value in vars(part).items()}


def parse_file(name: str) -> dict:
    return yaml.load((CONFIGS / name).read_text(), Loader=yaml.SafeLoader)


@pytest.mark.parametrize("name", FILES)
def test_every_config_parses_and_every_value_arrives(name):
    settings = yaml.safe_load((CONFIGS / name).read_text())
    parsed = parse(name)
    for key, value in settings.items():
        key = {"alpha_kd": "kl_weight"}.get(key, key)
        if key == "report_to":
            value = [] if value == "none" else value
        arrived = parsed[key]
        assert arrived == (type(arrived)(value) if isinstance(arrived, (int, float)) else value), key


def test_every_variant_of_the_ablation_parses_and_they_are_all_different():
    ablation = read_ablation([str(CONFIGS / "ablation.yaml")])
    settings = {name: settings_of(ablation, name, 0) for name in ablation.variants}
    for name, own in settings.items():
        check_settings(name, own, [])
        own.pop("output_dir")
    assert len({json.dumps(own, sort_keys=True) for own in settings.values()}) == len(settings)


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(CONFIGS.parent / "tests" / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize(
    "name", ["bench_losses", "bench_kl_methods", "bench_when_it_pays", "bench_frontier", "bench_native"]
)
def test_the_variants_of_the_benchmarks_parse(benchmark_module, name):
    bench = benchmark_module(name)
    ablation = replace(read_ablation([str(CONFIGS / "ablation.yaml")]), variants=bench.VARIANTS)
    for case in getattr(bench, "CASES", {"": {}}).values():
        for variant in bench.VARIANTS:
            check_settings(variant, settings_of(ablation, variant, 0) | case, [])


def test_the_benchmark_of_the_losses_takes_the_reference_weights(benchmark_module):
    bench, reference = benchmark_module("bench_losses"), parse_file("reference_losses.yaml")
    assert bench.WEIGHTS | bench.PHASES == {name: reference[name] for name in (*bench.WEIGHTS, *bench.PHASES)}


def test_the_ablation_is_the_demo_with_half_its_steps_and_fewer_losses():
    ablation, demo = read_ablation([str(CONFIGS / "ablation.yaml")]).settings, parse_file("demo.yaml")
    same = [name for name in demo if name in ablation and str(demo[name]) == str(ablation[name])]
    assert set(same) >= {"datasets", "dataset_subset_size", "learning_rate", "router_learning_rate", "max_length"}
    assert 2 * int(ablation["max_steps"]) == demo["max_steps"]
    assert all(ablation[f"{name}_weight"] == "0" for name in ("feature", "attention", "layerwise", "contrastive"))


def test_the_default_config_states_the_defaults_of_the_code():
    defaults = {key: value for part in parse_arguments([]) for key, value in vars(part).items()}
    own = {"output_dir", "eval_strategy", "eval_steps", "save_total_limit", "do_eval"}
    parsed = parse("default.yaml")
    stated = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    assert {key for key in stated if parsed[key] != defaults[key]} <= own


def test_the_recommended_config_differs_from_the_default_only_where_it_says_so():
    default, recommended = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("default", "recommended")
    )
    different = {key for key in recommended if recommended[key] != default.get(key)}
    assert different == {"temperature", "router_layers", "initial_top_k", "final_top_k", "run_baseline", "output_dir"}
    assert default.keys() <= recommended.keys()
    assert recommended["temperature"] == recommended["final_temperature"] == 1.0


def test_the_reference_losses_are_all_five_in_phases_and_differ_in_nothing_else():
    default, reference = (parse(f"{name}.yaml") for name in ("default", "reference_losses"))
    different = {key for key in parse_file("reference_losses.yaml") if reference[key] != default[key]}
    losses = {f"{name}_weight" for name in ("feature", "attention", "layerwise")}
    assert different == {*losses, "phase_boundaries", "output_dir"}
    weights = [reference[f"{name}_weight"] for name in ("kl", "feature", "attention", "layerwise", "contrastive")]
    assert weights == [0.7, 0.1, 0.1, 0.05, 0.05] and sum(weights) == 1
    assert reference["lm_weight"] is None and reference["phase_boundaries"] == [0.1, 0.2]


def test_the_custom_config_holds_just_its_five_settings():
    assert json.loads((CONFIGS / "custom.json").read_text()) == {
        "learning_rate": 1e-4,
        "alpha_kd": 0.8,
        "temperature": 5.0,
        "initial_top_k": 2,
        "final_top_k": 6,
    }


def test_the_demo_needs_no_network_and_trains_the_baseline():
    settings = parse("demo.yaml")
    assert settings["datasets"] == ["sotu"] and settings["run_baseline"]
    for role in ("teacher", "student"):
        assert settings[f"{role}_model_name_or_path"] == f"distill_trainer/demo_assets/{role}"
