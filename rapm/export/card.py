"""The model card of a LoRA: README.md as the hub shows it, with how to use it: a snippet that runs as pasted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rapm.disk import write_atomic
from rapm.export.clients import WORKFLOW, run_name, sampled_elsewhere, webui_settings
from rapm.export.files import base_name, recipe, title
from rapm.export.lora_file import WEIGHTS
from rapm.loading.source import variant

if TYPE_CHECKING:
    from rapm.config import Config
    from rapm.teacher import Teacher

CARD = "README.md"
NEWLINE = "\n"


def write_model_card(
    folder: str | Path,
    teacher: Teacher,
    *,
    config: Config,
    prompts: Sequence[str],
    steps_done: int | None = None,
    metrics: Mapping[str, Mapping[str, object]] | None = None,
    repo: str | None = None,
) -> None:
    """README.md as the hub shows it: front matter, samples.png, how to use the LoRA, settings, figures.

    `prompts` (at least one) are those of samples.png; `steps_done` None means all iterations of `config`; `metrics`
    maps the rows of a table to their columns; `repo` is the model on the hub that the folder becomes, None for none.
    The base model is in the front matter where it is on the hub. OSError where the card cannot be written.
    """
    folder = Path(folder)
    base = f"base_model: {_literal(teacher.source)}\n" if _on_the_hub(teacher) else ""
    sizes = config.resolutions or (teacher.default_resolution,)
    settings = {
        "teacher": base_name(teacher),
        "LoRAs in the teacher": ", ".join(f"{style.name} at {style.scale:g}" for style in teacher.loras) or "none",
        "trajectories": config.trajectories,
        "teacher's steps": f"{config.steps} x {config.fine_steps}, guidance {config.guidance}",
        "resolution": ", ".join(f"{width}x{height}" for height, width in sizes),
        "LoRA rank": config.lora_rank,
        "iterations": config.max_train_steps if steps_done is None else steps_done,
        "learning rate": config.learning_rate,
        "seed": config.seed,
    }
    card = f"""---
{base}license: {"apache-2.0" if teacher.source == "embedded" else "other"}
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusers
- lora
- template:sd-lora
- {"stable-diffusion-xl" if teacher.family == "sdxl" else "stable-diffusion"}
- rapm
widget:
- text: {_literal(prompts[0])}
  output:
    url: samples.png
---

# {_markdown(title(teacher, config))}

A LoRA distilled with [RAPM](https://arxiv.org/abs/2503.20744) for sampling in {config.steps} steps without guidance.
The licence of the base model applies.

![samples](samples.png)

{NEWLINE.join(f"- {_markdown(prompt)}" for prompt in prompts)}

## Use

{recipe(config)}, LoRA strength 1.0.

```python
{_snippet(repo or folder.resolve().as_posix(), teacher, config, prompts[0], shared=repo is not None)}
```

{_elsewhere(teacher, config)}

## Settings

{_table({name: {"value": value} for name, value in settings.items()})}
"""
    if metrics:
        card += f"\n## Measured\n\n{_table(metrics)}\n"
    write_atomic(folder / CARD, card.encode())


def _elsewhere(teacher: Teacher, config: Config) -> str:
    """How to use it in programs that are not diffusers."""
    if not sampled_elsewhere(teacher):
        return "Only diffusers samples it: other programs do not know this base model or its noise schedule."
    name, end = run_name(config), math.sqrt(1 - teacher.schedule.at(0))
    beside = "".join(f", and the teacher's `{style.name}.safetensors` beside it" for style in teacher.loras)
    return f"""**ComfyUI**: copy `{WEIGHTS}` to `models/loras/{name}.safetensors`{beside}, and drop `{WORKFLOW}` on the
window. Its latents are DDIM's. In a workflow of your own, or where the node ManualSigmas is missing: sampler `euler`,
scheduler `simple`, {config.steps} steps, cfg 1.

**A1111 (1.10 or newer), Forge**: copy it to `models/Lora/{name}.safetensors`{beside}, paste this into the prompt box,
and press the arrow that reads it back. Sampler and schedule are what matters: the sampler `DDIM` of these programs
takes other timesteps.

```
{webui_settings(teacher, config)}
```

These programs and `simple` remove the last noise too (a standard deviation of {end:.3f}), which DDIM leaves. All this
is from reading their code: only diffusers was run."""


def _on_the_hub(teacher: Teacher) -> bool:
    return teacher.source != "embedded" and not Path(teacher.source).expanduser().exists()


def _snippet(lora: str, teacher: Teacher, config: Config, prompt: str, *, shared: bool) -> str:
    """Python that samples in stock diffusers with the LoRA in `lora`, a folder or a hub id, as pasted.

    The teacher's style LoRAs are fused first, as they were in training; `shared` names local files without a folder.
    """
    files = [f"{style.name}.safetensors" if shared else style.path.resolve().as_posix() for style in teacher.loras]
    styles = "".join(
        f"pipe.load_lora_weights({_literal(file)})\npipe.fuse_lora(lora_scale={style.scale})\n"
        "pipe.unload_lora_weights()\n"
        for file, style in zip(files, teacher.loras, strict=True)
    )
    kind = type(teacher.pipe).__name__
    local = Path(teacher.source).expanduser()
    imports, load, base = "", "from_pretrained", _literal(teacher.source)
    if teacher.source == "embedded":
        imports, base = "from pathlib import Path\n\nimport rapm\n", 'Path(rapm.__file__).parent / "zoo" / "embedded"'
    elif not _on_the_hub(teacher):
        load = "from_single_file" if local.is_file() else load
        base = _literal(local.name if shared else local.resolve().as_posix())
    only = variant(teacher.location) if teacher.location.is_dir() else None
    base += f", variant={_literal(only)}" if only else ""
    stock = teacher.pipe.scheduler.config
    height, width = config.resolution or teacher.default_resolution
    # torch_dtype, though diffusers 0.40 and later warn of it: those before take no notice of its successor `dtype`
    return f"""{imports}import torch
from diffusers import DDIMScheduler, {kind}

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = {kind}.{load}({base}, torch_dtype=dtype).to(device)
pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config,
    timestep_spacing="trailing",
    set_alpha_to_one=False,
    clip_sample=False,
    prediction_type={_literal(stock.prediction_type)},
    rescale_betas_zero_snr={stock.rescale_betas_zero_snr},
)
{styles}pipe.load_lora_weights({_literal(lora)}, weight_name={_literal(WEIGHTS)})
prompt = {_literal(prompt)}
image = pipe(prompt, num_inference_steps={config.steps}, guidance_scale=1.0, height={height}, width={width}).images[0]
image.save("sample.png")"""


def _table(rows: Mapping[str, Mapping[str, object]]) -> str:
    """Rows by name, with the columns of the first, as Markdown."""
    columns = [*next(iter(rows.values()))]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        values = (f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        lines.append([_markdown(x) for x in (name, *values)])
    return NEWLINE.join(f"| {' | '.join(line)} |" for line in lines)


def _literal(text: str) -> str:
    """`text` as a string of Python and of YAML, on one line whatever is in it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def _markdown(text: str) -> str:
    """`text` on one line, meaning only itself in Markdown, at the start of a list's item too."""
    text = re.sub(r"([\\`*_{}\[\]()#+!|~$<>&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d+)\. ", r"\1\\. ", re.sub("^-", r"\\-", text))
