"""Tables that read well in a terminal and in Markdown."""


def markdown(header, rows):
    """A Markdown table of `rows`, padded; columns of numbers are aligned to the right."""
    text = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    right = [all(isinstance(cell, (int, float)) for cell in column) for column in zip(*rows)]
    widths = [max(3, *map(len, column)) for column in zip(*text)]
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right)]
    lines = [
        "| " + " | ".join(f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(row, widths, right)) + " |"
        for row in (text[0], rule, *text[1:])
    ]
    return "\n".join(lines) + "\n"
