"""The entries of a row of metrics.jsonl, in order."""

KEYS = [
    *("step", "loss", "task_loss", "swd", "lambda_sw", "task_loss_per_agent", "lr", "grad_norm"),
    *("skipped", "agent_tokens_per_second"),
]
