"""The human table of a plan, on stderr; the same figures are in its JSON line."""

from __future__ import annotations

from typing import Any, TextIO


def print_table(result: dict[str, Any], out: TextIO) -> None:
  """Prints memory, programs, ratios, speeds and the verdict of `awf.plan.plan_once`."""
  r = result
  how = "compiled" if r["compiled"] else "not compiled: what stays resident is too much already"
  if r["counted"]:
    how = "not compiled: counted operands at the chip's figures"
  elif r["extrapolated"] and r["compiled"]:
    how = "extrapolated from programs of 2 and 4 layers"
  sizes = ", ".join(f"{k} {v:,}" for k, v in r["sizes"].items())
  lines = [
    f"plan for {r['target']} ({r['devices']} device{'s' * (r['devices'] > 1)}, {how})",
    f"model {r['model']}, {r['parameters'] / 1e6:,.0f}M parameters, quant {r['quant']}",
    sizes,
    "",
    "stays resident, GiB per device: "
    + ", ".join(f"{k} {v:.2f}" for k, v in r["memory_gb"].items()),
  ]
  if r["programs"]:
    lines += ["", *_programs(r["programs"])]
  if r.get("ratios"):
    lines += ["", *_ratios(r["ratios"])]
  lines += [
    "",
    f"roofline: {_number(r['tokens_per_second'])} tokens/s, "
    f"{_number(r['seconds_per_step'])} s per step, "
    f"{_number(r['problems_per_hour'])} problems per hour",
    f"peak {r['peak_gb']:.2f} of {r['capacity_gb']:.2f} GiB: {r['verdict']}",
  ]
  print("\n".join(lines), file=out, flush=True)


def _programs(programs: dict[str, Any]) -> list[str]:
  lines = [
    f"{'GiB':<22}{'peak':>8}{'args':>8}{'temp':>8}{'beside':>8}{'code':>8}",
  ]
  for name, p in programs.items():
    keys = ("peak_gb", "arguments_gb", "temporaries_gb", "beside_gb", "code_gb")
    lines.append(f"{name:<22}" + "".join(f"{p[k]:>8.2f}" for k in keys))
  lines += ["", f"{'one run':<22}{'GFLOP':>12}{'MB read':>12}{'MB moved':>12}{'roofline ms':>14}"]
  for name, p in programs.items():
    for part, cost in p["parts"].items():
      lines.append(
        f"{name + ' ' + part:<22}{cost['flops'] / 1e9:>12,.1f}{cost['bytes_read'] / 1e6:>12,.1f}"
        f"{cost['bytes'] / 1e6:>12,.1f}{cost['roofline_seconds'] * 1e3:>14,.3f}"
      )
    if not p["parts"]:
      lines.append(f"{name:<22}  not counted: the compiler found no room for it")
  return lines


def _ratios(ratios: dict[str, Any]) -> list[str]:
  lines = []
  if "decode_bytes" in ratios:
    lines.append(
      f"one decode step reads {ratios['decode_bytes']:.3f}x the bytes that must be read "
      "(weights and adapters once + live KV)"
    )
  if "update_flops" in ratios:
    lines.append(
      f"one update does {ratios['update_flops']:.3f}x the FLOPs of forward + recomputation + "
      f"backward to activations and LoRA ({ratios['update_padding']:.3f}x by padding of bins)"
    )
  return lines


def _number(x: float | None) -> str:
  return "unknown" if x is None else f"{x:,.3g}" if x < 100 else f"{x:,.0f}"
