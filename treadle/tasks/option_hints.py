"""Checks of the calls of tasks: hints for the options of other libraries, and for values of another kind."""

from __future__ import annotations

from treadle.ir.wording.checked_calls import with_checked_methods

_SAMPLING = "sampling=t.Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=1)"
_RULES = "rules=t.TokenRules(repetition_penalty=1.2, no_repeat_ngram=3, fewest=5)"
_CHAT = 'print(*chat().say("Hello"), sep=""), where chat(system=...) sets the system prompt'
_ELSEWHERE = {
    **dict.fromkeys(("max_new_tokens", "max_tokens", "num_predict", "tokens"), "most=64"),
    "max_length": "most=64, which does not include the prompt's tokens",
    **dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "min_p", "seed"), _SAMPLING),
    **dict.fromkeys(("num_beams", "beams"), "search(prompts, beams=t.Beams(count=4))"),
    "length_penalty": "search(prompts, beams=t.Beams(length_penalty=1.2))",
    "num_return_sequences": "search(prompts, beams=t.Beams(best=2))",
    **dict.fromkeys(("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "bad_words_ids"), _RULES),
    **dict.fromkeys(("stream", "streamer"), "stream(prompt), a method that yields the text piece by piece"),
    **dict.fromkeys(("messages", "conversation"), _CHAT),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_words"), 'stop=["."]'),
}
"""Hints for generation options that have another name in other libraries, mostly in Hugging Face's, by that name."""


_TEXTS = "a string, or a list of strings; token ids go to a session: t.compile(MODEL).session()"
_IMAGE = "the path of a file, its bytes, an image of Pillow, or an array u8[height, width, 3]"
_EXAMPLES = {
    "sampling": _SAMPLING,
    "rules": _RULES,
    "beams": "beams=t.Beams(4, best=2)",
    "stop": 'stop=["."]',
    "question": "answer(question, text), or answer([(question, text), ...])",
    "texts": "a string, or a list of strings",
    "sentences": "a string, or a list of strings",
    "prompts": _TEXTS,
    "prompt": _TEXTS,
    "images": _IMAGE,
    "recording": 'the path of a WAV file: "speech.wav"',
}
"""Hints for arguments of another kind, by name."""

with_task_calls = with_checked_methods(_ELSEWHERE, _EXAMPLES)
"""Decorate a class whose methods are tasks: calls are checked, with hints for the options of other libraries."""
