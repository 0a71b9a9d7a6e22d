"""What every backbone with a Physical Branch has in common, whatever its family."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig, ModelMixin, ParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.utils import BaseOutput
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from prophy.device import default_device
from prophy.errors import ProPhyError
from prophy.models.acceleration import dispatch_attention
from prophy.models.control import PhysicsControl, RoutingOutput
from prophy.models.physics_branch import PhysicsBranch, Residual
from prophy.models.physics_config import BranchConfig

BRANCH = "physics_branch."  # begins the names of the branch's parameters
# Compiled beside blocks. The experts themselves are one kernel, which cannot be traced in float32.
EXPERT_BLOCKS = ("RefinementRouter",)
_ENLARGED = 2.0**14  # exact in any precision, and far from the ends of the range of bfloat16


@dataclass
class ProPhyTransformerOutput(BaseOutput):
    """Output of a transformer with a Physical Branch.

    Attributes:
        sample: the prediction, like the latents.
        routing: what the routers said; None where the branch was skipped, or a step cache may skip it.
    """

    sample: torch.Tensor
    routing: RoutingOutput | None = None


class PhysicsTransformer(ModelMixin):
    """Base of the transformers with a branch, before diffusers' own class in the order of bases.

    A family names its `_block_list` (attribute), its `_block` and `_injected_block` (classes), its
    `semantic_text` and the `_text_dim` of it (key of the configuration), makes a `_new_block`, and gives
    `predict`, `_embed_inputs`, `_embed_patches`. Its `__init__` takes `physics`, `lora_rank` and `lora_alpha`
    (None without an adapter), and ends with `self._add_branch()`. The configuration has `in_channels`, and
    `num_attention_heads` times `attention_head_dim` is the width of a token. Routers are float32, whatever
    the precision of the rest: `_keep_in_fp32_modules` names "router". Where processes may share a sample,
    what a block takes of each token went through `_own`, and `proj_out` gives the prediction of a token.

    Attributes:
        semantic_text: name of the tensor, of those that a text is encoded to, that the semantic experts read:
            `[B, L, text_dim]`.
        physics: what decides the branch.
        physics_branch: the branch.
    """

    physics: BranchConfig
    physics_branch: PhysicsBranch
    semantic_text: ClassVar[str]
    _block_list: ClassVar[str]
    _block: ClassVar[type[nn.Module]]
    _injected_block: ClassVar[type[nn.Module]]
    _text_dim: ClassVar[str]
    _skip_layerwise_casting_patterns: Sequence[str] | None  # diffusers'
    # diffusers': what is split among processes that share a sample, and what is put together again. The two
    # that are named for it are modules that do nothing else, and so are met wherever the branch is run from.
    _cp_plan: ClassVar = {
        "own_tokens": {"input": ContextParallelInput(split_dim=-2)},
        "physics_branch.all_tokens": ContextParallelOutput(gather_dim=1),
        "proj_out": ContextParallelOutput(gather_dim=1),
    }

    def enable_parallelism(self, *, config: ContextParallelConfig) -> None:
        """Has several processes make each sample together: every one computes a share of its tokens.

        Each is called with the same, whole inputs, and gets the same, whole outputs. In attention they
        exchange tokens for heads (Ulysses). Each process has the gradients that its tokens give: their sum is
        the sample's.

        Args:
            config: its `ulysses_degree` is the number of processes; its `mesh`, where the default group has
                more than these, has the dimensions "ring", of size 1, and "ulysses".

        Raises:
            ProPhyError: another kind of parallelism, a number of processes that does not divide the attention
                heads, no group of processes, a family whose attention is its own, or a step cache, about
                which processes that see other tokens would disagree.
        """
        if not isinstance(config, ContextParallelConfig) or config.ring_degree > 1 or config.ulysses_anything:
            raise ProPhyError(
                "a transformer with a Physical Branch is parallel in one way alone: give enable_parallelism "
                "a ContextParallelConfig with nothing but ulysses_degree and mesh"
            )
        heads = self.config.num_attention_heads
        if heads % config.ulysses_degree:
            raise ProPhyError(
                f"{config.ulysses_degree} processes cannot share out {heads} attention heads; set "
                f"ulysses_degree to a divisor of {heads}"
            )
        if not dist.is_initialized():
            raise ProPhyError(
                "a sample is shared by processes, and this is one alone; start them with torchrun, and call "
                "torch.distributed.init_process_group() first"
            )
        if self.is_cache_enabled:
            raise ProPhyError(
                "processes that share a sample would skip other steps each; call disable_cache() first"
            )
        dispatch_attention(self)
        processors = [module.processor for module in self.modules() if hasattr(module, "processor")]
        if deaf := [one for one in processors if not hasattr(one, "_parallel_config")]:
            raise ProPhyError(
                f"the attention of {type(self).__name__}, {type(deaf[0]).__name__}, sees the tokens of one "
                f"process alone; make each sample in one process"
            )
        super().enable_parallelism(config=config)

    def enable_cache(self, config: Any) -> None:
        """As upstream's.

        Raises:
            ProPhyError: several processes share a sample.
        """
        if self.processes_per_sample > 1:
            raise ProPhyError(
                "processes that share a sample would skip other steps each; leave the step cache out, or "
                "make each video in one process"
            )
        super().enable_cache(config)

    @property
    def processes_per_sample(self) -> int:
        """How many processes share the tokens of a sample: 1 until `enable_parallelism`."""
        parallel = self._parallel_config
        return 1 if parallel is None else parallel.context_parallel_config.ulysses_degree

    def _resolve_parallel_config(self, config: ContextParallelConfig) -> ParallelConfig:
        """As upstream's, which counts the devices of a host without a GPU as none, and divides by them."""
        parallel, device = ParallelConfig(context_parallel_config=config), default_device()
        mesh = config.mesh or init_device_mesh(
            device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names
        )
        parallel.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
        self._parallel_config = parallel
        return parallel

    @classmethod
    def from_transformer(cls, backbone: ModelMixin, physics: Mapping[str, Any]) -> Self:
        """Puts a new branch beside `backbone`, its blocks copied from the listed ones.

        The backbone's parameters are taken over, not copied: the two share memory.

        Args:
            backbone: a transformer of this family; where its parameters are on the meta device,
                those of the copied blocks are too, and the rest of the branch is on the CPU.
            physics: the new branch, as `BranchConfig` has it.

        Raises:
            ProPhyError: the backbone has fewer blocks than `physics_layers` asks for.
        """
        config = {name: value for name, value in backbone.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = cls(**config, physics=BranchConfig.read(physics).model_dump(mode="json"))
        own_blocks, blocks = getattr(model, cls._block_list), getattr(backbone, cls._block_list)
        _take_over(model, backbone)
        setattr(model, cls._block_list, own_blocks)
        for layer, block in enumerate(blocks):
            if layer in model.physics.physics_layers:
                _take_over(own_blocks[layer], block)
            else:
                own_blocks[layer] = block
        layers = model.physics.physics_layers if model.physics.physical_blocks else []
        model.physics_branch = model._new_branch([copy.deepcopy(blocks[layer]) for layer in layers])
        device = torch.device("cpu") if backbone.device.type == "meta" else backbone.device
        for name, parameter in model.physics_branch.named_parameters():
            # The copies are what the backbone's blocks are, here float32, there not.
            if ".block." not in name:
                dtype = torch.float32 if ".router." in name else backbone.dtype
                parameter.data = parameter.data.to(device, dtype)
        return model

    def train_backbone(self, how: Literal["frozen", "lora", "full"]) -> None:
        """Gives gradients to the branch, and to nothing, the adapter or everything of the backbone."""
        for name, parameter in self.named_parameters():
            own = "lora_" in name if how == "lora" else how == "full"
            parameter.requires_grad_(name.startswith(BRANCH) or own)

    def add_lora(self, rank: int, alpha: int, dtype: torch.dtype = torch.float32) -> None:
        """Puts a new adapter on the attention of the backbone's blocks, not on the branch's.

        It starts as the identity: the second of its two matrices is zero. It is never fused: what a short
        training adds to a weight is below the precision of bfloat16, and would round back to that weight.

        Args:
            rank: inner size of the two matrices.
            alpha: the adapter's output is scaled by alpha / rank.
            dtype: precision of the adapter: float32 to train, else that of the layers beneath.
        """
        # Imported where there is an adapter: it takes over a second.
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer

        layers = rf"{self._block_list}\.\d+\..*(to_q|to_k|to_v|to_out\.0)"
        self.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers))
        self.register_to_config(lora_rank=rank, lora_alpha=alpha)
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        for module in self.modules():
            if isinstance(module, LoraLayer):  # made like the layer beneath: in its precision, or on meta
                for matrices in (module.lora_A, module.lora_B):
                    matrices.to_empty(device=device).to(dtype)
                module.reset_lora_parameters("default", True)

    def backbone_name(self, name: str) -> str | None:
        """Tensor of the pretrained backbone that a new one of this model equals; None where it is new."""
        if block := re.fullmatch(rf"{BRANCH}blocks\.(\d+)\.block\.(.+)", name):
            return f"{self._block_list}.{self.physics.physics_layers[int(block[1])]}.{block[2]}"
        if name.startswith(BRANCH) or "lora_" in name:
            return None
        return name.replace(".base_layer.", ".")

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        physics: PhysicsControl | None = None,
    ) -> ProPhyTransformerOutput:
        """The forward pass in one form for all families: latents and prediction are `[B, C, T, H, W]`.

        Args:
            latents: noisy.
            timestep: `[B]`, or `[B, N]` of each token, where the family takes that.
            text: the family's tensors `[B, ...]`, by name; of an image too, where the model always takes one.
            physics: knobs of the branch; None leaves it as it is.
        """
        raise NotImplementedError

    def route(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: Mapping[str, torch.Tensor]
    ) -> RoutingOutput:
        """The routing of `predict` alone; no block of the backbone runs where the branch reads none."""
        if self.physics_branch.reads_backbone:
            routing = self.predict(latents, timestep, text).routing
            assert routing is not None
            return routing
        tokens, embedded_text, conditions = self._embed_inputs(latents, timestep, text)
        _, steps, routing = self.physics_branch(
            tokens,
            embedded_text,
            text[self.semantic_text],
            latents.shape[2:],
            self._embed_mixture,
            conditions,
            PhysicsControl(),
        )
        for _ in steps:
            pass
        return routing

    def _embed_inputs(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[object, ...]]:
        """Inputs of `predict` -> tokens `[B, N, D]`, text `[B, L, D]` and what a block takes after these."""
        raise NotImplementedError

    def _embed_mixture(self, mixture: torch.Tensor) -> torch.Tensor:
        """The linear part of the embedding of patches: `[B, C, T, H, W]` -> tokens `[B, N, D]`.

        By the embedding itself, which alone may use its weights where ZeRO 3 has sharded them. What it adds
        drops out, and so enlarged is the mixture before that hardly any of it is rounded away.
        """
        missing = self.config.in_channels - mixture.shape[1]  # of an image, which the mixture leaves alone
        enlarged = F.pad(_ENLARGED * mixture.to(self.dtype), (0, 0) * 3 + (0, missing))
        mixture = self._embed_patches(enlarged) - self._embed_patches(torch.zeros_like(enlarged))
        return self._own(mixture / _ENLARGED)

    def _own(self, tokens: torch.Tensor) -> torch.Tensor:
        """This process's share of what there is of each token, `[..., N, D]`: all where it shares none.

        Raises:
            ProPhyError: the tokens cannot be shared out evenly.
        """
        num_tokens = tokens.shape[-2]
        if num_tokens % self.processes_per_sample:
            raise ProPhyError(
                f"{self.processes_per_sample} processes cannot share out {num_tokens} tokens; take another "
                f"number of them, or another size, length or maximum of text tokens"
            )
        return self.own_tokens(tokens)

    def _embed_patches(self, latents: torch.Tensor) -> torch.Tensor:
        """`[B, C, T, H, W]` -> tokens `[B, N, D]`."""
        raise NotImplementedError

    def _new_block(self, block: type[nn.Module]) -> nn.Module:
        raise NotImplementedError

    def _add_branch(self) -> None:
        self.physics = BranchConfig.read(self.config.physics)
        self.own_tokens = nn.Identity()
        layers, blocks = self.physics.physics_layers, getattr(self, self._block_list)
        if layers[-1] >= len(blocks):
            raise ProPhyError(
                f"physics_layers {layers} go beyond the backbone's {len(blocks)} blocks; "
                f"give indices from 0 to {len(blocks) - 1}"
            )
        for layer in layers:
            blocks[layer] = self._new_block(self._injected_block)
        new = [self._new_block(self._block) for _ in layers if self.physics.physical_blocks]
        self.physics_branch = self._new_branch(new)
        # Layerwise casting is for what is frozen.
        self._skip_layerwise_casting_patterns = [
            *(self._skip_layerwise_casting_patterns or ()),
            "physics_branch",
        ]
        if self.config.lora_rank is not None:
            self.add_lora(self.config.lora_rank, self.config.lora_alpha)

    def _new_branch(self, blocks: Sequence[nn.Module]) -> PhysicsBranch:
        config = self.config
        return PhysicsBranch(
            blocks,
            self.physics,
            hidden_dim=config.num_attention_heads * config.attention_head_dim,
            text_dim=config[self._text_dim],
            latent_channels=config.get("out_channels") or config.in_channels,
        )

    def _run_branch(
        self,
        tokens: torch.Tensor,
        text: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        latent_shape: torch.Size,
        conditions: tuple[object, ...],
        attention_kwargs: dict[str, Any] | None,
        timestep: torch.Tensor,
        token_grid: tuple[int, int, int],
    ) -> tuple[dict[int, Residual], RoutingOutput | None]:
        """What is injected after each layer (-1: before the first), and the routing, whole after the last.

        Nothing where the request's scale is 0. With a step cache, a residual is computed when its block asks
        for it: what is skipped costs nothing. A trace wants the routing of every step, so there the whole
        branch runs.

        Args:
            tokens: embedded latents `[B, N, D]`, this process's share.
            text: embedded text `[B, L, D]`.
            encoder_hidden_states: the text that the semantic experts read, `[B, L, text_dim]`.
            latent_shape: (T, H, W).
            conditions: what a block takes after tokens and text.
            attention_kwargs: may hold `physics`, a `PhysicsControl`.
            timestep: `[B]`, or `[B, N]`, where given tokens have less than the others.
            token_grid: `(T', H', W')`.

        Raises:
            ProPhyError: the request asks for maps or turns knobs of experts that the branch lacks, or asks
                for maps where a step cache leaves them out.
        """
        control = (attention_kwargs or {}).get("physics") or PhysicsControl()
        if control.scale == 0:
            return {}, None
        branch, layers = self.physics_branch, self.physics.physics_layers
        complete = branch.semantic is not None and branch.refinement is not None
        if not complete and (control.strength or control.invert_refinement or control.trace is not None):
            raise ProPhyError(
                "this model lacks semantic or refinement experts, so there are no maps and no strengths; "
                "leave them out, or use a model that has both"
            )
        if self.is_cache_enabled and control.trace is not None and branch.reads_backbone:
            raise ProPhyError(
                "the maps of this model come from tokens of its backbone, which a step cache leaves out; "
                "switch the step cache off, or ask for no maps"
            )

        start, steps, routing = branch(
            tokens, text, encoder_hidden_states, latent_shape, self._embed_mixture, conditions, control
        )
        residuals: dict[int, Residual] = {} if start is None else {-1: start}

        def record() -> None:
            if control.trace is not None:
                control.trace.record(timestep[0].max().item(), routing, token_grid, branch.phenomena)

        def with_record(residual: Callable[[torch.Tensor], torch.Tensor]) -> Residual:
            def compute(hidden_states: torch.Tensor) -> torch.Tensor:
                added = residual(hidden_states)
                record()
                return added

            return compute

        if branch.reads_backbone:
            readers = [*steps]
            if readers:  # of refinement experts alone: that of the last layer
                readers[-1] = with_record(readers[-1])
                residuals |= zip(layers[-len(readers) :], readers, strict=True)
            return residuals, routing
        if self.is_cache_enabled and control.trace is None:
            return residuals | dict.fromkeys(layers, lambda _: next(steps)), None
        residuals |= zip(layers, steps, strict=True)
        record()
        return residuals, routing


def inject(hidden_states: torch.Tensor, residual: Residual | None) -> torch.Tensor:
    """Adds what the branch has for this layer, if anything, to tokens `[B, N, D]`."""
    if residual is None:
        return hidden_states
    added = residual if isinstance(residual, torch.Tensor) else residual(hidden_states)
    return hidden_states + added.to(hidden_states.dtype)


def _take_over(module: nn.Module, source: nn.Module) -> None:
    """Gives `module` the parameters and children of `source`."""
    for name, parameter in source.named_parameters(recurse=False):
        setattr(module, name, parameter)
    for name, child in source.named_children():
        setattr(module, name, child)
