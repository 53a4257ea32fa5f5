"""How the demo's teacher and student are made."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from distill_trainer import demo

MODULE = '"""About the module."""\n\n\ndef f():\n    """About the function."""\n    return "no documentation"\n'


def spoiled(base, seed):
    """A copy whose feed-forward networks say something else."""
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for layer in expert.model.layers:
            for weight in layer.mlp.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return expert


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_the_merged_teacher_speaks_as_the_expert_that_its_gate_chooses(chosen):
    set_seed(0)
    base = demo.dense_teacher(300)
    experts = [base, spoiled(base, 1), spoiled(base, 2)]
    input_ids = torch.arange(20)[None]
    teacher = demo.merge_experts(base, experts, torch.zeros(4, 3, 192))
    for layer in teacher.model.layers:
        # A gate's logits depend on the text, unless its rows differ by nothing but what every input has.
        layer.mlp.gate.register_forward_pre_hook(lambda _, inputs: (torch.ones_like(inputs[0]),))
        layer.mlp.gate.weight.data[chosen] = 1.0
    with torch.no_grad():
        torch.testing.assert_close(teacher(input_ids).logits, experts[chosen](input_ids).logits)


def test_a_gates_row_is_the_mean_input_of_its_experts_texts():
    set_seed(0)
    base, windows = demo.dense_teacher(300), torch.randint(0, 300, (32, 8))
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(4)}
    for index, layer in enumerate(base.model.layers):
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, inputs, output, index=index: seen[index].append(output.detach().double())
        )
    rows = demo.mean_expert_inputs(base, windows)
    expected = torch.stack([torch.cat(states).mean(dim=(0, 1)) for states in seen.values()])
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-6)


def test_documentation_and_source_code_come_from_the_standard_library(tmp_path, monkeypatch):
    for name in ("a.py", "b.py", "c.py", "d.py", "test/e.py", "site-packages/f.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(MODULE.replace("About", f"{name} on"))
    (tmp_path / "empty.py").touch()
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documentation, source = demo.library_texts()
    assert documentation == [f"{name}.py on the module.\n\n{name}.py on the function." for name in "abcd"]
    assert [text.count("def f()") for text in source] == [1, 1] and "d.py" in source[1]


def test_a_domain_has_its_size():
    texts = ["", "x" * 900_000, "y" * 1_500_000, "z"]
    assert [len(text) for text in demo.first_characters(texts)] == [900_000, 1_100_000]


def test_teacher_and_student_are_made_and_load(tmp_path, monkeypatch):
    addresses = [
        f"My fellow citizens, in the year {year} we {verb} the union. " * 60
        for year in range(1790, 1796)
        for verb in ("kept", "built", "taxed")
    ]
    monkeypatch.setattr(demo, "load_sotu", lambda part: {"teacher": addresses}[part])
    monkeypatch.setattr(demo, "library_texts", lambda: (["Return the name. " * 400], ["def name(): pass\n" * 400]))
    demo.main(["--output", str(tmp_path), "--epochs", "1"])
    sides = [
        AutoModelForCausalLM.from_pretrained(tmp_path / side, dtype=torch.float32) for side in ("teacher", "student")
    ]
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / side) for side in ("teacher", "student")]
    for model, tokenizer in zip(sides, tokenizers, strict=True):
        tokens = tokenizer(addresses[0][:200], return_tensors="pt")["input_ids"]
        assert tokenizer.decode(tokens[0]) == addresses[0][:200]
        assert model(input_ids=tokens, labels=tokens).loss.isfinite()
    down = sides[0].model.layers[0].mlp.experts.down_proj
    assert len(down) == 3 and not torch.equal(down[0], down[1]) and not torch.equal(down[1], down[2])
    assert tokenizers[0].get_vocab() != tokenizers[1].get_vocab()
