"""Drop-ins for other projects' samplers: they translate arguments and delegate."""

from .accelerate import accelerate, is_fused, report
from .classifier_free import ClassifierFree

__all__ = ["ClassifierFree", "accelerate", "is_fused", "report"]
