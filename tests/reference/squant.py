"""SQuant as slow loops over channels, kernels and elements."""


def flip(x, qmin, qmax):
    """Codes of weights in grid units, nested lists [O][K][E]."""
    return [_channel(kernels, qmin, qmax) for kernels in x]


def _channel(kernels, qmin, qmax):
    codes = [[min(max(round(v), qmin), qmax) for v in kernel] for kernel in kernels]
    if len(kernels[0]) == 1:
        flat, _ = _row([k[0] for k in kernels], [c[0] for c in codes], qmin, qmax)
        return [[c] for c in flat]
    spares = []
    for number, kernel in enumerate(kernels):
        codes[number], spare = _row(kernel, codes[number], qmin, qmax)
        if spare is not None:
            spares.append((spare[2], number, spare))
    total = sum(c - v for row, kernel in zip(codes, kernels, strict=True) for c, v in zip(row, kernel, strict=True))
    useful = [s for s in spares if s[2][1] * total < 0]
    useful.sort(key=lambda s: -s[0])
    for _, number, (place, direction, _) in useful[: round(abs(total))]:
        codes[number][place] += direction
    return codes


def _row(values, codes, qmin, qmax):
    """Codes after flipping, and (place, direction, size of error) of one more step, or None."""
    errors = [c - v for c, v in zip(codes, values, strict=True)]
    total = sum(errors)
    if total == 0:
        return list(codes), None
    sign = 1 if total > 0 else -1
    free = [i for i, e in enumerate(errors) if e * sign > 0 and (codes[i] > qmin if sign > 0 else codes[i] < qmax)]
    free.sort(key=lambda i: -abs(errors[i]))
    count = round(abs(total))
    codes = list(codes)
    for i in free[:count]:
        codes[i] -= sign
    if count > len(free):
        return codes, None
    if count >= abs(total):  # overshot
        last = free[count - 1]
        return codes, (last, sign, 1 - abs(errors[last]))
    if count == len(free):
        return codes, None
    return codes, (free[count], -sign, abs(errors[free[count]]))
