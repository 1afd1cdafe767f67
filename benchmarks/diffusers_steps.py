"""The updates of both stages in torch, eager, with diffusers' networks: what `benchmarks.train_step --compare diffusers` runs.

Widths, depths, heads, batch, dtype, optimiser, clipping and averages are those of our configuration.
"""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional as F

from ldm_jax.nn.layers import norm_groups
from ldm_jax.stages import compute_dtype

_PIXEL = {"l1": torch.abs, "l2": torch.square, "l1_l2": lambda d: d.abs() + d.square()}
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _autocast(dtype: str) -> AbstractContextManager[Any]:
    return torch.autocast(_DEVICE.type, torch.bfloat16, enabled=np.dtype(compute_dtype(dtype)).name == "bfloat16")


def _optimizer(group: ConfigDict, module: nn.Module) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if group.kind == "adamw" else torch.optim.Adam
    return kind(module.parameters(), group.learning_rate, (group.b1, group.b2), group.eps, group.weight_decay)


class _Averages:
    """Exponential moving averages of a module's parameters, one for each decay."""

    def __init__(self, module: nn.Module, decays: tuple[float, ...]) -> None:
        self._params = [p.detach() for p in module.parameters()]
        self._copies = {decay: [p.clone() for p in self._params] for decay in decays}

    def update(self) -> None:
        for decay, copies in self._copies.items():
            torch._foreach_lerp_(copies, self._params, 1 - decay)


class _Text(nn.Module):
    """A pre-norm transformer over token ids, of the widths of our text encoder."""

    def __init__(self, vocab_size: int, group: ConfigDict) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, group.width)
        self.positions = nn.Parameter(0.02 * torch.randn(group.max_length, group.width))
        layer = nn.TransformerEncoderLayer(
            group.width, group.num_heads, 4 * group.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, group.depth, nn.LayerNorm(group.width), enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(self.tokens(tokens) + self.positions)


class DenoiserStep:
    """Latents from moments, noise, the network on a drawn time, squared error, clipping, AdamW, averages."""

    differences = (
        "the text encoder is torch's nn.TransformerEncoder, with biases in its projections",
        "32 groups in every norm",
        "velocity as the target",
    )

    def __init__(self, config: ConfigDict, batch: dict[str, np.ndarray], vocab_size: int) -> None:
        group, self.config = config.denoiser, config
        widths = [group.channels * m for m in group.channel_mult]
        crossed = [2**i in group.attention_levels for i in range(len(widths))]
        channels = batch["moments"].shape[-1] // 2
        unet = UNet2DConditionModel(
            sample_size=batch["moments"].shape[1],
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            layers_per_block=group.num_res_blocks,
            down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed),
            up_block_types=tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)),
            attention_head_dim=tuple(group.num_heads or w // group.head_channels for w in widths),  # the number of heads, despite its name
            cross_attention_dim=config.conditioning.text.width,
            transformer_layers_per_block=group.transformer_depth,
            resnet_time_scale_shift="scale_shift" if group.scale_shift else "default",
        )
        self.model = nn.ModuleDict({"unet": unet, "text": _Text(vocab_size, config.conditioning.text)}).to(_DEVICE).train()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer, self.averages = _optimizer(config.optimizer, self.model), _Averages(self.model, tuple(config.ema.decays))
        self.moments = torch.from_numpy(batch["moments"]).permute(0, 3, 1, 2).contiguous().to(_DEVICE)
        self.tokens = torch.from_numpy(batch["tokens"]).long().to(_DEVICE)

    def use_channels_last(self) -> None:
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.moments = self.moments.contiguous(memory_format=torch.channels_last)

    def run(self, updates: int) -> None:
        for _ in range(updates):
            self._update()
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def _update(self) -> None:
        mean, log_var = self.moments.chunk(2, dim=1)
        x0 = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        noise, t = torch.randn_like(x0), torch.rand(len(x0), device=_DEVICE)
        x_t = torch.lerp(x0, noise, t[:, None, None, None])
        with _autocast(self.config.train.dtype):
            prediction = self.model["unet"](x_t, 1000 * t, self.model["text"](self.tokens)).sample
        F.mse_loss(prediction.float(), noise - x0).backward()
        if self.config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averages.update()


def _discriminator(group: ConfigDict) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, group.features, 4, 2, 1), nn.LeakyReLU(0.2)]
    width = group.features
    for layer in range(1, group.num_layers + 1):
        wider = group.features * min(2**layer, 8)
        layers.append(nn.Conv2d(width, wider, 4, 2 if layer < group.num_layers else 1, 1, bias=group.norm != "batch"))
        if group.norm != "none":
            layers.append(nn.BatchNorm2d(wider) if group.norm == "batch" else nn.GroupNorm(max(1, min(32, wider // 4)), wider))
        layers.append(nn.LeakyReLU(0.2))
        width = wider
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))


class FirstStageStep:
    """One update of both players as diffusers' training example for AutoencoderKL makes them, without LPIPS.

    The autoencoder's comes first, with the adaptive weight from the gradients at the last convolution; the discriminator's follows after
    another pass through the autoencoder.
    """

    differences = (
        "two passes through the autoencoder, as in the example",
        "the discriminator's update, whose backward pass and step the example leaves out, is made",
        "mid-block attention and norms as diffusers has them",
    )

    def __init__(self, config: ConfigDict, batch: dict[str, np.ndarray]) -> None:
        group, self.config = config.first_stage, config
        if group.attention_levels or group.z_channels != group.latent_channels:
            raise SystemExit("diffusers' AutoencoderKL has attention in the middle only, and latent_channels = z_channels")
        levels = len(group.channel_mult)
        self.patch, pixels = group.patch_size, 3 * group.patch_size**2
        self.vae = AutoencoderKL(
            in_channels=pixels,
            out_channels=pixels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(group.channels * m for m in group.channel_mult),
            layers_per_block=group.num_res_blocks,
            latent_channels=group.latent_channels,
            norm_num_groups=norm_groups(group.channels),
            mid_block_add_attention=group.mid_attention,
        )
        self.vae, self.disc = self.vae.to(_DEVICE).train(), _discriminator(group.discriminator).to(_DEVICE).train()
        self.parameters = sum(p.numel() for model in (self.vae, self.disc) for p in model.parameters())
        self.optimizers = [_optimizer(config.optimizer, model) for model in (self.vae, self.disc)]
        self.averages = _Averages(self.vae, tuple(config.ema.decays))
        self.images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).contiguous().to(_DEVICE)

    def use_channels_last(self) -> None:
        self.vae.to(memory_format=torch.channels_last)
        self.disc.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images = self.images.contiguous(memory_format=torch.channels_last)

    def run(self, updates: int) -> None:
        for _ in range(updates):
            self._update_autoencoder()
            self._update_discriminator()
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def _reconstruct(self) -> tuple[torch.Tensor, torch.Tensor, Any]:
        images = self.images.float() / 127.5 - 1
        posterior = self.vae.encode(F.pixel_unshuffle(images, self.patch)).latent_dist
        return images, F.pixel_shuffle(self.vae.decode(posterior.sample()).sample, self.patch).float(), posterior

    def _update_autoencoder(self) -> None:
        loss = self.config.first_stage.loss
        with _autocast(self.config.train.dtype):
            images, recon, posterior = self._reconstruct()
            nll = _PIXEL[loss.pixel](images - recon).sum() / len(images)
            kl = posterior.kl().sum() / len(images)
            gan = -self.disc(recon).float().mean()
        last = self.vae.decoder.conv_out.weight
        rec_grad, gan_grad = (torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (nll, gan))
        weight = (rec_grad / (gan_grad + 1e-4)).clamp(0, 1e4) * loss.disc_weight
        (nll + loss.kl_weight * kl + weight * gan).backward()
        if self.config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(self.vae.parameters(), self.config.optimizer.clip_norm)
        self._step(0)
        self.averages.update()

    def _update_discriminator(self) -> None:
        with _autocast(self.config.train.dtype):
            images, recon, _ = self._reconstruct()
            real, fake = self.disc(images).float(), self.disc(recon.detach()).float()
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        self._step(1)

    def _step(self, which: int) -> None:
        self.optimizers[which].step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
