import math
import socket

import evaluate
import pytest
import torch

from distill_trainer.evaluation.metrics import METRICS
from distill_trainer.evaluation.metrics.attention_similarity.attention_similarity import similarity_per_row
from distill_trainer.evaluation.metrics.bits_per_byte.bits_per_byte import bits_per_byte
from distill_trainer.evaluation.metrics.compression.compression import compression
from distill_trainer.evaluation.metrics.knowledge_retention.knowledge_retention import retention_per_position
from distill_trainer.evaluation.metrics.perplexity.perplexity import perplexity

NAMES = ("attention_similarity", "bits_per_byte", "compression", "knowledge_retention", "perplexity")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`evaluate.load` of one of the metrics from its path, with the network cut."""

    def refuse(*arguments):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # evaluate copies a script there, and puts the folder on the path.
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path), experiment_id=name)


def distributions(rows, size, seed):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


def retention_loop(student, teacher):
    """Means over positions of divergence, top-1 agreement and top-5 overlap, from probabilities."""
    divergence = agreed = shared = 0.0
    for q, p in zip(student.tolist(), teacher.tolist(), strict=True):
        divergence += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True) if b)
        student_order = sorted(range(len(q)), key=lambda v: -q[v])
        teacher_order = sorted(range(len(p)), key=lambda v: -p[v])
        agreed += student_order[0] == teacher_order[0]
        shared += len({*student_order[:5]} & {*teacher_order[:5]}) / 5
    return [value / len(student) for value in (divergence, agreed, shared)]


def similarity_loop(student, teacher):
    values = []
    for p, q in zip(student.tolist(), teacher.tolist(), strict=True):
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        halves = [sum(a * math.log2(a / m) for a, m in zip(row, middle, strict=True) if a) for row in (p, q)]
        values.append(1 - sum(halves) / 2)
    return values


def test_every_metric_is_listed_here_and_describes_itself(load):
    assert sorted(path.name for path in METRICS.iterdir() if (path / f"{path.name}.py").exists()) == sorted(NAMES)
    for name in NAMES:
        metric = load(name)
        assert metric.name == name and metric.description and "Returns" in metric.inputs_description


def test_bits_per_byte(load):
    nlls, lengths = [13.2, 0.7, 55.0], [9, 1, 40]
    bits = sum(nll / math.log(2) for nll in nlls)
    assert bits_per_byte(sum(nlls), sum(lengths)) == pytest.approx(bits / 50)
    assert load("bits_per_byte").compute(predictions=nlls, references=lengths)["bits_per_byte"] == pytest.approx(
        bits / 50
    )
    # A byte that is one of 256 at random takes 8 bits.
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
    with pytest.raises(ValueError, match="num_bytes must be at least 1, got 0"):
        bits_per_byte(0.0, 0)


def test_perplexity(load):
    nlls, units = [2.0, 7.5], [3.0, 4.5]
    expected = math.exp(9.5 / 7.5)
    assert perplexity(sum(nlls), sum(units)) == pytest.approx(expected)
    assert load("perplexity").compute(predictions=nlls, references=units)["perplexity"] == pytest.approx(expected)
    assert perplexity(5 * math.log(17), 5) == pytest.approx(17)
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="num_units must be above 0"):
        perplexity(1.0, 0)


def test_compression(load):
    student = {"parameters": 20, "size_mb": 5.0, "bytes_per_second": 900.0}
    teacher = {"parameters": 100, "size_mb": 50.0, "bytes_per_second": 300.0}
    expected = {"parameter_ratio": 5.0, "size_reduction": 0.9, "speedup": 3.0}
    assert compression(student, teacher) == pytest.approx(expected)
    metric = load("compression")
    assert metric.compute(predictions=[student], references=[teacher]) == pytest.approx(expected)
    assert compression(student | {"bytes_per_second": None}, teacher)["speedup"] is None
    with pytest.raises(ValueError, match="predictions must be one model, got 2"):
        load("compression").compute(predictions=[student] * 2, references=[teacher] * 2)


def test_knowledge_retention(load):
    student, teacher = distributions(12, 9, seed=0), distributions(12, 9, seed=1)
    expected = retention_loop(student, teacher)
    assert 0 < expected[1] < 1 and 0 < expected[2] < 1
    values = retention_per_position(student.log(), teacher.log())
    assert values.mean(dim=0).tolist() == pytest.approx(expected, rel=1e-5)
    found = load("knowledge_retention").compute(predictions=student.log().tolist(), references=teacher.log().tolist())
    assert found == pytest.approx(
        dict(zip(("kl_divergence", "top1_agreement", "top5_overlap"), expected, strict=True)), rel=1e-5
    )


def test_knowledge_retention_allows_tokens_that_the_teacher_rules_out():
    student, teacher = distributions(4, 8, seed=2), distributions(4, 8, seed=3)
    teacher[:, 6:] = 0
    teacher /= teacher.sum(dim=-1, keepdim=True)
    values = retention_per_position(student.log(), teacher.log())
    assert values.mean(dim=0).tolist() == pytest.approx(retention_loop(student, teacher), rel=1e-5)
    perfect = retention_per_position(teacher.log(), teacher.log())
    assert perfect.tolist() == [[0.0, 1.0, 1.0]] * 4


def test_knowledge_retention_is_not_symmetric_and_keeps_small_vocabularies():
    student, teacher = distributions(3, 4, seed=4), distributions(3, 4, seed=5)
    there, back = (
        retention_per_position(student.log(), teacher.log()),
        retention_per_position(teacher.log(), student.log()),
    )
    assert not torch.allclose(there[:, 0], back[:, 0])
    # All four tokens are among the five likeliest of both.
    assert there[:, 2].tolist() == [1.0] * 3


def test_attention_similarity(load):
    student, teacher = distributions(5, 7, seed=6), distributions(5, 7, seed=7)
    student[0] = torch.eye(7)[0]
    expected = similarity_loop(student, teacher)
    assert similarity_per_row(student, teacher).tolist() == pytest.approx(expected, rel=1e-5)
    found = load("attention_similarity").compute(predictions=student.tolist(), references=teacher.tolist())
    assert found["similarity"] == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_attention_similarity_is_1_for_equal_and_0_for_disjoint_rows_of_any_length(load):
    rows = [[1.0, 0.0], [0.0, 0.25, 0.75]]
    metric = load("attention_similarity")
    assert metric.compute(predictions=rows, references=rows)["similarity"] == pytest.approx(1)
    assert similarity_per_row(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(0)
