"""Text of others on its way to a terminal."""


def printable(text: str) -> str:
    """One line without characters that would move the cursor, change its colour or end the line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
