"""The commands and their exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from typing import Annotated

import typer
from rich.text import Text

from orthoserde import audit, comparison, conversion, plots
from orthoserde._version import __version__
from orthoserde.cli import objects
from orthoserde.cli.progress import Bar
from orthoserde.cli.show_contents import show_contents
from orthoserde.cli.show_reports import (
    show_conversion,
    show_difference,
    show_picture,
    show_residuals,
    show_verification,
)
from orthoserde.cli.terminal import Output, UnsaidError, complain, message_of
from orthoserde.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FileAccessError,
    FileFormatError,
    MissingPackageError,
    OrthoserdeError,
)
from orthoserde.integrations import in_process
from orthoserde.opening import open_checkpoint, rotations_of, stored_bytes
from orthoserde.watching import watched

#: Exit codes; the epilog says what they mean.
OK, NOT_OK, UNREADABLE, REFUSED, UNSAID, INTERRUPTED = 0, 1, 2, 3, 4, 130

EXIT_CODES = (
    "Exit codes: 0 fine; 1 the answer is no (does not verify, or differs); 2 wrong usage, or the input cannot be read; "
    "3 refused, or a file cannot be written, and nothing was; 4 the standard output cannot be written; 130 interrupted."
)

#: What is raised for wrong usage: click's own, whichever click this typer has.
_USAGE: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

app = typer.Typer(
    name="orthoserde",
    help="Look into checkpoints, check, compare and convert them, without a model.",
    epilog=EXIT_CODES,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

#: What a checkpoint's argument takes.
_PATH = "A safetensors file, a folder of shards, a file of torch.save, or a folder of pyreft's."

Checkpoint = Annotated[str, typer.Argument(metavar="PATH", help=_PATH, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
All = Annotated[bool, typer.Option("--all", help="Leave nothing out of the tables.")]


class To(str, Enum):
    """What ``--to`` takes: the forms of :func:`orthoserde.conversion.convert`."""

    dense = "dense"
    compact = "compact"
    baked = "baked"
    hooks = "hooks"
    torch = "torch"
    pyreft = "pyreft"
    pyreft_full = "pyreft-full"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Those of the process by default.

    Returns:
        The exit code. Whatever is not 0 or 1 is said in one line on the standard error.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # What a command returned, or what typer made of --help, --version and, from some version on, Ctrl-C.
        code = int(app(args=given, prog_name="orthoserde", standalone_mode=False) or OK)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except _USAGE as error:
        complain(f"{_message(error)} (orthoserde --help says more)")
        return UNREADABLE
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return INTERRUPTED
    except typer.Exit as ended:
        return ended.exit_code
    except SystemExit:  # so typer ends where whoever reads its help has gone
        return OK
    except UnsaidError as error:
        complain(str(error))
        return UNSAID
    except (OrthoserdeError, OSError) as error:
        complain(message_of(error))
        return UNREADABLE


def _message(error: BaseException) -> str:
    """What click says of wrong usage, in one line, and without what pydantic, which typer may use, puts before it."""
    say = getattr(error, "format_message", None)
    text = " ".join(str(say() if callable(say) else error).split())
    return text.replace(": Value error, ", ": ", 1).rstrip(".") + "."


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"orthoserde {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""


_options.__doc__ = None


@app.command(epilog=EXIT_CODES)
def inspect(
    path: Checkpoint,
    residuals: Annotated[
        bool,
        typer.Option("--residuals", help="Compute each parametrized tensor, and how far it is from its constraint."),
    ] = False,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE.png", help="Draw spectra and |Q^H Q - I|, which computes the tensors too."),
    ] = None,
    everything: All = False,
    as_json: Json = False,
) -> int:
    """Say what a checkpoint holds. Only headers are read, unless you ask for more."""
    output = Output()
    if plot is not None:
        try:
            plots.check_target(plot)
        except (ConfigError, FileAccessError) as error:
            return _refuse(error)
    code = OK
    with open_checkpoint(path) as found:
        manifest, size = found.manifest, stored_bytes(path)
        value = objects.of_manifest(manifest, path, size)
        lines = show_contents(manifest, path, size, width=output.width, guides=output.guides, everything=everything)
        if residuals:
            with Bar("measuring", 2 * manifest.nbytes) as bar:
                measured = watched(found, bar.advance, verify=False)
                report = audit.verify(measured, in_process(None), rotations_of(path, found))
            value["verification"] = objects.of_verification(report)
            lines += [Text(), *show_residuals(report, output.width, everything=everything)]
            if not report.ok:
                lines.append(Text("NOT OK: orthoserde verify says more", style="bold red"))
        if plot is not None:
            try:
                with Bar("drawing", manifest.nbytes) as bar:
                    picture = plots.plot(watched(found, bar.advance, verify=True), in_process(None), plot)
                value["plot"] = objects.of_picture(picture)
                lines += [Text(), *show_picture(picture, output.width)]
            except plots.NothingToDrawError as error:
                value["plot"] = None
                code = _refuse(error)
            except (ConfigError, MissingPackageError, FileAccessError) as error:
                return _refuse(error)
    if as_json:
        output.json(value)
    else:
        output.lines(lines)
    return code


def _refuse(error: BaseException) -> int:
    complain(message_of(error))
    return REFUSED


@app.command(epilog=EXIT_CODES)
def verify(path: Checkpoint, everything: All = False, as_json: Json = False) -> int:
    """Check every byte and every constraint.

    Every tensor is held to its digest, every computed tensor to its constraint, and bases to orthogonality.
    """
    output = Output()
    with open_checkpoint(path) as found, Bar("verifying", 2 * found.manifest.nbytes) as bar:
        checkpoint = watched(found, bar.advance, verify=False)
        report = audit.verify(checkpoint, in_process(None), rotations_of(path, found))
    if as_json:
        output.json(objects.of_verification(report))
    else:
        output.lines(show_verification(report, output.width, everything=everything))
    return OK if report.ok else NOT_OK


@app.command(epilog=EXIT_CODES)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_PATH, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="What values may be apart, relative to those of A, and count as the same.")
    ] = 0.0,
    model_only: Annotated[bool, typer.Option("--model-only", help="Leave metadata and training state aside.")] = False,
    everything: All = False,
    as_json: Json = False,
) -> int:
    """Say how two checkpoints differ.

    Configuration, the distance of each tensor, of orthogonal ones along their manifold too, and training state.
    """
    output = Output()
    with (
        open_checkpoint(a) as one,
        open_checkpoint(b) as two,
        Bar("comparing", one.manifest.nbytes + two.manifest.nbytes) as bar,
    ):
        sides = [watched(each, bar.advance, verify=True) for each in (one, two)]
        report = comparison.diff(sides[0], sides[1], in_process(None), tolerance=tolerance, model_only=model_only)
    if as_json:
        output.json(objects.of_difference(report))
    else:
        output.lines(show_difference(report, output.width, everything=everything))
    return OK if report.same else NOT_OK


@app.command(epilog=EXIT_CODES)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help=_PATH, show_default=False)],
    target: Annotated[str, typer.Argument(metavar="DST", help="The file or folder to write.", show_default=False)],
    to: Annotated[To, typer.Option(help="The form to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it is a file that is there already.")] = False,
    as_json: Json = False,
) -> int:
    """Write a checkpoint in another form. The source is never written over."""
    output = Output()
    try:
        with Bar("converting", stored_bytes(source)) as bar:
            report = conversion.convert(source, target, to.value, force=force, progress=bar.advance)
    except (CheckpointNotFoundError, FileFormatError):
        raise
    except (OrthoserdeError, OSError) as error:
        if isinstance(error, FileAccessError) and error.filename == source:
            raise
        return _refuse(error)
    if as_json:
        output.json(objects.of_conversion(report))
    else:
        output.lines(show_conversion(report, output.width))
    return OK
