"""Every family: how its objects are made, and the calls of its scripts, by batch."""

from __future__ import annotations

from .table_of_forks import of_forks
from .table_of_images import of_images
from .table_of_others import of_motion, of_others

FAMILIES = of_images() | of_forks() | of_motion() | of_others()
