"""What a verification, a comparison, a conversion or a picture found, as tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from orthoserde import json_values
from orthoserde.cli.layout import SHOWN, Row, heading, listed, pair, reasons, sections, table
from orthoserde.comparison import DiffReport, Pair, TensorDifference
from orthoserde.comparison.distances import Distance
from orthoserde.conversion import ConversionReport
from orthoserde.plots import PlotReport
from orthoserde.reports import VerifyReport


def show_verification(report: VerifyReport, width: int, *, everything: bool) -> list[Text]:
    """The verdict, and a row for each parametrized tensor."""
    head = [heading(report.path, width)]
    head += pair("verdict", report.verdict, width, "bold green" if report.ok else "bold red")
    head += pair("digests", report.integrity, width)
    if report.residuals:
        head += pair("constraints", report.constraints, width)
    return sections(
        [
            head,
            listed("damaged tensors", report.damaged, width, "red"),
            show_residuals(report, width, everything=everything),
            reasons("off its constraint", report.causes, width),
            reasons("does not fit its configuration", report.misfits, width),
            reasons("not measured", report.not_measured, width),
        ]
    )


def show_residuals(report: VerifyReport, width: int, *, everything: bool) -> list[Text]:
    """How far each computed tensor is from its constraint; those that are off it come first where not all are shown."""
    names = list(report.residuals)
    if not everything and len(names) > SHOWN:
        off = [name for name in names if name in set(report.off_constraint)]
        names = list(dict.fromkeys([*off, *names]))[:SHOWN]
    rows = [Row(("parametrized tensor", "residual", ""), style="bold")]
    for name in names:
        residual = report.residuals[name]
        verdict = "" if residual is not None else "no constraint to measure"
        if name in report.off_constraint:
            verdict = "OFF THE CONSTRAINT"
        style = "red" if name in report.off_constraint else ""
        rows.append(Row((name, "-" if residual is None else f"{residual:.2g}", verdict), style=style))
    if len(rows) == 1:
        return []
    lines = table(rows, width, right=frozenset({1}))
    if len(names) < len(report.residuals):
        lines.append(Text(f"and {len(report.residuals) - len(names):,} more; --all shows them", style="dim"))
    return lines


def show_difference(report: DiffReport, width: int, *, everything: bool) -> list[Text]:
    """The verdict, then what differs: tensors, configuration, training state."""
    head = [heading(f"a  {report.paths[0]}", width), heading(f"b  {report.paths[1]}", width)]
    head += pair("verdict", report.verdict, width, "bold green" if report.same else "bold yellow")
    within = set(report.within)
    near = [each for name, each in report.tensors.items() if name in within]
    far = [each for name, each in report.tensors.items() if name not in within]
    counts = [f"{report.identical:,} identical"]
    counts += [f"{len(near):,} within the tolerance"] if near else []
    counts += [f"{len(far):,} different"] if far or not near else []
    counts += [f"{len(names):,} only in {side}" for side, names in zip("ab", report.only, strict=True) if names]
    head += pair("tensors", ", ".join(counts), width)
    for note in report.notes:
        head += pair("note", note, width)
    return sections(
        [
            head,
            *(listed(f"only in {side}", names, width) for side, names in zip("ab", report.only, strict=True)),
            _differences("tensors that differ", far, width, everything),
            _differences(f"tensors within {report.tolerance:g}", near, width, everything),
            _pairs("configuration of modules", report.modules, width),
            _pairs("tied tensors", report.ties, width),
            _pairs("metadata", report.metadata, width),
            _training(report.training, width),
        ]
    )


def _differences(title: str, found: list[TensorDifference], width: int, everything: bool) -> list[Text]:
    rows = [Row((title, "largest", "relative", "on the manifold"), style="bold")]
    shown = found if everything else found[:SHOWN]
    for each in shown:
        values = each.values
        cells = ("-", "-") if values is None else (_number(values.largest), _number(values.relative))
        rows.append(Row((each.name, *cells, _manifold(each)), below=tuple(("    ", line) for line in _details(each))))
    if not found:
        return []
    lines = table(rows, width, right=frozenset({1, 2}))
    if len(shown) < len(found):
        lines.append(Text(f"and {len(found) - len(shown):,} more; --all shows them", style="dim"))
    return lines


def _manifold(each: TensorDifference) -> str:
    if each.manifold is None:
        return ""
    if each.manifold.measure == "rotation":
        return f"rotation {_number(each.manifold.length)}, largest angle {_number(each.manifold.largest_angle)}"
    return f"angle {_number(each.manifold.largest_angle)}, length {_number(each.manifold.length)}"


def _details(each: TensorDifference) -> list[str]:
    lines: list[str] = []
    for what, (a, b) in (("kind", each.kinds), ("dtype", each.dtypes)):
        if a != b:
            lines.append(f"{what}: {a} | {b}")
    if each.shapes[0] != each.shapes[1]:
        lines.append(f"shape: {_shape(each.shapes[0])} | {_shape(each.shapes[1])}")
    lines += [f"{where}: {_value(a)} | {_value(b)}" for where, (a, b) in each.settings.items()]
    for role, distance in each.state.items():
        lines.append(f"{role}: {_distance(distance)}")
    if each.values is not None and each.values.not_comparable:
        lines.append(f"{each.values.not_comparable:,} elements that are not finite, in other places or of other kinds")
    if each.values is not None and not each.values.identical and each.values.relative == 0.0:
        lines.append("equal numbers, other bits")
    if each.values is not None and each.values.identical and each.state:
        lines.append("the computed tensors are identical")
    if each.not_compared:
        lines.append(f"not compared: {each.not_compared}")
    return lines


def _pairs(title: str, found: Mapping[str, Pair], width: int) -> list[Text]:
    lines = {name: _both(a, b) for name, (a, b) in found.items()}
    return reasons(title, lines, width)


def _training(found: Mapping[str, Pair | Distance], width: int) -> list[Text]:
    lines = {
        where or "(all of it)": _distance(each) if isinstance(each, Distance) else _both(*each)
        for where, each in found.items()
    }
    return reasons("training state", lines, width)


def _distance(distance: Distance) -> str:
    text = f"largest {_number(distance.largest)}, relative {_number(distance.relative)}"
    return f"{text}, {distance.not_comparable:,} not finite" if distance.not_comparable else text


def _number(value: float) -> str:
    return f"{value:.2g}"


def _both(a: object, b: object) -> str:
    left, right = _value(a), _value(b)
    if left == right:  # a string of digits and a number, say
        left, right = (f'"{text}"' if isinstance(each, str) else text for each, text in ((a, left), (b, right)))
    return f"{left} | {right}"


def _value(value: object) -> str:
    if type(value) is int:  # of training state, which may have more than 64 bits
        return str(value)
    return "-" if value is None else value if isinstance(value, str) else json_values.encode(json_values.to_json(value))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else " x ".join(map(str, shape)) or "scalar"


def show_conversion(report: ConversionReport, width: int) -> list[Text]:
    """What was written."""
    lines = [heading(report.target, width)]
    lines += pair("from", f"{report.source}, {report.source_bytes:,} bytes", width)
    lines += pair("written", f"{report.sort}, {report.target_bytes:,} bytes", width)
    lines += pair("form", report.form, width)
    lines += pair("files" if report.form.startswith("pyreft") else "tensors", f"{report.tensors:,}", width)
    for note in report.notes:
        lines += pair("note", note, width)
    return lines


def show_picture(report: PlotReport, width: int) -> list[Text]:
    """What a picture shows, and what it does not."""
    lines = [heading("picture", width)]
    lines += pair("written", report.path, width)
    lines += pair("shown", f"{len(report.shown):,} of {len(report.shown) + len(report.left_out):,} tensors", width)
    return [*lines, *reasons("not in the picture", report.left_out, width)]
