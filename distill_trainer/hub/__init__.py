"""The student on the Hugging Face Hub: `python -m distill_trainer.hub push RUN_DIR REPO` uploads a finished run."""

from distill_trainer.hub.push import CARD, check_access, main, push_student

__all__ = ["CARD", "check_access", "main", "push_student"]
