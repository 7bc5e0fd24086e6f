"""Measuring an edit: functions of a language model and cases that know nothing of the method.

`teacher_forced` (token accuracy: reliability, generality, portability, locality), `probability` (is the new answer on top, or likelier
than the old one), `generation` (what the model writes by itself, in several frames, where the edit belongs and where it does not),
`multihop` (what it answers to MQuAKE's questions, put by `framing`), `fluency` (does it still write varied text), `normalise` (when two
answers are the same text), `summary` (from records to percentages); and what goes on inside: `noise` (how the edits of a sequence disturb
one another), `drift` (how far other facts' hidden states have moved), `overfitting` (an edit step by step, token by token), `tracing`.
"""

from __future__ import annotations

from errata.metrics.summary import summarise

__all__ = ["summarise"]  # the measurements themselves import torch; name their modules
