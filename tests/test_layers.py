import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "distill_trainer"
LAYERS = [
    {"errors", "schedules", "losses"},
    {
        *("arguments", "input_arguments", "evaluation_arguments", "parsing", "validation", "tokens", "alignment"),
        *("router", "balance", "moe", "mixing", "taps", "replay", "layer_plan"),
    },
    {
        *("anchors", "teacher", "aligned", "logit_loss", "logit_pass", "routing", "negatives", "modeling"),
        *("data", "curriculum", "documents", "loading", "scoring"),
    },
    {"assembly", "callbacks", "checkpoint", "early_stopping", "hub", "step_record", "trainer", "teacher_cache"},
    {"ablation", "ablation_file", "baseline", "card", "evaluation", "report", "export", "demo"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Lines of a module, by its name or its folder's.
CAPS = {
    "errors": 60,
    "schedules": 120,
    "losses": 150,
    "arguments": 400,
    "moe": 200,
    "modeling": 320,
    "data": 350,
    "callbacks": 200,
    "trainer": 360,
    "report": 250,
    "export": 250,
    "hub": 250,
    "demo": 250,
    "__init__": 40,
    "run_distillation": 150,
}
USUAL_CAP = 300
# Its parameters are all keywords, most of them optional parts of a report.
MANY_PARAMETERS = {"evaluate_models"}
PUBLIC_NAMES = {
    *("DistillationTrainer", "DistillationArguments", "ModelArguments", "DataArguments"),
    *("DistillationModel", "StudentAwareRouter", "DistillationCollator", "VocabularyProjection", "anchor_pairs"),
    *("kl_divergence_loss", "feature_loss", "attention_loss", "layerwise_loss", "contrastive_loss"),
    *("TopKScheduleCallback", "TemperatureScheduleCallback", "LossWeightScheduleCallback"),
    *("evaluate_models", "export_student", "DistillationError"),
}
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [*MODULES, ROOT / "run_distillation.py"]


def owner(path: Path) -> str:
    """The name by which the tables above know a file: its folder inside the package, or its own stem."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[str]:
    """Full names of all modules that a file imports, wherever in the file it does."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import in line {node.lineno}"
            module = node.module or ""
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "distill_trainer" else [module]
    return names


def test_no_module_imports_a_higher_layer():
    wrong = []
    for path in MODULES:
        if owner(path) == "__init__":
            continue
        for name in imported_modules(path):
            if name.startswith("distill_trainer") and LEVEL[name.split(".")[1]] > LEVEL[owner(path)]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_every_module_has_a_layer():
    assert {owner(path) for path in MODULES} - {"__init__"} <= LEVEL.keys()


def test_the_lowest_layer_knows_no_model_and_no_tokenizer():
    wrong = []
    for path in MODULES:
        if LEVEL.get(owner(path)) == 0:
            roots = {name.split(".")[0] for name in imported_modules(path)}
            wrong += [
                f"{path.name} imports {name}" for name in roots & {"transformers", "tokenizers", "peft", "datasets"}
            ]
    assert not wrong


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_functions_and_signatures_are_small(path):
    source = path.read_text()
    wrong = []
    cap = CAPS.get(owner(path), USUAL_CAP)
    if len(source.splitlines()) > cap:
        wrong.append(f"{len(source.splitlines())} lines, cap {cap}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > 60:
                wrong.append(f"{node.name} has {lines} lines, cap 60")
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([parameter for parameter in parameters if parameter.arg not in ("self", "cls")])
            if count > 8 and node.name not in MANY_PARAMETERS:
                wrong.append(f"{node.name} has {count} parameters, cap 8")
    assert not wrong


def test_only_the_command_line_prints():
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


def test_all_lists_exactly_the_public_names():
    import distill_trainer

    assert sorted(distill_trainer.__all__) == sorted(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert getattr(distill_trainer, name).__doc__, f"{name} has no docstring"


def test_importing_the_package_loads_no_tracker_plots_or_metrics():
    code = "import sys, distill_trainer; print(*{'wandb', 'matplotlib', 'evaluate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []
