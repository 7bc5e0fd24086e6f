"""Measuring an edit: functions of a language model and cases that know nothing of the method.

`teacher_forced` (token accuracy: reliability, generality, portability, locality), `generation` (what the model writes by itself),
`normalise` (when two answers are the same text), `summary` (from records to percentages).
"""

from __future__ import annotations

from errata.metrics.summary import summarise

__all__ = ["summarise"]  # the measurements themselves import torch; name their modules
