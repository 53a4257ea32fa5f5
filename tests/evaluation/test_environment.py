import platform
import sys

import pytest
import torch
from builders import tiny_llama, tiny_moe

from distill_trainer.evaluation.environment import describe_environment


def environment(command=None):
    return describe_environment(tiny_llama(), tiny_moe().to(torch.bfloat16), torch.float32, command)


def test_versions_device_and_dtypes_are_named():
    found = environment(["run.py"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert {"transformers", "datasets", "accelerate", "tokenizers"} <= found["versions"].keys()
    assert (found["device"], found["dtype"], found["teacher_dtype"]) == ("cpu", "float32", "bfloat16")
    assert found["speed_dtype"] == "float32" and found["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "secret",
    [
        ["--hub_token", "hf_abc"],
        ["--hub_token=hf_abc"],
        ["--hub-token", "hf_abc"],
        ["--api_key", "hf_abc def"],
        ["--some_password", "hf_abc"],
    ],
)
def test_secrets_are_left_out_of_the_command(secret):
    shown = environment(["run.py", "a b.yaml", *secret, "--seed", "1"])["command"]
    assert "hf_abc" not in shown and "def" not in shown
    assert shown.startswith("run.py 'a b.yaml' --") and shown.endswith("--seed 1") and "<hidden>" in shown


def test_the_running_command_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_distillation.py", "configs/demo.yaml"])
    assert environment()["command"] == "run_distillation.py configs/demo.yaml"
