"""How ComfyUI and A1111 / Forge sample as the student was trained to: a workflow and a line of settings.

Both walk in x = z / sqrt(abar) by noise levels sigma = sqrt((1 - abar) / abar). There a step of DDIM is a step of
Euler, x_s = x0 + sigma_s eps, so Euler on the sigmas of DDIM's trailing timesteps is DDIM. What is left:

- ComfyUI takes any list of sigmas (ManualSigmas) and ends where DDIM does, at sigma(0). It does not scale back to
  z = sqrt(abar(0)) x: its latents are 1 / sqrt(abar(0)) = 1.0004 times ours.
- A1111 and Forge take the schedule `Simple`, which picks DDIM's trailing timesteps where the steps divide 1000, and end
  at sigma = 0: without the last sqrt(1 - abar(0)) = 0.029 of predicted noise. Their sampler named DDIM takes other
  timesteps, whatever the schedule. Their noise starts a factor sigma / sqrt(1 + sigma^2) = 0.998 low unless the
  setting `SGM noise multiplier` is on. ComfyUI's `ddim` is its `euler`; `sgm_uniform` picks 249.75 for 249 and so on.

This is from reading the programs' public code, and tests check the arithmetic; the programs themselves were not run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rapm.disk import write_atomic
from rapm.loading.style import client_name
from rapm.schedule import Schedule, trailing_steps

if TYPE_CHECKING:
    from rapm.config import Config
    from rapm.teacher import Teacher

WORKFLOW = "comfyui_workflow.json"
SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = 4.8973451890853435e-08  # what both programs take for an abar of zero
# The nodes of ComfyUI's core that are used, and their outputs in the order of the slots: name -> type.
OUTPUTS = {
    "CheckpointLoaderSimple": {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"},
    "LoraLoader": {"MODEL": "MODEL", "CLIP": "CLIP"},
    "LoraLoaderModelOnly": {"MODEL": "MODEL"},
    "ModelSamplingDiscrete": {"MODEL": "MODEL"},
    "CLIPTextEncode": {"CONDITIONING": "CONDITIONING"},
    "EmptyLatentImage": {"LATENT": "LATENT"},
    "KSamplerSelect": {"SAMPLER": "SAMPLER"},
    "ManualSigmas": {"SIGMAS": "SIGMAS"},
    "SamplerCustom": {"output": "LATENT", "denoised_output": "LATENT"},
    "VAEDecode": {"IMAGE": "IMAGE"},
    "SaveImage": {},
    "Note": {},
}
COLUMN, ROW = 340, 200  # pixels between two nodes


def run_name(config: Config) -> str:
    """What a run's LoRA is called in these programs: as its folder."""
    return client_name(Path(config.output_dir).resolve())


def sampled_elsewhere(teacher: Teacher) -> bool:
    """Whether these programs load the base model and map sigma to timesteps as it needs: they know SD's table only."""
    if teacher.source == "embedded":
        return False
    config = {**SD_NOISE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": _zero_snr(teacher)}
    mine, theirs = teacher.schedule.abar, Schedule.from_config(config).abar
    return mine.shape == theirs.shape and bool(torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6))


def comfyui_text(prompt: str) -> str:
    """`prompt` as ComfyUI's text box must have it to read it literally: brackets mean emphasis, braces a choice."""
    return re.sub(r"([(){}])", r"\\\1", prompt)


def webui_text(prompt: str) -> str:
    """`prompt` as A1111 and Forge must have it to read it literally."""
    return re.sub(r"([\\()\[\]])", r"\\\1", prompt)


def style_tags(teacher: Teacher) -> str:
    """The teacher's style LoRAs as A1111 and Forge take them at a prompt's end."""
    return "".join(f" <lora:{style.name}:{style.scale:g}>" for style in teacher.loras)


def sigmas(schedule: Schedule, steps: int) -> list[float]:
    """The noise levels of DDIM's trailing timesteps, and the one where it ends: steps + 1 of them."""
    times = [t for t, _ in trailing_steps(len(schedule), steps)]
    abars = [max(schedule.at(t), ZERO_SNR) for t in (*times, 0)]
    return [math.sqrt((1 - abar) / abar) for abar in abars]


def webui_settings(teacher: Teacher, config: Config) -> str:
    """A prompt and the settings below it as A1111 and Forge read them back from their prompt box."""
    height, width = config.resolution or teacher.default_resolution
    settings = {
        "Steps": config.steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": 1,
        "Seed": config.seed,
        "Size": f"{width}x{height}",
        "SGM noise multiplier": True,
    }
    if _zero_snr(teacher):
        settings["Noise Schedule"] = "Zero Terminal SNR"
    line = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return f"your prompt{style_tags(teacher)} <lora:{run_name(config)}:1>\n{line}"


def write_workflow(folder: Path, teacher: Teacher, *, config: Config, prompt: str) -> None:
    """`WORKFLOW`, to be dropped on ComfyUI's window."""
    workflow = comfyui_workflow(teacher, config, prompt)
    write_atomic(folder / WORKFLOW, json.dumps(workflow, indent=1, ensure_ascii=False).encode())


def comfyui_workflow(teacher: Teacher, config: Config, prompt: str) -> dict[str, Any]:
    """A workflow in the format that ComfyUI saves, of nodes of its core alone."""
    height, width = config.resolution or teacher.default_resolution
    name = run_name(config)
    checkpoint = Path(teacher.source).name
    checkpoint = checkpoint if checkpoint.endswith(".safetensors") else f"{checkpoint}.safetensors"
    note = (
        f"Copy the LoRA to models/loras as {name}.safetensors, and pick its base model as the checkpoint. Strength and "
        f"cfg stay 1. The sigmas are those of DDIM's {config.steps} trailing timesteps; in a ComfyUI without the node "
        "ManualSigmas, use KSampler with sampler euler and scheduler simple, which ends at 0 instead."
    )
    values = ", ".join(f"{sigma:.8f}" for sigma in sigmas(teacher.schedule, config.steps))  # its parser knows no 1e-3
    graph = _Graph()
    base = graph.add("CheckpointLoaderSimple", (0, 1), widgets=[checkpoint])
    last = base
    for row, style in enumerate(teacher.loras, 2):  # those that the teacher was made of
        inputs = {"model": (last, 0), "clip": (last, 1)}
        last = graph.add("LoraLoader", (0, row), inputs, [f"{style.name}.safetensors", style.scale, style.scale])
    model = graph.add("LoraLoaderModelOnly", (1, 0), {"model": (last, 0)}, [f"{name}.safetensors", 1.0])
    if teacher.schedule.prediction == "v_prediction":
        widgets = ["v_prediction", _zero_snr(teacher)]
        model = graph.add("ModelSamplingDiscrete", (2, 0), {"model": (model, 0)}, widgets)
    positive = graph.add("CLIPTextEncode", (1, 1), {"clip": (last, 1)}, [comfyui_text(prompt)])
    negative = graph.add("CLIPTextEncode", (1, 2), {"clip": (last, 1)}, [""])
    sampler = graph.add("KSamplerSelect", (2, 1), widgets=["euler"])
    levels = graph.add("ManualSigmas", (2, 2), widgets=[values])
    latent = graph.add("EmptyLatentImage", (2, 3), widgets=[width, height, 1])
    sources = {"model": model, "positive": positive, "negative": negative, "sampler": sampler, "sigmas": levels}
    inputs = {key: (node, 0) for key, node in {**sources, "latent_image": latent}.items()}
    end = graph.add("SamplerCustom", (3, 0), inputs, [True, config.seed, "fixed", 1.0])
    image = graph.add("VAEDecode", (4, 0), {"samples": (end, 0), "vae": (base, 2)})
    graph.add("SaveImage", (4, 1), {"images": (image, 0)}, [name])
    graph.add("Note", (0, 0), widgets=[note])
    return graph.saved()


def _zero_snr(teacher: Teacher) -> bool:
    return teacher.schedule.at(len(teacher.schedule) - 1) == 0


class _Graph:
    """Nodes and links as ComfyUI saves them."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(
        self,
        kind: str,
        place: tuple[int, int],
        inputs: Mapping[str, tuple[int, int]] | None = None,
        widgets: Sequence[object] = (),
    ) -> int:
        """A node at column, row, with inputs from (node, slot); its number."""
        number, taken = len(self.nodes) + 1, []
        outputs = [
            {"name": output, "type": what, "links": [], "slot_index": slot}
            for slot, (output, what) in enumerate(OUTPUTS[kind].items())
        ]
        for slot, (name, (source, output)) in enumerate((inputs or {}).items()):
            link = len(self.links) + 1
            outlet = self.nodes[source - 1]["outputs"][output]
            outlet["links"].append(link)
            self.links.append([link, source, output, number, slot, outlet["type"]])
            taken.append({"name": name, "type": outlet["type"], "link": link})
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [COLUMN * place[0], ROW * place[1]],
                "size": [COLUMN - 40, ROW - 60],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": taken,
                "outputs": outputs,
                "properties": {"Node name for S&R": kind},
                "widgets_values": list(widgets),
            }
        )
        return number

    def saved(self) -> dict[str, Any]:
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }
