"""How work is cut to fit a workspace."""


def even_chunk(total: int, largest: int, multiple: int) -> int:
    """As even as can be, in multiples of ``multiple``, at most ``largest`` unless that is less."""
    largest = max(largest // multiple * multiple, multiple)
    count = -(-total // largest)
    return -(-total // (count * multiple)) * multiple
