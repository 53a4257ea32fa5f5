from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill_trainer.errors import CheckpointError, ConfigurationError, DistillationError
from distill_trainer.export import export_student

EXPORTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
EXPORTED |= {"export.json"}


def tiny_student(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def with_lora(student: LlamaForCausalLM) -> PeftModel:
    """The student with a LoRA adapter that changes it: its second factor is not zero as at the start of training."""
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return adapted.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


def exported(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model


@pytest.fixture
def trainer():
    return SimpleNamespace(student=tiny_student(), processing_class=tiny_tokenizer())


@pytest.fixture
def run_folder(tmp_path, trainer):
    folder = tmp_path / "run"
    trainer.student.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    for name in ("checkpoint-2", "baseline"):
        trainer.student.save_pretrained(folder / name)
    for name in ("distillation_modules.safetensors", "training_args.bin", "trainer_state.json"):
        (folder / name).write_text("{}")
    return folder


def test_a_trained_student_becomes_a_folder_with_its_weights_and_tokenizer(tmp_path, trainer):
    folder = export_student(trainer, tmp_path / "new" / "export")
    assert folder == tmp_path / "new" / "export"
    assert {path.name for path in folder.iterdir()} == EXPORTED
    assert torch.equal(logits(exported(folder)), logits(trainer.student))
    text = "Fellow citizens, 1865!"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == trainer.processing_class(text).input_ids
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_run_folder_becomes_a_folder_without_the_training_files(tmp_path, run_folder, trainer):
    folder = export_student(str(run_folder), tmp_path / "export")
    assert {path.name for path in folder.iterdir()} == EXPORTED
    assert torch.equal(logits(exported(folder)), logits(trainer.student))


def test_a_lora_student_is_merged_and_the_trained_one_stays_as_it_is(tmp_path, trainer):
    trainer.student = with_lora(trainer.student)
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    folder = export_student(trainer, tmp_path / "export")
    merged = exported(folder)
    assert type(merged) is LlamaForCausalLM
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    torch.testing.assert_close(logits(merged), logits(trainer.student))
    assert not torch.allclose(logits(merged), logits(tiny_student()), atol=1e-2)
    after = trainer.student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_saved_lora_checkpoint_is_merged_into_its_base(tmp_path, run_folder, trainer):
    adapted = with_lora(AutoModelForCausalLM.from_pretrained(run_folder))
    adapted.save_pretrained(tmp_path / "checkpoint-4")
    trainer.processing_class.save_pretrained(tmp_path / "checkpoint-4")
    folder = export_student(tmp_path / "checkpoint-4", tmp_path / "export")
    torch.testing.assert_close(logits(exported(folder)), logits(adapted))


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_weights_are_stored_in_the_wanted_type_and_the_trained_ones_keep_theirs(tmp_path, trainer, dtype, adapted):
    expected = dtype if isinstance(dtype, torch.dtype) else torch.float16
    if adapted:
        trainer.student = with_lora(trainer.student)
    folder = export_student(trainer, tmp_path / "export", dtype=dtype)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {expected}
    model = exported(folder)
    assert model.config.dtype == expected
    torch.testing.assert_close(logits(model).float(), logits(trainer.student), atol=0.05, rtol=0.05)
    assert {value.dtype for value in trainer.student.state_dict().values()} == {torch.float32}


def test_a_folder_keeps_its_type_unless_another_is_wanted(tmp_path, trainer):
    export_student(trainer, tmp_path / "half", dtype="bfloat16")
    export_student(tmp_path / "half", tmp_path / "same")
    export_student(tmp_path / "half", tmp_path / "full", dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full").dtype == torch.float32


def test_an_earlier_export_is_replaced_and_an_empty_folder_is_filled(tmp_path, trainer):
    (tmp_path / "export").mkdir()
    export_student(trainer, tmp_path / "export")
    (tmp_path / "export" / "model-00001-of-00002.safetensors").write_text("of an older export")
    trainer.student = tiny_student(seed=1)
    folder = export_student(trainer, tmp_path / "export")
    assert {path.name for path in folder.iterdir()} == EXPORTED
    assert torch.equal(logits(exported(folder)), logits(trainer.student))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_is_no_export_is_never_touched(tmp_path, run_folder, trainer):
    (tmp_path / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for target in (run_folder, tmp_path / "file"):
        with pytest.raises(ConfigurationError, match="output_dir must be new, empty or an earlier export, got"):
            export_student(trainer, target)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_failed_export_leaves_nothing_behind_and_keeps_the_earlier_one(tmp_path, trainer):
    export_student(trainer, tmp_path / "export")
    before = (tmp_path / "export" / "model.safetensors").read_bytes()

    class FullDisk:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    broken = SimpleNamespace(student=tiny_student(seed=1), processing_class=FullDisk())
    with pytest.raises(DistillationError, match="output_dir must be writable, got .*No space left on device"):
        export_student(broken, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before


def test_an_output_folder_below_a_file_is_refused(tmp_path, trainer):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DistillationError, match="output_dir must be writable"):
        export_student(trainer, tmp_path / "file" / "export")


def test_a_source_without_a_complete_student_is_refused(tmp_path, run_folder, trainer):
    with pytest.raises(CheckpointError, match="source must be a folder that holds a student, got .*nowhere"):
        export_student(tmp_path / "nowhere", tmp_path / "export")
    weights = load_file(run_folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, run_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="source must hold all weights, got .* without model.norm.weight"):
        export_student(run_folder, tmp_path / "export")
    (run_folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="source must hold a student and its tokenizer") as error:
        export_student(run_folder, tmp_path / "export")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "export").exists()


def test_a_wrong_type_or_source_is_named(tmp_path, trainer):
    with pytest.raises(ConfigurationError, match="dtype must be one of float32, float16, bfloat16 or None, got int4"):
        export_student(trainer, tmp_path / "export", dtype="int4")
    trainer.processing_class = None
    with pytest.raises(ConfigurationError, match="a student and a processing_class, got SimpleNamespace"):
        export_student(trainer, tmp_path / "export")
