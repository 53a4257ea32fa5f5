import dataclasses
import json
import math
import os
import re

import pytest
import yaml

from distill_trainer.arguments import DistillationArguments
from distill_trainer.errors import ConfigurationError
from distill_trainer.input_arguments import DataArguments, ModelArguments
from distill_trainer.parsing import parse_arguments, training_settings

KINDS = (ModelArguments, DataArguments, DistillationArguments)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Restored afterwards, whatever parsing makes of it.
    monkeypatch.setenv("WANDB_PROJECT", "from the environment")


def write(name: str, content: str) -> str:
    with open(name, "w", encoding="utf-8") as file:
        file.write(content)
    return name


def setting(arguments, name: str):
    return next(getattr(part, name) for part in arguments if hasattr(part, name))


def message(argv: list[str]) -> str:
    with pytest.raises(ConfigurationError) as error:
        parse_arguments(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_the_reference_pair_and_its_values():
    model, text, training = parse_arguments([])
    assert model.teacher_model_name_or_path == "huihui-ai/Huihui-MoE-1B-A0.6B"
    assert model.student_model_name_or_path == "HuggingFaceTB/SmolLM-135M"
    assert text.datasets == ["wikitext"]
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4, 8)
    assert (training.learning_rate, training.router_learning_rate, training.num_train_epochs) == (5e-5, 1e-4, 3)
    assert (training.temperature, training.final_temperature) == (4.0, 1.0)
    assert (training.initial_top_k, training.final_top_k) == (None, None)
    weights = "kl feature attention layerwise contrastive lm".split()
    assert [getattr(training, f"{name}_weight") for name in weights] == [0.7, 0.0, 0.0, 0.0, 0.05, None]
    assert (training.report_to, training.label_names, training.remove_unused_columns) == ([], ["labels"], False)
    assert (training.layer_map, training.phase_boundaries, training.max_length) == ("uniform", [0.0, 0.0], 512)


ACCEPTED = [
    ("batch_size", "3", "per_device_train_batch_size", 3),
    ("num_epochs", "2", "num_train_epochs", 2.0),
    ("epochs", "1.5", "num_train_epochs", 1.5),
    ("learning_rate", "1e-3", "learning_rate", 1e-3),
    ("router_lr", "2e-3", "router_learning_rate", 2e-3),
    ("alpha_kd", "0.8", "kl_weight", 0.8),
    ("temperature", "5", "temperature", 5.0),
    ("initial_top_k", "2", "initial_top_k", 2),
    ("final_top_k", "6", "final_top_k", 6),
    ("max_length", "64", "max_length", 64),
    ("dataset_subset_size", "100", "dataset_subset_size", 100),
    ("num_workers", "2", "dataloader_num_workers", 2),
    ("use_dynamic_batching", "true", "train_sampling_strategy", "group_by_length"),
    ("gradient_accumulation_steps", "5", "gradient_accumulation_steps", 5),
    ("datasets", ["a", "b", "c"], "datasets", ["a", "b", "c"]),
    ("resume", "some/checkpoint-3", "resume_from_checkpoint", "some/checkpoint-3"),
    ("use_wandb", "true", "report_to", ["wandb"]),
    ("use_wandb", "false", "report_to", []),
    ("report_to", ["wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
    ("project_name", "moe", "project", "moe"),
    ("skip_eval", "true", "skip_eval", True),
    ("seed", "7", "seed", 7),
    ("lm_weight", "0.25", "lm_weight", 0.25),
    ("feature_layers", ["1", "3"], "feature_layers", [1, 3]),
    ("layer_map", ["0:1", "2:5"], "layer_map", ["0:1", "2:5"]),
    ("layer_map", "uniform", "layer_map", "uniform"),
    ("eval_strategy", "no", "eval_strategy", "no"),
    ("use_router", "no", "use_router", False),
    ("router_layers", "all", "router_layers", "all"),
    ("router_layers", "last:3", "router_layers", "last:3"),
    ("router_layers", ["1", "2"], "router_layers", ["1", "2"]),
    ("router_layers", "2", "router_layers", ["2"]),
    ("router_parts", ["gap", "capacity"], "router_parts", ["gap", "capacity"]),
    ("router_parts", ["none"], "router_parts", []),
    ("expert_sampling", "4", "expert_sampling", 4),
    ("router_interval", "4", "router_interval", 4),
    ("router_until", "0.25", "router_until", 0.25),
    ("loss_balancing", "gradient-norm", "loss_balancing", "gradient-norm"),
    ("data_curriculum", "teacher_loss", "data_curriculum", "teacher_loss"),
]


@pytest.mark.parametrize(("name", "value", "target", "expected"), ACCEPTED)
@pytest.mark.parametrize("separator", ["-", "_"])
def test_every_name_works_as_a_flag_with_dashes_or_underscores(name, value, target, expected, separator):
    words = value if isinstance(value, list) else [value]
    assert setting(parse_arguments([f"--{name.replace('_', separator)}", *words]), target) == expected


@pytest.mark.parametrize(("name", "value", "target", "expected"), ACCEPTED)
def test_every_name_works_as_a_key_of_a_yaml_file(name, value, target, expected):
    # Unquoted, as a user writes it: here YAML itself would read 1e-3 as text, no as false and 2:5 as 125.
    text = f"[{', '.join(value)}]" if isinstance(value, list) else value
    assert setting(parse_arguments([write("run.yaml", f"{name}: {text}")]), target) == expected


@pytest.mark.parametrize(("name", "value", "target", "expected"), ACCEPTED)
def test_every_name_works_as_a_key_of_a_json_file(name, value, target, expected):
    assert setting(parse_arguments([write("run.json", json.dumps({name: value}))]), target) == expected


def test_json_values_keep_their_own_types():
    content = '{"learning_rate": 1e-4, "fp16": false, "lm_weight": null, "phase_boundaries": [0, 0.5], "seed": 3}'
    _, _, training = parse_arguments([write("run.json", content)])
    assert (training.learning_rate, training.fp16, training.lm_weight, training.seed) == (1e-4, False, None, 3)
    assert training.phase_boundaries == [0.0, 0.5]


def test_switches_need_no_value():
    _, text, training = parse_arguments(["--skip-eval", "--use-wandb", "--streaming", "--no_use_router"])
    assert training.skip_eval and training.report_to == ["wandb"] and text.streaming and not training.use_router


def test_flags_win_over_the_file_and_the_file_over_the_defaults():
    path = write("run.yaml", "learning_rate: 1e-3\nbatch_size: 2\nuse_wandb: true\nkl_weight: 0.5\nlm_weight: 0.5\n")
    flags = ["--per_device_train_batch_size", "6", "--report_to", "none", "--alpha-kd=0.9"]
    _, _, training = parse_arguments([path, *flags])
    assert (training.learning_rate, training.per_device_train_batch_size, training.report_to) == (1e-3, 6, [])
    assert (training.kl_weight, training.lm_weight, training.temperature) == (0.9, 0.5, 4.0)


@pytest.mark.parametrize("argv", [["{}", "--seed", "1"], ["--config", "{}"], ["--config={}"], ["--seed", "1", "{}"]])
def test_the_config_file_may_stand_first_or_be_named_by_a_flag(argv):
    path = write("run.yaml", "max_steps: 17")
    assert parse_arguments([word.format(path) for word in argv])[2].max_steps == 17


def test_the_command_line_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run_distillation.py", "--seed", "11"])
    assert parse_arguments()[2].seed == 11


def test_null_and_mappings_and_lists_reach_their_fields():
    content = "lm_weight:\nfeature_layers: null\nresume: ~\nlr_scheduler_type: cosine_with_min_lr\n"
    content += "lr_scheduler_kwargs: {min_lr: 1e-6, name: x, all: [true, null]}\noptim_target_modules: [attn, mlp]\n"
    _, _, training = parse_arguments([write("run.yaml", content)])
    assert (training.lm_weight, training.feature_layers, training.resume_from_checkpoint) == (None, None, None)
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6, "name": "x", "all": [True, None]}
    assert training.optim_target_modules == ["attn", "mlp"]


def test_the_project_name_reaches_weights_and_biases():
    parse_arguments([])
    assert os.environ["WANDB_PROJECT"] == "from the environment"
    parse_arguments(["--project-name", "moe"])
    assert os.environ["WANDB_PROJECT"] == "moe"


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        *[(f"--{name}_weight -0.1", f"{name}_weight", "-0.1") for name in ("kl", "feature", "attention", "lm")],
        *[(f"--{name}_weight nan", f"{name}_weight", "nan") for name in ("layerwise", "contrastive")],
        ("--kl_weight inf --lm_weight 0", "kl_weight", "inf"),
        ("--kl_weight 1.5", "kl_weight", "1.5"),
        ("--temperature -1", "temperature", "-1.0"),
        ("--temperature inf", "temperature", "inf"),
        ("--final_temperature 0", "final_temperature", "0.0"),
        ("--router_temperature 0", "router_temperature", "0.0"),
        ("--final_router_temperature -2", "final_router_temperature", "-2.0"),
        ("--kl_direction sideways", "kl_direction", "sideways"),
        ("--initial_top_k 0", "initial_top_k", "0"),
        ("--final_top_k -3", "final_top_k", "-3"),
        ("--router_learning_rate -1", "router_learning_rate", "-1.0"),
        ("--router_student_weight -1", "router_student_weight", "-1.0"),
        ("--router_anchor_weight -1", "router_anchor_weight", "-1.0"),
        ("--router_balance_weight -1", "router_balance_weight", "-1.0"),
        ("--phase_boundaries 0.5 0.2", "phase_boundaries", "[0.5, 0.2]"),
        ("--phase_boundaries -0.5 0.2", "phase_boundaries", "[-0.5, 0.2]"),
        ("--phase_boundaries 0.5 1.2", "phase_boundaries", "[0.5, 1.2]"),
        ("--phase_boundaries 0.5", "phase_boundaries", "[0.5]"),
        ("--feature_layers -1", "feature_layers", "[-1]"),
        ("--attention_layers 2 2", "attention_layers", "[2, 2]"),
        ("--layer_map 3", "layer_map", "['3']"),
        ("--router_layers first", "router_layers", "first"),
        ("--router_layers last:0", "router_layers", "last:0"),
        ("--router_layers 1 last", "router_layers", "['1', 'last']"),
        ("--router_layers -1", "router_layers", "-1"),
        ("--router_parts importance luck", "router_parts", "luck"),
        ("--expert_sampling -1", "expert_sampling", "-1"),
        ("--expert_sampling 2 --router_layers all", "expert_sampling", "2"),
        ("--router_interval 0", "router_interval", "0"),
        ("--router_until 0", "router_until", "0.0"),
        ("--router_until 1.5", "router_until", "1.5"),
        ("--layer_map uniform 1:2", "layer_map", "['uniform', '1:2']"),
        ("--max_length 1", "max_length", "1"),
        ("--max_nonfinite_steps 0", "max_nonfinite_steps", "0"),
        ("--lora_r 0", "lora_r", "0"),
        ("--lora_alpha 0", "lora_alpha", "0"),
        ("--lora_dropout 1", "lora_dropout", "1.0"),
        ("--batch_size 0", "per_device_train_batch_size", "0"),
        ("--per_device_eval_batch_size 0", "per_device_eval_batch_size", "0"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps", "0"),
        ("--learning_rate -1", "learning_rate", "-1.0"),
        ("--epochs 0", "num_train_epochs", "0.0"),
        ("--num_workers -1", "dataloader_num_workers", "-1"),
        ("--remove_unused_columns true", "remove_unused_columns", "true"),
        ("--teacher_dtype int3", "teacher_dtype", "int3"),
        ("--student_init zeros", "student_init", "zeros"),
        ("--datasets a b --dataset_weights 1", "dataset_weights", "[1.0]"),
        ("--dataset_weights 0", "dataset_weights", "0.0"),
        ("--dataset_subset_size 0", "dataset_subset_size", "0"),
        ("--validation_fraction 0", "validation_fraction", "0.0"),
        ("--validation_fraction 1", "validation_fraction", "1.0"),
        ("--streaming --use_dynamic_batching", "use_dynamic_batching", "true"),
        ("--use_dynamic_batching --train_sampling_strategy sequential", "train_sampling_strategy", "sequential"),
        ("--loss_balancing mean", "loss_balancing", "mean"),
        ("--data_curriculum hard", "data_curriculum", "hard"),
        ("--data_curriculum length --streaming", "data_curriculum", "length"),
        ("--data_curriculum length --use_dynamic_batching", "use_dynamic_batching", "length"),
        ("--data_curriculum length --train_sampling_strategy sequential", "train_sampling_strategy", "sequential"),
        ("--use_dynamic_batching maybe", "use_dynamic_batching", "maybe"),
        ("--learning_rate fast", "learning_rate", "fast"),
        ("--batch-size 2.5", "per_device_train_batch_size", "2.5"),
        ("--eval_strategy sometimes", "eval_strategy", "sometimes"),
        ("--log_level loud", "log_level", "loud"),
        ("--warmup_steps -1", "warmup_steps", "-1"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_field_and_value(flags, field, value):
    text = message(flags.split())
    assert field in text and value in text.replace("True", "true")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"layer_map": ["1:2", "1:2"]}, "layer_map must be uniform or different pairs as 2:5 3:8"),
        (
            {"kl_weight": 0.0, "lm_weight": 0.0, "phase_boundaries": [0.0, 0.5]},
            "phase_boundaries must let a loss train from the start, got [0.0, 0.5] with contrastive alone. Set 0 0.",
        ),
        ({"router_layers": None}, "all, or different layer numbers as in 1 3, got None"),
        ({"router_layers": ["3", "3"]}, "all, or different layer numbers as in 1 3, got ['3', '3']"),
        ({"router_parts": ["none", "gap"]}, "must be different names, or none alone, got none gap"),
        ({"phase_boundaries": [0, 1]}, "phase_boundaries must be below 1 for contrastive to train at all"),
        ({"router_parts": ["gap", "gap"]}, "must be different names, or none alone, got gap gap"),
        ({"expert_sampling": 2, "use_router": False}, "expert_sampling must be 0 without use_router, got 2"),
        ({"router_parts": None}, "router_parts must be a list of names, got None"),
        ({"expert_sampling": 1.5}, "expert_sampling must be a whole number, 0 or above, got 1.5"),
        ({"router_interval": None}, "router_interval must be 1 or above, got None"),
        ({"router_interval": 2.0}, "router_interval must be a whole number, 1 or above, got 2.0"),
        ({"router_until": None}, "router_until must be above 0, got None"),
        ({"initial_top_k": "2"}, "initial_top_k must be 1 or above, got 2"),
        ({"final_top_k": True}, "final_top_k must be 1 or above, got True"),
        ({"kl_top_k": 1.5}, "kl_top_k must be a whole number, 1 or above, got 1.5"),
        ({"feature_weight": None}, "feature_weight must be 0 or above, got None"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be from 0 to below 1, got 0.1"),
        ({"gap_schedule": "false"}, "gap_schedule must be True or False, got 'false'"),
        ({"push_to_hub": "no"}, "push_to_hub must be True or False, got 'no'"),
        ({"greater_is_better": "no"}, "greater_is_better must be True or False, got 'no'"),
        *[
            ({"feature_layers": value}, f"feature_layers must be different layer numbers, 0 or above, got {value}.")
            for value in (3, ["1"], [1.5], [True], [])
        ],
        *[
            ({"phase_boundaries": value}, f"phase_boundaries must be two rising values from 0 to 1, got {value}.")
            for value in (None, 0.3, ["0", "1"], [False, True], [0.1, math.nan])
        ],
        *[
            ({"layer_map": value}, f"layer_map must be uniform or different pairs as 2:5 3:8, got {value}.")
            for value in ([(0, 0)], [3], None, ["0:1", "00:1"], [])
        ],
        ({"router_layers": ["1", "01"]}, "or different layer numbers as in 1 3, got ['1', '01']"),
    ],
    ids=str,
)
def test_a_wrong_type_from_python_is_named_too(tmp_path, changes, rule):
    with pytest.raises(ConfigurationError, match=re.escape(rule)):
        DistillationArguments(str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize(("kind", "name"), [(ModelArguments, "trust_remote_code"), (DataArguments, "streaming")])
def test_a_text_is_no_yes_or_no(kind, name):
    with pytest.raises(ConfigurationError, match=f"{name} must be True or False, got 'false'"):
        kind(**{name: "false"})


@pytest.mark.parametrize("layers", [1, "1", ["1"], [1]])
def test_a_layer_of_the_router_can_be_given_as_number_or_text(tmp_path, layers):
    assert DistillationArguments(str(tmp_path), use_cpu=True, router_layers=layers).router_layers == ["1"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--accelerator_config", "lost.json"], "lost.json"),
        (["--accelerator_config", '{"nonsense": 1}'], "nonsense"),
        (["--deepspeed", "lost.json"], ""),
    ],
)
def test_what_transformers_raises_for_its_own_fields_is_one_line_too(flags, reason):
    assert reason in message(flags)


def test_a_blank_dataset_name_is_an_error():
    assert message(["--datasets", " "]) == "datasets must name at least one dataset, got [' ']."
    assert message([write("run.yaml", "datasets: []")]) == "datasets must name at least one dataset, got []."


def test_weights_that_are_all_zero_are_an_error_but_a_run_of_one_loss_is_not():
    zeros = [f"--{name}_weight=0" for name in ("kl", "feature", "attention", "layerwise", "contrastive")]
    assert "lm_weight must not all be 0" in message([*zeros, "--lm_weight=0"])
    assert parse_arguments(zeros)[2].lm_weight is None
    assert parse_arguments([*zeros, "--lm_weight=0", "--feature_weight=0.1"])[2].feature_weight == 0.1
    assert parse_arguments([*zeros, "--lm_weight=0.5"])[2].lm_weight == 0.5
    assert parse_arguments(["--kl_weight=2", "--lm_weight=1"])[2].kl_weight == 2


def test_fp16_without_a_gpu_is_an_error():
    expected = "fp16 must be false without a GPU, got true. Leave it out, or set bf16 and use_cpu."
    assert message(["--fp16", "--use_cpu"]) == expected
    assert parse_arguments(["--bf16", "--use_cpu"])[2].bf16


@pytest.mark.parametrize("folder", ["file", "file/run", "file/run/deeper", "/proc/run", "/dev/null/run"])
def test_an_output_folder_that_cannot_be_made_is_an_error_even_for_root(folder):
    write("file", "")
    assert message(["--output_dir", folder]).startswith(
        f"output_dir must be a folder that can be written, got {folder}"
    )


def test_a_new_or_an_existing_output_folder_is_fine_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in ("there", "new/deep/run"):
        assert parse_arguments(["--output_dir", folder])[2].output_dir == folder
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("learning_rte", "learning_rate"), ("evaluation_strategy", "eval_strategy"), ("alpha-kb", "alpha_kd")],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(wrong, nearest):
    name = wrong.replace("-", "_")
    expected = f"{name} is not a known setting. The nearest is {nearest}."
    assert message([f"--{wrong}", "1"]) == expected
    assert message([f"--{wrong}=1"]) == expected
    assert message([write("run.yaml", f"{wrong}: 1")]) == f"run.yaml: {expected}"


@pytest.mark.parametrize(
    "name",
    "teacher_cache on_policy_fraction teacher_quantization teacher_device config no_use_router".split(),
)
def test_names_that_mean_nothing_in_a_file_are_unknown(name):
    assert f"{name} is not a known setting" in message([write("run.yaml", f"{name}: 1")])


def test_two_names_of_one_field_in_one_source_are_an_error():
    expected = "kl_weight and alpha_kd are two names of kl_weight, got both. Give one."
    assert message(["--kl-weight", "1", "--alpha-kd", "0.5"]) == expected
    assert message([write("run.yaml", "kl_weight: 1\nalpha_kd: 0.5")]) == f"run.yaml: {expected}"
    assert "two names of report_to" in message(["--use-wandb", "--report_to", "none"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"learning_rate": "fast"}', "learning_rate must be of type float, got fast."),
        ('{"learning_rate": true}', "learning_rate must be of type float, got True."),
        ('{"max_steps": 2.5}', "max_steps must be of type int, got 2.5."),
        ('{"learning_rate": [1, 2]}', "learning_rate must be one value, got [1, 2]."),
        ('{"learning_rate": {"a": 1}}', 'learning_rate must be one value, got {"a": 1}.'),
        ('{"learning_rate": null}', "learning_rate must be one value, got null."),
        ('{"datasets": null}', "datasets must be a list, got null."),
        ('{"datasets": [{"name": "a"}]}', 'datasets must be a list of plain values, got [{"name": "a"}].'),
        ('{"feature_layers": ["last"]}', "feature_layers must be of type int, got last."),
    ],
)
def test_a_wrong_type_in_a_file_names_key_value_and_file(content, expected):
    assert message([write("run.json", content)]) == f"run.json: {expected}"
    # Values of a YAML file are still text here, and shown as such.
    in_yaml = message([write("run.yaml", content)]).replace('"', "")
    assert in_yaml == f"run.yaml: {expected}".replace("True", "true").replace('"', "")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("run.yaml", "", "must hold `field: value` pairs"),
        ("run.json", "", "is no valid JSON"),
        ("run.json", "{}", "must hold `field: value` pairs"),
        ("run.yaml", "- seed", "must hold `field: value` pairs"),
        ("run.json", "[1]", "must hold `field: value` pairs"),
        ("run.yaml", "seed: [1", "is no valid YAML"),
        ("run.yaml", "a: b: c", "is no valid YAML"),
        ("run.json", '{"seed": 1,}', "is no valid JSON"),
        ("run.txt", "seed: 1", "must end in .yaml, .yml or .json"),
    ],
)
def test_a_file_that_is_no_config_is_one_clear_line(name, content, expected):
    assert message([write(name, content)]).startswith(f"{name}: the config file {expected}")


def test_a_config_file_that_cannot_be_read_is_one_clear_line(tmp_path):
    assert message(["lost.yaml"]) == "lost.yaml: the config file cannot be read (No such file or directory)."
    (tmp_path / "folder.json").mkdir()
    assert message(["folder.json"]) == "folder.json: the config file cannot be read (Is a directory)."
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert message(["binary.yaml"]).startswith("binary.yaml: the config file is no valid YAML")


@pytest.mark.parametrize("argv", [["run.yaml", "--config", "run.yaml"], ["run.yaml", "run.yaml"], ["-x"]])
def test_more_than_one_config_file_or_a_stray_dash_is_an_error(argv):
    write("run.yaml", "seed: 1")
    assert message(argv).startswith("The command line must hold one config file and flags, got ")


def test_a_flag_without_its_value_is_an_error():
    assert message(["--learning_rate"]) == "learning_rate: expected one argument"


def test_help_renders_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for name in (
        "--kl_weight",
        "--alpha_kd",
        "--datasets",
        "--teacher_dtype",
        "--use_wandb",
        "--config",
        "--max_steps",
    ):
        assert name in shown


def test_every_field_of_ours_has_help():
    for kind in KINDS:
        for item in dataclasses.fields(kind):
            assert item.metadata.get("help"), f"{item.name} has no help"


def test_a_copy_with_one_change_keeps_the_rest(tmp_path):
    training = DistillationArguments(output_dir=str(tmp_path), report_to="wandb", layer_map=["uniform"])
    copy = dataclasses.replace(training, seed=9)
    assert (copy.seed, copy.report_to, copy.layer_map, copy.kl_weight) == (9, ["wandb"], "uniform", 0.7)


def test_the_python_interface_checks_values_too():
    with pytest.raises(ConfigurationError, match="temperature must be above 0, got -1"):
        DistillationArguments(temperature=-1)


def test_the_lm_weight_is_what_the_kl_weight_leaves_unless_it_is_set():
    names = ("kl", "feature", "attention", "layerwise", "contrastive", "lm")
    assert DistillationArguments().loss_weights() == pytest.approx(
        dict(zip(names, (0.7, 0.0, 0.0, 0.0, 0.05, 0.3), strict=True))
    )
    assert DistillationArguments(lm_weight=0.5).loss_weights()["lm"] == 0.5
    assert DistillationArguments(lm_weight=0.0).loss_weights()["lm"] == 0.0


def test_a_teacher_is_needed_unless_lm_is_the_only_loss():
    none = {f"{name}_weight": 0.0 for name in ("kl", "feature", "attention", "layerwise", "contrastive")}
    assert not DistillationArguments(**none).has_teacher_losses()
    for name in none:
        assert DistillationArguments(**{**none, name: 0.5}).has_teacher_losses()


GIVEN = {
    "nothing": [],
    "numbers": ["--learning_rate", "1e-3", "--max_steps", "6", "--bf16", "false", "--weight_decay", "1e-7"],
    "lists": ["--layer_map", "1:2", "2:3", "--datasets", "a b.txt", "no", "--router_layers", "1", "3"],
    "none of a list": ["--router_parts", "none", "--feature_layers", "0"],
    "texts that YAML would read otherwise": ["--save_strategy", "no", "--run_name", "1e3", "--text_column", "null "],
    "structures": ["--lr_scheduler_kwargs", '{"num_cycles": 0.5}', "--lr_scheduler_type", "cosine"],
    "aliases": ["--use-wandb", "--batch-size", "3", "--alpha_kd=0.5"],
    "a file and a flag": ["run.json", "--seed", "7"],
}


@pytest.mark.parametrize("argv", GIVEN.values(), ids=GIVEN)
def test_the_settings_of_a_run_as_a_file_train_the_same_again(argv):
    write("run.json", '{"metric_for_best_model": null, "alpha_kd": 0.8, "lm_eval_tasks": ["a", "b"], "seed": 3}')
    settings = training_settings(argv)
    assert bool(settings) == bool(argv)
    again = write("training_config.yaml", yaml.safe_dump({"output_dir": "trainer_output"} | settings))
    for first, second in zip(parse_arguments(argv), parse_arguments([again]), strict=True):
        # Another object each time.
        first, second = ({k: v for k, v in vars(part).items() if k != "distributed_state"} for part in (first, second))
        assert {k: str(v) for k, v in first.items()} == {k: str(v) for k, v in second.items()}


def test_the_settings_of_a_run_hold_no_token_and_do_not_publish_or_resume_it():
    write("run.yaml", "hub_token: hf_secret\nmax_steps: 5\nhub_private_repo: true\n")
    argv = ["run.yaml", "--push_to_hub", "true", "--hub_model_id", "a/b", "--resume", "out/checkpoint-1"]
    assert training_settings(argv) == {"max_steps": 5}
