"""Exact coverage of parameters by name and shape, shared by the converters."""


def check(seen: dict, expected: dict) -> None:
    """Refuse the first key that is missing, unknown or of another shape.

    Args:
      seen: {name: array}. expected: {name: shape}.

    Raises:
      ValueError: one line with the key, the shape seen and the shape expected.
    """
    for name, shape in expected.items():
        if name not in seen:
            raise ValueError(f"{name}: missing; expected shape {list(shape)}")
        if tuple(seen[name].shape) != shape:
            raise ValueError(f"{name}: shape {list(seen[name].shape)}; expected {list(shape)}")
    if unknown := [name for name in seen if name not in expected]:
        shape = list(seen[unknown[0]].shape)
        raise ValueError(f"{unknown[0]}: shape {shape}; this configuration has no such parameter")
