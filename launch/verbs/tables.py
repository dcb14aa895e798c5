"""What `pentad check` and `pentad flops` print their figures with. No torch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def table(title: str, *columns: str) -> Table:
    """A table with a title; without columns, one of names and values."""
    made = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns))
    for column in columns or ("", ""):
        made.add_column(column, justify="left" if column in ("", "part", "axis", "how") else "right")
    return made


def engineering(value: float) -> str:
    """FLOPs with a prefix: `51.47 GFLOP`."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}FLOP"
    return f"{value:.0f} FLOP"


def print_flops(result: dict[str, Any]) -> None:
    """The report of `pentad.models.costs.flops.report` as a table."""
    console = Console(highlight=False)
    rows = table(f"{result['model']}, sequences of {result['seq_len']:,} tokens")
    rows.add_row("parameters", f"{result['params_total']:,}")
    rows.add_row("active per token", f"{result['params_active']:,}")
    rows.add_row("FLOPs per token", f"{engineering(result['flops_per_token'])}, unmasked attention (mfu)")
    rows.add_row("", f"{engineering(result['flops_per_token_full_attention'])}, full attention (mfu_full)")
    for kind, flops in result["breakdown"].items():
        if flops:
            rows.add_row(f"  {kind}", engineering(flops))
    if result["params_active"] < result["params_total"]:
        rows.add_row("for S-MFU (MoE-CAP)", engineering(result["s_mfu_flops_per_token"]))
    console.print(rows)
    console.print(result["convention"], style="dim", soft_wrap=True)
