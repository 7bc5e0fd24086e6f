"""The geometry of a code book: which questions lie together, which answer each neighbourhood stands for, and how far it reaches.

MELO (arXiv 2312.11795 §3.2) places a new question by the nearest centre alone: farther than that cluster's radius plus the initial one
it founds a cluster; with the same answer it joins, the centre becomes the mean and the radius covers all; with another answer it
founds one too, and both radii are cut to half the distance. As published, members that a cut leaves outside are forgotten, and clusters
other than the nearest may go on overlapping. Here earlier edits are kept, and two things hold after every placing:

- neighbourhoods of different answers are disjoint (r + r' ≤ distance): cuts are made wherever two would meet, and never widen one;
- every member lies inside a neighbourhood with its answer: a cluster that a cut would take a member from falls apart into its members,
  each a cluster of its own with the same block.

A question asked again with another answer replaces the old one: only then a member is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.lm.tokens import Encoded

NEAR = 0.01
"""Queries closer than this share of the initial radius are one question: rounding and padding move a query by far less."""
EDGE = 0.99
"""Members stay within this share of the radius, so that rounding never puts one outside."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One edited question: its query [d], float32 on the CPU, and its text with the answer."""

    query: Tensor
    text: Encoded


@dataclass(frozen=True, slots=True, eq=False)
class Cluster:
    """The neighbourhood ‖q − centre‖ ≤ radius of some questions with one answer.

    centre: [d], float32 on the CPU. label: the answer. block: index of the adapter block that gives it; clusters may share one.
    """

    centre: Tensor
    radius: float
    label: str
    block: int
    members: tuple[Member, ...]

    @property
    def extent(self) -> float:
        """The least radius with all members inside; 0 for one that sits in the centre."""
        return max(_distance(self.centre, member.query) for member in self.members) / EDGE


def route(centres: Tensor, radii: Tensor, queries: Tensor, among: Tensor | None = None) -> Tensor:
    """The nearest of the clusters whose neighbourhood holds each query: [B] long, -1 for none.

    centres [C, d], radii [C], queries [B, d]. among [B, C] bool: the clusters that each query is asked of; None: all.
    """
    if not len(centres):
        return torch.full((len(queries),), -1, device=queries.device)
    distances = torch.cdist(queries.to(centres), centres, compute_mode="donot_use_mm_for_euclid_dist")  # [B, C]
    inside = distances <= radii if among is None else (distances <= radii) & among
    nearest, index = torch.where(inside, distances, torch.inf).min(-1)
    return torch.where(nearest.isfinite(), index, -1)


def place(clusters: Sequence[Cluster], new: Member, label: str, initial: float, block: int) -> tuple[tuple[Cluster, ...], int]:
    """The clusters with one more question; and the block that answers it: `block` if it founded a cluster, else the one it joined.

    initial: radius of a new cluster.
    """
    near = NEAR * initial
    kept: list[Cluster] = []
    for cluster in clusters:
        if cluster.label != label and any(_distance(new.query, member.query) <= near for member in cluster.members):
            rest = tuple(member for member in cluster.members if _distance(new.query, member.query) > near)
            if rest:
                kept.append(replace(cluster, members=rest))
            continue
        kept.append(cluster)
    for cluster in kept:
        inside = _distance(new.query, cluster.centre) <= EDGE * cluster.radius
        if cluster.label == label and inside and any(_distance(new.query, member.query) <= near for member in cluster.members):
            return tuple(kept), cluster.block
    if kept:
        distances = [_distance(new.query, cluster.centre) for cluster in kept]
        i = min(range(len(kept)), key=distances.__getitem__)
        if kept[i].label == label and distances[i] <= kept[i].radius + initial:
            members = (*kept[i].members, new)
            joined = Cluster(torch.stack([member.query for member in members]).mean(0), 0.0, label, kept[i].block, members)
            joined = replace(joined, radius=max(joined.extent, initial))
            return tuple(_settled([*kept[:i], *kept[i + 1 :]], joined, initial)), joined.block
    return tuple(_settled(kept, Cluster(new.query, initial, label, block, (new,)), initial)), block


def _settled(clusters: list[Cluster], new: Cluster, initial: float) -> list[Cluster]:
    """`clusters`, among which neighbourhoods of different answers are disjoint, with `new`, and still so.

    Ends: each cluster that falls apart leaves only clusters of one member, in their centres, and those never do.
    """
    pending = [new]
    while pending:
        new = pending.pop()
        for i, other in enumerate(clusters):
            distance = _distance(new.centre, other.centre)
            if other.label == new.label or new.radius + other.radius <= distance:
                continue
            broken = next((cluster for cluster in (other, new) if cluster.extent > distance / 2), None)
            if broken is not None:
                pending += _apart(broken, initial)
                if broken is other:
                    clusters = [*clusters[:i], *clusters[i + 1 :]]
                    pending.append(new)  # asked again, without it
                break
            clusters[i] = replace(other, radius=min(other.radius, distance / 2))
            new = replace(new, radius=min(new.radius, distance / 2))
        else:
            clusters.append(new)
    return clusters


def _apart(cluster: Cluster, initial: float) -> list[Cluster]:
    return [replace(cluster, centre=member.query, radius=initial, members=(member,)) for member in cluster.members]


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b.double()))
