"""Comparison of a vision-language model with Hugging Face's: prompts, logits of whole texts and of steps, answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import treadle as t
from tests.vision_models import VisionModel, asked, image_files
from treadle.continuation import TextWriter
from treadle.runtime.generation import generate

NEAR = 2e-5
"""Largest distance of logits, as a part of their range."""
_STEPS = 64


def compare_answers(made: VisionModel, backend: str, images: int, place: Path | None = None) -> float:
    """Compare prompts with this number of images. Return the largest distance of logits as a part of their range.

    place  the model's folder or GGUF file; None: the folder in which it was saved

    Raises AssertionError if token ids of the prompt, or of 32 greedy tokens, differ.
    """
    place = place or made.place
    writer, files, talk = TextWriter.open(place, backend=backend), image_files(images, images), asked(images)
    theirs = made.inputs(talk, files)
    prompt = writer.chat_prompt(writer.chat_template(), talk, writer.read_images(files))
    assert prompt.ids == theirs["input_ids"][0].tolist()
    session = writer.session(rows=2, capacity=len(prompt.ids) + 32)
    answer = [token.id for token in generate(session, [prompt.ids], most=32, inputs=[prompt.inputs])]
    assert answer == made.answer(theirs, 32)
    wanted = made.logits(theirs)

    exe = t.compile(place, backend=backend)
    assert exe.unread == ()
    whole = session.prompt(prompt.ids, **prompt.inputs)
    given = {name: array[None] for name, array in {**whole.prologue, **whole.along}.items()}
    found = [np.asarray(exe(tokens=np.array([prompt.ids]), **given)["logits"])[0]]
    row, start = session.open(**prompt.inputs), len(prompt.ids) - _STEPS
    session.prefill({row: prompt.ids[: start // 2]})
    logits = [session.prefill({row: prompt.ids[start // 2 : start]})[row]]
    logits += [session.step({row: token})[row] for token in prompt.ids[start:]]
    found.append(np.concatenate([wanted[: start - 1], logits]))
    return float(max(np.abs(each - wanted).max() for each in found) / np.ptp(wanted))
