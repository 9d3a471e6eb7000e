"""Text of others on its way to a terminal."""

from wmtp_worker import errors


def printable(text: str) -> str:
    """One line without characters that would move the cursor, change its colour or end the line."""
    return errors.printable(text).replace("\n", "\\n")
