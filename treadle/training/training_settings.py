"""The settings of a training run on texts: the flags of `treadle train`, and the settings that a state stores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.ir.errors import UsageError
from treadle.program.option_declarations import Flag, declare

if TYPE_CHECKING:
    from treadle.runtime.training.optimizers import Optimizer
    from treadle.runtime.training.schedules import Schedule


@dataclass(frozen=True)
class TrainingSettings:
    """The objective, the batches, the optimizer and the teacher of a run; see `treadle.training.trainer.Trainer`."""

    objective: str = declare(
        "next-token", "The training objective: next-token, or masked-token.", flag=Flag("objective", "NAME")
    )
    steps: int = declare(1000, "Total number of updates of the weights.", flag=Flag("steps", "N", least=1))
    batch: int = declare(8, "Blocks of tokens per batch.", flag=Flag("batch", "N", least=1))
    length: int | None = declare(
        None, "Tokens per block. By default 128, or the model's maximum.", flag=Flag("length", "N", least=2)
    )
    gradient_accumulation_steps: int = declare(
        1, "Gradient accumulation: batches per update.", flag=Flag("gradient-accumulation-steps", "N", least=1)
    )
    learning_rate: float = declare(1e-4, "The peak learning rate.", flag=Flag("learning-rate", "X"))
    warmup: int = declare(0, "Updates until the peak learning rate is reached.", flag=Flag("warmup", "N", least=0))
    schedule: str = declare(
        "constant",
        "The schedule after warmup: constant, cosine or linear decay to 0.",
        flag=Flag("schedule", "SHAPE"),
    )
    optimizer: str = declare("adamw", "adamw; or sgd, with a momentum of 0.9.", flag=Flag("optimizer", "NAME"))
    weight_decay: float | None = declare(
        None, "Weight decay. By default 0.01 with adamw, 0 with sgd.", flag=Flag("weight-decay", "X", least=0)
    )
    max_grad_norm: float = declare(
        1.0, "Clip the gradient norm to this value; 0 disables clipping.", flag=Flag("max-grad-norm", "X", least=0)
    )
    trained: Sequence[str] = declare(
        (),
        "Train only weights with these names, such as 'h.*.mlp.*'. Repeatable.",
        flag=Flag("train", "PATTERN", tuple, many=True),
    )
    teacher: str | None = declare(
        None, "Distill from this teacher model.", flag=Flag("teacher", "MODEL", complete="model")
    )
    temperature: float | None = declare(
        None, "With --teacher: divide logits by this temperature. By default 2.", flag=Flag("temperature", "X")
    )
    distillation_weight: float | None = declare(
        None,
        "With --teacher: weight of the teacher's part of the loss. By default 0.5.",
        flag=Flag("distillation-weight", "X", least=0, most=1),
    )
    tokenizer: str | None = declare(
        None, "Use another model's tokenizer.", flag=Flag("tokenizer", "MODEL", complete="model")
    )
    holdout: float = declare(
        0.0,
        "Fraction of held-out blocks, whose perplexity is reported before and after.",
        flag=Flag("holdout", "X", least=0, most=1),
    )
    gradient_checkpointing: bool = declare(
        False, "Recompute activations for the gradient: less memory, more time.", flag=Flag("gradient-checkpointing")
    )

    def __post_init__(self) -> None:
        if self.teacher is None and (self.temperature, self.distillation_weight) != (None, None):
            option = "--temperature" if self.temperature is not None else "--distillation-weight"
            raise UsageError(f"{option} only applies together with --teacher", hint="--teacher MODEL as well")

    def schedule_of_rates(self) -> Schedule:
        """Return the schedule of learning rates. Raises UsageError if the learning rate is not a number above 0."""
        from treadle.runtime.training.schedules import Schedule

        rate = self.learning_rate
        if not (0 < rate < math.inf):
            raise UsageError(
                "a learning rate must be a number above 0",
                received=f"--learning-rate {rate:g}",
                hint="--learning-rate 1e-4",
            )
        shape: Any = self.schedule
        return Schedule(rate, warmup=self.warmup, steps=None if shape == "constant" else self.steps, shape=shape)

    def optimizer_of_weights(self) -> Optimizer:
        """Return the optimizer. Raises UsageError for an unknown name."""
        from treadle.runtime.training.optimizers import SGD, AdamW

        if self.optimizer == "adamw":
            return AdamW() if self.weight_decay is None else AdamW(weight_decay=self.weight_decay)
        if self.optimizer == "sgd":
            return SGD(momentum=0.9, weight_decay=self.weight_decay or 0.0)
        raise UsageError(f"there is no optimizer {self.optimizer!r}", hint="adamw or sgd")
