"""The names of the value forms: how the sparse part of a stored weight holds its numbers."""

from typing import Literal, get_args

# The forms that a configuration may name.
Values = Literal["exact", "int8", "int4", "sign"]
# `bits` and `budget` choose `steps`.
Form = Literal["exact", "int8", "int4", "sign", "steps"]
VALUES: tuple[Values, ...] = get_args(Values)
