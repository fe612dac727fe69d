"""The command line: one table of commands, and one place where errors become exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from hydralv_tune import cli_data, cli_study, cli_trial
from hydralv_tune.console import say
from hydralv_tune.errors import HydraLVError, InputError

# Typer carries its own copy of Click; this is the base of its usage errors, whichever copy it is.
ClickError: type[Any] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

EXIT_WORK_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="hydralv-tune",
    help="Search training configurations and decoding thresholds for 3D vesicle segmentation.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Data": {
        "phantom": cli_data.phantom,
        "inspect": cli_data.inspect,
        "check": cli_data.check,
        "score": cli_data.score,
        "decode": cli_data.decode,
        "sweep": cli_data.sweep,
    },
    "One candidate": {
        "train": cli_trial.train,
        "predict": cli_trial.predict,
    },
    "Studies": {
        "run": cli_study.run,
        "status": cli_study.status,
        "export": cli_study.export,
        "report": cli_study.report,
        "dashboard": cli_study.dashboard,
        "demo": cli_study.demo,
        "doctor": cli_study.doctor,
    },
}
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)


def _version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        from hydralv_tune import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Search training configurations and decoding thresholds for 3D vesicle segmentation."""


def exit_code(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, with every error told as the contract says.

    Args:
        arguments: The words after the program's name; those of this process by default.
    """
    try:
        code = app(args=arguments, standalone_mode=False)
    except ClickError as error:
        say(f"error: {error.format_message()}")
        return EXIT_WRONG_INPUT
    except InputError as error:
        say(f"error: {error}")
        return EXIT_WRONG_INPUT
    except HydraLVError as error:
        code = getattr(error, "exit_code", EXIT_WORK_FAILED)
        say(str(error) if code == EXIT_INTERRUPTED else f"error: {error}")
        return int(code)
    except (KeyboardInterrupt, typer.Abort):
        say("Interrupted.")
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(exit_code())
