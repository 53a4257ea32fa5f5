import json
import sys

import pytest
import torch
from builders import random_ids, tiny_llama, tiny_moe, tiny_trainer, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from distill_trainer.checkpoint import MODULES_FILE, STATE_FILE, check_checkpoint, load_modules, save_modules
from distill_trainer.errors import CheckpointError


def trained(folder, **changes):
    trainer = tiny_trainer(folder, **({"max_steps": 2, "save_strategy": "steps", "save_steps": 2} | changes))
    trainer.train()
    return trainer


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_a_plain_model_folder_with_tokenizer_and_modules(tmp_path, tied):
    trainer = trained(tmp_path, student=tiny_llama(tie_word_embeddings=tied))
    trainer.save_model()
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        student = AutoModelForCausalLM.from_pretrained(folder)
        assert type(student) is LlamaForCausalLM
        assert_equal_states(student.state_dict(), trainer.student.state_dict())
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer("student").get_vocab()
        assert set(load_file(folder / MODULES_FILE)) == set(trainer.distillation_model.extra_state_dict())


def test_the_token_stands_in_no_file_that_is_saved(tmp_path):
    trainer = trained(tmp_path, hub_token="hf_secret")
    trainer.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files].count("training_args.bin") == 2
    assert [path for path in files if b"hf_secret" in path.read_bytes()] == []
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.to_dict() == trainer.args.to_dict()
    assert trainer.args.hub_token == "hf_secret"


def test_no_weight_of_the_teacher_is_saved(tmp_path):
    trainer = trained(tmp_path)
    teacher = {value.shape: value for value in trainer.teacher.model.state_dict().values()}
    for path in tmp_path.rglob("*.safetensors"):
        for value in load_file(path).values():
            assert value.shape not in teacher or not torch.equal(teacher[value.shape], value)


def test_loading_gives_back_all_that_trains_in_place(tmp_path):
    trainer = trained(tmp_path)
    other = tiny_trainer(tmp_path / "other", student=tiny_llama(seed=8))
    parameters = [id(p) for p in other.distillation_model.parameters()]
    load_modules(tmp_path / "checkpoint-2", other.distillation_model)
    assert_equal_states(other.distillation_model.state_dict(), trainer.distillation_model.state_dict())
    assert [id(p) for p in other.distillation_model.parameters()] == parameters


def test_a_half_precision_student_stays_half_precision(tmp_path):
    trainer = tiny_trainer(tmp_path, student=tiny_llama().bfloat16())
    save_modules(tmp_path, trainer.distillation_model, tokenizer("student"))
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert student.dtype == torch.bfloat16
    assert_equal_states(student.state_dict(), trainer.student.state_dict())


@pytest.mark.parametrize("name", ["final", "checkpoints"])
def test_the_final_folder_of_an_adapter_run_loads_without_peft(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    trainer = trained(tmp_path, use_peft=True, lora_r=4)
    before = {key: value.clone() for key, value in trainer.distillation_model.state_dict().items()}
    trainer.save_model(str(folder))
    assert not (folder / "adapter_config.json").exists()
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM
    trainer.student.eval()
    with torch.no_grad():
        found, expected = (model(input_ids=random_ids()).logits for model in (loaded, trainer.student))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # Saving merges a copy: the run can go on.
    assert_equal_states(trainer.distillation_model.state_dict(), before)


def test_adapters_are_loaded_from_a_checkpoint_and_go_on_training(tmp_path):
    trainer = trained(tmp_path, use_peft=True, lora_r=4)
    other = tiny_trainer(tmp_path / "other", use_peft=True, lora_r=4, max_steps=1)
    load_modules(tmp_path / "checkpoint-2", other.distillation_model)
    assert_equal_states(other.distillation_model.state_dict(), trainer.distillation_model.state_dict())
    assert any("lora_" in n and p.requires_grad for n, p in other.student.named_parameters())


@pytest.mark.parametrize("name", [MODULES_FILE, STATE_FILE])
def test_a_folder_that_is_no_checkpoint_is_named_with_what_it_lacks(tmp_path, name):
    (tmp_path / ({MODULES_FILE: STATE_FILE, STATE_FILE: MODULES_FILE}[name])).touch()
    with pytest.raises(CheckpointError, match=f"is no checkpoint of this trainer: {name} missing") as error:
        check_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["nowhere", "other"])
def test_resuming_from_no_checkpoint_is_an_error(tmp_path, folder):
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint of this trainer"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / folder))


@pytest.mark.parametrize("file", [MODULES_FILE, "model.safetensors", "config.json"])
def test_a_damaged_file_is_an_error_in_one_line(tmp_path, file):
    trainer = trained(tmp_path)
    path = tmp_path / "checkpoint-2" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"The checkpoint .*checkpoint-2 cannot be loaded") as error:
        load_modules(tmp_path / "checkpoint-2", trainer.distillation_model)
    assert "\n" not in str(error.value)


def test_damaged_adapters_are_an_error_in_one_line(tmp_path):
    trainer = trained(tmp_path, use_peft=True, lora_r=4)
    path = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_modules(tmp_path / "checkpoint-2", trainer.distillation_model)


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_weight": 0.0},
        {"contrastive_weight": 0.0},
        {"use_router": False},
        {"router_parts": ["importance", "gap"]},
        {"router_layers": "all"},
        {"loss_balancing": "ema"},
        {"teacher": "dense"},
        {"teacher": "wider"},
    ],
    ids=str,
)
def test_a_run_with_other_modules_cannot_be_resumed_and_stays_as_it_was(tmp_path, changes):
    trained(tmp_path)
    made = {"dense": lambda: tiny_llama(vocab_size=4100), "wider": lambda: tiny_moe(hidden_size=64)}
    if "teacher" in changes:
        changes = {"teacher": made[changes["teacher"]]()}
    other = tiny_trainer(tmp_path / "other", student=tiny_llama(seed=4), **changes)
    before = {name: value.clone() for name, value in other.distillation_model.state_dict().items()}
    with pytest.raises(CheckpointError, match="another teacher, student, set of losses"):
        load_modules(tmp_path / "checkpoint-2", other.distillation_model)
    assert_equal_states(other.distillation_model.state_dict(), before)


def test_parts_of_the_router_of_one_size_are_told_apart(tmp_path):
    trained(tmp_path, router_parts=["capacity"])
    other = tiny_trainer(tmp_path / "other", router_parts=["gap"])
    with pytest.raises(CheckpointError, match="router_parts"):
        load_modules(tmp_path / "checkpoint-2", other.distillation_model)


def test_sizes_of_one_kind_are_not_taken_for_those_of_the_other(tmp_path):
    trained(tmp_path, loss_balancing="ema")
    other = tiny_trainer(tmp_path / "other", loss_balancing="gradient-norm")
    with pytest.raises(CheckpointError, match="loss_balancing"):
        load_modules(tmp_path / "checkpoint-2", other.distillation_model)


LAYERS = {
    "layer_map": ["0:0", "1:2"],
    "feature_layers": [0, 2],
    "attention_layers": [1, 2],
    "data_curriculum": "teacher_loss",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_map": ["0:2", "1:0"]},
        {"feature_layers": [0, 1]},
        {"attention_layers": [0, 2]},
        {"data_curriculum": "length"},
        {"data_curriculum": "none"},
    ],
    ids=str,
)
def test_projections_serve_the_layers_that_they_learned_and_the_windows_keep_their_order(tmp_path, changes):
    trained(tmp_path, **LAYERS)
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=next(iter(changes))) as error:
        tiny_trainer(tmp_path / "other", **(LAYERS | changes)).train(resume_from_checkpoint=checkpoint)
    assert "\n" not in str(error.value)


def test_a_run_of_other_layers_may_differ_in_those_that_no_loss_compares(tmp_path):
    unused = {"feature_weight": 0.0, "attention_weight": 0.0, "layerwise_weight": 0.0}
    trained(tmp_path, **unused)
    other = tiny_trainer(tmp_path / "other", feature_layers=[0], attention_layers=[0], layer_map=["0:0"], **unused)
    load_modules(tmp_path / "checkpoint-2", other.distillation_model)


def test_another_students_weights_are_an_error(tmp_path):
    trained(tmp_path)
    other = tiny_trainer(tmp_path / "other", student=tiny_llama(intermediate_size=96))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_modules(tmp_path / "checkpoint-2", other.distillation_model)


def test_a_checkpoint_lacking_a_weight_is_an_error(tmp_path):
    trainer = trained(tmp_path)
    path = tmp_path / "checkpoint-2" / MODULES_FILE
    extras = load_file(path)
    extras.pop("routing.routers.2.query.weight")
    save_file(extras, path)
    with pytest.raises(CheckpointError, match="another teacher"):
        load_modules(tmp_path / "checkpoint-2", trainer.distillation_model)


def test_the_trainers_own_state_is_beside_the_weights(tmp_path):
    trained(tmp_path)
    folder = tmp_path / "checkpoint-2"
    check_checkpoint(folder)
    state = json.loads((folder / STATE_FILE).read_text())
    assert state["global_step"] == 2 and "distill/loss_kl" in state["log_history"][0]
    assert all((folder / name).is_file() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
