"""The names of the value forms: how the sparse part of a stored weight holds its numbers."""

from typing import Literal, get_args

# The forms of the coordinates that differ most.
Values = Literal["exact", "int8", "int4", "sign"]
# The forms of an expert that is stored by a rate; the first is low rank plus sparse, whose sparse numbers are `steps`.
RateForm = Literal["low_rank", "random_sign"]
# The forms that a configuration may name.
StoredValues = Literal["exact", "int8", "int4", "sign", "low_rank", "random_sign"]
Form = Literal["exact", "int8", "int4", "sign", "random_sign", "steps"]
VALUES: tuple[Values, ...] = get_args(Values)
