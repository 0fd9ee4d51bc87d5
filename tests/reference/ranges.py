"""Range search by plain loops over Python floats, one value at a time."""


def levels(low, high, bits, symmetric):
    """Every value of the grid over [low, high]."""
    if symmetric:
        steps = 2 ** (bits - 1) - 1
        return [k * max(abs(low), abs(high)) / steps for k in range(-steps, steps + 1)]
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    zero_point = round(-low / scale)
    return [(code - zero_point) * scale for code in range(2**bits)]


def mean_error(values, low, high, bits, symmetric, p):
    """Mean distance to the nearest level, to the power p."""
    grid = levels(low, high, bits, symmetric)
    return sum(min(abs(v - level) for level in grid) ** p for v in values) / len(values)


def candidates(values, bits, search):
    """The plain range, then every shrunken one (1d) or every width with every zero point (2d)."""
    low, high = min(values), max(values)
    yield low, high
    for i in range(1, 101):
        if search == "1d":
            yield low * i / 100, high * i / 100
            continue
        width = (high - low) * i / 100
        for z in range(2**bits):
            start = -z * width / (2**bits - 1)
            yield start, start + width


def least_error(values, bits, symmetric, p, search):
    """The least mean error that any candidate reaches."""
    return min(mean_error(values, *ends, bits, symmetric, p) for ends in candidates(values, bits, search))
