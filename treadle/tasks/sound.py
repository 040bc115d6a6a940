"""Sound files as samples: WAV files of any number of channels and bits, resampled to the model's rate.

samples = read_sound("talk.wav", rate=16_000)        # f64[N], between -1 and 1
"""

from __future__ import annotations

import io
import math
import struct
import wave
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.files.contained_files import PathLike, read_regular
from treadle.files.shown_names import printable, shown_path
from treadle.ir.errors import UsageError

Floats = npt.NDArray[np.float64]

_BYTES = 1 << 30
_RATES = range(1_000, 400_001)
_MOST_CHANNELS = 64
_ZEROS = 32  # zeros of the sinc function on either side
_PIECE = 1 << 16


def read_sound(path: PathLike, *, rate: int) -> Floats:
    """Return the samples f64[N] of a WAV file, averaged over the channels and resampled to `rate` samples per second.
    Raises UsageError if the file is damaged or not a WAV file of integers.
    """
    shown = shown_path(path)
    data = read_regular(path, _BYTES, shown)
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, given = file.getnchannels(), file.getsampwidth(), file.getframerate()
            if given not in _RATES or not 1 <= channels <= _MOST_CHANNELS or width not in (1, 2, 3, 4):
                raise UsageError(
                    "the sound format is not supported",
                    received=f"{channels} channels, {8 * width} bits, {given} samples per second",
                    within=shown,
                )
            held = file.readframes(file.getnframes())
    except (wave.Error, EOFError, struct.error, ValueError, RuntimeError) as error:
        raise UsageError(
            "the file is not a sound that can be read",
            received=printable(str(error), 200) or type(error).__name__,
            within=shown,
            hint="a WAV file of integers: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le FILE.wav",
        ) from None
    whole = len(held) // (channels * width) * channels * width
    samples = _numbers(held[:whole], width).reshape(-1, channels).mean(axis=1)
    if not len(samples):
        raise UsageError("the sound is empty", within=shown)
    return samples if given == rate else resample(samples, given, rate)


def _numbers(data: bytes, width: int) -> Floats:
    """Return samples between -1 and 1 from integers of `width` bytes: unsigned if 1 byte, else signed little-endian."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        bytes_of = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        signed = (bytes_of[:, 0] | bytes_of[:, 1] << 8 | bytes_of[:, 2] << 16) << 8 >> 8
        return signed.astype(np.float64) / 2**23
    kind: Any = "<i2" if width == 2 else "<i4"
    return np.frombuffer(data, kind).astype(np.float64) / 2.0 ** (8 * width - 1)


def resample(samples: Floats, given: int, wanted: int) -> Floats:
    """Return samples converted from the rate `given` to the rate `wanted`, low-pass filtered to half of the lower rate.

    The filter is a sinc under a Kaiser window, with 32 zeros on either side (Smith, "Digital Audio Resampling", 2002).
    """
    count = math.ceil(len(samples) * wanted / given)
    cutoff = 0.95 * min(1.0, wanted / given)
    reach = math.ceil(_ZEROS / cutoff)
    padded = np.pad(samples, (reach, reach + 1))
    around = np.arange(-reach, reach + 1)
    made = np.empty(count)
    for start in range(0, count, _PIECE):
        times = np.arange(start, min(start + _PIECE, count)) * (given / wanted)
        nearest = np.floor(times).astype(np.int64)
        made[start : start + len(times)] = _values(padded, times - nearest, nearest, around, cutoff)
    return made


def _values(padded: Floats, past: Floats, nearest: npt.NDArray[np.int64], around: Any, cutoff: float) -> Floats:
    """Return the audio interpolated at offsets `past` after the samples `nearest`.

    Times with equal offsets use the same filter weights.
    """
    alike, which = np.unique(np.round(past, 9), return_inverse=True)
    found = np.empty(len(past))
    reach = len(around) // 2
    for number, share in enumerate(alike):
        distance = share - around
        window = np.i0(8.6 * np.sqrt(np.maximum(0, 1 - (distance / (reach + 1)) ** 2))) / np.i0(8.6)
        weights = cutoff * np.sinc(cutoff * distance) * window
        rows = np.flatnonzero(which == number)
        found[rows] = padded[nearest[rows, None] + reach + around] @ weights
    return found
