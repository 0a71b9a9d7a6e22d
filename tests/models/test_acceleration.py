"""Kernels of attention and compiled blocks change nothing but the rounding."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig, ModelMixin
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prophy.errors import ProPhyError
from prophy.models.acceleration import (
    check_attention,
    checkpoint_but_attention,
    compile_blocks,
    set_attention,
)
from prophy.models.physics_transformer import PhysicsTransformer

from .conftest import BACKBONES, BASELINES, PHYSICS, make_inputs

CPU = torch.device("cpu")
SHAPES = ((2, 4, 6), (4, 8, 4))


def awaken(transformer: PhysicsTransformer) -> None:
    """A branch that injects something, as after training."""
    torch.manual_seed(1)
    for name, parameter in transformer.physics_branch.named_parameters():
        if "injection" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def differences(compiled: ModelMixin, eager: ModelMixin, latents: torch.Tensor) -> list[float]:
    """By how much three steps of a video differ, without a step cache and with one."""
    inputs = make_inputs(eager, latents)
    found = []
    for caches in (False, True):
        steps: list[list[torch.Tensor]] = []
        for model in (compiled, eager):
            if caches:
                model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
            with torch.no_grad(), model.cache_context("cond"):
                steps.append(
                    [model(**inputs | {"timestep": inputs["timestep"] - n}).sample for n in range(3)]
                )
            if caches:
                model.disable_cache()
        found += [(one - other).abs().max().item() for one, other in zip(*steps, strict=True)]
    return found


@pytest.mark.heavy
@pytest.mark.parametrize(
    "family", ["wan", pytest.param("cogvideox1.5-5b", marks=pytest.mark.slow)], indirect=True
)
def test_compiled_blocks_are_whole_graphs_that_every_step_takes_again(
    family: str, backbone: ModelMixin, transformer: PhysicsTransformer
) -> None:
    """With residuals, with such as are computed while their block runs, and without: one set of graphs."""
    no_blocks = PHYSICS | BASELINES["lora+seb+reb"]
    baseline = BACKBONES[family][1].from_transformer(copy.deepcopy(backbone), no_blocks)
    torch._dynamo.reset()
    for name, eager in {"branch": transformer, "no Physical Blocks": baseline, "bare": backbone}.items():
        if isinstance(eager, PhysicsTransformer):
            awaken(eager)
        compiled = copy.deepcopy(eager)
        set_attention(compiled, "native")
        compile_blocks(compiled, "aot_eager")
        compiled_blocks = [
            block for block in compiled.modules() if {"forward", "run_block"} & vars(block).keys()
        ]
        assert len(compiled_blocks) >= 3
        for shape in SHAPES if name == "branch" else SHAPES[:1]:
            before = graphs()
            seen = differences(compiled, eager, torch.randn(2, 4, *shape))
            made = graphs()
            assert made - before <= 6 and made > 0
            seen += differences(compiled, eager, torch.randn(2, 4, *shape))
            assert graphs() == made, "compiled again for a shape that it knew"
            print(f"{family}, {name}, {shape}: {made - before} graphs; differs by {max(seen):.1e}")
            assert max(seen) < 1e-5
    assert graphs() and not counters["graph_break"]


def test_a_kernel_is_that_of_every_attention(transformer: PhysicsTransformer) -> None:
    set_attention(transformer, "_native_math")
    kernels = [
        module.processor._attention_backend
        for module in transformer.modules()
        if hasattr(module, "processor")
    ]
    assert len(kernels) >= 5 and {kernel.value for kernel in kernels} == {"_native_math"}


class CountAttention(TorchDispatchMode):
    """How often attention is computed, by whether it is of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.text = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.name() and "backward" not in func.name():
            if args[1].shape == args[0].shape:
                self.all += 1
            else:
                self.text += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["wan", "cogvideox-5b"], indirect=True)
def test_checkpointing_that_keeps_attention_gives_the_same_gradients_and_computes_it_once(
    family: str, transformer: PhysicsTransformer, inputs: dict[str, torch.Tensor]
) -> None:
    awaken(transformer)
    transformer.train_backbone("frozen")

    def gradients() -> tuple[dict[str, torch.Tensor], CountAttention]:
        transformer.zero_grad()
        with CountAttention() as counted:
            transformer(**inputs).sample.square().mean().backward()
        named = transformer.named_parameters()
        return {name: value.grad.clone() for name, value in named if value.grad is not None}, counted

    expected, once = gradients()
    assert len(expected) > 30 and once.all == 5
    transformer.enable_gradient_checkpointing()
    again, twice = gradients()
    assert twice.all > once.all + 3  # the first frozen block has no gradient to compute again for
    transformer.enable_gradient_checkpointing(checkpoint_but_attention)
    kept, counted = gradients()
    assert (counted.all, counted.text) == (once.all, twice.text)
    for found in (again, kept):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class AsOnCuda(TorchFunctionMode):
    """CUDA's autocast leaves norms in float32; and the precisions in which attention gets its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attended: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.attended += [value.dtype for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        output = func(*args, **kwargs)
        return output.float() if func in (torch.rms_norm, F.rms_norm, F.layer_norm) else output


@pytest.mark.parametrize("family", ["wan", "cogvideox-5b"], indirect=True)
def test_queries_and_keys_have_the_precision_of_values_under_cudas_autocast_too(
    transformer: PhysicsTransformer, inputs: dict[str, torch.Tensor]
) -> None:
    def attended() -> set[torch.dtype]:
        with AsOnCuda() as seen, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            transformer(**inputs)
        return set(seen.attended)

    assert attended() == {torch.float32, torch.bfloat16}
    set_attention(transformer, "native")
    assert attended() == {torch.bfloat16}


def test_own_attention_of_cogvideox_equals_upstreams_bit_for_bit() -> None:
    for family in ("cogvideox-2b", "cogvideox-5b"):
        torch.manual_seed(0)
        upstream = BACKBONES[family][0](**BACKBONES[family][2])
        inputs = make_inputs(upstream, torch.randn(2, 4, 2, 4, 6))
        own = copy.deepcopy(upstream)
        set_attention(own, "native")
        assert torch.equal(own(**inputs).sample, upstream(**inputs).sample)


def test_a_family_that_takes_neither_is_refused() -> None:
    with pytest.raises(ProPhyError, match="'regional', and SimpleNamespace names no _repeated_blocks"):
        compile_blocks(SimpleNamespace(_repeated_blocks=[]))
    own: Any = torch.nn.Identity()
    own.processor = SimpleNamespace()
    with pytest.raises(ProPhyError, match="'sage', and SimpleNamespace takes no kernel"):
        set_attention(own, "sage")


@pytest.mark.parametrize(
    "backend, trains, reason",
    [
        ("_native_cudnn", False, "needs an NVIDIA GPU of compute capability 8.0, and this is a CPU"),
        ("_flash_3", True, "needs an NVIDIA GPU of compute capability 9.0, and this is a CPU"),
        ("sage", True, "has no backward pass"),
        ("xformers", False, r"cannot be loaded \(Xformers .* is not usable because of missing package"),
    ],
)
def test_a_kernel_that_does_not_run_here_is_refused_by_name(backend: str, trains: bool, reason: str) -> None:
    with pytest.raises(ProPhyError, match=f"backbone.attention '{backend}' {reason}.*set it to 'native'"):
        check_attention(backend, CPU, torch.bfloat16, trains=trains)
    check_attention("native", CPU, torch.float32, trains=True, shares=True)
    with pytest.raises(ProPhyError, match="cannot be shared by several GPUs"):
        check_attention("_flash_3", CPU, torch.bfloat16, trains=True, shares=True)
