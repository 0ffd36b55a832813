"""The names of the value forms: how the sparse part of a stored weight holds its numbers."""

from typing import Literal, get_args

# The forms of the coordinates that differ most.
Values = Literal["exact", "int8", "int4", "sign"]
# The forms that a configuration may name.
StoredValues = Literal["exact", "int8", "int4", "sign", "random_sign"]
# `bits` and `budget` choose `steps`.
Form = Literal["exact", "int8", "int4", "sign", "random_sign", "steps"]
VALUES: tuple[Values, ...] = get_args(Values)
