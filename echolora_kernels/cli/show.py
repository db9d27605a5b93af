"""What a run looks like in a terminal, and in a log file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..training.loop import StepRecord

# retries of a hub that does not answer; parts that are missing where nobody asked for them
_LOGGERS = ("huggingface_hub", "torchao", "bitsandbytes", "torch.utils._pytree")
_LINES = 20  # lines that a whole run prints where there is no terminal to draw a bar on


class RunDisplay:
    """Progress bars on standard error, so that standard output stays free for results; to be used in a `with`."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._spinner: Status | None = None

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_stage()

    def stage(self, text: str) -> None:
        """A line for each part of the work; on a terminal something turns under it until the next begins."""
        self._end_stage()
        self._console.print(Text(text, style="dim"), soft_wrap=True)
        if self._console.is_terminal:
            self._spinner = self._console.status("")
            self._spinner.start()

    def _end_stage(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    @contextmanager
    def batches(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        self._end_stage()
        with self._bar() as bar:
            task = bar.add_task(text, total=total)
            yield lambda done: bar.update(task, completed=done)
        if not self._console.is_terminal:
            self._console.print(f"{text}: {total} questions", highlight=False)

    def training(self, records: Iterator[StepRecord], total: int, done: int) -> Iterable[StepRecord]:
        if done:
            self.stage(f"resuming after step {done}")
        self._end_stage()
        every = max(total // _LINES, 1)
        with self._bar("{task.fields[text]}") as bar:
            task = bar.add_task("training", total=total, completed=done, text="")
            for record in records:
                bar.update(task, completed=record.step, text=_describe(record))
                if not self._console.is_terminal and (record.step % every == 0 or record.step == total):
                    line = f"step {record.step}/{total}  {_describe(record)}"
                    self._console.print(line, highlight=False, soft_wrap=True)
                yield record

    def _bar(self, *fields: str) -> Progress:
        return _bar(self._console, *fields)


def _bar(console: Console, *fields: str, transient: bool = False) -> Progress:
    columns = [TextColumn("{task.description:<16}"), BarColumn(bar_width=24), MofNCompleteColumn()]
    columns += [TextColumn(field) for field in fields]
    hidden = not console.is_terminal
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden, transient=transient)


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error that goes when all is done; gives a function to call with how many are."""
    with _bar(Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the command in one line and with exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None


def quiet_libraries() -> None:
    """Keep other libraries' bars and notices from breaking the display; our own warnings stay."""
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("peft", "transformers"):
        warnings.filterwarnings("ignore", module=module)


def _describe(record: StepRecord) -> str:
    text = f"off {record.loss_off:.3f}"
    if record.loss_on is not None:
        text += f"  on {record.loss_on:.3f}  kd {record.loss_kd:.1e}"
    if record.echo_probability:
        text += f"  {'routed' if record.routed else 'plain '} (p {record.echo_probability:.2f})"
    return text + f"  {record.tokens / record.seconds:.0f} tok/s"


def print_summary(metrics: dict[str, Any], output: Path) -> None:
    """The figures of a finished run as a table on standard output."""
    settings = metrics["settings"]
    table = Table(title=f"{settings['method']} on {settings['data']}", title_justify="left", show_header=False)
    rows = {
        "exact match before": f"{metrics['accuracy_before']:.1%} of {metrics['held_out_questions']}",
        "exact match after": f"{metrics['accuracy_after']:.1%} of {metrics['held_out_questions']}",
        "loss of the deployed branch": f"{metrics['final_loss_off']:.3f} nats a token (last 10 steps)",
        "seconds a step (median)": ", ".join(
            f"{metrics[key]:.2f} {kind}"
            for key, kind in (("seconds_per_routed_step", "with echo"), ("seconds_per_plain_step", "without"))
            if metrics[key] is not None
        ),
        "tokens a second": f"{metrics['tokens_per_second']:.0f}",
        "steps with echo": f"{metrics['routed_steps']} of {settings['steps']}",
        "reloaded by stock PEFT": f"largest logit difference {metrics['reload_max_abs_logit_difference']:g}",
        "adapter": str(output / "adapter"),
        "plot": str(output / "loss.png"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
