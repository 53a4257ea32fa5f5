import pytest
import torch
from builders import ASSETS, FAMILIES, STUDENT_ROWS, TEXTS, collated, tiny_llama, tiny_moe, tokenizer, windows
from transformers import GPT2Config, GPT2LMHeadModel

from distill_trainer.evaluation.measure import (
    SIDES,
    active_parameters,
    evaluating,
    floating_dtype,
    forward_logits,
    model_folder,
    model_size,
    score_logits,
    scored_tokens,
)

CPU = torch.device("cpu")


def score(model, batch, side="student"):
    with evaluating(model):
        return score_logits(forward_logits(model, batch, side), batch, side)


def unpadded_nll(model, ids, positions):
    """Likelihood of the tokens between first and last anchor, one token at a time in float64, without any padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    nll = 0.0
    for index in range(positions[0] + 1, positions[-1] + 1):
        scores = logits[index - 1]
        nll += (torch.log(torch.exp(scores - scores.max()).sum()) + scores.max() - scores[ids[index]]).item()
    return nll


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_score_is_that_of_each_token_between_the_first_and_the_last_anchor(side, padding_side):
    model = {"student": tiny_llama, "teacher": tiny_moe}[side]()
    ids, positions = {
        "student": ("input_ids", "student_positions"),
        "teacher": ("teacher_input_ids", "teacher_positions"),
    }[side]
    rows = list(windows().select(range(4)))
    scores = score(model, collated(4, padding_side=padding_side), side)
    expected = sum(unpadded_nll(model, row[ids], row[positions]) for row in rows)
    assert scores["nll"] == pytest.approx(expected, rel=1e-5)
    assert scores["tokens"] == sum(row[positions][-1] - row[positions][0] for row in rows)
    assert scores["bytes"] == sum(row["scored_bytes"] for row in rows)


def test_left_padding_does_not_move_the_positions_of_a_model_that_learned_them():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=STUDENT_ROWS, n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
    model = GPT2LMHeadModel(config)
    right, left = (score(model, collated(4, padding_side=side)) for side in ("right", "left"))
    assert left["nll"] == pytest.approx(right["nll"], rel=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_both_sides_are_scored_on_the_same_bytes(padding_side):
    batch = collated(4, padding_side=padding_side)
    decoded = {}
    for side in SIDES:
        mask = scored_tokens(batch, side, CPU)
        ids = batch[SIDES[side][0]]
        decoded[side] = [tokenizer(side).decode(row[kept]) for row, kept in zip(ids, mask, strict=True)]
    assert decoded["student"] == decoded["teacher"]
    assert [len(text.encode()) for text in decoded["student"]] == batch["scored_bytes"].tolist()
    assert all(text and any(text in whole for whole in TEXTS) for text in decoded["student"])


def test_a_row_with_one_anchor_scores_nothing():
    batch = collated(2)
    batch["anchor_mask"][0, 1:] = False
    assert scored_tokens(batch, "student", CPU).any(dim=1).tolist() == [False, True]


def test_evaluation_mode_is_for_the_block_only_and_leaves_every_module_as_it_was():
    model = tiny_llama(attention_dropout=0.5).train()
    model.lm_head.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training and model.model.layers[0].training and not model.lm_head.training
    assert torch.is_grad_enabled()


def test_scores_do_not_depend_on_the_mode_of_the_model():
    model = tiny_llama(attention_dropout=0.5)
    assert score(model.train(), collated(2)) == score(model.eval(), collated(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_meets_its_top_k_of_the_experts_only(family):
    model = tiny_moe(family)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts > 0
    # 2 of 4 experts work for each token.
    assert active_parameters(model) == model.num_parameters() - experts // 2


def test_a_dense_model_is_active_in_full():
    model = tiny_llama()
    assert active_parameters(model) == model.num_parameters()


def test_tied_weights_count_once_and_sizes_follow_the_dtype():
    free, tied = (model_size(tiny_llama(tie_word_embeddings=tie)) for tie in (False, True))
    head = 32 * STUDENT_ROWS
    assert free["parameters"] - tied["parameters"] == head
    assert tied["size_mb"] == pytest.approx(4e-6 * tied["parameters"])
    assert model_size(tiny_llama(tie_word_embeddings=True).half())["size_mb"] == pytest.approx(tied["size_mb"] / 2)


def test_the_dtype_of_a_model_holds_all_of_its_parameters():
    model = tiny_llama().half()
    assert floating_dtype(model) == torch.float16
    model.lm_head.to(torch.bfloat16)
    assert floating_dtype(model) == torch.float32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_on_disk_is_that_of_what_saving_writes(tmp_path, tied, dtype):
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    foretold = model_size(model)["disk_mb"]
    model.save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    # The file has a header too.
    assert 0 < written - 1e6 * foretold < 4000
    # Read back wider than it was saved.
    assert model_size(model.float(), tmp_path)["disk_mb"] == pytest.approx(written / 1e6)


def test_the_shards_of_a_checkpoint_are_added_up_and_other_weights_beside_it_are_not(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "distillation_modules.safetensors").write_bytes(b"0" * 100_000)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    size = sum(shard.stat().st_size for shard in shards) / 1e6
    assert model_size(model, tmp_path)["disk_mb"] == pytest.approx(size)


def test_a_folder_without_weight_files_leaves_the_size_of_the_model_at_hand(tmp_path):
    model = tiny_llama()
    assert model_size(model, tmp_path) == model_size(model)


def test_the_folder_of_a_name_is_where_it_was_loaded_from():
    assert model_folder(ASSETS / "student") == ASSETS / "student"
    assert model_folder("nobody/nothing") is None and model_folder("./no/such folder") is None
