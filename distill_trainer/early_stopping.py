"""Stopping a run whose evaluations no longer get better."""

from transformers import EarlyStoppingCallback, TrainerState


class ResumableEarlyStoppingCallback(EarlyStoppingCallback):
    """`EarlyStoppingCallback` that counts the evaluations of the log, so that a resumed run stops where it would have.

    The Trainer keeps the log and the best metric in a checkpoint, but the count of the callback's own only with
    `restore_callback_states_from_checkpoint`.
    """

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = 0
        name, past = f"eval_{args.metric_for_best_model.removeprefix('eval_')}", TrainerState()
        better = max if args.greater_is_better else min
        for value in (entry[name] for entry in state.log_history if name in entry):
            self.check_metric_value(args, past, control, value)
            past.best_metric = value if past.best_metric is None else better(past.best_metric, value)
