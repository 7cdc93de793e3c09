"""A run that stands still: who waits for whom, told and ended so that it can be started again."""

from .guard import HangError, HangGuard

__all__ = ["HangError", "HangGuard"]
