"""Training compared with PyTorch: losses, norms and weights are equal after each step, on every backend and in every
mode.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from treadle.backends.registry import backend_names, find_backend
from treadle.ir.errors import BackendError, CheckpointError, RuleError, UsageError
from treadle.resolving import resolve
from treadle.runtime.training.optimizers import SGD, AdamW
from treadle.runtime.training.schedules import Schedule
from treadle.training.states import read_notes
from treadle.training.trainer import Trainer
from treadle.training.weight_files import write_weights

Array = np.ndarray[Any, Any]

BACKENDS = [name for name in backend_names() if find_backend(name).available() is None]
SMALL = {"layers": 2, "dim": 16, "heads": 2, "vocab": 19, "context": 12}


pytestmark = pytest.mark.usefixtures("quickly_planned")


def batch_of(trainer: Trainer, seed: int, rows: int = 3, length: int = 7) -> dict[str, Array]:
    """Return random arrays for the inputs of a language model's trainer. A third of the targets are ignored."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for port in trainer.inputs:
        shape = port.type.evaluate({"B": rows, "S": length, "T": length})
        if port.dtype.is_float:
            made[port.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            made[port.name] = rng.integers(3, 19, shape)
    if "targets" in made and made["targets"].ndim > 1:
        made["targets"][rng.random(made["targets"].shape) < 0.3] = -100
    return made


# -- compared with PyTorch ---------------------------------------------------------------------------------------------


def train_in_torch(
    model: Any, batches: list[dict[str, Array]], optimizer: AdamW | SGD, rate: float, clip: float | None
) -> list[tuple[float, float]]:
    """Return the losses and gradient norms of a Hugging Face model that PyTorch trains on our batches."""
    import torch

    from tests.hf_models import _INPUTS

    decaying = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decaying, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if isinstance(optimizer, AdamW):
        chosen: Any = torch.optim.AdamW(groups, lr=rate, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps)
    else:
        chosen = torch.optim.SGD(groups, lr=rate, momentum=optimizer.momentum)
    results = []
    for batch in batches:
        given = {_INPUTS[name]: torch.from_numpy(array) for name, array in batch.items() if name != "targets"}
        logits = model(**given).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.from_numpy(batch["targets"]).flatten())
        chosen.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if clip is None else clip)
        chosen.step()
        results.append((loss.item(), norm.item()))
    return results


MODELS = ["gpt2", "bert-masked-lm", "albert-masked-lm", "bert-classifier", "t5", "vit-classifier", "llama", "qwen2"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_hub_is_trained_as_by_pytorch(name: str, tmp_path: Path) -> None:
    """The model is read from its folder. Backends and optimizers are tested one after the other.

    eps is large, because AdamW turns the rounding error of a zero gradient, such as the gradient of the biases of keys,
    into a full step.
    """
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.hf_models import save

    model = save(name, tmp_path / "before")
    number = MODELS.index(name)
    backend = BACKENDS[number % len(BACKENDS)]
    optimizer: AdamW | SGD = SGD(momentum=0.9) if number % 2 else AdamW(eps=1e-3, weight_decay=0.1)
    trainer = Trainer(tmp_path / "before", optimizer=optimizer, learning_rate=0.01, max_grad_norm=0.7, backend=backend)
    batches = [batch_of(trainer, seed, rows=3, length=6) for seed in range(4)]
    if name.endswith("classifier"):
        batches = [{**batch, "targets": batch["targets"] % 5} for batch in batches]
    wanted = train_in_torch(model, batches, optimizer, 0.01, 0.7)
    for step, (batch, (loss, norm)) in enumerate(zip(batches, wanted, strict=True), 1):
        result = trainer.step(**batch)
        assert (result.step, result.updated, result.learning_rate) == (step, True, 0.01)
        assert result.loss == pytest.approx(loss, rel=1e-4)
        assert result.norm == pytest.approx(norm, rel=1e-3)
    model.save_pretrained(tmp_path / "after")
    after = resolve(tmp_path / "after").weights
    assert after is not None
    for weight, array in trainer.weights.items():
        np.testing.assert_allclose(array, after[weight], rtol=0, atol=2e-5 * max(1, abs(array).max()), err_msg=weight)


@pytest.mark.parametrize("name", ["bert-masked-lm", "bart", "albert-masked-lm", "llama"])
def test_rows_of_padding_and_buffers_are_trained_as_by_pytorch(name: str, tmp_path: Path) -> None:
    """Padding tokens add no gradient to their row of the embedding table. Logits add a gradient if they are tied to the
    table.
    """
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.hf_models import save

    model = save(name, tmp_path / "before")
    if name == "llama":  # Llama has no padding token by default
        model.config.pad_token_id = model.model.embed_tokens.padding_idx = 5
        model.save_pretrained(tmp_path / "before")
    pad = model.get_input_embeddings().padding_idx
    trainer = Trainer(tmp_path / "before", optimizer=SGD(), learning_rate=1.0, max_grad_norm=None)
    batch = batch_of(trainer, 0, rows=3, length=6)
    tokens = [key for key in batch if key.endswith("tokens")]
    for key in tokens:
        batch[key][:, ::2] = pad
    before = {weight: array.copy() for weight, array in trainer.weights.items()}
    train_in_torch(model, [batch], SGD(), 1.0, None)
    trainer.step(**batch)
    model.save_pretrained(tmp_path / "after")
    after = resolve(tmp_path / "after").weights
    assert after is not None
    for weight, array in trainer.weights.items():
        within = 2e-5 * max(1, abs(array).max())
        np.testing.assert_allclose(array, after[weight], rtol=0, atol=within, err_msg=weight)
    if name == "bart":
        np.testing.assert_array_equal(trainer.weights["logits_bias"], before["logits_bias"])
        assert Trainer(tmp_path / "before", trained="logits_bias").trained == ("logits_bias",)


def test_the_row_of_padding_of_a_torch_module_gets_no_gradient() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4, padding_idx=2), torch.nn.Linear(4, 7)).eval()
    tokens = torch.tensor([[1, 2, 3], [2, 2, 5]])
    trainer = Trainer(t.from_torch(module, (tokens,)), optimizer=SGD(), learning_rate=1.0, max_grad_norm=None)
    before = {weight: array.copy() for weight, array in trainer.weights.items()}
    trainer.step(input=tokens.numpy(), targets=np.array([[0, 1, 2], [3, 4, 5]]))
    changed = np.any(trainer.weights["0.weight"] != before["0.weight"], axis=1)
    assert changed.tolist() == [False, True, False, True, False, True, False]


# -- several ways to the same weights ----------------------------------------------------------------------------------


def trained(steps: int = 3, **options: Any) -> tuple[Trainer, list[float]]:
    trainer = Trainer("gpt2", optimizer=AdamW(eps=1e-3), learning_rate=0.02, **{**SMALL, **options})
    results = [trainer.step(**batch_of(trainer, seed)) for seed in range(steps)]
    return trainer, [each.loss for each in results]


def near(found: Mapping[str, Array], wanted: Mapping[str, Array], within: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=within, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_backends_train_alike_whether_blocks_are_kept_or_computed_again(backend: str, recompute: bool) -> None:
    plain, losses = trained()
    other, results = trained(backend=backend, gradient_checkpointing=recompute)
    assert results == pytest.approx(losses, rel=1e-5)
    near(other.weights, plain.weights)
    assert other.evaluate(**batch_of(other, 9)) == pytest.approx(plain.evaluate(**batch_of(plain, 9)), rel=1e-5)


def test_a_batch_in_parts_makes_the_update_of_the_whole() -> None:
    """The gradients of micro-batches are weighted by their numbers of counted positions."""
    whole = Trainer("gpt2", learning_rate=0.02, optimizer=AdamW(eps=1e-3), **SMALL)
    parts = Trainer("gpt2", learning_rate=0.02, optimizer=AdamW(eps=1e-3), gradient_accumulation_steps=2, **SMALL)
    batch = batch_of(whole, 0, rows=4)
    batch["targets"][:3, 1:] = -100
    whole.step(**batch)
    first = parts.step(**{name: array[:3] for name, array in batch.items()})
    assert (first.updated, first.step) == (False, 0)
    assert np.isnan(first.norm)
    with pytest.raises(UsageError, match="a state can only be saved after an update"):
        parts.save_state("nowhere")
    second = parts.step(**{name: array[3:] for name, array in batch.items()})
    assert (second.updated, second.step) == (True, 1)
    near(parts.weights, whole.weights, 1e-6)


def test_only_weights_that_match_are_trained() -> None:
    trainer, losses = trained(trained=["h.1.mlp.*", "ln_f.*"])
    assert {name.split(".")[0] for name in trainer.trained} == {"h", "ln_f"}
    before = Trainer("gpt2", **SMALL).weights
    changed = [name for name, array in trainer.weights.items() if not np.array_equal(array, before[name])]
    assert changed == list(trainer.trained)
    assert len(changed) == 6
    assert losses[-1] != losses[0]


def test_training_goes_on_from_its_state_to_the_bit(tmp_path: Path) -> None:
    straight = Trainer("gpt2", learning_rate=Schedule(0.02, warmup=3), **SMALL)
    broken = Trainer("gpt2", learning_rate=Schedule(0.02, warmup=3), **SMALL)
    for seed in range(4):
        wanted = straight.step(**batch_of(straight, seed))
        if seed == 2:
            broken.save_state(tmp_path / "state")
            broken = Trainer("gpt2", learning_rate=Schedule(0.02, warmup=3), seed=5, **SMALL)
            broken.restore(tmp_path / "state")
        found = broken.step(**batch_of(broken, seed))
        assert (found.step, found.loss, found.norm, found.learning_rate) == (
            wanted.step,
            wanted.loss,
            wanted.norm,
            wanted.learning_rate,
        )
    for name, array in straight.weights.items():
        assert np.array_equal(array, broken.weights[name]), name
    assert os.listdir(tmp_path) == ["state"]


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    trainer = Trainer("gpt2", **SMALL)
    trainer.save_state(tmp_path / "state")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"optimizer": SGD()}, "the state was written by another optimizer"),
        ({"layers": 1}, "the state and the model differ in the names of"),
        ({"dim": 18, "heads": 3}, "must be f32"),
        ({"trained": ["h.0.*"]}, "the state and the model differ in the names of"),
    ]
    for options, expected in cases:
        other = Trainer("gpt2", **{**SMALL, **options})
        before = {name: array.copy() for name, array in other.weights.items()}
        with pytest.raises(CheckpointError, match=expected):
            other.restore(tmp_path / "state")
        near(other.weights, before, 0)
    file = (tmp_path / "state").read_bytes()
    size = int.from_bytes(file[:8], "little")
    header, data = json.loads(file[8 : 8 + size]), bytearray(file[8 + size :])
    begin = header["moment/square.ln_f.bias"]["data_offsets"][0]
    damages: dict[str, tuple[str, bytes, str]] = {
        "minus": ("-1", data, "the state lacks the number of updates"),
        "many": ("9" * 400, data, "the state lacks the number of updates"),
        "long": ("0" * 17 + "9" * 5000, data, "the state lacks the number of updates"),
        "cut": ("0", data[:-1], "the file ends before its tensors do"),
        "negative": ("0", data[: begin + 3] + b"\xbf" + data[begin + 4 :], "has values that training cannot produce"),
        "no number": (
            "0",
            data[: begin + 2] + b"\xc0\x7f" + data[begin + 4 :],
            "has values that training cannot produce",
        ),
    }
    for steps, content, expected in damages.values():
        text = json.dumps({**header, "__metadata__": {**header["__metadata__"], "steps": steps}}).encode()
        (tmp_path / "wrong").write_bytes(len(text).to_bytes(8, "little") + text + bytes(content))
        with pytest.raises(CheckpointError, match=expected):
            trainer.restore(tmp_path / "wrong")
    assert trainer.steps == 0


def test_a_student_learns_what_its_teacher_says() -> None:
    teacher = t.compile("gpt2", seed=7, **SMALL)
    student = Trainer("gpt2", teacher=teacher, distillation_weight=1.0, learning_rate=0.05, **{**SMALL, "layers": 1})
    assert [port.name for port in student.inputs] == ["tokens", "targets"]
    batch = batch_of(student, 0)
    losses = [student.step(**batch).loss for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    alone = Trainer("gpt2", learning_rate=0.05, **{**SMALL, "layers": 1})
    mixed = Trainer("gpt2", teacher=teacher, distillation_weight=0.25, learning_rate=0.05, **{**SMALL, "layers": 1})
    whole = Trainer("gpt2", teacher=teacher, distillation_weight=1.0, learning_rate=0.05, **{**SMALL, "layers": 1})
    found = [each.evaluate(**batch) for each in (alone, mixed, whole)]
    assert found[1] == pytest.approx(0.75 * found[0] + 0.25 * found[2], rel=1e-5)


@t.model
def pulled(x: t.f32["B 4"], *, dim: int = 3):
    y = t.linear(x, dim, name="w")
    return {"y": y, "far": t.reduce_mean((y - 1.0) * (y - 1.0), axes=(0, 1))}


def test_a_model_may_say_its_own_loss() -> None:
    trainer = Trainer(pulled, loss="far", optimizer=SGD(), learning_rate=0.5, max_grad_norm=None)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    assert [port.name for port in trainer.inputs] == ["x"]
    losses = [trainer.step(x=x).loss for _ in range(60)]
    assert losses[-1] < losses[0] / 100
    exe = trainer.compiled(backend="numpy")
    np.testing.assert_allclose(exe(x=x)["y"], 1, atol=0.1)
    again = exe(x=x)["y"].copy()
    trainer.step(x=-x)
    assert np.array_equal(exe(x=x)["y"], again), "what is compiled has weights of its own"


def test_the_contents_of_a_step_are_reported() -> None:
    kept, again = (Trainer("gpt2", gradient_checkpointing=r, **{**SMALL, "layers": 3}) for r in (False, True))
    reports = [each.memory(B=2, S=8) for each in (kept, again)]
    assert reports[1].arena < 0.7 * reports[0].arena
    assert "alive at step" in str(reports[0])


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be 1 or more"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps must be 1 or more"),
        ({"trained": ["h.9.*"]}, "no weight matches 'h.9.*'"),
        ({"trained": "mlp"}, "'*mlp*', which matches"),
        ({"loss": "perplexity"}, "the model has no output perplexity"),
        ({"output": "hidden"}, "the model has no output hidden"),
        ({"target": "cuda"}, "training runs on the CPU, not on cuda"),
        ({"loss": "logits"}, "is not a scalar, so it cannot be a loss"),
        ({"loss": "far", "output": "logits"}, "`output=` cannot be combined with a custom loss"),
        ({"optimizer": "adamw"}, "optimizer= must be an optimizer"),
        ({"optimizer": AdamW}, "optimizer= must be an optimizer"),
        ({"teacher": "gpt2"}, "a teacher must be a compiled model"),
        ({"temperature": 2.0}, "temperature= only applies together with teacher="),
        ({"distillation_weight": 0.0}, "distillation_weight= only applies together with teacher="),
    ],
)
def test_untrainable_models_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected.replace("*", r"\*")):
        Trainer("gpt2", **{**SMALL, **options})


def test_a_teacher_and_what_it_teaches_go_together() -> None:
    with pytest.raises(UsageError, match="the teacher has no output logits"):
        Trainer("gpt2", teacher=t.compile(pulled), **SMALL)
    with pytest.raises(UsageError, match="the teacher's classes differ from the model's") as caught:
        Trainer("gpt2", teacher=t.compile("gpt2", **{**SMALL, "vocab": 21}), **SMALL)
    assert caught.value.received == "logits: f32[B, S, 21] of the teacher, f32[B, S, 19] of the model"
    student = Trainer("gpt2", teacher=t.compile("gpt2", **{**SMALL, "context": 5}), **SMALL)
    student.step(**batch_of(student, 0, length=5))
    with pytest.raises(BackendError, match=r"the teacher does not accept this batch: .* must be at most 5, is 7"):
        student.step(**batch_of(student, 0, length=7))
    tokens, targets = batch_of(student, 0, length=5).values()
    with pytest.raises(BackendError, match="gpt2 has no input token") as named:
        student.step(token=tokens, targets=targets)
    assert named.value.received == "token, targets"
    assert "tokens=" in str(named.value.hint)
    with pytest.raises(UsageError, match="a teacher cannot be combined with another loss"):
        Trainer(pulled, loss="far", teacher=t.compile(pulled))
    with pytest.raises(UsageError, match="the model has several outputs: the output to train is not set"):
        Trainer(pulled)


def test_a_function_is_no_loss() -> None:
    """PyTorch computes a loss outside the model."""
    with pytest.raises(UsageError, match="the name of an output that is the loss") as caught:
        Trainer(pulled, loss=lambda y, target: y)  # type: ignore[arg-type]
    assert 'loss="loss"' in str(caught.value.hint)


def test_a_batch_of_which_nothing_counts_or_whose_loss_is_no_number_changes_nothing() -> None:
    trainer = Trainer("gpt2", learning_rate=1e30, max_grad_norm=None, optimizer=SGD(), **SMALL)
    batch = batch_of(trainer, 0)
    before = {name: array.copy() for name, array in trainer.weights.items()}
    with pytest.raises(UsageError, match="no position of the batch is counted"):
        trainer.step(**{**batch, "targets": np.full_like(batch["targets"], -100)})
    near(trainer.weights, before, 0)
    trainer.step(**batch)
    spoiled = {name: array.copy() for name, array in trainer.weights.items()}
    with pytest.raises(UsageError, match=r"the loss is \S+ after 1 updates"):
        trainer.step(**batch)
    for name, array in spoiled.items():
        np.testing.assert_array_equal(trainer.weights[name], array)


@t.model
def rooted(x: t.f32["B 4"]):
    return {
        "loss": t.reduce_sum(t.sqrt(t.reduce_sum(t.linear(x, 3, bias=False, name="w") ** 2.0, axes=(1,))), axes=(0,))
    }


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    """The loss is finite, but the gradient of the square root at 0 is infinite."""
    trainer = Trainer(rooted, loss="loss")
    before = {name: array.copy() for name, array in trainer.weights.items()}
    with pytest.raises(UsageError, match=r"gradient\.w\.weight is NaN, infinite or too large after 0 updates"):
        trainer.step(x=np.zeros((2, 4), np.float32))
    near(trainer.weights, before, 0)
    result = trainer.step(x=np.ones((2, 4), np.float32))
    assert result.step == 1, "what was added up before is forgotten"
    assert np.isfinite(result.norm)


@t.model
def scored(x: t.f32["B 4"], y: t.f32["B 1"]):
    return {"loss": t.reduce_sum((t.linear(x, 1, name="w") - y) ** 2.0, axes=(0, 1))}


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_batch_with_nan_is_reported_by_input_and_position(value: float) -> None:
    trainer = Trainer(scored, loss="loss", learning_rate=1e-3)
    x, y = np.ones((3, 4), np.float32), np.zeros((3, 1), np.float32)
    trainer.step(x=x, y=y)
    x[2, 1] = value
    for call in (trainer.step, trainer.evaluate):
        with pytest.raises(UsageError, match=r"the loss is (nan|inf) after 1 updates") as caught:
            call(x=x, y=y)
        assert caught.value.received == f"input x has {value} at [2, 1]"
        assert str(caught.value.hint).startswith("finite inputs")
        assert ("rate" in str(caught.value.hint)) == np.isinf(value), "where it is a mask, the rate may be too high"
    assert trainer.step(x=np.ones((3, 4), np.float32), y=y).step == 2


def test_a_loss_that_is_nan_before_any_update_is_no_matter_of_the_rate() -> None:
    """The error's cause is a weight of the checkpoint, or a computed value, so its hint does not mention the learning
    rate.
    """
    x, y = np.ones((3, 4), np.float32), np.zeros((3, 1), np.float32)
    trainer = Trainer(scored, loss="loss")
    trainer.state.weights["w.weight"][0, 2] = np.nan
    with pytest.raises(UsageError, match="the loss is nan after 0 updates") as caught:
        trainer.step(x=x, y=y)
    assert caught.value.received == "weight w.weight has nan at [0, 2]"
    assert "rate" not in str(caught.value.hint)
    with pytest.raises(
        UsageError, match=r"gradient\.w\.weight is NaN, infinite or too large after 0 updates"
    ) as caught:
        Trainer(rooted, loss="loss").step(x=np.zeros((2, 4), np.float32))
    assert caught.value.received == "inputs and weights are finite"
    assert "rate" not in str(caught.value.hint)


@pytest.mark.parametrize("name", ["run.bin", "run.pt", "run.PTH", "run.ckpt", "run.pkl", "run.pickle"])
def test_a_state_is_not_written_under_the_name_of_a_pickle(name: str, tmp_path: Path) -> None:
    """`restore` would refuse a file with the extension of a pickle."""
    with pytest.raises(UsageError, match="a training state is not stored as a pickle") as caught:
        small().save_state(tmp_path / name)
    assert not os.listdir(tmp_path)
    small().save_state(str(caught.value.hint))
    assert os.listdir(tmp_path) == ["run.state"]


def test_a_state_gives_back_the_notes_that_were_saved(tmp_path: Path) -> None:
    small().save_state(tmp_path / "plain")
    small().save_state(tmp_path / "noted", {"seed": "3", "texts": "a b"})
    assert read_notes(tmp_path / "plain") == {}
    assert read_notes(tmp_path / "noted") == {"seed": "3", "texts": "a b"}
    small().restore(tmp_path / "noted")
    write_weights(tmp_path / "weights", {})
    with pytest.raises(CheckpointError, match="not a training state"):
        read_notes(tmp_path / "weights")


# -- weights without a gradient ----------------------------------------------------------------------------------------


@t.model
def gated(x: t.f32["B S 4"]):
    """A model with weights that get no gradient: only a comparison reads `gate`, only floor reads `round`, and
    `unread` is read only by an output that is not the loss.
    """
    y = t.linear(x, 4, name="w")
    for _ in t.stack("h", 2):
        y = y + t.floor(t.linear(x, 4, name="round"))
    y = t.where(t.linear(x, 4, name="gate") > 0.0, y, y * 0.5)
    return {"loss": t.reduce_mean(y * y, axes=(0, 1, 2)), "beside": t.linear(y, 2, name="unread")}


def test_weights_that_no_gradient_reaches_stay_as_they_are() -> None:
    trainer = Trainer(gated, loss="loss", learning_rate=0.1)
    assert trainer.trained == ("w.weight", "w.bias")
    before = {name: array.copy() for name, array in trainer.weights.items()}
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    losses = [trainer.step(x=x).loss for _ in range(5)]
    assert losses[-1] < losses[0]
    changed = {name for name, array in trainer.weights.items() if not np.array_equal(array, before[name])}
    assert changed == {"w.weight", "w.bias"}
    with pytest.raises(UsageError, match="the loss depends on no trained weight"):
        Trainer(gated, loss="loss", trained=["gate.*", "h.0.*"])


def test_of_a_torch_module_what_requires_a_gradient_is_trained() -> None:
    torch = pytest.importorskip("torch")

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(40, 40), torch.nn.Linear(40, 3)
            self.register_buffer("moved", torch.randn(40, 40))
            self.first.requires_grad_(False)

        def forward(self, x: Any) -> Any:
            return self.last(torch.tanh(self.first(x) @ self.moved))

    model = t.from_torch(Module(), (torch.randn(2, 40),))
    assert set(model.weights) > {"moved", "first.weight"}
    assert set(Trainer(model).trained) == {"last.weight", "last.bias"}
    assert set(Trainer(model, trained=["first.*", "last.*"]).trained) == {*model.weights} - {"moved"}


@pytest.mark.parametrize(
    ("given", "error", "expected"),
    [
        ({"targets": None}, BackendError, "no value for targets"),
        ({"wte.weight": np.zeros((19, 16), np.float32)}, BackendError, "has no input wte.weight"),
        ({"self": np.zeros(1)}, BackendError, "has no input self"),
        ({"targets": np.full((3, 7), 19)}, UsageError, "targets must be classes from 0 to 18, or -100"),
        ({"targets": np.full((3, 7), -1)}, UsageError, "targets must be classes from 0 to 18, or -100"),
        ({"targets": np.zeros((3, 6), np.int64)}, BackendError, "targets"),
    ],
)
def test_a_batch_that_does_not_fit_is_told_by_what_is_in_it(
    given: dict[str, Any], error: type[Exception], expected: str
) -> None:
    trainer = small()
    batch = {name: array for name, array in {**batch_of(trainer, 0), **given}.items() if array is not None}
    for call in (trainer.step, trainer.evaluate):
        with pytest.raises(error, match=expected) as caught:
            call(**batch)
        assert "ln_1" not in str(caught.value), "no list of weights"


@cache
def small() -> Trainer:
    return Trainer("gpt2", **SMALL)


def test_a_file_of_another_kind_is_no_state(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import treadle as t")
    with pytest.raises(CheckpointError) as caught:
        t.Trainer("gpt2", layers=1, dim=8, heads=2, vocab=20, context=8, backend="numpy").restore(tmp_path / "model.py")
    assert caught.value.hint == "a file that `save_state` wrote, undamaged"


@t.model
def measured(x: Annotated[t.Tensor, t.f32["B 4"]]):  # type: ignore[no-untyped-def]
    return {"y": t.linear(x, 2, name="out"), "z": t.linear(x, 1, name="other")}


def test_the_mean_squared_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 4), np.float32), rng.standard_normal((8, 2), np.float32)
    trainer = Trainer(measured, loss="mse", output="y", learning_rate=0.05, backend="numpy")
    first = trainer.evaluate(x=x, targets=y)
    found = np.asarray(trainer.compiled(backend="numpy")(x=x)["y"])
    assert first == pytest.approx(float(np.mean((found - y) ** 2)), rel=1e-6)
    assert trainer.step(x=x, targets=y).loss == pytest.approx(first, rel=1e-6)
    for _ in range(200):
        trainer.step(x=x, targets=y)
    best = np.linalg.lstsq(np.concatenate([x, np.ones((8, 1), np.float32)], 1), y, rcond=None)[1].sum() / y.size
    assert trainer.evaluate(x=x, targets=y) == pytest.approx(float(best), rel=0.05)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_targets_with_a_number_for_each_class_lead_to_their_indices(dtype: Any) -> None:
    x, y = np.ones((3, 4), np.float32), np.eye(2, dtype=dtype)[[0, 1, 1]]
    trainer = Trainer(measured, output="y", backend="numpy")
    with pytest.raises(UsageError, match="targets are class indices, from 0 to 1, not a number for each") as caught:
        trainer.step(x=x, targets=y)
    assert caught.value.hint == "targets.argmax(-1), for a one-hot array"
    assert np.isfinite(trainer.step(x=x, targets=y.argmax(-1)).loss)


@pytest.mark.parametrize("numbers", [[[0.5, 1.5], [2, 3]], [[4, 1], [2, 3]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_targets_that_are_numbers_lead_to_the_mean_squared_error(dtype: Any, numbers: Any) -> None:
    x, y = np.ones((2, 4), np.float32), np.array(numbers, dtype)
    with pytest.raises(UsageError, match="targets are class indices, from 0 to 1") as caught:
        Trainer(measured, output="y", backend="numpy").step(x=x, targets=y)
    assert 'loss="mse"' in str(caught.value.hint)
    with pytest.raises(UsageError, match="targets must be classes from 0 to 0") as caught:
        Trainer(measured, output="z", backend="numpy").step(x=x, targets=np.array([2, 3]))
    assert 'loss="mse"' in str(caught.value.hint)
    assert np.isfinite(Trainer(measured, loss="mse", output="y", backend="numpy").step(x=x, targets=y).loss)


def test_ones_for_a_model_of_one_number_are_numbers() -> None:
    """They are a share for each of one class too, but one class has nothing to learn."""
    y = np.ones((2, 1))
    with pytest.raises(UsageError, match="targets are class indices, from 0 to 0") as caught:
        Trainer(measured, output="z", backend="numpy").step(x=np.ones((2, 4), np.float32), targets=y)
    assert str(caught.value.hint).startswith('loss="mse"')


@pytest.mark.parametrize("loss", ["bce", "y", None, t.cross_entropy])
def test_a_loss_that_the_model_does_not_have_leads_to_one_that_it_may_have(loss: Any) -> None:
    with pytest.raises(UsageError, match=r"so it cannot be a loss|loss= is") as caught:
        Trainer(measured, loss=loss)
    assert 'return {"loss": ...}' in str(caught.value.hint) and 'loss="mse"' in str(caught.value.hint)


@t.model
def summed(x: Annotated[t.Tensor, t.f32["B 4"]]):  # type: ignore[no-untyped-def]
    return t.linear(x, 1, name="out")[:, 0]


def test_an_output_without_classes_is_not_trained_as_one() -> None:
    """Its last axis is the batch. The hint names the loss for numbers."""
    with pytest.raises(UsageError, match="has no classes along its last axis") as caught:
        Trainer(summed, backend="numpy")
    assert 'loss="mse" for numbers' in str(caught.value.hint)
    trainer = Trainer(summed, loss="mse", backend="numpy")
    assert np.isfinite(trainer.step(x=np.ones((2, 4), np.float32), targets=np.ones(2)).loss)

    @t.model
    def scalar(x: Annotated[t.Tensor, t.f32["B 4"]]) -> t.Tensor:
        return t.linear(x, 1, name="out").mean()

    with pytest.raises(UsageError, match="has no classes along its last axis") as caught:
        Trainer(scalar, backend="numpy", output="output")
    assert caught.value.hint == "loss='output' without output=, to minimize it"
    assert Trainer(scalar, backend="numpy", loss="output")


def test_the_hint_for_a_dtype_names_no_option_that_training_lacks() -> None:
    for dtype in ("int8", "q4_0"):
        with pytest.raises(UsageError, match="unknown computation dtype") as caught:
            Trainer(summed, loss="mse", backend="numpy", dtype=dtype)
        assert caught.value.hint == "dtype='f32' or 'bf16'"
    assert Trainer(summed, loss="mse", backend="numpy", dtype="f32")


@t.model
def with_columns(x: t.f32["B 4"], labels: t.i64["B 1"]):  # type: ignore[no-untyped-def]
    return {"loss": t.reduce_sum(t.cross_entropy(t.linear(x, 3, name="w"), labels), axes=(0, 1))}


def test_targets_of_another_rank_are_refused_at_the_line_of_the_loss() -> None:
    with pytest.raises(RuleError, match="target must have rank 1, one class for each row of x, has 2") as caught:
        Trainer(with_columns, loss="loss")
    assert str(caught.value.source).startswith("tests/test_trainer.py:")
    assert caught.value.hint == "target.squeeze(-1)"
