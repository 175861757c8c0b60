"""The preference that the demo's aligned model was trained towards."""


def plain_words(text: str) -> float:
    """Share of the words of `text` that are short (at most 4 letters), purely alphabetic and not repeated.

    It rewards brief, everyday wording. Repetition does not help, since a word counts once however often it
    occurs; nor does stopping early, since a text is never taken to be shorter than 8 words.
    """
    words = [word.strip(".,;:").lower() for word in text.split()]
    plain = {word for word in words if word.isalpha() and len(word) <= 4}
    return len(plain) / max(len(words), 8)
