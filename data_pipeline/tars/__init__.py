"""Strict reading of foreign tars: every damage that a tar can betray is an error with its byte offset."""

from __future__ import annotations

from .headers import TarError
from .samples import BadSample, Sample, group_samples, split_name
from .walk import Member, walk_tar

__all__ = ["BadSample", "Member", "Sample", "TarError", "group_samples", "split_name", "walk_tar"]
