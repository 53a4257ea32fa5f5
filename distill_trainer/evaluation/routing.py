"""What the router does on held-out text: by kind of token, against what the student can do, and in the text itself."""

import unicodedata
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_trainer.aligned import LayerDecision, RoutedBatch
from distill_trainer.anchors import IGNORE_INDEX
from distill_trainer.evaluation.agreement import ANCHORS_PER_CHUNK, anchor_index, quantile_groups
from distill_trainer.tokens import token_bytes

ROUTER_KEYS = (
    *("expert_load", "gate_load", "changed_fraction", "entropy", "top_k", "capacity", "gap"),
    *("layers", "token_classes", "reliability", "calibration_error", "examples"),
)
TOKEN_CLASSES = ("word start", "word part", "digits", "punctuation", "blank", "other")
# Anchors with about the same estimated capacity that one point of the reliability curve stands for: a tenth of all.
RELIABILITY_BINS = 10
NUM_PASSAGES, PASSAGE_PIECES = 4, 48
CPU = torch.device("cpu")


def token_class(content: bytes) -> str:
    """Which of `TOKEN_CLASSES` a token belongs to, from the bytes it stands for.

    Letters decide before digits, and digits before marks: `(self` is a word part. `other` are pieces of characters and
    what is neither letter, number, mark, symbol nor white space.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "other"
    if text.isspace():
        return "blank"
    kinds = {unicodedata.category(character)[0] for character in text}
    if "L" in kinds:
        return "word start" if text[0].isspace() else "word part"
    if "N" in kinds:
        return "digits"
    return "punctuation" if kinds & {"P", "S"} else "other"


def true_token_answers(student_logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """What the student says to the true next token at every anchor of a batch.

    Args:
        student_logits: `(batch_size, student_sequence_length, student_vocab_size)`.
        batch: A collated batch.

    Returns:
        `(batch_size, num_anchors_in_row, 2)` on the CPU: the probability of the true next token, and 1 where it is the
        likeliest one, else 0. NaN at padding and at anchors that no student token follows.
    """
    rows, positions = anchor_index(batch, "student", batch["anchor_mask"], student_logits.device)
    upcoming = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX).to(rows.device)
    labels = upcoming[rows, positions]
    values = student_logits.new_full((len(rows), 2), torch.nan, dtype=torch.float32)
    for n in (labels != IGNORE_INDEX).nonzero()[:, 0].split(ANCHORS_PER_CHUNK):
        logits, truth = student_logits[rows[n], positions[n]].float(), labels[n]
        values[n, 0] = logits.log_softmax(dim=-1).gather(-1, truth.unsqueeze(-1)).squeeze(-1).exp()
        values[n, 1] = (logits.argmax(dim=-1) == truth).float()
    mask = batch["anchor_mask"].cpu()
    answers = torch.full((*mask.shape, 2), torch.nan)
    answers[mask] = values.cpu()
    return answers


def reliability_bins(capacity: Tensor, probability: Tensor, correct: Tensor) -> list[dict[str, float | int]]:
    """How the capacity that the router estimates compares with what the student does, from the lowest to the highest.

    The bins hold equally many anchors, because the estimates lie close together: bins of equal width would leave most
    of them empty.

    Args:
        capacity: Estimated probability of the true next token, `(num_anchors,)`.
        probability: The one that the student gave, NaN where there is none, `(num_anchors,)`.
        correct: 1 where the true next token was the student's likeliest, else 0, `(num_anchors,)`.

    Returns:
        For each bin the mean of each of them as `predicted`, `observed` and `correct`, and its `anchors`.
    """
    known = ~probability.isnan()
    capacity, probability, correct = capacity[known], probability[known], correct[known]
    return [
        {
            "predicted": capacity[members].mean().item(),
            "observed": probability[members].mean().item(),
            "correct": correct[members].mean().item(),
            "anchors": len(members),
        }
        for members in quantile_groups(capacity, RELIABILITY_BINS)
    ]


def calibration_error(bins: list[dict[str, float | int]]) -> float:
    """Expected calibration error: mean distance of a bin's `predicted` from its `observed`, weighted by its anchors.

    After https://huggingface.co/papers/1706.04599, equation 3, with the mean probability of the true token in place of
    the accuracy, since that is what the capacity estimates.
    """
    anchors = sum(found["anchors"] for found in bins)
    return sum(found["anchors"] * abs(found["predicted"] - found["observed"]) for found in bins) / anchors


def router_sums(decision: LayerDecision, classes: Tensor) -> dict[str, Tensor]:
    """The choices in one layer, summed over the anchors of one batch.

    Args:
        decision: Of the layer.
        classes: Index in `TOKEN_CLASSES` of the teacher's token that ends at each anchor, `(num_anchors,)`.

    Returns:
        float64: `expert_load` (routing weight) and `gate_load` (selections), `(num_classes, num_experts)`;
        `class_anchors`, `(num_classes,)`; scalars `changed`, `entropy` (nats) and `capacity`.
    """
    router = decision.router
    # On the CPU, because not every accelerator has float64.
    logits, weights = router.router_logits.cpu().double(), router.routing_weights.cpu().double()
    selected, gate = router.selected_experts.cpu(), decision.gate_experts.cpu()
    none = torch.zeros(len(TOKEN_CLASSES), logits.shape[-1], dtype=torch.float64)

    def load(experts: Tensor, shares: Tensor) -> Tensor:
        return none.index_put((classes.unsqueeze(-1).expand_as(experts), experts), shares, accumulate=True)

    return {
        "expert_load": load(selected, weights),
        "gate_load": load(gate, torch.ones_like(gate, dtype=torch.float64)),
        "class_anchors": torch.bincount(classes, minlength=len(TOKEN_CLASSES)).double(),
        "changed": (selected[:, 0] != gate[:, 0]).double().sum(),
        "entropy": torch.special.entr(logits.softmax(dim=-1)).sum(),
        "capacity": router.capacity.cpu().double().sum(),
    }


def _shares(load: Tensor) -> list[float]:
    return (load / load.sum()).tolist()


def _choices(sums: dict[str, Tensor], anchors: int) -> dict[str, Any]:
    """What the report says of every layer, from the sums of `router_sums`."""
    return {
        "expert_load": _shares(sums["expert_load"].sum(dim=0)),
        "gate_load": _shares(sums["gate_load"].sum(dim=0)),
        "changed_fraction": sums["changed"].item() / anchors,
    }


def passage_windows(batches: list[dict[str, Tensor]]) -> set[int]:
    """Numbers of the windows that examples are taken from: evenly spaced over those that are long enough for one.

    Nothing but their length is looked at. Where none is long enough, all are.
    """
    anchors = [count for batch in batches for count in batch["anchor_mask"].sum(dim=1).tolist()]
    long_enough = [number for number, count in enumerate(anchors) if count > PASSAGE_PIECES + 1]
    windows = long_enough or list(range(len(anchors)))
    return {windows[(2 * k + 1) * len(windows) // (2 * NUM_PASSAGES)] for k in range(NUM_PASSAGES)}


class RoutingRecord:
    """What the router did at the held-out anchors, taken in batch by batch: sums, and three numbers per anchor.

    Args:
        teacher_tokenizer: Tells which text ends at an anchor.
        batches: All collated batches, in the order in which they will be taken in.
    """

    def __init__(self, teacher_tokenizer: PreTrainedTokenizerBase, batches: list[dict[str, Tensor]]):
        self.tokenizer = teacher_tokenizer
        self.windows, self._passed = passage_windows(batches), 0
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.gap = 0.0
        self.answers: list[Tensor] = []
        self.examples: list[dict[str, Any]] = []
        self.top_k = 0
        self._classes: dict[int, int] = {}

    def add(self, routed: RoutedBatch, answers: Tensor, batch: dict[str, Tensor]) -> None:
        """Take in a batch.

        Args:
            routed: With the decision of at least one layer.
            answers: See `true_token_answers`.
            batch: The collated batch.
        """
        index = anchor_index(batch, "teacher", routed.mask, CPU)
        classes = self._token_classes(batch["teacher_input_ids"].cpu()[index])
        for layer, decision in routed.decisions.items():
            sums, before = router_sums(decision, classes), self.sums.get(layer)
            self.sums[layer] = {key: value + before[key] for key, value in sums.items()} if before else sums
        self.gap += routed.gap.cpu().double().sum().item()
        capacity = routed.router.capacity.cpu().double().unsqueeze(-1)
        self.answers.append(torch.cat([capacity, answers[routed.mask.cpu()].double()], dim=-1))
        self.top_k = routed.router.selected_experts.shape[1]
        for row in range(len(routed.mask)):
            if self._passed + row in self.windows and (tokens := self._passage(routed, batch, row)):
                self.examples.append({"tokens": tokens})
        self._passed += len(routed.mask)

    def figures(self) -> dict[str, Any]:
        """The report's `router` part; all null if nothing was taken in.

        Returns:
            `expert_load` (share of the routing weight per expert), `gate_load` (share of the selections of the gate in
            the teacher as it is), `changed_fraction` (anchors whose first expert is not the gate's first), mean
            `entropy` (nats), `capacity` and `gap` (nats), `top_k`; `layers`, the first three in every re-routed layer,
            from the bottom up; `token_classes`, the loads by the kind of the teacher's token that ends at the anchor;
            `reliability` of the capacity and its `calibration_error`; and `examples`. All but `layers` and `gap` are
            of the highest re-routed layer.
        """
        highest = self.sums[max(self.sums)] if self.sums else {}
        anchors = int(highest["class_anchors"].sum()) if highest else 0
        if not anchors:
            return dict.fromkeys(ROUTER_KEYS)
        bins = reliability_bins(*torch.cat(self.answers).unbind(dim=-1))
        layers = [{"layer": layer, **_choices(sums, anchors)} for layer, sums in sorted(self.sums.items())]
        return {
            **_choices(highest, anchors),
            "entropy": highest["entropy"].item() / anchors,
            "top_k": self.top_k,
            "capacity": highest["capacity"].item() / anchors,
            "gap": self.gap / anchors,
            "layers": layers,
            "token_classes": [
                {"name": name, "anchors": int(count), "expert_load": _shares(load), "gate_load": _shares(gate_load)}
                for name, count, load, gate_load in zip(
                    TOKEN_CLASSES,
                    *(highest[key] for key in ("class_anchors", "expert_load", "gate_load")),
                    strict=True,
                )
                if count
            ],
            "reliability": bins or None,
            "calibration_error": calibration_error(bins) if bins else None,
            "examples": self.examples,
        }

    def _token_classes(self, ids: Tensor) -> Tensor:
        """Index in `TOKEN_CLASSES` of each token."""
        new = [token for token in ids.unique().tolist() if token not in self._classes]
        special = set(self.tokenizer.all_special_ids)
        for token, name in zip(new, self.tokenizer.convert_ids_to_tokens(new), strict=True):
            # What stands before a document is no text.
            self._classes[token] = TOKEN_CLASSES.index(token_class(b"" if token in special else token_bytes(name)))
        return torch.tensor([self._classes[token] for token in ids.tolist()], dtype=torch.long)

    def _passage(self, routed: RoutedBatch, batch: dict[str, Tensor], row: int) -> list[dict[str, Any]]:
        """Pieces of text from the middle of one window, each from the anchor before up to its own anchor."""
        rows, positions = anchor_index(batch, "teacher", routed.mask, CPU)
        members = (rows == row).nonzero()[:, 0]
        # The first anchor of a window has none before it.
        first = max((len(members) - PASSAGE_PIECES) // 2, 1)
        ids, pieces = batch["teacher_input_ids"][row].tolist(), []
        for before, anchor in zip(members[first - 1 :], members[first : first + PASSAGE_PIECES], strict=False):
            names = self.tokenizer.convert_ids_to_tokens(ids[positions[before] + 1 : positions[anchor] + 1])
            pieces.append(
                {
                    "text": b"".join(map(token_bytes, names)).decode("utf-8", "replace"),
                    "expert": routed.router.selected_experts[anchor, 0].item(),
                    "gate_expert": routed.highest.gate_experts[anchor, 0].item(),
                    "gap": routed.gap[anchor].item(),
                }
            )
        return pieces
