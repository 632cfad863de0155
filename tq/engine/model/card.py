"""The model card: README.md of a converted model, with what the Hugging Face Hub reads and what a person wants."""

import tq
from tq.engine.model.plan import Plan

_CARD = """---
library_name: mlx
pipeline_tag: text-generation
{front}tags:
- mlx
- tq
{tags}---

# {title}

{base} {made} with [tq](https://pypi.org/project/tq) {version}.

| | |
|---|---|
| size | {size:.3f} GB (source: {source:.3f} GB) |
| bits per weight | {bpw:.3f} (whole model) |
| format | {format} |
| activations | {dtype} |
| recipe | {recipe} |

| role | codes | tensors | weights | bytes | bits per weight |
|---|---|---|---|---|---|
{rows}

## Run it

```sh
tq run -m PATH_OR_HUB_ID "Why is the sky blue?"
```
"""


def model_card(plan: Plan) -> str:
    """The text of README.md for the result of ``plan``."""
    base = plan.source.base_model
    quantized = plan.quantized_bits_per_weight is not None
    front = f"base_model: {base}\n" if base else ""
    if base and quantized:
        front += "base_model_relation: quantized\n"
    format = "not quantized"
    if quantized:
        version = plan.quantization.get("version")
        format = plan.format.name + (f", version {version}" if version else "")
    rows = [
        f"| {r['role']} | {r['codes']} | {r['tensors']} | {r['weights']:,} | {r['bytes']:,} "
        f"| {r['bits_per_weight']:.3f} |"
        for r in plan.by_role()
    ]
    title = (base or plan.source.name).rstrip("/").split("/")[-1]
    return _CARD.format(
        front=front,
        tags="- quantized\n" if quantized else "",
        made="quantized" if quantized else "converted",
        title=f"{title}, {plan.bits_per_weight:.2f} bits per weight",
        base=f"[{base}](https://huggingface.co/{base})" if base and "/" in base else title,
        version=tq.__version__,
        size=plan.size_bytes / 1e9,
        source=plan.source_bytes / 1e9,
        bpw=plan.bits_per_weight,
        format=format,
        dtype=plan.dtype,
        recipe=plan.recipe.name,
        rows="\n".join(rows),
    )
