"""Models and inputs of the checks: random weights, in the precision of this device."""

from typing import Any

import torch

from prophy.backbones.families import FAMILIES
from prophy.models.physics_transformer import PhysicsTransformer
from tests.wisa import PHENOMENA

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
TINY = {
    "wan": {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "ffn_dim": 64,
        "num_layers": 3,
        "text_dim": 32,
    },
    "cogvideox": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": 3,
        "use_rotary_positional_embeddings": True,
        "max_text_seq_length": 16,
    },
}


def rounded(model: Any) -> Any:
    """The weights in this device's precision, but those that diffusers keeps in float32."""
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.to(DTYPE)
    return model


def small(family: str, width: int | None = None) -> tuple[Any, PhysicsTransformer, tuple[Any, ...]]:
    """A bare backbone, the model that has grown from it, and inputs; `width` is that of a head."""
    torch.manual_seed(0)
    classes, settings = FAMILIES[family].classes(), dict(TINY[family])
    if width is not None:
        settings["attention_head_dim"] = width
    with DEVICE:
        bare: Any = rounded(classes.transformer(**settings)).eval()
    physics = {"physics_layers": [0, 2], "latent_shape": [3, 8, 8], "phenomena": [*PHENOMENA]}
    model = classes.prophy_transformer.from_transformer(bare, physics).eval()
    text = {"prompt_embeds": torch.randn(1, 16, 32, device=DEVICE, dtype=DTYPE)}
    latents = torch.randn(1, 16, 3, 8, 8, device=DEVICE, dtype=DTYPE)
    return bare, model, (latents, torch.tensor([500.0], device=DEVICE), text)


def run(model: Any, inputs: tuple[Any, ...]) -> torch.Tensor:
    """The prediction of a model or of a bare backbone, in the layout of its family."""
    latents, timestep, text = inputs
    if isinstance(model, PhysicsTransformer):
        return model.predict(latents, timestep, text).sample
    if "patch_size_t" not in model.config:
        return model(latents, timestep, text["prompt_embeds"]).sample
    rotary = FAMILIES["cogvideox"].classes().prophy_transformer.rotary_embeddings(model, latents)
    output = model(latents.transpose(1, 2), text["prompt_embeds"], timestep, image_rotary_emb=rotary)
    return output.sample.transpose(1, 2)
