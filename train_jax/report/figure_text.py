"""Text of figures: characters that the font lacks."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def drawable(text: str) -> str:
    """Returns a text with characters that matplotlib's font lacks replaced by U+FFFD; matplotlib would warn of each.

    Answers and captions may hold any character: an untrained model generates control characters too.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font  # takes 0.5 s to import

    font = get_font(findfont(FontProperties()))
    return "".join(one if one == "\n" or font.get_char_index(ord(one)) else _REPLACEMENT for one in text)
