"""What is a number called in English?

Plain words, spaces only: no hyphen, no "and", so that every word is one token of a CLIP vocabulary
and a caption of six digits stays below sixteen tokens.
"""

from dist_siglip.errors import UserError

MOST_DIGITS = 6

_UNITS = (
    *("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

_VALUES = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS)
}


def number_in_words(value: int, num_digits: int) -> str:
    """Spell out a whole number of ``num_digits`` decimal digits, without hyphens or "and".

    Numbers do not start with zero, so the words and the digits determine each other.

    Args:
        value: The number, with exactly ``num_digits`` digits and no leading zero.
        num_digits: 1 to 6.

    Returns:
        Lower-case English words separated by single spaces.

    Raises:
        UserError: If ``num_digits`` is out of range or ``value`` has another number of digits.

    Example:
        >>> number_in_words(4712, 4)
        'four thousand seven hundred twelve'
        >>> number_in_words(8005, 4), number_in_words(340, 3), number_in_words(90, 2)
        ('eight thousand five', 'three hundred forty', 'ninety')
    """
    lowest, highest = number_range(num_digits)
    if not lowest <= value < highest:
        raise UserError(
            f"value ({value}) must have {num_digits} digits and no leading zero; "
            f"use {lowest} to {highest - 1}"
        )
    thousands, rest = divmod(value, 1000)
    words = [*_words_below_thousand(thousands), "thousand"] if thousands else []
    return " ".join(words + _words_below_thousand(rest))


def number_from_words(text: str) -> int | None:
    """Read what ``number_in_words`` writes; None for any other text.

    Example:
        >>> number_from_words("four thousand seven hundred twelve"), number_from_words("a cat")
        (4712, None)
    """
    thousands, rest = 0, 0
    for word in text.split():
        if word == "thousand":
            thousands, rest = rest, 0
        elif word == "hundred":
            rest *= 100
        else:
            rest += _VALUES.get(word, 0)
    value = 1000 * thousands + rest
    num_digits = len(str(value))
    is_number = value > 0 and num_digits <= MOST_DIGITS
    return value if is_number and number_in_words(value, num_digits) == text else None


def number_range(num_digits: int) -> tuple[int, int]:
    """Return the half-open range of the numbers of ``num_digits`` digits, without a leading zero.

    Example:
        >>> number_range(4)
        (1000, 10000)
    """
    if not 1 <= num_digits <= MOST_DIGITS:
        raise UserError(f"num_digits ({num_digits}) must be 1 to {MOST_DIGITS}; use 4")
    return 10 ** (num_digits - 1), 10**num_digits


def _words_below_thousand(value: int) -> list[str]:
    """Spell out 0 to 999, with no words for 0."""
    hundreds, rest = divmod(value, 100)
    words = [_UNITS[hundreds], "hundred"] if hundreds else []
    if rest < 20:
        return words + [_UNITS[rest]] * (rest > 0)
    return [*words, _TENS[rest // 10], *[_UNITS[rest % 10]] * (rest % 10 > 0)]
