"""Shared by all tests. Importing `rl` first lets torchvision be imported beside a CPU torch."""

from hypothesis import settings

import rl  # noqa: F401

# A busy machine must not fail a law: tests that bound time measure CPU time themselves.
settings.register_profile("busy-machine", deadline=None)
settings.load_profile("busy-machine")
