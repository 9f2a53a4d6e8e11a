"""The command line: arguments in, records or tables out. What commands do lives elsewhere.

Results go to stdout, progress and errors to stderr. With `--json` stdout holds one JSON value and
nothing else. Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, in one line. Heavy
imports happen inside commands: `--help` and `--version` load no torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moelten import __version__
from moelten.commands import terminal
from moelten.errors import LayoutError

OK, CHECK_FAILED, BAD_INPUT = 0, 1, 2

app = typer.Typer(
    name="moelten",
    help="Run, inspect, quantize and verify the experts of Mixture-of-Experts checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]


class DeviceKind(str, Enum):
    """Where the experts would run."""

    cpu = "cpu"
    cuda = "cuda"


Device = Annotated[DeviceKind, typer.Option(help="Where the experts run.")]
Backend = Annotated[
    str | None, typer.Option(help="A backend's name; default: the first that runs.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Sampled = Annotated[int, typer.Option("--experts", help="Experts per layer; 0 means all.", min=0)]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moelten {__version__}")
        raise typer.Exit(OK)


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _command(name: str) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Register a command that returns its exit code, and whose errors are one line."""

    def register(function: Callable[..., int]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> None:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            try:
                code = function(*arguments, **options)
            except (ValueError, NotImplementedError, LayoutError, OSError, ImportError) as error:
                typer.echo(f"error: {' '.join(str(error).split())}", err=True)
                code = BAD_INPUT
            raise typer.Exit(code)

        return app.command(name=name)(wrapper)

    return register


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a checkpoint folder with config.json")
    return path


@_command("run")
def run_command(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint folder; default: small ones, made here.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="MoE layers to run; default: all.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per layer.")] = 16,
    backend: Backend = None,
    seed: Seed = 0,
    json_output: Json = False,
) -> int:
    """Load the experts, pack them, run tokens, and hold the result to an independent decoder."""
    from moelten.commands.run import record, run_checkpoint, run_demos

    options: dict[str, Any] = {"layers": layers, "tokens": tokens, "backend": backend, "seed": seed}
    with terminal.show_progress() as progress:
        if checkpoint is None:
            refused: list[str] = []
            records = list(run_demos(progress=progress, skipped=refused.append, **options))
            typer.echo("".join(f"skipped {reason}\n" for reason in refused), err=True, nl=False)
        else:
            results = run_checkpoint(_folder(checkpoint), progress=progress, **options)
            records = [record(results, str(checkpoint), None)]
    if json_output:
        terminal.print_json(records)
    else:
        terminal.print_run(records)
    return OK if all(r["ok"] for r in records) else CHECK_FAILED


@_command("inspect")
def inspect_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    device: Device = DeviceKind.cpu,
    json_output: Json = False,
) -> int:
    """What is in a checkpoint, its scheme, and whether it runs here; reads headers alone."""
    from moelten.commands.describe import describe_checkpoint

    found = describe_checkpoint(_folder(checkpoint), device.value)
    if json_output:
        terminal.print_json(found)
    else:
        terminal.print_checkpoint(found)
    return OK


@_command("quantize")
def quantize_command(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="A folder to write; must not hold anything.")],
    weight_format: Annotated[
        str,
        typer.Option("--format", help="int4g32, int4g64, int4g128, int4, mxfp4, nvfp4, fp8, ..."),
    ],
    activations: Annotated[
        str, typer.Option(help="Recorded for the reader: bf16, fp8, int8, ...")
    ] = "bf16",
    json_output: Json = False,
) -> int:
    """Quantize the routed experts and write a compressed-tensors checkpoint; the rest is copied."""
    from moelten.checkpoints.writer import quantize_checkpoint
    from moelten.commands.describe import find_format

    weights = find_format(weight_format, "weights")
    rounded = find_format(activations, "activations")
    with terminal.show_progress() as progress:
        written = quantize_checkpoint(
            _folder(source),
            target,
            weights,
            activation_format=rounded,
            progress=lambda done, total, text: progress(text, total),
        )
    record = {
        "source": str(source),
        "target": str(written.path),
        "format": written.weight_format.name,
        "activations": written.activation_format.name,
        "bytes_before": written.bytes_before,
        "bytes_after": written.bytes_after,
        "layer_errors": {str(layer): error for layer, error in written.layer_errors.items()},
    }
    if json_output:
        terminal.print_json(record)
    else:
        terminal.print_quantized(record)
    return OK


@_command("explain")
def explain_command(
    what: Annotated[
        str, typer.Argument(help="A scheme, e.g. int4g32_bf16, or a checkpoint folder.")
    ],
    device: Device = DeviceKind.cpu,
    hidden_size: Annotated[int, typer.Option(help="H of a scheme's layer.")] = 4096,
    intermediate_size: Annotated[int, typer.Option(help="I of a scheme's layer.")] = 2048,
    num_experts: Annotated[int, typer.Option(help="E of a scheme's layer.")] = 64,
    json_output: Json = False,
) -> int:
    """Which backend would run it, and why each other one would not; exit code 1 if none would."""
    from moelten.commands.describe import describe_checkpoint, describe_spec, find_scheme
    from moelten.weights import ExpertSpec

    if Path(what).is_dir():
        found = describe_checkpoint(Path(what), device.value)["kinds"]
    else:
        spec = ExpertSpec(find_scheme(what), num_experts, hidden_size, intermediate_size)
        found = [describe_spec(spec, device.value)]
    if json_output:
        terminal.print_json(found)
    else:
        for kind in found:
            terminal.print_spec(kind)
    return OK if all(kind["runs"] for kind in found) else CHECK_FAILED


@_command("verify")
def verify_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    against: Annotated[
        Path | None, typer.Option(help="Another checkpoint of the same model to compare with.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative error; default 1e-6, with --against 0.2."),
    ] = None,
    experts: Sampled = 4,
    json_output: Json = False,
) -> int:
    """Decode experts a second time, by definition, and compare; or compare two checkpoints."""
    from moelten.checkpoints import Checkpoint
    from moelten.commands import verify

    opened = Checkpoint(_folder(checkpoint))
    with terminal.show_progress(len(opened.layers)) as progress:
        if against is None:
            bound = verify.DECODING_TOLERANCE if tolerance is None else tolerance
            found = list(verify.compare_decoding(opened, experts or None, progress))
        else:
            bound = verify.QUANTIZATION_TOLERANCE if tolerance is None else tolerance
            other = Checkpoint(_folder(against))
            found = list(verify.compare_checkpoints(opened, other, experts or None, progress))
    layers = [vars(c) | {"ok": c.finite and c.rel_error <= bound} for c in found]
    result = {"ok": all(c["ok"] for c in layers), "tolerance": bound, "layers": layers}
    if json_output:
        terminal.print_json(result)
    else:
        terminal.print_comparison(result)
    return OK if result["ok"] else CHECK_FAILED


@_command("doctor")
def doctor_command(json_output: Json = False) -> int:
    """Versions, hardware, backends and missing extras of this installation."""
    from moelten.commands.doctor import report

    sections = report()
    if json_output:
        terminal.print_json(sections)
    else:
        terminal.print_entries(sections)
    return OK


@_command("bench")
def bench_command(
    device: Annotated[
        DeviceKind | None, typer.Option(help="Default: a GPU if there is one, else the CPU.")
    ] = None,
    scheme: Annotated[
        list[str], typer.Option(help="Schemes, by commas or by repeating the option.")
    ] = ["int4g32_bf16", "mxfp4_bf16"],  # noqa: B006 - typer reads it
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Models' shapes: A, gpt-oss-20b, ...; default: A on a GPU, else small."),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="Numbers of tokens; default: 1,4,16,...,4096 on a GPU, else 1,16,128."),
    ] = None,
    routing: Annotated[list[str], typer.Option(help="uniform, zipf, onehot.")] = ["uniform"],  # noqa: B006
    hidden_size: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    num_experts: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    backend: Backend = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time of one point's rounds; default: 1 on a GPU, else 20.")
    ] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file, written again after every record; other points' records stay."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the records, with all of --output, to a PNG file (extra: plot)."),
    ] = None,
    json_output: Json = False,
) -> int:
    """Time whole layers against measured floors; on a CPU, beside transformers' own experts too."""
    from moelten.commands import bench
    from moelten.commands.bench_records import TOLERANCE, is_right, merge, read_records
    from moelten.commands.bench_workload import find_shape
    from moelten.commands.describe import find_scheme
    from moelten.commands.doctor import require_extra
    from moelten.commands.plot import draw

    if plot is not None:
        require_extra("plot", "--plot")
    where = bench.choose_device(device.value if device else None)
    default = bench.DEFAULTS[where]
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    counts = [_count(text) for text in _listed(tokens or [default.tokens])]
    layers = bench.choose_layers(
        [find_scheme(name) for name in _listed(scheme)],
        [find_shape(name, given) for name in _listed(shape or [default.shape])],
        device=where,
        backend=backend,
        skipped=lambda reason: typer.echo(f"skipped {reason}", err=True),
    )
    records: list[dict[str, Any]] = []
    kept = read_records(output) if output is not None and output.exists() else []
    with terminal.show_progress() as progress:
        for record in bench.run(
            layers,
            counts,
            routings=_listed(routing),
            device=where,
            backend=backend,
            seconds=default.seconds if seconds is None else seconds,
            seed=seed,
            progress=progress,
        ):
            records.append(record)
            if output is not None:
                output.write_text(terminal.json_text(merge(kept, records)) + "\n")
    if plot is not None:
        draw(merge(kept, records), plot)
    if json_output:
        terminal.print_json(records)
    else:
        terminal.print_bench(records)
    wrong = [r for r in records if not is_right(r)]
    for r in wrong:
        point = f"{r['scheme']} at {r['shape']}, {r['routing']}, {r['tokens']} tokens"
        error = f"relative error {r['rel_error']:.2e} is above {TOLERANCE:.1e}"
        typer.echo(f"error: {point}: {error}; its time counts for nothing", err=True)
    return CHECK_FAILED if wrong else OK


def _listed(texts: list[str]) -> list[str]:
    """The parts of an option that was repeated or given with commas."""
    return [part.strip() for text in texts for part in text.split(",")]


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--tokens takes numbers such as 1,16,128, got {text!r}")
    return int(text)
