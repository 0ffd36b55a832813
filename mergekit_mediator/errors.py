"""The errors a user can meet. Each message is one readable line: what, where, what was got, what to do."""


class MediatorError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(MediatorError):
    """A merge configuration that cannot be carried out as written."""


class InputError(MediatorError):
    """A model, tensor or file that was given to a merge and cannot be merged."""


class OutputError(MediatorError):
    """An output directory that cannot be written or must not be overwritten."""


class ArtifactError(MediatorError):
    """A mediator artifact that is missing, incomplete, altered or malformed."""


class RoutingError(MediatorError):
    """A request that cannot be routed, or a router that cannot be fitted or loaded."""


class MixtureError(MediatorError):
    """A mixture of experts that cannot be applied to the model."""


class SettingError(MediatorError):
    """A setting of a routed model that does not exist, or cannot have the value it is given."""


class ExportError(MediatorError):
    """An expert that cannot be written in the format of another tool."""


class EngineError(MediatorError):
    """An engine that cannot serve an artifact as it was started."""


class ShareError(MediatorError):
    """An artifact that cannot be sent to the Hub, or fetched from there."""


class TaskError(MediatorError):
    """Evaluation data that cannot be loaded or scored."""


class PromptError(MediatorError):
    """A prompt that cannot be turned into tokens, or a file of prompts that cannot be read."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
