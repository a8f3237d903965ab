"""Pipelines that set processors of their own, or build models of others: coefficients go along, or it is said.

A scan of diffusers' source finds them, so that a new release shows new ones.
"""

from __future__ import annotations
