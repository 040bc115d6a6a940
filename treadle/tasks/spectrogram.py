"""Whisper's input: the log-mel spectrogram of a sound, every 10 ms (Radford et al. 2023, section 2.2).

    mel = log_mel(samples, frames=3000)          # f32[80, 3000] of 30 s at 16 kHz

Steps: Hann windows of 25 ms, 10 ms apart, each centered on its frame, with mirrored ends; the power of the Fourier
transform of each window; triangular bands on Slaney's mel scale, each of area 1; the decimal logarithm, clipped below
at the maximum minus 8, and scaled to about -1 to 1. Sources: OpenAI's `whisper/audio.py`; Slaney 1998, "Auditory
Toolbox", for the mel scale.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RATE = 16_000
"""Samples per second."""
HOP, WINDOW = 160, 400
"""Number of samples between the starts of consecutive windows, and number of samples of a window."""


def log_mel(samples: Floats, *, frames: int, bands: int = 80) -> npt.NDArray[np.float32]:
    """Return the spectrogram f32[bands, frames] of samples [N] at RATE, between -1 and 1. A short sound is padded with
    silence, and a long sound is truncated.
    """
    whole = np.zeros(frames * HOP, np.float64)
    kept = samples[: len(whole)]
    whole[: len(kept)] = kept
    padded = np.pad(whole, WINDOW // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:frames]
    power = np.abs(np.fft.rfft(windows * hann, axis=1)) ** 2
    loudness = np.log10(np.maximum(power @ mel_bands(bands), 1e-10)).T
    loudness = np.maximum(loudness, loudness.max() - 8.0)
    found: npt.NDArray[np.float32] = ((loudness + 4.0) / 4.0).astype(np.float32)
    return found


@cache
def mel_bands(bands: int) -> Floats:
    """Return the weight of each frequency of a window in each band, f64[WINDOW // 2 + 1, bands]. A band is a triangle
    that reaches from the center of the previous band to the center of the next. Centers are evenly spaced in mel
    from 0 Hz to half of RATE.
    """
    middles = _hertz(np.linspace(_mel(0.0), _mel(RATE / 2), bands + 2))
    frequencies = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    low, middle, high = middles[:-2], middles[1:-1], middles[2:]
    rising = (frequencies[:, None] - low) / (middle - low)
    falling = (high - frequencies[:, None]) / (high - middle)
    found: Floats = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    return found


_LINEAR = 200 / 3  # hertz per mel below _BREAK
_BREAK = 1000.0  # hertz; above it, mels are logarithmic
_STEP = math.log(6.4) / 27  # increase of ln(hertz) per mel above _BREAK


def _mel(hertz: float) -> float:
    if hertz < _BREAK:
        return hertz / _LINEAR
    return _BREAK / _LINEAR + math.log(hertz / _BREAK) / _STEP


def _hertz(mel: Floats) -> Floats:
    first = _BREAK / _LINEAR
    return np.where(mel < first, mel * _LINEAR, _BREAK * np.exp(_STEP * (mel - first)))
