"""Every network of Send-VAE, and nothing else: VAE, Mapper, SiT, VFM (frozen), LPIPS, PatchDiscriminator.

Conventions, here and in every other file:
    images   float (B,3,H,W), RGB, in [-1,1]
    latents  z (B,C,h,w) in raw VAE units; `vae.normalize(z)` is what a diffusion model sees
    time     t (B,), 0 is data and 1 is noise: x_t = (1-t) x + t eps, velocity v = eps - x
    tokens   (B,N,D), row by row over a square grid
Letters in shape comments: B pictures, C latent channels, h and w latent height and width, N tokens, D token width,
H heads, d width of a head.
"""

import difflib
import math
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.files import UserError, first_line, load_strictly, read_weights, reading


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def sincos_positions(dim, grid):
    """Fixed 2-D sine-cosine positions of MAE, as DiT and SiT use them: -> (1, grid*grid, dim), the first half for the
    column, the second for the row, each sin then cos over dim/4 frequencies 1/10000^(k/(dim/4))."""
    if dim % 4:
        raise UserError(
            f"token width {dim} is not divisible by 4, which the 2-D sine-cosine positions need"
        )
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim/2)
    column = axis[None, :, :].expand(grid, -1, -1)
    row = axis[:, None, :].expand(-1, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, dim).float()


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v over (B,H,N,d). PyTorch's fused kernel for CPUs does not use their bf16 matrix products:
    two products and a softmax take 40% of its time in bf16, forward and backward, at 64 to 257 tokens."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def maybe_checkpoint(on, function, *inputs):
    """`function(*inputs)`, its activations recomputed in the backward pass when `on`."""
    if on and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


class Attention(nn.Module):
    """Multi-head self-attention, (B,N,D) -> (B,N,D)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise UserError(f"token width {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = (
            self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )  # each (B,H,N,d)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, D))


def named(**parts):
    """nn.Sequential with the names that published weights give to its parts."""
    return nn.Sequential(OrderedDict(parts))


def mlp(dim, approximate):
    return named(
        fc1=nn.Linear(dim, 4 * dim),
        act=nn.GELU(approximate=approximate),
        fc2=nn.Linear(4 * dim, dim),
    )


def projector(dim, out, width=2048):
    """The three-layer MLP that REPA and Send-VAE put before the cosine: dim -> width -> width -> out, SiLU."""
    return nn.Sequential(
        nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out)
    )


# ----------------------------------------------------------------------------------------------------------------------
# VAE: the AutoencoderKL of latent diffusion (Rombach et al. 2022), under its parameter names


class ChannelsLastNorm(torch.autograd.Function):
    """group_norm with its own backward pass, for bf16 in channels_last on a CPU, where PyTorch's takes 4 to 10 times as long as
    in contiguous memory. With it convolutions can run in channels_last: a VAE step at 256 px takes 4.00 s instead of 4.52."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        B, C, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, B, C, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors  # mean and 1/std of the groups, fp32 (B,G)
        B, C, h, w = x.shape
        x, dy = (t.permute(0, 2, 3, 1).reshape(B, h * w, C) for t in (x, dy))
        mean, rstd, weight = mean[..., None], rstd[..., None], weight.view(mean.shape[1], -1)
        dbias = dy.sum(1, dtype=torch.float32).view(B, *weight.shape)  # a picture's, (B,G,C/G)
        dweight = ((dy * x).sum(1, dtype=torch.float32).view_as(dbias) - mean * dbias) * rstd
        # dx = rstd (weight dy - mean of it over the group - xhat mean of weight dy xhat over the group), xhat = (x-mean) rstd
        count = h * w * weight.shape[1]
        of_one = (weight * dbias).sum(2, keepdim=True) / count
        of_x = (weight * dweight).sum(2, keepdim=True) / count * rstd

        def a_channel(value):  # -> (B,1,C)
            return value.expand_as(dbias).reshape(B, 1, C).to(x.dtype)

        dx = torch.addcmul(a_channel(rstd * (of_x * mean - of_one)), x, a_channel(-rstd * of_x))
        dx = torch.addcmul(dx, dy, a_channel(rstd * weight))
        return (
            dx.view(B, h, w, C).permute(0, 3, 1, 2),
            dweight.sum(0).flatten(),
            dbias.sum(0).flatten(),
            None,
            None,
        )


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels, groups):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        if (
            x.device.type == "cpu"
            and x.dtype == torch.bfloat16
            and x.is_contiguous(memory_format=torch.channels_last)
        ):
            return ChannelsLastNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(cin, groups), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(cout, groups), nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """One head over all positions of a feature map."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        B, C, h, w = x.shape
        y = self.norm(x)
        q, k, v = (
            f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v)
        )  # (B,1,hw,C)
        y = attention(q, k, v)[:, 0].transpose(1, 2).reshape(B, C, h, w)
        return x + self.proj_out(y)


def make_level(cin, cout, blocks, attention, groups):
    """The blocks of one resolution, with attention after each of them or none."""
    return nn.ModuleDict(
        dict(
            block=nn.ModuleList(
                ResnetBlock(cout if i else cin, cout, groups) for i in range(blocks)
            ),
            attn=nn.ModuleList(
                AttnBlock(cout, groups) if attention else nn.Identity() for _ in range(blocks)
            ),
        )
    )


def middle(channels, groups):
    return named(
        block_1=ResnetBlock(channels, channels, groups),
        attn_1=AttnBlock(channels, groups),
        block_2=ResnetBlock(channels, channels, groups),
    )


def in_order(levels):
    """The modules of the levels as they run: a block, its attention, the next block, ..., the change of resolution."""
    modules = []
    for level in levels:
        block, attn, *resample = level.values()
        modules += [module for pair in zip(block, attn) for module in pair] + resample
    return modules


def run_coder(coder, blocks, x, recompute):
    """What encoder and decoder share: a convolution, their blocks, norm and convolution."""
    x = coder.conv_in(x)
    for block in blocks:
        x = maybe_checkpoint(recompute, block, x)
    return coder.conv_out(F.silu(coder.norm_out(x)))


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, channels, groups):
        super().__init__()
        widths = [ch] + [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            make_level(a, b, num_res_blocks, i in attn_levels, groups)
            for i, (a, b) in enumerate(zip(widths, widths[1:]))
        )
        for level, width in zip(self.down[:-1], widths[1:]):
            conv = nn.Conv2d(width, width, 3, stride=2)
            level["downsample"] = named(
                pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv
            )  # LDM pads right and bottom only
        self.mid = middle(widths[-1], groups)
        self.norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

    def forward(self, x, recompute):
        return run_coder(self, [*in_order(self.down), *self.mid], x, recompute)


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, channels, groups):
        super().__init__()
        widths = [ch * mult for mult in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        self.up = nn.ModuleList(
            make_level(b, a, num_res_blocks + 1, i in attn_levels, groups)
            for i, (a, b) in enumerate(zip(widths, widths[1:]))
        )
        for level, width in zip(self.up[1:], widths[1:]):
            level["upsample"] = named(
                nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(width, width, 3, padding=1)
            )
        self.norm_out = GroupNorm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z, recompute):  # levels are numbered as in LDM: the last is first
        return run_coder(self, [*self.mid, *in_order(reversed(self.up))], z, recompute)


# Factor -> (channel multipliers a level, levels with attention after each block). f8 is LDM's, f16 VA-VAE's.
VAE_LEVELS = {
    2: ((1, 2), ()),
    4: ((1, 2, 4), ()),
    8: ((1, 2, 4, 4), ()),
    16: ((1, 1, 2, 2, 4), (4,)),
    32: ((1, 1, 2, 2, 4, 4), (4, 5)),
}


class VAE(nn.Module):
    """LDM's AutoencoderKL. `spec` is f<factor>d<channels>, e.g. f8d4 (SD-VAE), f16d32 (VA-VAE); anything else of the
    architecture is an override: ch=128, ch_mult, num_res_blocks=2, attn_levels, groups of the norms (LDM's 32, fewer below
    ch=128: a group of one channel is an instance norm, which wipes out the picture's mean colours).

    Buffers latent_mean, latent_std (C,) are the statistics of its latents over the training set (0 and 1 until they
    are measured); `config` holds the arguments that build the same network again."""

    def __init__(
        self,
        spec="f16d32",
        resolution=256,
        ch=128,
        ch_mult=None,
        num_res_blocks=2,
        attn_levels=None,
        groups=None,
    ):
        super().__init__()
        match = re.fullmatch(r"f(\d+)d(\d+)", spec)
        if not match or int(match[1]) not in VAE_LEVELS or int(match[2]) < 1:
            raise UserError(
                f"VAE spec '{spec}' is not f<factor>d<channels> with a factor of "
                f"{', '.join(map(str, VAE_LEVELS))}, such as f8d4 or f16d32"
            )
        self.factor, self.channels = int(match[1]), int(match[2])
        mult, attn = VAE_LEVELS[self.factor]
        ch_mult = tuple(ch_mult or mult)
        attn_levels = tuple(attn if attn_levels is None else attn_levels)
        if 2 ** (len(ch_mult) - 1) != self.factor:
            raise UserError(
                f"ch_mult {ch_mult} has {len(ch_mult)} levels, but {spec} needs "
                f"{int(math.log2(self.factor)) + 1}"
            )
        groups = groups or min(32, max(1, ch // 4))
        if any(ch * m % groups for m in ch_mult):
            raise UserError(
                f"VAE widths {[ch * m for m in ch_mult]} must be multiples of the norms' {groups} groups"
            )
        self.config = dict(
            spec=spec,
            ch=ch,
            ch_mult=list(ch_mult),
            num_res_blocks=num_res_blocks,
            attn_levels=list(attn_levels),
            groups=groups,
        )
        self.set_resolution(resolution)
        self.grad_checkpoint = False
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, attn_levels, self.channels, groups)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, attn_levels, self.channels, groups)
        self.quant_conv = nn.Conv2d(2 * self.channels, 2 * self.channels, 1)
        self.post_quant_conv = nn.Conv2d(self.channels, self.channels, 1)
        self.register_buffer("latent_mean", torch.zeros(self.channels))
        self.register_buffer("latent_std", torch.ones(self.channels))
        self.init_weights()

    def init_weights(self):
        """Convolutions that keep the variance and residual branches that start at zero. LDM leaves PyTorch's default, which
        shrinks the signal threefold a layer: after 4,800 CIFAR-10 pictures 20.9 dB, and 22.9 dB with this."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (ResnetBlock, AttnBlock)):
                nn.init.zeros_(
                    (module.conv2 if isinstance(module, ResnetBlock) else module.proj_out).weight
                )

    def set_resolution(self, resolution):
        """The weights fit any resolution that the factor divides; this is the one the VAE is trained for."""
        if resolution % self.factor:
            raise UserError(
                f"resolution {resolution} is not divisible by the VAE's factor {self.factor}"
            )
        self.resolution, self.latent_size = resolution, resolution // self.factor
        self.config["resolution"] = resolution

    def encode(self, x):
        """Images (B,3,H,W) in [-1,1] -> mean and logvar (B,C,h,w) of the posterior, fp32, raw units."""
        mean, logvar = (
            self.quant_conv(self.encoder(x, self.grad_checkpoint)).float().chunk(2, dim=1)
        )
        return mean, logvar.clamp(-30.0, 20.0)

    @staticmethod
    def sample(mean, logvar, noise):
        """A posterior sample z (B,C,h,w); `noise` is standard normal of the same shape."""
        return mean + torch.exp(0.5 * logvar) * noise

    def decode(self, z):
        """Raw latents (B,C,h,w) -> images (B,3,H,W), fp32, about [-1,1] (not clamped)."""
        return self.decoder(self.post_quant_conv(z), self.grad_checkpoint).float()

    def normalize(self, z):
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, z):
        return z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# Mapper: Send-VAE's h, from noised latents to the tokens of a vision foundation model


class MapperBlock(nn.Module):
    """Pre-norm ViT block."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), mlp(dim, "none")

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Mapper(nn.Module):
    """BatchNorm -> noise -> patch embedding + positions -> `depth` ViT blocks -> MLP to `dim` (paper, section 3).

    The batch norm without scale (as REPA-E's) gives every channel unit variance, so that the noise means the same for
    any VAE. `width` is the width of the tokens inside (default: dim), `hidden` that of the MLP. depth 0 is the paper's
    MLP-only ablation."""

    def __init__(self, channels, latent_size, patch, dim, heads, depth=1, width=None, hidden=2048):
        super().__init__()
        if latent_size % patch:
            raise UserError(
                f"a latent of {latent_size}x{latent_size} cannot be cut into patches of {patch}"
            )
        width = width or dim
        self.norm = nn.BatchNorm2d(channels, eps=1e-4, momentum=0.1, affine=False)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer(
            "positions", sincos_positions(width, latent_size // patch), persistent=False
        )
        self.blocks = nn.ModuleList(MapperBlock(width, heads) for _ in range(depth))
        self.head = projector(width, dim, hidden)

    def forward(self, z, t=None, noise=None):
        """Raw latents (B,C,h,w), times (B,) and standard normal noise (B,C,h,w), or neither -> tokens (B,N,dim)."""
        z = self.norm(z)
        if t is not None:
            t = t.view(-1, 1, 1, 1)
            z = (1 - t) * z + t * noise
        x = self.embed(z).flatten(2).transpose(1, 2) + self.positions  # (B,N,width)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# ----------------------------------------------------------------------------------------------------------------------
# SiT: the published network (Ma et al. 2024), its parameter names and initialisation, with REPA's projector

SIT_SIZES = dict(
    S=(12, 384, 6), B=(12, 768, 12), L=(24, 1024, 16), XL=(28, 1152, 16)
)  # depth, width, heads


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """t (B,) in [0,1] -> (B,width). The frequencies are those of DiT, 1 to 1/10000, and t is not scaled up (as SiT)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer(
            "omega", torch.exp(-math.log(10000.0) * torch.arange(128) / 128), persistent=False
        )

    def forward(self, t):
        angle = t[:, None].float() * self.omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class SiTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = mlp(width, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """Velocity network on normalised latents. `size` S, B, L or XL; depth, width and heads override it.

    forward(x, t, y) -> v. With `vfm_dim` it also holds REPA's projector: forward(x, t, y, tokens=True) -> (v, tokens
    (B,N,vfm_dim)), taken after block `repa_block` (counted from 1). y == num_classes is the null label."""

    def __init__(
        self,
        size="XL",
        patch=1,
        channels=32,
        latent_size=16,
        num_classes=1000,
        vfm_dim=None,
        repa_block=8,
        depth=None,
        width=None,
        heads=None,
    ):
        super().__init__()
        preset = SIT_SIZES[size]
        depth, width, heads = depth or preset[0], width or preset[1], heads or preset[2]
        if latent_size % patch:
            raise UserError(
                f"a latent of {latent_size}x{latent_size} cannot be cut into patches of {patch}"
            )
        if vfm_dim and not 1 <= repa_block <= depth:
            raise UserError(f"repa_block {repa_block} is not one of the SiT's {depth} blocks")
        self.config = dict(
            size=size,
            patch=patch,
            channels=channels,
            latent_size=latent_size,
            num_classes=num_classes,
            vfm_dim=vfm_dim,
            repa_block=repa_block,
            depth=depth,
            width=width,
            heads=heads,
        )
        self.patch, self.channels, self.latent_size, self.num_classes = (
            patch,
            channels,
            latent_size,
            num_classes,
        )
        self.repa_block, self.grid, self.grad_checkpoint = repa_block, latent_size // patch, False
        self.x_embedder = named(proj=nn.Conv2d(channels, width, patch, stride=patch))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = named(
            embedding_table=nn.Embedding(num_classes + 1, width)
        )  # the last row is the null label
        self.register_buffer("pos_embed", sincos_positions(width, self.grid))
        self.blocks = nn.ModuleList(SiTBlock(width, heads) for _ in range(depth))
        self.projectors = nn.ModuleList([projector(width, vfm_dim)] if vfm_dim else [])
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.init_weights()

    def init_weights(self):
        """As published by DiT and SiT: adaLN and output start at zero, so that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for layer in [b.adaLN_modulation[1] for b in self.blocks] + [
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, tokens=False):
        B, C, p, g = x.shape[0], self.channels, self.patch, self.grid
        c = self.t_embedder(t) + self.y_embedder(y)  # (B,width)
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B,N,width)
        for i, block in enumerate(self.blocks, 1):
            x = maybe_checkpoint(self.grad_checkpoint, block, x, c)
            if tokens and i == self.repa_block:
                projected = self.projectors[0](x)  # (B,N,vfm_dim)
        x = self.final_layer(x, c).float()  # (B,N,p*p*C)
        v = x.view(B, g, g, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, g * p, g * p)
        return (v, projected) if tokens else v


# ----------------------------------------------------------------------------------------------------------------------
# VFM: a frozen vision model through timm

VFM_NAMES = {
    "dinov2-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov3-b": "vit_base_patch16_dinov3.lvd1689m",
    "mae-l": "vit_large_patch16_224.mae",
    "clip-l": "vit_large_patch14_clip_224.openai",
    "siglip-b": "vit_base_patch16_siglip_256.webli",
    "ijepa-h": "vit_huge_patch14_gap_224.in1k_ijepa",
}


class VFM(nn.Module):
    """Frozen features of any timm model as tokens: forward(images in [-1,1]) -> (B, grid*grid, dim).

    A transformer gives its patch tokens after the final norm, without class or register tokens; a CNN its last
    feature map, or the one at `stride`. Pictures are resized (bicubic, as REPA does) so that the token grid is `grid`,
    by default image_size/16: 224 for a /14 transformer and 256 for a /16 one at 256 px. `name` may be one of VFM_NAMES.
    `weights` is a local file in timm's key names; without it timm's own are taken from the hub. Never random ones."""

    def __init__(self, name, weights=None, image_size=256, grid=None, stride=None):
        super().__init__()
        import timm  # the slowest import of all, so only where it is needed

        name, self.grid = VFM_NAMES.get(name, name), grid or image_size // 16
        try:
            with torch.device("meta"):
                plan = timm.create_model(name, pretrained=False)
        except Exception as error:
            near = difflib.get_close_matches(
                name, timm.list_models() + timm.list_pretrained(), 4, 0.5
            )
            raise UserError(
                f"timm cannot build '{name}' ({first_line(error)}); it knows {', '.join(near) or 'none like it'}"
            ) from None
        self.prefix = getattr(plan, "num_prefix_tokens", 0)
        self.stage = None
        reductions = [f["reduction"] for f in plan.feature_info]
        if stride:
            if stride not in reductions:
                raise UserError(
                    f"{name} has no feature map at stride {stride}, only {sorted(set(reductions))}"
                )
            self.stage = len(reductions) - 1 - reductions[::-1].index(stride)
        self.input_size = self.grid * (stride or reductions[-1])
        size = dict(img_size=self.input_size) if hasattr(plan, "num_prefix_tokens") else {}
        with reading(
            weights or "the hub",
            f"{name}'s weights in timm's key names; a local file is given with --vfm-weights",
        ):
            source = {}
            if weights:
                state, heads = read_weights(weights)[0], plan.pretrained_cfg.get("classifier") or ()
                heads = [
                    state[f"{h}.weight"]
                    for h in ([heads] if isinstance(heads, str) else heads)
                    if f"{h}.weight" in state
                ]
                classes = (
                    len(heads[0]) if heads else 0
                )  # with its own head a file must fit in full: timm loads strictly
                source = dict(
                    num_classes=classes,
                    pretrained_cfg_overlay=dict(state_dict=state, num_classes=classes),
                )
            self.model = timm.create_model(name, pretrained=True, **size, **source)
        self.eval().requires_grad_(False)
        self.model.to(
            memory_format=torch.channels_last
        )  # a CNN in bf16 on a CPU: 551 pictures/s instead of 366
        data = timm.data.resolve_model_data_config(self.model)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(3, 1, 1), persistent=False)
        try:
            with torch.no_grad():
                _, tokens, self.dim = self(torch.zeros(1, 3, image_size, image_size)).shape
            if tokens != self.grid**2:
                raise ValueError(f"it gives {tokens} tokens")
        except Exception as error:  # models of one input size alone fail in many ways
            raise UserError(
                f"{name} takes no {self.input_size}x{self.input_size} picture, which a {self.grid}x{self.grid} grid of "
                f"tokens needs ({first_line(error)}); choose another --vfm or --vfm-stride"
            ) from None

    def train(self, mode=True):
        return super().train(False)  # frozen: batch norms and dropout stay in eval mode

    def forward(self, x):
        x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic")
        x = (((x + 1) / 2 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if self.stage is None:
            x = self.model.forward_features(x)
        else:
            x = self.model.forward_intermediates(
                x,
                indices=[self.stage],
                norm=False,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )[0]
        if x.ndim == 4:
            return x.flatten(2).transpose(1, 2).float()  # a CNN's (B,D,g,g)
        return x[:, self.prefix :].float()


# ----------------------------------------------------------------------------------------------------------------------
# LPIPS and the patch discriminator: the perceptual and adversarial parts of the VAE's loss

LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"


class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018): forward(a, b), images in [-1,1] (B,3,H,W) -> distance (B,).

    `weights`: local files that together hold VGG16's convolutions (torchvision's vgg16-397923af.pth, or the `lpips`
    package's whole network) and the five linear layers (its vgg.pth); what they lack is downloaded once."""

    def __init__(self, weights=()):
        super().__init__()
        from torchvision.models import VGG16_Weights, vgg16

        state = {}
        for path in weights:
            for key, value in read_weights(path)[0].items():
                key = re.sub(r"^net\.slice\d\.", "features.", key)
                if torch.is_tensor(value):
                    state[re.sub(r"^lins?\.?(\d)\.(?:model\.)?1\.weight$", r"lin\1", key)] = value
        try:
            if "features.0.weight" not in state:
                state.update(
                    VGG16_Weights.IMAGENET1K_V1.get_state_dict(
                        progress=True, check_hash=True, weights_only=True
                    )
                )
            if "lin0" not in state:
                lin = torch.hub.load_state_dict_from_url(
                    LPIPS_URL,
                    file_name="lpips-vgg-a78928a0.pth",
                    check_hash=True,
                    map_location="cpu",
                    weights_only=True,
                )  # 8 digits of sha256
                state.update({f"lin{i}": lin[f"lin{i}.model.1.weight"] for i in range(5)})
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download LPIPS's weights ({error}); give the files vgg16-397923af.pth and {LPIPS_URL} "
                "with --lpips-weights, or switch the term off with --lpips 0"
            ) from None
        self.features = vgg16().features[:30]  # up to relu5_3
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = False  # some outputs are kept
        for i, layer in enumerate((2, 7, 14, 21, 28)):
            self.register_buffer(f"lin{i}", torch.zeros(1, self.features[layer].out_channels, 1, 1))
        load_strictly(
            self,
            {k: state[k] for k in self.state_dict() if k in state},
            "what LPIPS's weight files hold",
        )
        # ImageNet's mean and std, moved to inputs in [-1,1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, a, b):
        a, b, total = (a - self.shift) / self.scale, (b - self.shift) / self.scale, 0
        compared = {
            3: self.lin0,
            8: self.lin1,
            15: self.lin2,
            22: self.lin3,
            29: self.lin4,
        }  # relu1_2, 2_2, 3_3, 4_3, 5_3
        for i, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if i in compared:
                error = F.normalize(a.float(), dim=1, eps=1e-10) - F.normalize(
                    b.float(), dim=1, eps=1e-10
                )
                total = total + (error.square() * compared[i]).sum(1).mean((1, 2))
        return total


class PatchDiscriminator(nn.Module):
    """PatchGAN of pix2pix, as LDM uses it and under its names: images (B,3,H,W) -> logits (B,1,H/8-2,W/8-2)."""

    def __init__(self):
        super().__init__()
        modules = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for cin, cout, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            modules += [
                nn.Conv2d(cin, cout, 4, stride, 1, bias=False),
                nn.BatchNorm2d(cout),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*modules, nn.Conv2d(512, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x).float()
