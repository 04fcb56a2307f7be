"""Shared by all tests. Importing `rl` first lets torchvision be imported beside a CPU torch."""

import rl  # noqa: F401
