"""The build command that puts the start-up hook's files beside the package, in wheels and editable installs."""

from pathlib import Path

from setuptools.command.build_py import build_py as _build_py

_NAME = "mergekit_mediator"
# Every Python of today runs the import lines of `.pth` files. Python 3.15 and later read the `.start` file
# of the same name instead (PEP 829).
STARTUP_FILES = {
    f"{_NAME}.pth": f"import {_NAME}._autoload; {_NAME}._autoload.install()\n",
    f"{_NAME}.start": f"{_NAME}._autoload:install\n",
}


class build_py(_build_py):  # noqa: N801 (the name that setuptools looks for)
    """The stock command, which also writes `STARTUP_FILES` to the root of the later site-packages."""

    def run(self) -> None:
        super().run()
        for name, text in STARTUP_FILES.items():
            Path(self._site_packages(), name).write_text(text)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return outputs
        return outputs + [str(Path(self.build_lib, name)) for name in STARTUP_FILES]

    def _site_packages(self) -> str:
        """Return the directory whose files are installed; an editable wheel takes none from `build_lib`."""
        if not self.editable_mode:
            return str(self.build_lib)
        directory = str(self.distribution.get_command_obj("install").install_lib)
        Path(directory).mkdir(parents=True, exist_ok=True)
        return directory
