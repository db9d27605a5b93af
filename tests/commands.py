"""The command, run in the process of a test."""

import pytest

from echolora_kernels.cli import main as cli


@pytest.fixture
def echolora(monkeypatch, capsys):
    """Exit status of `echolora ARGUMENTS`; of an error that a user can mend, whose status is 2, what it says."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["echolora", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        if exit.value.code != 2:
            return exit.value.code
        said = capsys.readouterr().err
        return said[said.index("echolora: ") :].removesuffix("\n")

    return run
