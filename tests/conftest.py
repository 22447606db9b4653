"""Shared by all tests: one torch thread a process, so that workers do not fight for cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
