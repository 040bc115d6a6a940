"""Lowering rules of normalization."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.backends.lowering.routine_writer import Keeps, Rule

RULES: Mapping[str, Rule] = {}
KEEPS: Mapping[str, Keeps] = {}
