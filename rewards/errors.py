"""The base of the errors that are meant for the user."""

from __future__ import annotations


class ReasonKneeError(Exception):
    """Something the user can put right: the message names the file or field, the value and the remedy.

    The command line prints it without a traceback. Every other exception is a bug and keeps its traceback.
    """
