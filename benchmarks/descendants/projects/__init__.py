"""The projects, those that others' files are copies of last."""

from __future__ import annotations

from benchmarks.descendants.calls import Project

from . import dit, images, motion, openai, others

PROJECTS: tuple[Project, ...] = (*motion.PROJECTS, *dit.PROJECTS, *images.PROJECTS, *others.PROJECTS, *openai.PROJECTS)
