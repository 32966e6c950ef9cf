"""Errors of a language worker's process."""


class EngineDiedError(Exception):
    """The engine has ended although nobody has asked it to. The message is one line for the operator."""
