"""The command that uses a trained model after it is saved."""

from __future__ import annotations

from dataclasses import dataclass, replace

from treadle.artifacts.tasks import continues_text
from treadle.frontends.vocabularies.folder_vocabulary import VOCABULARIES
from treadle.ir.analysis.following import follow
from treadle.ir.errors import TreadleError
from treadle.passes.stages import Recognize, run
from treadle.program.source import Resolved
from treadle.tasks.causal_models import causality_of
from treadle.tasks.heads import HEADS
from treadle.training.text_data import TextFiles


@dataclass(frozen=True)
class SavedUse:
    """The use of a saved model.

    task  the command that uses the output `logits`: "generate", "perplexity" for a causal model without decoding step,
          "fill", "tag" or "classify"; empty if there is none
    mask  the mask token of a model that predicts masked tokens; None for other models
    has_tokenizer  True if the model is saved with a tokenizer, which the task needs
    """

    task: str = ""
    mask: str | None = None
    has_tokenizer: bool = False

    def with_texts(self, texts: TextFiles) -> SavedUse:
        """Return the use of a model that is saved with the files of this tokenizer."""
        task = "fill" if texts.mask is not None and self.task in ("generate", "perplexity") else self.task
        return replace(self, task=task, mask=texts.mask, has_tokenizer=bool(texts.files))

    def command(self, model: str) -> str:
        """Return the command for a model, MODEL with its options: `inspect` if no other command is known to work."""
        if not self.task or not self.has_tokenizer or (self.task == "fill" and self.mask is None):
            return f"treadle inspect {model}"
        if self.task == "perplexity":
            return f"treadle perplexity {model} FILE"
        return f'treadle {self.task} {model} "A {f"{self.mask} " if self.mask is not None else ""}text"'


def use_of_declaration(resolved: Resolved) -> SavedUse:
    """Return the use of a declaration. Logits of tokens with fewer classes than the tokenizer has tokens are labels."""
    logits, source = resolved.graph.main.outputs.get("logits"), resolved.source
    if logits is None or logits.type.rank not in (2, 3):
        return SavedUse()
    if logits.type.rank == 2:
        return SavedUse("classify")
    classes = logits.type.shape[-1].constant
    count = 0 if source.text_source is source else len(source.tokenizer().vocabulary())
    if classes is not None and classes < count:
        return SavedUse("tag")
    axis = logits.type.shape[1].as_symbol
    if axis is None or not causality_of(resolved):
        return SavedUse("fill")
    graph = run(resolved.graph, [Recognize()]).graph
    return SavedUse("generate" if follow(graph, axis).step() else "perplexity")


def use_of_folder(resolved: Resolved) -> SavedUse:
    """Return the use of a folder's model, by its graph and its class."""
    source = resolved.source
    has_tokenizer = any(map(source.folder.has, VOCABULARIES))
    if continues_text(resolved.graph):
        return SavedUse("generate", None, has_tokenizer)
    for task in ("fill", "tag", "classify"):
        if HEADS[task].is_of(source.config):
            mask = _mask(resolved) if task == "fill" and has_tokenizer else None
            return SavedUse(task, mask, has_tokenizer)
    return SavedUse()


def _mask(resolved: Resolved) -> str | None:
    try:
        return resolved.source.tokenizer().mask
    except TreadleError:  # a damaged tokenizer, or a package that is not installed, does not concern the weights
        return None
