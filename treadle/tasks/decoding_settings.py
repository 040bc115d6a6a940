"""The settings of a generation run: the flags of `treadle generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.ir.errors import UsageError
from treadle.program.option_declarations import Flag, declare

if TYPE_CHECKING:
    from treadle.runtime.beams import Beams
    from treadle.runtime.sampling import Sampling


_NEED_LOGITS = ("repetition_penalty", "presence_penalty", "logprobs", "beams", "speculate", "draft")


@dataclass(frozen=True)
class DecodingSettings:
    """Length, sampling or beam search, and speculation. Raises UsageError for settings that exclude each other, and for
    values out of range.
    """

    most: int = declare(32, "Maximum number of tokens to add to each text.", flag=Flag("tokens", "N", least=1))
    temperature: float = declare(
        0.0, "Sampling temperature; 0 always takes the most likely token.", flag=Flag("temperature", "T")
    )
    top_k: int = declare(0, "Sample from the K most likely tokens; 0 disables this.", flag=Flag("top-k", "K"))
    top_p: float = declare(
        1.0, "Sample from the most likely tokens whose probabilities sum to P.", flag=Flag("top-p", "P")
    )
    min_p: float = declare(
        0.0, "Sample from tokens whose probability is at least P times the largest one.", flag=Flag("min-p", "P")
    )
    seed: int = declare(0, "Random seed; the same seed gives the same text.", flag=Flag("seed", "N"))
    repetition_penalty: float | None = declare(
        None,
        "Values above 1 make tokens that are already in the text less likely. By default the folder's.",
        flag=Flag("repetition-penalty", "X"),
    )
    presence_penalty: float = declare(
        0.0, "Subtracted from the logits of tokens that were already generated.", flag=Flag("presence-penalty", "X")
    )
    stop: Sequence[str] = declare((), "End at this text. Repeatable.", flag=Flag("stop", "TEXT", tuple, many=True))
    logprobs: int | None = declare(
        None,
        "Print each token's log probability, and the N most likely tokens.",
        flag=Flag("logprobs", "N", least=0, most=100),
    )
    beams: int | None = declare(None, "Beam search with N beams.", flag=Flag("beams", "N", least=1, most=512))
    length_penalty: float = declare(
        1.0, "With --beams: values above 0 favour long texts.", flag=Flag("length-penalty", "X")
    )
    best: int = declare(1, "With --beams: number of texts to print.", flag=Flag("best", "N", least=1))
    chat: bool = declare(False, "Put each text into the model's chat template as a user message.", flag=Flag("chat"))
    system: str | None = declare(None, "With --chat: the system message.", flag=Flag("system", "TEXT"))
    samples_on_device: bool = declare(
        False,
        "Choose tokens where the model runs, and copy no logits to the host. Log probabilities are then unknown.",
        flag=Flag("device-sampling"),
    )
    speculate: bool = declare(
        False, "Speculative decoding from the text so far: the same text in less time.", flag=Flag("speculate")
    )
    draft: str | None = declare(
        None,
        "Speculative decoding with a smaller model of the same vocabulary.",
        flag=Flag("draft", "MODEL", complete="model"),
    )

    def __post_init__(self) -> None:
        from treadle.tasks.generation_settings import FolderRules

        self.sampling, self.search  # noqa: B018  values out of range are refused
        FolderRules().but(**self.penalties)
        if self.beams is not None:
            others = ("temperature", "top_k", "top_p", "min_p", "stop", "logprobs", "speculate", "draft")
            self._refuse("a beam search does not accept", others)
        else:
            self._refuse(
                "only --beams accepts", ("best", "length_penalty"), f"--beams {max(self.best, 4)} as well, or "
            )
        if self.samples_on_device:
            self._refuse("--device-sampling copies no logits, so it does not accept", _NEED_LOGITS)
        if not self.chat:
            self._refuse("only --chat accepts", ("system",), "--chat as well, or ")

    def _refuse(self, what: str, names: Sequence[str], instead: str = "") -> None:
        """Raise UsageError if one of these settings differs from its default.

        what     the beginning of the message; the flags follow
        instead  the beginning of the hint: another way than to leave the settings out
        """
        fields = type(self).__dataclass_fields__
        given = [name for name in names if getattr(self, name) != fields[name].default]
        if given:
            flags = " or ".join(f"--{fields[name].metadata['flag'].name}" for name in given)
            raise UsageError(f"{what} {flags}", hint=f"{instead}leave {'it' if len(given) == 1 else 'them'} out")

    @property
    def sampling(self) -> Sampling:
        """The sampling settings."""
        from treadle.runtime.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.seed, self.min_p)

    @property
    def search(self) -> Beams | None:
        """The beam search settings, or None without --beams."""
        from treadle.runtime.beams import Beams

        return None if self.beams is None else Beams(self.beams, self.length_penalty, self.best)

    @property
    def penalties(self) -> dict[str, Any]:
        """The penalties that the user set. They override the folder's penalties."""
        return {"repetition_penalty": self.repetition_penalty, "presence_penalty": self.presence_penalty or None}
