"""What clients make of the files: diffusers and peft themselves, and the arithmetic of ComfyUI, A1111 and Forge.

The rules of the last three are written here from reading their public code; the programs are not run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from exports import CONFIG, FAMILIES, HOSTILE, PROMPTS, latents, trained
from safetensors.torch import load_file
from torch import Tensor

from rapm.config import Config
from rapm.export.clients import (
    WORKFLOW,
    ZERO_SNR,
    comfyui_text,
    comfyui_workflow,
    run_name,
    sampled_elsewhere,
    sigmas,
    webui_settings,
    webui_text,
    write_workflow,
)
from rapm.export.files import FILES, export_lora
from rapm.export.lora_file import WEIGHTS, folded, read_lora
from rapm.loading.style import Style
from rapm.sample import sample
from rapm.schedule import Schedule
from rapm.teacher import Teacher
from rapm.unet import UNet


def combined(*parts: tuple[float, dict]) -> dict[str, tuple[Tensor, Tensor]]:
    """Several LoRAs, each times its strength, as one of the sum of their ranks."""
    return {
        name: (
            torch.cat([lora[name][0] for _, lora in parts]),
            torch.cat([strength * lora[name][1] for strength, lora in parts], dim=1),
        )
        for name in parts[0][1]
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_does_as_we_do(tiny_teacher: Callable, family: str, tmp_path: Path) -> None:
    """Each file as a user loads it: every layer at strength 1, at 0.5, beside a second LoRA, and fused."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    teacher = tiny_teacher(family)
    student, style, noise = trained(teacher.unet), trained(teacher.unet, seed=6), latents(teacher)
    export_lora(tmp_path, student, teacher, config=CONFIG, steps_done=7)
    export_lora(tmp_path / "style", style, teacher, config=CONFIG, steps_done=7)
    text = teacher.encode(PROMPTS)

    def agree(pipe: diffusers.DiffusionPipeline, lora: dict | None) -> None:
        ours = sample(teacher.unet, teacher.schedule, text, noise, 2, lora=lora)
        stock = pipe(PROMPTS, latents=noise, num_inference_steps=2, guidance_scale=1.0, output_type="latent").images
        assert (stock - ours).abs().max() <= 1e-4 * ours.std()

    bare = sample(teacher.unet, teacher.schedule, text, noise, 2)
    ours = sample(teacher.unet, teacher.schedule, text, noise, 2, lora=student)
    assert (ours - bare).abs().max() > 0.1 * ours.std()  # else the comparison would say nothing
    pipe = teacher.stock_pipeline()
    for name in reversed(FILES):
        pipe.load_lora_weights((tmp_path / name).parent, weight_name=WEIGHTS, adapter_name="student")
        layers = {name: layer for name, layer in pipe.unet.named_modules() if isinstance(layer, BaseTunerLayer)}
        assert layers.keys() == teacher.unet.lora_targets().keys()
        assert {scale for layer in layers.values() for scale in layer.scaling.values()} == {1.0}
        if name == FILES[1]:
            agree(pipe, student)
            pipe.unload_lora_weights()
    pipe.set_adapters("student", 0.5)
    agree(pipe, combined((0.5, student)))
    pipe.load_lora_weights(tmp_path / "style", weight_name=WEIGHTS, adapter_name="style")
    pipe.set_adapters(["student", "style"], [1.0, 0.7])
    agree(pipe, combined((1.0, student), (0.7, style)))
    pipe.set_adapters("student", 1.0)
    pipe.fuse_lora(adapter_names=["student"])
    pipe.unload_lora_weights()
    agree(pipe, student)
    fused = pipe.unet.state_dict()
    for name, layer in teacher.unet.lora_targets().items():
        torch.testing.assert_close(fused[f"{name}.weight"], folded(layer.weight, student[name]), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_alone_reads_the_diffusers_file(tiny_teacher: Callable, family: str, tmp_path: Path) -> None:
    """With the settings in its header, which say every layer's rank and strength."""
    import peft
    from safetensors import safe_open

    teacher = tiny_teacher(family)
    lora = trained(teacher.unet)
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    with safe_open(tmp_path / FILES[1], framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(teacher.unet.config)
    unet = peft.inject_adapter_in_model(
        peft.LoraConfig(**{key.removeprefix("unet."): value for key, value in settings.items()}), unet
    ).to_empty(device="cpu")
    tensors = {key.removeprefix("unet."): x for key, x in load_file(tmp_path / FILES[1]).items()}
    assert not peft.set_peft_model_state_dict(unet, tensors).unexpected_keys
    layers = {name: x for name, x in unet.named_modules() if isinstance(x, peft.tuners.lora.LoraLayer)}
    assert layers.keys() == lora.keys()
    for name, layer in layers.items():
        down, up = lora[name]
        assert layer.scaling == {"default": 1.0}, name
        torch.testing.assert_close(layer.get_delta_weight("default").flatten(1), up.flatten(1) @ down.flatten(1))


def euler(unet: UNet, schedule: Schedule, text, lora: dict, noise: Tensor, levels: list[float], start: float) -> Tensor:
    """ComfyUI's, A1111's and Forge's `euler` in x = z / sqrt(abar), for either kind of prediction; float64 in between.

    A noise level is the timestep whose own is nearest; `start` is what they scale the noise by.
    """
    abar = schedule.abar.clamp_min(ZERO_SNR)
    table = ((1 - abar) / abar).log() / 2
    x = start * noise.double()
    for sigma, following in itertools.pairwise(levels):
        t = int((table - math.log(sigma)).abs().argmin())
        z = x / math.sqrt(sigma**2 + 1)
        with torch.no_grad():
            out = unet(z.float(), torch.tensor(t), text, lora=lora).double()
        if schedule.prediction == "v_prediction":
            x0 = x / (sigma**2 + 1) - out * sigma / math.sqrt(sigma**2 + 1)
        else:
            x0 = x - sigma * out
        x = x + (x - x0) / sigma * (following - sigma)
    return x


def zero_snr(teacher: Teacher) -> Schedule:
    config = {**teacher.pipe.scheduler.config, "rescale_betas_zero_snr": True}
    return Schedule.from_config(config)


class ComfyUI:
    """Runs a saved workflow with the rules of its nodes, all that the graph leads to; the images are the latents."""

    def __init__(self, workflow: dict, teacher: Teacher, schedule: Schedule, lora: Path, noise: Tensor) -> None:
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: link for link in workflow["links"]}
        self.teacher, self.schedule, self.lora, self.noise = teacher, schedule, lora, noise
        self.sampling = "eps", False

    def result(self) -> Tensor:
        (save,) = (node for node in self.nodes.values() if node["type"] == "SaveImage")
        return self.run(save)[0]

    def run(self, node: dict) -> tuple:
        inputs = {}
        for slot, entry in enumerate(node["inputs"]):
            number, source, output, target, place, what = self.links[entry["link"]]
            outlet = self.nodes[source]["outputs"][output]
            assert (target, place, what) == (node["id"], slot, entry["type"]) and outlet["type"] == what
            assert number in outlet["links"] and outlet["slot_index"] == output
            inputs[entry["name"]] = self.run(self.nodes[source])[output]
        return getattr(self, node["type"])(*node["widgets_values"], **inputs)

    def CheckpointLoaderSimple(self, ckpt_name: str) -> tuple:
        assert ckpt_name == f"base-{self.teacher.family}.safetensors"
        return None, self.teacher.encode, "vae"

    def LoraLoaderModelOnly(self, lora_name: str, strength_model: float, model: None) -> tuple:
        assert lora_name == "demo.safetensors"
        weights = read_lora(self.lora, self.teacher.unet)
        return (combined((strength_model, weights)),)

    def ModelSamplingDiscrete(self, sampling: str, zsnr: bool, model: dict) -> tuple:
        self.sampling = sampling, zsnr
        return (model,)

    def CLIPTextEncode(self, text: str, clip: Callable) -> tuple:
        assert not re.search(r"(?<!\\)[()]", text)  # emphasis
        return (clip([re.sub(r"\\([()])", r"\1", text)] * len(self.noise)),)

    def EmptyLatentImage(self, width: int, height: int, batch_size: int) -> tuple:
        assert batch_size == 1
        return ((height // 8, width // 8),)

    def KSamplerSelect(self, sampler_name: str) -> tuple:
        return ({"euler": euler}[sampler_name],)

    def ManualSigmas(self, text: str) -> tuple:
        return ([float(torch.tensor(float(x))) for x in re.findall(r"[-+]?(?:\d*\.*\d+)", text)],)

    def SamplerCustom(
        self, add_noise, noise_seed, control, cfg, model, positive, negative, sampler, sigmas, latent_image
    ):
        assert add_noise and cfg == 1.0 and control == "fixed" and isinstance(noise_seed, int)
        assert latent_image == tuple(self.noise.shape[2:])
        assert (
            self.sampling
            == {
                "epsilon": ("eps", False),
                "v_prediction": ("v_prediction", bool(self.schedule.abar[-1] == 0)),
            }[self.schedule.prediction]
        )
        # the noise is scaled for the whole walk where it starts at the model's largest level
        largest = max(self.schedule.at(len(self.schedule) - 1), ZERO_SNR)
        assert math.isclose(sigmas[0], math.sqrt((1 - largest) / largest), rel_tol=1e-5)
        start = math.sqrt(1 + sigmas[0] ** 2)
        return sampler(self.teacher.unet, self.schedule, positive, model, self.noise, sigmas, start), None

    def VAEDecode(self, samples: Tensor, vae: str) -> tuple:
        assert vae == "vae"
        return (samples,)

    def SaveImage(self, filename_prefix: str, images: Tensor) -> tuple:
        return (images,)


@pytest.mark.parametrize("family", [*FAMILIES, "sd2, zero terminal SNR"])
def test_the_workflow_samples_as_the_student_does(tiny_teacher: Callable, family: str, tmp_path: Path) -> None:
    """But for a factor 1 / sqrt(abar(0)), which ComfyUI leaves.

    With zero terminal SNR it takes 5e-8 for zero: the first step is some 2e-4 off, which the next ones magnify.
    """
    name, _, snr = family.partition(", ")
    teacher = tiny_teacher(name)
    if snr:
        teacher = dataclasses.replace(teacher, schedule=zero_snr(teacher))
    lora, noise = trained(teacher.unet), latents(teacher)[:1]
    export_lora(tmp_path, lora, teacher, config=CONFIG, steps_done=7)
    write_workflow(tmp_path, teacher, config=CONFIG, prompt=PROMPTS[0])
    workflow = json.loads((tmp_path / WORKFLOW).read_text(encoding="utf-8"))
    theirs = ComfyUI(workflow, teacher, teacher.schedule, tmp_path, noise).result()
    text = teacher.encode(PROMPTS[:1])
    ours = sample(teacher.unet, teacher.schedule, text, noise, 4, lora=lora).double()
    factor = 1 / math.sqrt(teacher.schedule.at(0))
    assert 1.0004 < factor < 1.0005
    assert (theirs / factor - ours).abs().max() <= (1e-2 if snr else 1e-4) * ours.std()
    used = {node["id"] for node in workflow["nodes"] if node["type"] != "Note"}
    assert used == {end for link in workflow["links"] for end in (link[1], link[3])}
    assert workflow["last_node_id"] == max(used) + 1 and workflow["last_link_id"] == len(workflow["links"])


def test_the_workflow_holds_any_prompt(tiny_teacher: Callable, tmp_path: Path) -> None:
    write_workflow(tmp_path, tiny_teacher("sd1"), config=CONFIG, prompt=HOSTILE)
    workflow = json.loads((tmp_path / WORKFLOW).read_text(encoding="utf-8"))
    assert [comfyui_text(HOSTILE)] in [node["widgets_values"] for node in workflow["nodes"]]
    assert workflow == comfyui_workflow(tiny_teacher("sd1"), CONFIG, HOSTILE)


def test_brackets_are_no_emphasis(tiny_teacher: Callable) -> None:
    """These programs read them so, training does not."""
    prompt = r"a (red) [hat] {1} \o/"
    workflow = comfyui_workflow(tiny_teacher("sd1"), CONFIG, prompt)
    assert [r"a \(red\) [hat] \{1\} \o/"] in [node["widgets_values"] for node in workflow["nodes"]]
    assert webui_text(prompt) == r"a \(red\) \[hat\] {1} \\o/"


@pytest.mark.parametrize("family", [*FAMILIES, "sd2, zero terminal SNR"])
def test_whom_these_programs_can_sample(tiny_teacher: Callable, family: str) -> None:
    """Stable Diffusion's noise, with zero terminal SNR too; with other betas they would walk other timesteps."""
    teacher = tiny_teacher(family.partition(",")[0])
    assert sampled_elsewhere(dataclasses.replace(teacher, schedule=zero_snr(teacher)) if "," in family else teacher)
    for betas in (dict(beta_schedule="linear"), dict(beta_schedule="squaredcos_cap_v2"), {**SD, "beta_end": 0.013}):
        assert not sampled_elsewhere(dataclasses.replace(teacher, schedule=Schedule.from_config(betas)))
    assert not sampled_elsewhere(dataclasses.replace(teacher, source="embedded"))


SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_sigmas_of_stable_diffusion() -> None:
    """The published ends of ComfyUI's table, 14.6146 and 0.0292, and of its `simple` schedule for 4 steps."""
    schedule = Schedule.from_config(SD)
    table = torch.sqrt((1 - schedule.abar) / schedule.abar)
    assert sigmas(schedule, 4) == pytest.approx([14.6146, 4.0817, 1.6129, 0.6932, 0.02917], abs=1e-4)
    for steps in (1, 2, 4, 5, 8, 10):  # where they divide 1000
        simple = [float(table[-(1 + int(i * len(table) / steps))]) for i in range(steps)]
        assert sigmas(schedule, steps)[:-1] == pytest.approx(simple)
    uniform = [999 * (1 - i / 4) for i in range(4)]  # what ComfyUI's `sgm_uniform` picks
    assert uniform == [999, 749.25, 499.5, 249.75]
    leading = [min(t + 1, 999) for t in range(0, 1000, 250)]  # what A1111's DDIM picks, and takes one step less
    assert leading == [1, 251, 501, 751]


def test_what_a1111_leaves_out(tiny_teacher: Callable) -> None:
    """Euler and Simple end at 0: our latents less their last noise, sqrt(1 - abar(0)) of it, and that factor."""
    teacher = tiny_teacher("sd1")
    lora, noise, schedule = trained(teacher.unet), latents(teacher)[:1], teacher.schedule
    *levels, last, _ = sigmas(schedule, 4)
    text, start = teacher.encode(PROMPTS[:1]), math.sqrt(1 + levels[0] ** 2)
    before = euler(teacher.unet, schedule, text, lora, noise, [*levels, last], start)
    x0 = euler(teacher.unet, schedule, text, lora, before, [last, 0.0], start=1.0)
    predicted = (before - x0) / last
    ours = sample(teacher.unet, schedule, text, noise, 4, lora=lora).double()
    signal, rest = math.sqrt(schedule.at(0)), math.sqrt(1 - schedule.at(0))
    assert rest == pytest.approx(0.02915, abs=1e-4)
    assert (signal * x0 + rest * predicted - ours).abs().max() <= 1e-4 * ours.std()
    assert (x0 - ours).abs().max() > 0.02 * predicted.abs().max()  # so it is there
    assert levels[0] / start == pytest.approx(0.99767, abs=1e-4)  # without `SGM noise multiplier`


def test_settings_for_a1111(tiny_teacher: Callable) -> None:
    """Read by its rule: the last line, pairs of a name and a value up to a comma."""
    text = webui_settings(tiny_teacher("sd2"), CONFIG.replace(resolution=(96, 128)))
    prompt, line = text.split("\n")
    pairs = dict(re.findall(r"\s*(\w[\w \-/]+):\s*([^,]+)(?:,|$)", line))
    assert pairs == {
        "Steps": "4", "Sampler": "Euler", "Schedule type": "Simple", "CFG scale": "1", "Seed": "3", "Size": "128x96",
        "SGM noise multiplier": "True",
    }  # fmt: skip
    assert re.findall(r"<(\w+):([^>]+)>", prompt) == [("lora", "demo:1")]


def test_zero_terminal_snr_is_said(tiny_teacher: Callable) -> None:
    teacher = dataclasses.replace(tiny_teacher("sd2"), schedule=zero_snr(tiny_teacher("sd2")))
    assert webui_settings(teacher, CONFIG).endswith(", Noise Schedule: Zero Terminal SNR")
    assert sigmas(teacher.schedule, 4)[0] == pytest.approx(4518.7, abs=0.1)


def styled(teacher: Teacher, folder: Path) -> Teacher:
    """The teacher as if two LoRAs had been fused into it."""
    styles = (Style(folder / "ink (v1).safetensors", 0.7, {}), Style(folder / "blue" / WEIGHTS, 1.0, {}))  # of a run
    return dataclasses.replace(teacher, loras=styles)


def test_the_teachers_own_loras_come_first(tiny_teacher: Callable, tmp_path: Path) -> None:
    teacher = styled(tiny_teacher("sd1"), tmp_path)
    workflow = comfyui_workflow(teacher, CONFIG, PROMPTS[0])
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}

    styles = [["ink (v1).safetensors", 0.7, 0.7], ["blue.safetensors", 1.0, 1.0]]
    (node,) = (node for node in nodes.values() if node["type"] == "LoraLoaderModelOnly")
    chain = []
    while node["inputs"]:  # up to the checkpoint
        chain.append(node["widgets_values"])
        node = nodes[links[node["inputs"][0]["link"]][1]]
    assert chain[::-1] == [*styles, ["demo.safetensors", 1.0]]
    texts = [node for node in nodes.values() if node["type"] == "CLIPTextEncode"]
    assert {links[node["inputs"][0]["link"]][1:3] == [3, 1] for node in texts} == {True}
    assert nodes[3]["widgets_values"] == styles[1]
    assert webui_settings(teacher, CONFIG).startswith("your prompt <lora:ink (v1):0.7> <lora:blue:1> <lora:demo:1>\n")


@pytest.mark.parametrize("folder, name", [("runs/a b:c>d", "a_b_c_d"), ("runs/4-step.v2", "4-step.v2"), ("x/é", "é")])
def test_the_name_is_one_for_every_client(folder: str, name: str) -> None:
    assert run_name(Config(output_dir=folder)) == name
    assert run_name(Config(output_dir=".")) == Path.cwd().name
