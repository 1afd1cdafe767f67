"""The paper's denoiser: ADM's UNet with cross-attention (Rombach et al. 2022, section 3.3, appendix E.2.1; Dhariwal & Nichol 2021)."""

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.attention import AttentionBlock, SpatialTransformer
from ldm_jax.nn.layers import Array, Conv, Dense, Dtype, ResBlock, norm, norm_groups, share_waves, timestep_embedding, zeros
from ldm_jax.nn.remat import check_remat, rematted, rematted_group


def place_features(height: int, width: int, channels: int) -> Array:
    """`share_waves` of a grid's places [height,width,channels]: of the column and of the row, each in shares of the whole."""
    columns, rows = (share_waves((jnp.arange(count) + 0.5) / count, -(-channels // 4)) for count in (width, height))
    return jnp.concatenate(jnp.broadcast_arrays(columns[None], rows[:, None]), axis=-1)[..., :channels]


class UNet(nn.Module):
    """Predicts eps, v, x_0 or a velocity from x_t.

    Block names follow the released checkpoints: `input_{i}_*`, `middle_*`, `output_{i}_*`, i counted as there.

    Attributes:
      out_channels: channels of the prediction, those of the latent.
      channels: width of the first level; level l has channels * channel_mult[l].
      attention_levels: downsampling factors (1, 2, 4, ...) of the levels with attention.
      num_heads, head_channels: give one, leave the other at 0.
      transformer_depth: blocks in each SpatialTransformer; 0 puts ADM's plain self-attention there instead.
      scale_shift, resblock_updown: as in ADM.
      vector_layers: dense layers between `vector` and the time embedding, to which it is added: 0 for a table of classes of the embedding's
        width, as in ADM; 1; or 2, as later text models have for pooled text and picture sizes.
      norm_groups: of every GroupNorm; 0 is 32, or fewer in narrow networks.
      places: adds fixed features of each place to the first convolution's result. Without them a UNet knows where it is by the padding of
        its convolutions alone, and a small one takes long to learn to paint at places that it is told. Not in the paper's code.
      remat: which activations are kept for the backward pass, see `nn.remat`.
    """

    out_channels: int
    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (4, 2, 1)
    num_heads: int = 0
    head_channels: int = 64
    transformer_depth: int = 1
    scale_shift: bool = False
    resblock_updown: bool = False
    dropout: float = 0.0
    vector_layers: int = 1
    norm_groups: int = 0
    places: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def check(self) -> None:
        """Raises ValueError where a setting is wrong or would have no effect."""
        factors = [2**i for i in range(len(self.channel_mult))]
        unmatched = sorted(set(self.attention_levels) - set(factors))
        if unmatched:
            raise ValueError(f"attention_levels {unmatched} match no level; the factors of this UNet are {factors}")
        if bool(self.num_heads) == bool(self.head_channels):
            raise ValueError("give one of num_heads and head_channels, and set the other to 0")
        if self.vector_layers not in (0, 1, 2):
            raise ValueError(f"vector_layers {self.vector_layers} is not 0, 1 or 2")
        check_remat(self.remat)
        for mult, factor in zip(self.channel_mult, factors, strict=True):
            width, by = self.channels * mult, self.num_heads or self.head_channels
            if (factor in self.attention_levels or factor == factors[-1]) and width % by:
                raise ValueError(f"width {width} at factor {factor} is not divisible into heads ({by})")

    @property
    def multiple(self) -> int:
        """What a latent's height and width must be divisible by."""
        return 2 ** (len(self.channel_mult) - 1)

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        crossattn: Array | None = None,
        concat: Array | None = None,
        vector: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        """x [B,h,w,C] and t float [B] (in the embedding's units) to [B,h,w,out_channels].

        crossattn [B,L,D] is attended to, concat [B,h,w,C'] joins x, vector [B,D] joins the time embedding. Dropout acts where it is
        given keys [B], one an example. h and w must be divisible by `multiple`, or a ValueError is raised. The result is in at least
        float32.
        """
        emb = Dense(4 * self.channels, dtype=self.dtype, name="time_embed_0")(timestep_embedding(t, self.channels).astype(self.dtype))
        emb = Dense(4 * self.channels, dtype=self.dtype, name="time_embed_2")(nn.silu(emb))
        if vector is not None:
            emb = emb + self._vector(vector.astype(self.dtype))
        if crossattn is not None and not self.transformer_depth:
            raise ValueError("transformer_depth=0 leaves nothing that attends to a condition; give 1 or more, or no such condition")
        if x.shape[1] % self.multiple or x.shape[2] % self.multiple:
            raise ValueError(f"a latent of {x.shape[1]}x{x.shape[2]} cannot be halved {len(self.channel_mult) - 1} times")
        if concat is not None:
            x = jnp.concatenate([x, concat.astype(x.dtype)], axis=-1)

        h = Conv(self.channels, dtype=self.dtype, name="input_0_conv")(x)
        if self.places:
            h = h + jnp.asarray(place_features(*h.shape[1:]), h.dtype)
        skips = [h]
        for level in range(len(self.channel_mult)):
            down = rematted_group(UNet._down, self.remat, (1,))
            skips += down(self, level, skips[-1], emb, crossattn, dropout_keys)
        h = rematted_group(UNet._middle, self.remat)(self, skips[-1], emb, crossattn, dropout_keys)
        for level in reversed(range(len(self.channel_mult))):
            first = -self.num_res_blocks - 1
            up = rematted_group(UNet._up, self.remat, (1,))
            h = up(self, level, h, tuple(skips[first:]), emb, crossattn, dropout_keys)
            del skips[first:]

        h = nn.silu(norm(self.dtype, 1e-5, "out_norm", norm_groups(h.shape[-1], self.norm_groups))(h))
        h = Conv(self.out_channels, kernel_init=zeros, dtype=self.dtype, name="out_conv")(h)
        return h.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _down(self, level: int, h: Array, emb: Array, context: Array | None, dropout_keys: Array | None) -> list[Array]:
        """What the blocks of a level make of h one after another, for the way up, and with the last level excepted, the halved map."""
        outputs, block, width = [], 1 + level * (self.num_res_blocks + 1), self.channels * self.channel_mult[level]
        for _ in range(self.num_res_blocks):
            h = self._res(f"input_{block}_res", width, h, emb, dropout_keys)
            h = self._attention(f"input_{block}_attn", 2**level, h, context, dropout_keys)
            outputs.append(h)
            block += 1
        if level + 1 == len(self.channel_mult):
            return outputs
        if self.resblock_updown:
            return [*outputs, self._res(f"input_{block}_down", width, h, emb, dropout_keys, "down")]
        return [*outputs, Conv(width, stride=2, dtype=self.dtype, name=f"input_{block}_down")(h)]

    def _middle(self, h: Array, emb: Array, context: Array | None, dropout_keys: Array | None) -> Array:
        h = self._res("middle_0_res", h.shape[-1], h, emb, dropout_keys)
        h = self._attention("middle_1_attn", None, h, context, dropout_keys)
        return self._res("middle_2_res", h.shape[-1], h, emb, dropout_keys)

    def _up(self, level: int, h: Array, skips: tuple[Array, ...], emb: Array, context: Array | None, dropout_keys: Array | None) -> Array:
        """The way up through a level, with what the way down left there, the last of it first."""
        block, width = (len(self.channel_mult) - 1 - level) * (self.num_res_blocks + 1), self.channels * self.channel_mult[level]
        for skip in reversed(skips):
            h = self._res(f"output_{block}_res", width, jnp.concatenate([h, skip], -1), emb, dropout_keys)
            h = self._attention(f"output_{block}_attn", 2**level, h, context, dropout_keys)
            block += 1
        if not level:
            return h
        if self.resblock_updown:
            return self._res(f"output_{block - 1}_up", width, h, emb, dropout_keys, "up")
        return Conv(width, upsample=True, dtype=self.dtype, name=f"output_{block - 1}_up")(h)

    def _vector(self, vector: Array) -> Array:
        for layer in range(self.vector_layers):
            vector = nn.silu(vector) if layer else vector
            vector = Dense(4 * self.channels, dtype=self.dtype, name=f"vector_embed_{2 * layer}")(vector)
        return vector

    def _res(self, name: str, width: int, h: Array, emb: Array, dropout_keys: Array | None, resample: str | None = None) -> Array:
        cls = rematted(ResBlock, self.remat)
        block = cls(width, 1e-5, self.dropout, self.scale_shift, resample, groups=self.norm_groups, dtype=self.dtype, name=name)
        return block(h, emb, dropout_keys)

    def _attention(self, name: str, factor: int | None, h: Array, context: Array | None, dropout_keys: Array | None) -> Array:
        """Attention at a level that has it; the middle block (factor None) always does."""
        if factor is not None and factor not in self.attention_levels:
            return h
        width = h.shape[-1]
        heads = self.num_heads or width // self.head_channels
        if self.transformer_depth == 0:
            return rematted(AttentionBlock, self.remat)(heads, groups=self.norm_groups, dtype=self.dtype, name=name)(h)
        cls = rematted(SpatialTransformer, self.remat)
        transformer = cls(heads, width // heads, self.transformer_depth, self.dropout, self.norm_groups, self.dtype, name=name)
        return transformer(h, context, dropout_keys)
