"""Prints what a detector's programs do on a GPU that is not there."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import jax

from hpr_jax.analysis.compiled import CompiledProgram, Launch
from hpr_jax.analysis.costs import evaluation_buckets
from hpr_jax.analysis.describe import Subject
from hpr_jax.analysis.gpu_compiler import (
    CARDS,
    USABLE,
    Card,
    Compiled,
    check_compiler,
    compile_traced,
    largest_batch,
    programs_of,
)
from hpr_jax.analysis.programs import Traced, traced_inference, traced_training
from hpr_jax.analysis.scopes import module_names
from hpr_jax.analysis.text_table import print_table
from hpr_jax.data.loading.batch_plan import Shape
from hpr_jax.models.build import abstract_detector

# What the table of programs counts.
COUNTED = """\
GB moved: operands and results of each launch once, caches ignored. At least: each launch takes the time of its bytes or of
its products at the rates of the data sheet ({bandwidth:.2f} TB/s, {rate:.0f} TFLOP/s in bfloat16), and starting it takes
none. Kept: results. Peak: all that is on the card while the program runs. Of {memory:.1f} GB JAX takes {usable:.0%} by
default, in which {fits} fit at this size."""
WITHOUT_CARD = "Without the card, XLA tries out no settings of kernels, takes no Triton products, and sorts by its fallback."


@dataclasses.dataclass(frozen=True)
class Case:
    """What the programs are compiled for.

    Attributes:
      image: (height, width) of the images; None for the largest bucket of evaluation.
      images: of a batch; in training each has all its views.
      objects: room for true boxes in each view.
    """

    image: Shape | None
    images: int
    objects: int


def describe_compiled(subject: Subject, card_name: str, case: Case, rows: int) -> None:
    """Compiles inference and a training step for a card, and prints what they do there.

    Args:
      card_name: one of `CARDS`.
      rows: how many rows the tables of modules and launches have.

    Raises:
      UserError: programs cannot be compiled for the card on this machine, or see `Subject.settings`.
    """
    check_compiler()
    config, num_classes = subject.settings()
    image = case.image or list(evaluation_buckets(config))[-1]
    card, step = CARDS[card_name], config.copy_and_resolve_references()
    # The batch is computed at once, so that the programs are those of a whole step.
    step.train.update(batch_size=case.images, accumulation_steps=1)
    with programs_of(card) as mesh:
        detector = abstract_detector(config.model, num_classes, config.compute)
        names = module_names(detector)
        height, width = image
        views = 1 + config.augmentation.strong_views
        print(
            f"Programs for {card.name}, compiled without one by JAX {jax.__version__}: {case.images} x {height}x{width}, "
            f"{config.compute.dtype}; training with {views} views and room for {case.objects} boxes each.\n"
            "Compiling takes minutes (Ctrl-C to leave).",
            flush=True,
        )
        inference = traced_inference(config, detector, image, case.images, mesh)
        detecting = dict(compile_traced(inference))
        training = traced_training(step, detector, image, case.images, case.objects, mesh)
        stepping = dict(compile_traced(training))
    print()
    _print_programs(detecting, stepping, card)
    detects, trains = (
        largest_batch(traced, compiled, case.images, card)
        for traced, compiled in ((inference, detecting), (training, stepping))
    )
    fits = f"{detects:,} images in inference and {trains:,} in training ({trains * views:,} views)"
    share = {"usable": USABLE, "memory": card.memory / 1e9, "fits": fits}
    print(COUNTED.format(bandwidth=card.bandwidth / 1e12, rate=card.rates["bf16"] / 1e12, **share))
    print(WITHOUT_CARD)
    _print_sizes(training)
    _print_products({**detecting, **stepping})
    for name, compiled in {**detecting, **stepping}.items():
        _print_rows(name, compiled.program, names, card, rows)


def _print_programs(detecting: dict[str, Compiled], stepping: dict[str, Compiled], card: Card) -> None:
    def row(name: str, programs: Sequence[Compiled]) -> tuple[str, ...]:
        launches = [launch for one in programs for launch in one.program.launches]
        moved = sum(one.program.bytes for one in programs)
        pads = sum(launch.times * launch.bytes for launch in launches if launch.kind == "pad")
        flops = sum(launch.times * launch.flops for launch in launches)
        alone = programs[0] if len(programs) == 1 else None
        return (
            name,
            f"{sum(one.program.num_launches for one in programs):,}",
            _gb(moved),
            f"{pads / max(moved, 1):.1%}",
            f"{flops / 1e12:.3f}",
            f"{1e3 * sum(map(card.seconds, launches)):,.2f} ms",
            *(map(_gb, (alone.arguments, alone.results, alone.inner)) if alone else ("", "", "")),
            _gb(max(one.peak for one in programs)),
        )

    head = ("program", "launches", "GB moved", "pads", "TFLOP", "at least", "arguments", "kept", "inner values", "peak, GB")
    every = {**detecting, **stepping}
    rows = [row(name, [compiled]) for name, compiled in every.items()]
    print_table([head, *rows, row("training step", list(stepping.values()))])


def _print_sizes(traced: Traced) -> None:
    parts = ", ".join(f"{what} {_gb(size)}" for what, size in {**traced.lasting, **traced.passing}.items())
    print(f"Arrays of training, GB: {parts}.")


def _print_products(programs: dict[str, Compiled]) -> None:
    flops = {name: compiled.program.flops for name, compiled in programs.items()}
    with_products = [name for name in flops if flops[name]]
    kinds = dict.fromkeys(types for name in with_products for types in flops[name])
    rows = [(_types(kind), *(f"{flops[name].get(kind, 0) / 1e12:.3f}" for name in with_products)) for kind in kinds]
    print()
    print_table([("TFLOP of products", *with_products), *rows])


def _print_rows(name: str, program: CompiledProgram, names: Collection[str], card: Card, rows: int) -> None:
    def module(launch: Launch) -> str:
        return "/".join(launch.scope(names)) + (" (again)" if launch.is_again else "")

    def kind(launch: Launch) -> str:
        return launch.kind

    for what, key in (("module", module), ("kind", kind)):
        _print_groups(f"{name}, by {what}", program, key, card, rows)
    largest = sorted(program.launches, key=lambda launch: -launch.times * launch.bytes)[:rows]
    table = [
        (
            f"{launch.times} x {launch.kind}",
            launch.result if len(launch.result) < 40 else launch.result[:37] + "...",
            _gb(launch.times * launch.bytes),
            module(launch),
        )
        for launch in largest
    ]
    print()
    print_table([(f"{name}, largest launches", "result", "GB", "module"), *table], left=(0, 1, 3))
    if program.guessed:
        print(f"{program.guessed} loops run as often as data say; each counts as three rounds.")


def _print_groups(title: str, program: CompiledProgram, key: Callable[[Launch], str], card: Card, rows: int) -> None:
    table = [(title, "launches", "GB", "of all", "TFLOP", "at least")]
    for group, part in list(program.grouped(key).items())[:rows]:
        table.append(
            (
                group or "(no module)",
                f"{part.num_launches:,}",
                _gb(part.bytes),
                f"{part.bytes / max(program.bytes, 1):.1%}",
                f"{sum(part.flops.values()) / 1e12:.3f}",
                f"{1e3 * sum(map(card.seconds, part.launches)):,.2f} ms",
            )
        )
    print()
    print_table(table)


def _types(types: Sequence[str]) -> str:
    """Types of products in words: `bf16 x bf16 -> f32`, or the type in which a kernel reads."""
    return f"{' x '.join(types[:-1])} -> {types[-1]}" if len(types) > 1 else f"kernels on {types[0]}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"
