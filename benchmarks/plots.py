"""Pictures of results; an implementation has the same colour in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS: Mapping[str, str] = {
    "registered": "#0b5fa5",
    "plan": "#3fa7d6",
    "ordinary": "#7b5ea7",
    "mpi": "#d1495b",
    "gloo": "#e09f3e",
    "limit": "#4d4d4d",
    "alone": "#4d4d4d",
    "no_sync": "#8a8a8a",
    "ours": "#0b5fa5",
    "ddp": "#e09f3e",
    "torch": "#e09f3e",
    "plan's closed form": "#4d4d4d",
}
MARKERS = {"limit": "", "mpi": "s", "gloo": "^", "ordinary": "D", "plan": "v"}


def new_figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """Return a figure and its axes, [row][column]; without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * columns, 4.4 * rows), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def plot_sizes(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw time and bandwidth over the size, a line of pictures for each collective and type."""
    cases = list(dict.fromkeys((row["collective"], row["dtype"]) for row in rows))
    figure, axes = new_figure(2, len(cases))
    for (collective, dtype), (times, bandwidths) in zip(cases, axes, strict=True):
        chosen = [row for row in rows if (row["collective"], row["dtype"]) == (collective, dtype)]
        for impl in dict.fromkeys(row["impl"] for row in chosen):
            mine = [row for row in chosen if row["impl"] == impl]
            sizes = [row["nbytes"] for row in mine]
            style = {
                "color": COLOURS[impl],
                "marker": MARKERS.get(impl, "o"),
                "linestyle": "--" if impl == "limit" else "-",
                "markersize": 4.5,
                "label": impl,
            }
            times.plot(sizes, [row["median_us"] for row in mine], **style)
            bandwidths.plot(sizes, [row["busbw_gbs"] for row in mine], **style)
        times.set_ylabel("median time of the slowest rank, us")
        bandwidths.set_ylabel("busbw, GB/s")
        for ax in (times, bandwidths):
            ax.set_xscale("log", base=2)
            if any(row["busbw_gbs"] > 0 for row in chosen) or ax is times:
                ax.set_yscale("log")
            ticks = sorted({row["nbytes"] for row in chosen})
            ax.set_xticks(ticks, [short(nbytes) for nbytes in ticks], rotation=45, fontsize=8)
            ax.minorticks_off() if len(ticks) > 1 else None
            ax.set_xlabel("size of the buffer")
            ax.set_title(f"{collective}, {dtype}, {chosen[0]['ranks']} ranks")
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
    save(figure, path)


def short(nbytes: int) -> str:
    """Show a number of bytes on an axis: 4, 64 Ki, 1 Mi."""
    for unit, prefix in ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {prefix}"
    return str(nbytes)


def figures(value: float) -> str:
    """Show a number above a bar, in three figures, or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot_bars(
    path: Path, rows: Sequence[Mapping[str, Any]], group: str, value: str, label: str, title: str
) -> None:
    """Draw one bar for each row, in groups; rows of a group differ by impl."""
    figure, axes = new_figure(1)
    ax = axes[0][0]
    groups = list(dict.fromkeys(row[group] for row in rows))
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    there = {name: [row["impl"] for row in rows if row[group] == name] for name in groups}
    width = 0.8 / max(map(len, there.values()))
    for impl in impls:
        mine = {row[group]: row[value] for row in rows if row["impl"] == impl}
        held = [
            at + (there[name].index(impl) - (len(there[name]) - 1) / 2) * width
            for at, name in enumerate(groups)
            if name in mine
        ]
        heights = [mine[name] for name in groups if name in mine]
        colour = COLOURS.get(impl, "#999999")
        bars = ax.bar(held, heights, width * 0.92, color=colour, label=impl)
        ax.bar_label(bars, fmt=figures, fontsize=7, padding=2)
    ax.set_xticks(range(len(groups)), groups, fontsize=8)
    ax.set_ylabel(label)
    ax.set_title(title)
    ax.grid(axis="y", alpha=0.3)
    ax.margins(y=0.15)
    ax.legend(fontsize=8)
    save(figure, path)


def plot_pipelines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw throughput and bubble of every plan; lines where the plan's arithmetic has them."""
    figure, axes = new_figure(2)
    plans = list(dict.fromkeys(row["plan"] for row in rows if row["plan"] != "-"))
    impls = [impl for impl in ("ours", "torch") if any(row["impl"] == impl for row in rows)]
    width = 0.8 / len(impls)
    for ax, key in zip(axes[0], ("samples_per_second", "bubble"), strict=True):
        for place, impl in enumerate(impls):
            mine = {row["plan"]: row[key] for row in rows if row["impl"] == impl}
            held = [at for at, plan in enumerate(plans) if plan in mine]
            at = [spot + (place - (len(impls) - 1) / 2) * width for spot in held]
            heights = [mine[plans[spot]] for spot in held]
            bars = ax.bar(at, heights, width * 0.92, color=COLOURS[impl], label=impl)
            ax.bar_label(bars, fmt=figures, fontsize=7, padding=2)
        ax.set_xticks(range(len(plans)), plans)
        ax.grid(axis="y", alpha=0.3)
        ax.margins(y=0.2)
    for at, plan in enumerate(plans):
        ideal = next(row["simulated_bubble"] for row in rows if row["plan"] == plan)
        label = "the plan's own, simulated" if at == 0 else None
        axes[0][1].hlines(ideal, at - 0.45, at + 0.45, color=COLOURS["limit"], ls="--", label=label)
    alone = next(row for row in rows if row["impl"] == "alone")
    axes[0][0].axhline(
        alone["samples_per_second"], color=COLOURS["limit"], ls="--", label="one process alone"
    )
    axes[0][0].set_ylabel("samples a second")
    axes[0][1].set_ylabel("bubble, share of a step")
    for ax in axes[0]:
        ax.set_title(f"{alone['ranks']} stages, {alone['microbatches']} micro-batches")
        ax.legend(fontsize=8)
    save(figure, path)
