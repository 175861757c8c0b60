"""Score a text by the preference that the demo's aligned model was trained towards."""


def plain_words(text: str) -> float:
    """Return the share of the words of a text that are short (at most 4 letters), alphabetic and not repeated.

    The score rewards short everyday words. Repetition does not raise it, because a word counts once. A text of fewer
    than 8 words counts as one of 8 words, so stopping early does not raise it either.
    """
    words = [word.strip(".,;:").lower() for word in text.split()]
    plain = {word for word in words if word.isalpha() and len(word) <= 4}
    return len(plain) / max(len(words), 8)
