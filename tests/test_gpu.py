"""The Triton kernels without a GPU: what they compute, in Triton's interpreter, and what they compile to, for each card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="there is no triton for this platform")

import triton_interpreted
import triton_targets
from coeff_diffusers.backends import tiles
