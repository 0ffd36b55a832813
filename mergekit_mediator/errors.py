"""The errors that a user can meet.

Each message is one readable line: what was required, where, what was got, what to do.
"""


class MediatorError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(MediatorError):
    """A merge configuration that cannot be carried out as written."""


class InputError(MediatorError):
    """A model, tensor or file that a merge cannot take as input."""


class OutputError(MediatorError):
    """An output directory that cannot be written or must not be overwritten."""


class ArtifactError(MediatorError):
    """A mediator artifact that is missing, incomplete, altered or malformed."""


class EditError(MediatorError):
    """A change of an artifact that cannot be carried out as asked."""


class RoutingError(MediatorError):
    """A request that cannot be routed, or a router that cannot be fitted or loaded."""


class MixtureError(MediatorError):
    """A mixture of experts that cannot be applied to the model."""


class SettingError(MediatorError):
    """A setting of a routed model that does not exist, or a value that the setting does not allow."""


class ExportError(MediatorError):
    """An expert that cannot be written in the format of another tool."""


class EngineError(MediatorError):
    """An engine whose options do not allow it to serve an artifact."""


class ShareError(MediatorError):
    """An artifact that cannot be sent to the Hub, or fetched from there."""


class TaskError(MediatorError):
    """Evaluation data that cannot be loaded or scored."""


class PromptError(MediatorError):
    """A prompt that cannot be turned into tokens, or a file of prompts that cannot be read."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if the text is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
