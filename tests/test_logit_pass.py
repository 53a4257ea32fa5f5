"""The pass over both heads against loops in float64, for each way of comparing the models."""

import math

import pytest
import torch
from builders import (
    ALL,
    EXCHANGED,
    STUDENT_ROWS,
    TEACHER_ROWS,
    collated,
    distillation_model,
    projection,
    run,
    scheduled,
    tiny_llama,
    tiny_moe,
    tiny_teacher,
    tokenizer,
)

from distill_trainer import logit_pass
from distill_trainer.alignment import VocabularyProjection
from distill_trainer.anchors import IGNORE_INDEX, Anchors, Spans
from distill_trainer.losses.gap_weights import gap_weights
from distill_trainer.teacher import Teacher

METHODS = ["projected", "topk", "uld", "hybrid", "alm"]
TEMPERATURE = 2.0
ONLY_KL = frozenset({"kl"})


def exchanged():
    """A pair whose student has the larger vocabulary, so that its tokens span several of the teacher's."""
    projection = VocabularyProjection.from_tokenizers(
        tokenizer("student"), tokenizer("teacher"), STUDENT_ROWS, TEACHER_ROWS
    )
    teacher = Teacher(tiny_moe(vocab_size=STUDENT_ROWS), projection)
    return teacher, tiny_llama(vocab_size=TEACHER_ROWS), collated(5, sides=EXCHANGED)


def pair(kind):
    return exchanged() if kind == "exchanged" else (tiny_teacher(), tiny_llama(), collated(5))


def kl_divergence(p, q):
    return float((p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log())).sum())


def two(p, q, direction):
    """Divergence of the student q from the teacher p."""
    if direction == "forward":
        return kl_divergence(p, q)
    if direction == "reverse":
        return kl_divergence(q, p)
    return (kl_divergence(p, (p + q) / 2) + kl_divergence(q, (p + q) / 2)) / 2


def softened(p):
    p = p ** (1 / TEMPERATURE)
    return p / p.sum()


def sorted_distance(p, q):
    p, q = (torch.cat([x, x.new_zeros(10_000 - len(x))]).sort(descending=True).values for x in (p, q))
    return float((p - q).abs().sum())


class Reference:
    """Every anchor's beliefs, in float64 and one position at a time."""

    def __init__(self, model, teacher, batch):
        self.batch, self.teacher = batch, teacher
        self.anchors = Anchors.of(batch)
        self.spans = Spans.of(batch, self.anchors)
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            self.student = model.student(**inputs).logits.double().softmax(-1)
            sides = {name: batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask")}
            self.own = teacher.model(**sides).logits.double().softmax(-1)
            self.routed = model.route_batch(
                batch, teacher, teacher(batch, self.anchors), scheduled(temperature=TEMPERATURE)
            )
        self.aware = self.routed.logits.detach().double().softmax(-1)
        self.weights = gap_weights(self.routed.gap, torch.ones(len(self.anchors), dtype=torch.bool)).double()

    def places(self, index):
        a = self.anchors
        return int(a.rows[index]), int(a.student_positions[index]), int(a.teacher_positions[index])

    def project(self, probs):
        ids = self.teacher.projection.student_ids
        mapped = torch.zeros(self.teacher.projection.student_vocab_size, dtype=torch.float64)
        mapped.index_add_(0, ids[ids >= 0], probs[ids >= 0])
        return mapped / mapped.sum()

    def spelled(self, index):
        """The teacher's probability of the text up to the next anchor, and of the student likewise; or None."""
        row, student, teacher = self.places(index)
        present = self.batch["anchor_mask"][row]
        following = [
            (int(s), int(t))
            for s, t in zip(
                self.batch["student_positions"][row][present],
                self.batch["teacher_positions"][row][present],
                strict=True,
            )
            if s > student
        ]
        if not following:
            return None
        end_student, end_teacher = following[0]
        ids, labels = self.batch["teacher_input_ids"][row], self.batch["input_ids"][row]
        of_teacher = float(self.aware[index, ids[teacher + 1]])
        for position in range(teacher + 1, end_teacher):
            of_teacher *= float(self.own[row, position, ids[position + 1]])
        of_student = math.prod(float(self.student[row, p, labels[p + 1]]) for p in range(student, end_student))
        return of_teacher, of_student, end_student - student, end_teacher - teacher

    def target(self, index, corrected):
        row, student, teacher = self.places(index)
        q = self.project(self.aware[index])
        spelled = self.spelled(index)
        if corrected and spelled and spelled[2] == 1 and spelled[3] > 1:
            first = int(self.teacher.projection.student_ids[self.batch["teacher_input_ids"][row, teacher + 1]])
            true = int(self.batch["input_ids"][row, student + 1])
            q[first] -= spelled[0]
            q[true] += spelled[0]
        # 0 stands for the smallest normal float, or the reverse direction would be infinite.
        return q.clamp(min=torch.finfo(torch.float32).tiny)

    def value(self, index, method, direction, corrected):
        row, student, _ = self.places(index)
        p = self.student[row, student]
        if method == "alm":
            spelled = self.spelled(index)
            if spelled is None:
                return 0.0
            chances = [torch.tensor([x ** (1 / TEMPERATURE), 1 - x ** (1 / TEMPERATURE)]) for x in spelled[:2]]
            return TEMPERATURE * two(*(chance.double() for chance in chances), direction)
        if method in ("projected", "topk"):
            q, p = softened(self.target(index, corrected)), softened(p)
            if method == "topk":
                best = q.topk(64).indices
                p, q = (torch.cat([x[best], (x.sum() - x[best].sum())[None]]) for x in (p, q))
            return TEMPERATURE**2 * two(q, p, direction)
        ids = self.teacher.projection.student_ids
        # Rows that are no token are none of the teacher's beliefs.
        q, p = softened(self.aware[index] * (ids >= 0)), softened(p)
        if method == "uld":
            return TEMPERATURE * sorted_distance(q, p)
        own, other = (x.tolist() for x in self.teacher.projection.matches)
        matched = two(
            torch.cat([q[other], (1 - q[other].sum()).clamp(min=0)[None]]),
            torch.cat([p[own], (1 - p[own].sum()).clamp(min=0)[None]]),
            direction,
        )
        rest = [torch.ones(len(x), dtype=torch.bool) for x in (q, p)]
        rest[0][other], rest[1][own] = False, False
        return TEMPERATURE**2 * matched + TEMPERATURE * sorted_distance(q[rest[0]], p[rest[1]])

    def loss(self, method, direction="forward", corrected=True):
        values = [self.value(index, method, direction, corrected) for index in range(len(self.anchors))]
        return float((self.weights * torch.tensor(values, dtype=torch.float64)).mean())


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["usual", "exchanged"])
def test_each_method_matches_a_loop_over_the_anchors(kind, method, direction):
    if method == "uld" and direction != "forward":
        pytest.skip("sorted distances have no direction")
    teacher, student, batch = pair(kind)
    model = distillation_model(teacher, student, kl_method=method, kl_direction=direction, gap_weighting=True)
    found = run(model, teacher, batch, ONLY_KL, values=scheduled(temperature=TEMPERATURE))["losses"]["kl"]
    expected = Reference(model, teacher, batch).loss(method, direction)
    assert float(found) == pytest.approx(expected, rel=2e-4, abs=1e-5) and expected > 0


def test_the_correction_of_spans_is_a_setting_and_changes_the_target():
    teacher, student, batch = exchanged()
    # A teacher that knows this text: then the spans' probabilities are worth moving.
    optimizer = torch.optim.Adam(teacher.model.requires_grad_(True).parameters(), lr=3e-3)
    for _ in range(60):
        ids = batch["teacher_input_ids"]
        labels = ids.masked_fill(batch["teacher_attention_mask"] == 0, IGNORE_INDEX)
        teacher.model(input_ids=ids, attention_mask=batch["teacher_attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.model.requires_grad_(False)
    values = {}
    for corrected in (True, False):
        model = distillation_model(teacher, student, span_correction=corrected, gap_weighting=True)
        found = run(model, teacher, batch, ONLY_KL, values=scheduled(temperature=TEMPERATURE))["losses"]["kl"]
        values[corrected] = float(found)
        expected = Reference(model, teacher, batch).loss("projected", corrected=corrected)
        assert values[corrected] == pytest.approx(expected, rel=2e-4)
    # Ten times what the comparison with the definition allows.
    assert values[True] != pytest.approx(values[False], rel=2e-3)


def gradients(model, teacher, batch, values, losses=ALL):
    model.zero_grad()
    result = run(model, teacher, batch, losses, values=values)
    result["logit_loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return result["logit_loss"].detach(), result["losses"] | result["router"], found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["usual", "exchanged"])
def test_chunks_of_any_size_equal_the_unfused_pass_in_losses_and_gradients(monkeypatch, kind, method, tied):
    teacher, student, batch = pair(kind)
    if tied:
        student = tiny_llama(vocab_size=student.config.vocab_size, tie_word_embeddings=True)
    values = scheduled(temperature=TEMPERATURE)
    with monkeypatch.context() as patch:
        patch.setattr(logit_pass.Head, "is_whole", lambda head: False)
        whole = gradients(distillation_model(teacher, student, kl_method=method), teacher, batch, values)
    for megabytes in (1e-6, 0.5, 1000.0):
        model = distillation_model(teacher, student, kl_method=method, logit_chunk_mb=megabytes)
        chunked = gradients(model, teacher, batch, values)
        torch.testing.assert_close(chunked[0], whole[0], rtol=1e-5, atol=1e-6)
        for name in ("kl", "lm", "ce", "student_kl"):
            torch.testing.assert_close(chunked[1][name].detach(), whole[1][name].detach(), rtol=1e-5, atol=1e-6)
        assert chunked[2].keys() == whole[2].keys()
        for name, gradient in whole[2].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(chunked[2][name], gradient, rtol=1e-5, atol=1e-5 * scale + 1e-9, msg=name)


def test_the_alm_gradient_is_that_of_its_definition():
    """The chunks see slopes of the spans' values; a difference of the definition must agree with them."""
    teacher, student, batch = exchanged()
    model = distillation_model(teacher, student.double().float(), kl_method="alm", gap_weighting=False)
    values = scheduled(temperature=TEMPERATURE)
    _, _, found = gradients(model, teacher, batch, values, ONLY_KL)
    weight = student.lm_head.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    # The router looks at the student too, but its choice at these weights does not change within the step.
    slope = float((found["student.lm_head.weight"] * direction).sum())
    step, losses = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        losses.append(Reference(model, teacher, batch).loss("alm"))
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_chunks_follow_the_budget_or_else_the_batch():
    teacher = tiny_teacher()

    def size(positions, copies=(7, 2), **settings):
        model = distillation_model(teacher, **settings)
        head = logit_pass.Head(model.student.lm_head, STUDENT_ROWS)
        return logit_pass.LogitPass(model.logit_settings, head, teacher, num_positions=positions)._chunk_size(copies)

    assert size(10, logit_chunk_mb=1e-6) == 1
    assert size(10, logit_chunk_mb=8.0) == 2 * size(10, logit_chunk_mb=4.0) > 50
    # From 200 to 500 MB the chunks grow with the batch.
    many = int(2e8 / (logit_pass.LOGIT_SHARE * 4 * (STUDENT_ROWS + TEACHER_ROWS)))
    assert size(1) == size(many) == pytest.approx(2e8 / (4 * (7 * STUDENT_ROWS + 2 * TEACHER_ROWS)), abs=1)
    assert size(2 * many) == pytest.approx(2 * size(many), abs=2) and size(10 * many) == pytest.approx(
        2.5 * size(many), abs=2
    )
    assert size(many, (14, 4)) == pytest.approx(size(many) / 2, abs=1)


def test_a_sharded_head_falls_back_to_one_pass_with_one_line_in_the_log(monkeypatch):
    lines = []
    monkeypatch.setattr(logit_pass.logger, "warning_once", lines.append)
    monkeypatch.setattr(logit_pass.Head, "is_whole", lambda head: False)
    teacher = tiny_teacher()
    run(distillation_model(teacher), teacher, collated())
    assert len(lines) == 1 and "sharded" in lines[0]


@pytest.mark.parametrize("method", ["projected", "alm"])
def test_a_sharded_head_is_called_as_often_whatever_the_batch(monkeypatch, method):
    """Each call gathers the weights on all ranks: ranks with other batches must make the same calls."""
    monkeypatch.setattr(logit_pass.Head, "is_whole", lambda head: False)
    teacher, calls = tiny_teacher(), []
    model = distillation_model(teacher, kl_method=method)
    for name, head in (("student", model.student.lm_head), ("teacher", teacher.model.lm_head)):
        head.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    without_anchors = collated(1) | {"anchor_mask": torch.zeros_like(collated(1)["anchor_mask"])}
    counts = []
    for batch in (collated(1), collated(6), without_anchors):
        calls.clear()
        run(model, teacher, batch)["logit_loss"].backward()
        counts.append(tuple(calls))
    assert counts[0] == counts[1] == counts[2] and {"student", "teacher"} == set(counts[0])


@pytest.mark.parametrize(
    ("settings", "reads"),
    [({}, 1), ({"kl_method": "uld"}, 1), ({"gap_weighting": True}, 2), ({"kl_method": "alm"}, 3)],
)
def test_without_a_router_the_teachers_head_reads_an_anchor_no_more_often_than_needed(settings, reads):
    """A pass of this head is a fifth of a step: it is looked at beforehand only where the losses need what it says."""
    teacher, rows = Teacher(tiny_moe(), projection(), use_router=False), []
    model = distillation_model(teacher, span_correction=False, **settings)
    batch = collated(4)
    with_logits = model.route_batch(batch, teacher, teacher(batch, Anchors.of(batch)), scheduled())
    teacher.model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    metrics = run(model, teacher, batch)["metrics"]
    inner = int(Spans.of(batch, Anchors.of(batch)).num_inner.sum()) if settings.get("kl_method") == "alm" else 0
    assert sum(rows) == reads * len(Anchors.of(batch)) + inner
    torch.testing.assert_close(metrics["gap"], with_logits.gap.mean())


def test_no_chunk_holds_all_logits(monkeypatch):
    """The largest tensor that either head makes has a chunk's rows."""
    teacher, rows = tiny_teacher(), []
    model = distillation_model(teacher, logit_chunk_mb=1.0)
    for head in (model.student.lm_head, teacher.model.lm_head):
        head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    result = run(model, teacher, collated(6))
    result["logit_loss"].backward()
    assert max(rows) < len(Anchors.of(collated(6))) // 3 and len(rows) > 10
