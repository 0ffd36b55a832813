"""The group of all commands: it imports a command when somebody calls it."""

from importlib import import_module
from typing import Any

import click

from mergekit_mediator.errors import MediatorError

_SUMMARIES = {
    "add-expert": "Add an expert to an artifact.",
    "calibrate": "Fit the router of an artifact to example prompts.",
    "classify": "Serve the experts' probabilities for each text over HTTP.",
    "config": "Print the files with which engines and routers serve an artifact.",
    "demo": "Merge four skills of a small model and see each prompt routed.",
    "evaluate": "Score an artifact and its rivals on tasks.",
    "export": "Write experts as LoRA adapters that other tools load.",
    "gateway": "Route requests to engines that hold the exported experts.",
    "generate": "Answer prompts, each with the experts that it needs.",
    "inspect": "Show experts, conflict, routed layers and sizes.",
    "merge": "Merge models into an artifact.",
    "plan": "Show what a merge will read, write and need, before it runs.",
    "push": "Send an artifact to the Hugging Face Hub.",
    "remove-expert": "Remove an expert from an artifact.",
    "rename-expert": "Rename an expert of an artifact.",
    "report": "Write one page about an artifact.",
    "requantize": "Store the experts of an artifact in fewer bytes.",
    "verify": "Check every digest of an artifact, and its base.",
}
# The module of each command that is not in `main`. Some import libraries that take seconds.
_MODULES = {
    "add-expert": "experts",
    "calibrate": "calibrate",
    "classify": "services",
    "config": "config",
    "demo": "demo",
    "evaluate": "evaluate",
    "export": "export",
    "gateway": "services",
    "generate": "generate",
    "merge": "merge",
    "plan": "merge",
    "push": "share",
    "remove-expert": "experts",
    "rename-expert": "experts",
    "report": "report",
    "requantize": "experts",
}


class Commands(click.Group):
    """A group that imports a command when it is called, and shows an error as one readable line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of all commands."""
        return sorted({*super().list_commands(ctx), *_MODULES})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is no command of this name."""
        if cmd_name in _MODULES:
            module = import_module(f"mergekit_mediator.cli.{_MODULES[cmd_name]}")
            command: click.Command = getattr(module, cmd_name.replace("-", "_"))
            return command
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the summaries of all commands without an import of any."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_SUMMARIES.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command.

        Raises:
            ClickException: the command failed with a MediatorError; `--verbose` raises that error itself.
        """
        try:
            return super().invoke(ctx)
        except MediatorError as error:
            if ctx.params.get("verbose"):
                raise
            raise click.ClickException(str(error)) from error
