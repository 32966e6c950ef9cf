"""Errors of a language worker's process."""


class EngineDiedError(Exception):
    """The engine has ended without a request to stop. The message is one line for the operator."""
