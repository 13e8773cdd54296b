"""The command `avatard`: words to settings, results to lines, errors to one line and an exit status.

What a command needs is imported in it, so that those that need no model answer at once.
"""

from __future__ import annotations

import signal
import time

BEGAN = time.monotonic()
"""When the command was given, as near as its own code can know."""

_interrupted = signal.getsignal(signal.SIGINT)
if _interrupted is signal.default_int_handler:
    # Until there is a main() to catch it, Ctrl-C ends the process as it ends any other, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Annotated, Any  # noqa: E402

import typer  # noqa: E402

from audio.errors import AvatardError  # noqa: E402
from service import VERSION  # noqa: E402

if TYPE_CHECKING:
    from service.batch import Outcome
    from service.batch_plan import BatchRequest
    from service.config import Settings

SOME_FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="avatard",
    help="Make the person in one picture speak, for as long as there is sound.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at the settings.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure how good and how fast it is on this machine.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of settings.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as encoder.crf=20. Repeatable.")
]


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"avatard {VERSION}")
        raise typer.Exit


@app.command("run")
def run_command(
    image: Annotated[Path, typer.Option("--image", "-i", help="A picture of the person: any kind Pillow opens.")],
    audio: Annotated[
        str,
        typer.Option(
            "--audio",
            "-a",
            help="What they say: any audio or video file; live: - for stdin, a FIFO, a URL or a device.",
        ),
    ],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            "-o",
            help="Where the video goes: NAME.mp4, segment:SECONDS:NAME.mp4, LIST.m3u8, rtmp://HOST/APP/KEY, or null:// "
            "to measure. Repeatable.",
        ),
    ],
    pcm: Annotated[
        str | None,
        typer.Option("--format", metavar="ENC:RATE:CH", help="Of raw samples on stdin or a FIFO, as s16le:16000:1."),
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Live: idle on when the voice has ended.")] = False,
    model: Annotated[
        str | None, typer.Option(help="pocket (default), live-avatar-14b, a folder of weights, or FILE.py:FUNCTION.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the person does, in words.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same video. Default 0.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels, as 704x384. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="live-avatar-14b without its files: how fast it is, not how good.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the video if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON with the results.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Make a picture speak: a file into a file as fast as it can, a live voice or a live output in real time.

    Exit status: 0 all is there, 1 an output was lost while others went on, 2 what you can mend, 130 it was stopped.
    """
    from service import log
    from service.config import load_settings
    from service.live import is_live
    from service.run import Stopped

    log.set_up()
    width, height = parse_size(size)
    settings = load_settings(
        config,
        [*(assignments or ()), *(["model.options.random_weights=true"] if random_weights else [])],
        model__name=model,
        model__prompt=prompt,
        model__seed=seed,
        model__width=width,
        model__height=height,
        model__steps=steps,
    )
    show = _Show(interactive=sys.stderr.isatty() and not quiet and not as_json, as_json=as_json, quiet=quiet)
    try:
        if is_live(audio, tuple(to), pcm):
            _run_live(settings, show, image, audio, tuple(to), pcm, overwrite, stay)
        else:
            _run_file(settings, show, image, Path(audio), tuple(to), overwrite)
    except Stopped:
        _complain("stopped before the first frame; nothing was written")
        raise typer.Exit(INTERRUPTED) from None


@dataclass(frozen=True)
class _Show:
    """How much a run tells: to a person at a terminal, to a program, or nothing but errors."""

    interactive: bool
    as_json: bool
    quiet: bool


class _Results:
    """What --json prints, a line each. When nobody can have them any more, the work goes on without."""

    def __init__(self) -> None:
        # As it is now: what Ray prints goes to stderr later, by another sys.stdout.
        self._file = sys.stdout
        self._lost = False

    def tell(self, result: Mapping[str, Any]) -> None:
        if self._lost:
            return
        try:
            print(json.dumps(result), file=self._file, flush=True)
        except OSError as error:
            self._lost = True
            # What it still holds would be tried again at the end of the process, and change its status.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
            why = (error.strerror or str(error)).lower()
            _complain(f"warning: stdout: results cannot be printed any more ({why}); the work goes on")


def _run_file(
    settings: Settings, show: _Show, image: Path, audio: Path, targets: tuple[str, ...], overwrite: bool
) -> None:
    from service.run import RunRequest, Watcher, run

    request = RunRequest(image=image, audio=audio, targets=targets, overwrite=overwrite)
    if show.interactive:
        from service.progress import Bar

        with Bar(Path(targets[0]).name) as bar:
            result = run(request, settings, bar, BEGAN)
    else:
        result = run(request, settings, Watcher(), BEGAN)
    for warning in [] if show.quiet else result.warnings:
        _complain(f"warning: {warning}")
    if show.as_json:
        _Results().tell(vars(result))
    elif show.interactive:
        print(
            f"{', '.join(result.outputs) or targets[0]}: {result.seconds:.2f} s of video in {result.wall_s:.1f} s, "
            f"{result.times_real_time:.2f} x real time",
            file=sys.stderr,
        )
    if result.stopped:
        where = f"{', '.join(result.outputs)} plays up to there" if result.outputs else "nothing was kept"
        _complain(f"stopped after {result.seconds:.2f} s of video; {where}")
        raise typer.Exit(INTERRUPTED)
    if result.lost:
        raise typer.Exit(SOME_FAILED)


def _run_live(
    settings: Settings,
    show: _Show,
    image: Path,
    audio: str,
    targets: tuple[str, ...],
    pcm: str | None,
    overwrite: bool,
    stay: bool,
) -> None:
    from service.live import LiveRequest, LiveWatcher, broadcast

    request = LiveRequest(image, audio, targets, pcm, overwrite, stay)
    if show.interactive:
        from service.progress import StatusLine

        with StatusLine() as line:
            result = broadcast(request, settings, line, BEGAN)
    elif show.as_json:
        results, watcher = _Results(), LiveWatcher()
        watcher.event = lambda event: results.tell(event)  # type: ignore[method-assign]
        result = broadcast(request, settings, watcher, BEGAN)
        results.tell({"event": "ended", **vars(result)})
    else:
        result = broadcast(request, settings, LiveWatcher(), BEGAN)
    if show.interactive:
        kept = f"; {', '.join(result.outputs)}" if result.outputs else ""
        halved = f", {result.repeated} a picture's second showing" if result.repeated else ""
        print(f"off air after {result.seconds:.1f} s, {result.held} frames held{halved}{kept}", file=sys.stderr)
    elif not show.as_json and not show.quiet and not result.frames:
        _complain("stopped before the first frame; nothing was sent")
    if result.lost:
        raise typer.Exit(SOME_FAILED)


@app.command("serve")
def serve_command(config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Run the daemon: jobs and live sessions over HTTP and MQTT, and a page to look at."""
    from service.config import load_settings
    from service.daemon import serve

    raise typer.Exit(serve(lambda: load_settings(config, assignments or ())))


@app.command()
def doctor(
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether this machine can do what the settings ask, and what to do where it cannot."""
    from service.config import load_settings
    from service.doctor import examine, worst

    findings = []
    for finding in examine(lambda: load_settings(config, assignments or ())):
        findings.append(finding)
        if not as_json:
            print(finding.line, flush=True)
    if as_json:
        print(json.dumps({"level": worst(findings), "findings": [vars(finding) for finding in findings]}))
    raise typer.Exit(1 if worst(findings) == "problem" else 0)


@app.command("batch")
def batch_command(
    image: Annotated[
        list[Path],
        typer.Option(
            "--image",
            "-i",
            help="A picture for all, or a table (.csv, .jsonl) with a line for a sound: audio, image, prompt, seed, "
            "name. Repeatable: a picture and a table.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of results.")],
    sources: Annotated[
        list[Path] | None, typer.Argument(metavar="[AUDIO]...", help="Folders and files. Without any: the table's.")
    ] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="Of names in the folders, as '*.wav' or 'en/*'. Repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Of names and folders to leave out. Repeatable.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive/--flat", help="Whether folders in folders count.")] = True,
    model: Annotated[str | None, typer.Option(help="As of avatard run.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the person does, where the table does not say.")] = None,
    seed: Annotated[int | None, typer.Option(help="Where the table does not say. Default 0.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels, as 704x384. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Work on a Ray cluster; local: on one of this machine alone.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="With --ray: models side by side. Default: one for each GPU, or 2 cores.")
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make all of it anew, whatever is there.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each result, and one at the end.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Make many sounds into files. Begun again, it goes on where it was, and makes nothing twice.

    Exit status: 0 all is there, 1 something failed (see report.txt in the folder of results), 2 it could not begin,
    130 it was stopped.
    """
    from service import log
    from service.batch_plan import BatchRequest
    from service.config import load_settings

    log.set_up()
    width, height = parse_size(size)
    settings = load_settings(
        config,
        assignments or (),
        model__name=model,
        model__prompt=prompt,
        model__seed=seed,
        model__width=width,
        model__height=height,
        model__steps=steps,
    )
    request = BatchRequest(
        sources=tuple(sources or ()),
        images=tuple(image),
        out=out,
        patterns=tuple(pattern or ()),
        exclude=tuple(exclude or ()),
        recursive=recursive,
        overwrite=overwrite,
        retry_failed=retry_failed,
    )
    if dry:
        _tell_plan(request, settings, as_json)
        return
    if actors is not None and ray is None:
        raise AvatardError(f"--actors {actors}: is for a Ray cluster; add --ray ADDRESS or --ray local")
    show = _Show(interactive=sys.stderr.isatty() and not quiet and not as_json, as_json=as_json, quiet=quiet)
    _run_batch(request, settings, show, ray, actors)


def _tell_plan(request: BatchRequest, settings: Settings, as_json: bool) -> None:
    from service.batch import dry_run
    from service.batch_plan import shown

    results = _Results()
    for step in dry_run(request, settings):
        item = step.item
        if as_json:
            told = {"do": step.do, "name": item.name, "audio": str(item.audio), "image": str(item.image)}
            results.tell(told | {"prompt": item.prompt, "seed": item.seed, "why": step.why})
        else:
            why = f"  {step.why}" if step.why else ""
            print(f"{step.do:6}  {shown(item.name)}  {shown(item.audio)}  {shown(item.image)}{why}")


def _run_batch(request: BatchRequest, settings: Settings, show: _Show, ray: str | None, actors: int | None) -> None:
    from service.batch import BatchWatcher, batch

    results = _Results()
    workers = None
    if ray is not None:
        from service.batch_ray import ray_workers

        workers = ray_workers(ray, actors, request.out)
    if show.interactive:
        from service.progress import BatchBars

        with BatchBars() as bars:
            result = batch(request, settings, bars, workers)
    else:
        watcher = BatchWatcher()
        if show.as_json:
            watcher.ended = lambda slot, outcome: results.tell(outcome.told())  # type: ignore[method-assign]
        elif not show.quiet:
            watcher.ended = lambda slot, outcome: _tell_failure(outcome)  # type: ignore[method-assign]
        result = batch(request, settings, watcher, workers)
    counts, report = result.counts(), request.out / "report.txt"
    if show.as_json:
        results.tell({"counts": counts, "stopped": result.stopped, "wall_s": result.wall_s, "report": str(report)})
    elif show.interactive:
        told = ", ".join(f"{number} {word}" for word, number in counts.items())
        print(f"{request.out}: {told}, in {result.wall_s:.1f} s; see {report}", file=sys.stderr)
    if result.halted:
        _complain(f"{result.halted}; {result.count('waiting')} of {len(result.outcomes)} wait")
    if result.stopped:
        _complain(f"stopped; {result.count('waiting')} of {len(result.outcomes)} wait, the same command goes on")
        raise typer.Exit(INTERRUPTED)
    if result.halted or result.count("failed"):
        raise typer.Exit(SOME_FAILED)


def _tell_failure(outcome: Outcome) -> None:
    from service.batch_plan import shown

    if outcome.state == "failed":
        _complain(f"{shown(outcome.item.name)}: {outcome.error}")


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="live-avatar-14b")],
    to: Annotated[Path | None, typer.Option(help="The folder; default: the settings' paths.models.")] = None,
    revision: Annotated[str | None, typer.Option(help="A revision of the weights other than the tested one.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and check again what is there already.")] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Download the weights of a model, or go on where a download broke off."""
    from service import log
    from service.config import load_settings
    from service.fetch import fetch_model

    log.set_up()
    try:
        folder = fetch_model(model, load_settings(config, assignments or ()), to, revision, verify)
    except KeyboardInterrupt:
        _complain("stopped; the same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None
    print(f"{model} is in {folder}")


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="A model; without one: what each consists of.")] = None,
    named: Annotated[str | None, typer.Option("--model", help="The same, as an option.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels, as 704x384. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    merge: Annotated[bool, typer.Option("--merge-last-step", help="One denoising step less, at little cost.")] = False,
    live: Annotated[
        bool | None,
        typer.Option("--live/--files", help="At 25 fps, the largest size that holds them; or as fast as it goes."),
    ] = None,
    vram: Annotated[str, typer.Option(metavar="24GiB", help="Of each GPU. Default: what is free.")] = "",
    ram: Annotated[
        str,
        typer.Option(metavar="64GiB", help="Of this machine. Default: what is free; 64GiB for a GPU that is not here."),
    ] = "",
    gpus: Annotated[int, typer.Option(help="How many share the steps.")] = 1,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="H200, 4090, ... instead of those that are here.")] = "",
    weights: Annotated[str, typer.Option(metavar="bf16|fp8", help="Default: whichever is better.")] = "",
    keys: Annotated[str, typer.Option(metavar="bf16|fp8", help="Of the remembered keys and values.")] = "",
    schedule: Annotated[str, typer.Option(metavar="sequential|wavefront", help="Of the steps.")] = "",
    offload: Annotated[str, typer.Option(metavar="none|cpu|group|model|block", help="What may leave the GPU.")] = "",
    measure: Annotated[bool, typer.Option("--measure", help="Measure the GPU's rates first, if unknown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a model runs on a GPU, how and how fast, and what each model consists of. Loads nothing."""
    from service.plan import Question, answer

    told = answer(
        Question(
            model=named or model,
            size=parse_size(size),
            steps=steps,
            merge_last_step=merge,
            live=live,
            vram=vram,
            ram=ram,
            gpus=gpus,
            gpu=gpu,
            weights=weights,
            keys=keys,
            schedule=schedule,
            offload=offload,
            measure=measure,
        )
    )
    print(json.dumps(told.table) if as_json else "\n".join(told.lines))


@config_app.command("show")
def config_show(config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Print every setting with its value and what it means, as a settings file."""
    from service.config import load_settings, reference_yaml

    print(reference_yaml(load_settings(config, assignments or ())), end="")


@config_app.command("check")
def config_check(file: Annotated[Path, typer.Argument(help="A YAML file of settings.")]) -> None:
    """Say whether a settings file is right, and if not, where and why."""
    from service.config import load_settings

    load_settings(file)
    print(f"{file}: all settings are known and valid")


ModelOption = Annotated[str | None, typer.Option(help="Another model than the settings name.")]
ImageOption = Annotated[Path | None, typer.Option(help="Another picture than the bundled presenter.")]
AudioOption = Annotated[Path | None, typer.Option(help="Another sound than the bundled sentence; it is repeated.")]


@bench_app.command(
    "quality",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench_quality(context: typer.Context) -> None:
    """Lip sync, identity, drift and seams of the embedded model, on presenters and speech that it never saw."""
    # a long job that gains nothing from a second thread, and loses much by one where the cores are shared
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    evaluate: Any = importlib.import_module("avatar.pocket.evaluate")
    evaluate.main(context.args)


@bench_app.command(
    "gpu", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench_gpu(context: typer.Context) -> None:
    """The full-size model with random weights on this GPU: plans against measurement, speed, errors; see --help."""
    gpu_bench: Any = importlib.import_module("avatar.gpu_bench")
    gpu_bench.main(context.args)


@bench_app.command("speed")
def bench_speed(
    model: ModelOption = None,
    image: ImageOption = None,
    audio: AudioOption = None,
    seconds: Annotated[float, typer.Option(help="Seconds of video to make.")] = 30.0,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Seconds of each stage, from the command to the finished file."""
    from service import bench
    from service.config import load_settings

    settings = load_settings(config, assignments or (), model__name=model)
    picture, sound = image or bench.example("presenter.png"), audio or bench.example("welcome.wav")
    result = bench.speed(settings, picture, sound, seconds)
    stages = bench.stages(settings)
    if as_json:
        print(json.dumps({**vars(result), "stages_ms": stages}))
    else:
        print("\n".join(bench.speed_lines(result, stages)))


@bench_app.command("memory")
def bench_memory(
    model: ModelOption = None,
    image: ImageOption = None,
    audio: AudioOption = None,
    seconds: Annotated[float, typer.Option(help="Seconds of video to make.")] = 600.0,
    every: Annotated[float, typer.Option(help="Seconds of video between two samples.")] = 60.0,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Resident memory over a long input, as a curve."""
    from service import bench
    from service.config import load_settings

    settings = load_settings(config, assignments or (), model__name=model)
    picture, sound = image or bench.example("presenter.png"), audio or bench.example("welcome.wav")
    print("\n".join(bench.memory_lines(bench.memory(settings, picture, sound, seconds, every))))


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of WxH (or W*H, as the Wan tools write it)."""
    if text is None:
        return None, None
    match = re.fullmatch(r"\s*(\d+)\s*[xX*×]\s*(\d+)\s*", text)
    if match is None:
        raise AvatardError(f"--size {text}: not width x height in pixels, such as 704x384")
    return int(match[1]), int(match[2])


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it is gone
        print("avatard: " + " ".join(line.split()), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; ends the process with 0, 2 for what the user can mend (one line), 130 for Ctrl-C."""
    try:
        command = typer.main.get_command(app)
        status = command.main(args=arguments, prog_name="avatard", standalone_mode=False)
    except AvatardError as error:
        _complain(str(error))
        status = USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped")
        status = INTERRUPTED
    except Exception as error:
        if isinstance(error, getattr(sys.modules.get("service.run"), "Stopped", ())):
            _complain("stopped before the first frame")
            sys.exit(INTERRUPTED)
        # What the parser of the command line complains of: an unknown option, a missing one.
        if not hasattr(error, "format_message"):
            raise
        _complain(f"{error.format_message()} See avatard --help.")
        status = USER_ERROR
    sys.exit(status if isinstance(status, int) else 0)


if _interrupted is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)

if __name__ == "__main__":
    main()
