"""The networks of Send-VAE: VAE, Mapper, SiT, VFM (frozen), LPIPS and PatchDiscriminator.

Conventions, here and in every other file:
    images   float (B,3,H,W), RGB, in [-1,1]
    latents  z (B,C,h,w) in raw VAE units; vae.normalize(z) is what a diffusion model sees
    time     t (B,), 0 is data and 1 is noise: x_t = (1-t) x + t eps, velocity v = eps - x
    tokens   (B,N,D), row by row over a square grid
Letters in shape comments: B pictures, H and W their height and width, C latent channels, h and w
latent height and width, N tokens, D width of tokens or features, d width of an attention head.
"""

import difflib
import math
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.files import UserError, first_line, load_strictly, read_weights, reading

# --------------------------------------------------------------------------------------------------
# Parts that several networks share


def sincos_positions(dim, grid):
    """Fixed 2-D sine-cosine positions of a grid x grid square, as in MAE, DiT and SiT.

    Returns (1, grid*grid, dim), fp32. The first half of the channels encodes the column and the
    second half the row. Each half holds dim/4 sines, then dim/4 cosines, of the frequencies
    1/10000^(k/(dim/4)). Raises UserError where 4 does not divide dim."""
    if dim % 4:
        raise UserError(
            f"token width {dim} is not divisible by 4, which the 2-D sine-cosine positions need"
        )
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim/2)
    column = axis[None, :, :].expand(grid, -1, -1)  # (grid, grid, dim/2)
    row = axis[:, None, :].expand(-1, grid, -1)  # (grid, grid, dim/2)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, dim).float()


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v of queries, keys and values (B,heads,N,d) -> (B,heads,N,d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's fused kernel for CPUs leaves their bf16 matrix units unused. Two products and a
        # softmax take 40% of its time, forward and backward, at 64 to 257 tokens.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B,heads,N,N)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise UserError(f"token width {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B,N,D)
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B,heads,N,d)
        x = attention(q, k, v)  # (B,heads,N,d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B,N,D)


def named(**parts):
    """nn.Sequential whose parts have the names that published weights give them."""
    return nn.Sequential(OrderedDict(parts))


def mlp(dim, approximate):
    """The MLP of a transformer block: dim -> 4 dim -> dim with GELU, "none" (exact) or "tanh"."""
    return named(
        fc1=nn.Linear(dim, 4 * dim),
        act=nn.GELU(approximate=approximate),
        fc2=nn.Linear(4 * dim, dim),
    )


def projector(dim, out, hidden=2048):
    """The three-layer MLP that predicts VFM tokens in REPA and Send-VAE: dim -> hidden -> hidden ->
    out with SiLU."""
    return nn.Sequential(
        nn.Linear(dim, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, out),
    )


def maybe_checkpoint(recompute, function, *inputs):
    """function(*inputs). With `recompute`, its activations are not kept for the backward pass but
    computed again there, which saves memory and costs time."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


# --------------------------------------------------------------------------------------------------
# VAE: the AutoencoderKL of latent diffusion (Rombach et al. 2022), under its parameter names


class GroupNorm(nn.GroupNorm):
    """Group norm with LDM's eps (PyTorch's default is 1e-5) that keeps the type of its input."""

    def __init__(self, channels, groups):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):  # (B,channels,h,w)
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        # CUDA's autocast, unlike that of CPUs, would compute the norm in fp32, and so the SiLU
        # after it: a third of a training step's memory. The kernels for bf16 compute mean and
        # variance in fp32 too, but on CUDA they want weight and bias in the input's type.
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.to(x.dtype)
            bias = self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = GroupNorm(cin, groups)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = GroupNorm(cout, groups)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):  # (B,cin,h,w)
        y = self.conv1(F.silu(self.norm1(x)))  # (B,cout,h,w)
        y = self.conv2(F.silu(self.norm2(y)))  # (B,cout,h,w)
        return y + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Attention with one head over all positions of a feature map."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):  # (B,D,h,w)
        B, D, h, w = x.shape
        y = self.norm(x)
        q = self.q(y).flatten(2).transpose(1, 2)[:, None]  # (B,1,hw,D)
        k = self.k(y).flatten(2).transpose(1, 2)[:, None]
        v = self.v(y).flatten(2).transpose(1, 2)[:, None]
        y = attention(q, k, v)[:, 0]  # (B,hw,D)
        y = y.transpose(1, 2).reshape(B, D, h, w)
        return x + self.proj_out(y)


def make_level(cin, cout, num_blocks, has_attention, groups):
    """The modules of one resolution: residual blocks, each with an attention block after it where
    `has_attention`. Encoder and Decoder add the change to the next resolution."""
    blocks = nn.ModuleList()
    attentions = nn.ModuleList()
    for i in range(num_blocks):
        blocks.append(ResnetBlock(cin if i == 0 else cout, cout, groups))
        attentions.append(AttnBlock(cout, groups) if has_attention else nn.Identity())
    return nn.ModuleDict({"block": blocks, "attn": attentions})


def make_middle(channels, groups):
    """The modules at the lowest resolution, between encoder levels and latents."""
    return named(
        block_1=ResnetBlock(channels, channels, groups),
        attn_1=AttnBlock(channels, groups),
        block_2=ResnetBlock(channels, channels, groups),
    )


def run_blocks(blocks, x, recompute):
    for block in blocks:
        x = maybe_checkpoint(recompute, block, x)
    return x


def run_level(level, x, recompute):
    """One level's blocks and attentions in turn, then its change of resolution if it has one."""
    for block, attn in zip(level["block"], level["attn"], strict=True):
        x = run_blocks([block, attn], x, recompute)
    for name in ("downsample", "upsample"):
        if name in level:
            x = maybe_checkpoint(recompute, level[name], x)
    return x


class Encoder(nn.Module):
    """Images -> mean and logvar of the latents, before quant_conv. Level 0 is the full resolution;
    every level but the last ends by halving it."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, channels, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        last = len(ch_mult) - 1
        cin = ch
        for i, mult in enumerate(ch_mult):
            cout = ch * mult
            level = make_level(cin, cout, num_res_blocks, i in attn_levels, groups)
            if i < last:
                # LDM pads the right and the bottom edge only.
                pad = nn.ZeroPad2d((0, 1, 0, 1))
                level["downsample"] = named(pad=pad, conv=nn.Conv2d(cout, cout, 3, stride=2))
            self.down.append(level)
            cin = cout
        self.mid = make_middle(cin, groups)
        self.norm_out = GroupNorm(cin, groups)
        self.conv_out = nn.Conv2d(cin, 2 * channels, 3, padding=1)

    def forward(self, x, recompute):  # (B,3,H,W)
        x = self.conv_in(x)  # (B,ch,H,W)
        for level in self.down:
            x = run_level(level, x, recompute)
        x = run_blocks(self.mid, x, recompute)  # (B,D,h,w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B,2C,h,w)


class Decoder(nn.Module):
    """Latents, after post_quant_conv -> images. Levels are numbered as in the encoder, so the last
    one runs first; every level but level 0 ends by doubling the resolution."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, channels, groups):
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = make_middle(widths[-1], groups)
        self.up = nn.ModuleList()
        last = len(widths) - 1
        for i, cout in enumerate(widths):
            # A level receives the features of the next lower resolution, the last one the middle's.
            cin = widths[min(i + 1, last)]
            level = make_level(cin, cout, num_res_blocks + 1, i in attn_levels, groups)
            if i > 0:
                nearest = nn.Upsample(scale_factor=2.0)
                conv = nn.Conv2d(cout, cout, 3, padding=1)
                level["upsample"] = named(nearest=nearest, conv=conv)
            self.up.append(level)
        self.norm_out = GroupNorm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z, recompute):  # (B,C,h,w)
        x = self.conv_in(z)  # (B,D,h,w)
        x = run_blocks(self.mid, x, recompute)
        for level in reversed(self.up):
            x = run_level(level, x, recompute)  # after the last: (B,D,H,W)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B,3,H,W)


# {factor: (channel multiplier of each level, numbers of the levels with attention)}. f8 is LDM's,
# f16 VA-VAE's.
VAE_LEVELS = {
    2: ((1, 2), ()),
    4: ((1, 2, 4), ()),
    8: ((1, 2, 4, 4), ()),
    16: ((1, 1, 2, 2, 4), (4,)),
    32: ((1, 1, 2, 2, 4, 4), (4, 5)),
}


def parse_vae_spec(spec):
    """ "f16d32" -> (16, 32): the factor by which resolution shrinks, and the latents' channels."""
    match = re.fullmatch(r"f(\d+)d(\d+)", spec)
    if not match or int(match[1]) not in VAE_LEVELS or int(match[2]) < 1:
        factors = ", ".join(str(factor) for factor in VAE_LEVELS)
        raise UserError(
            f"VAE spec '{spec}' is not f<factor>d<channels> with a factor of {factors}, such as "
            "f8d4 or f16d32"
        )
    return int(match[1]), int(match[2])


class VAE(nn.Module):
    """LDM's AutoencoderKL.

    spec         f<factor>d<channels>, e.g. f8d4 (SD-VAE) or f16d32 (VA-VAE)
    resolution   the one it is trained for; the weights fit any that the factor divides
    ch, ch_mult, num_res_blocks, attn_levels   override the architecture that the spec stands for
    groups       of the norms; default LDM's 32, fewer below ch=128, since a group of one channel
                 would be an instance norm, which wipes out the mean colours of a picture
    quant_conv   whether 1x1 convolutions stand between encoder, latents and decoder, as in LDM;
                 SD3's and FLUX's VAEs have none

    The buffers latent_mean and latent_std (C,) are the statistics of its latents over the training
    set, 0 and 1 until they are measured. decode_std (C,) replaces latent_std in `denormalize`; it
    is None but for latents of REPA-E's, which are divided by sqrt(var + 1e-4) and multiplied by
    sqrt(var). `config` holds the arguments that build the same network again. `grad_checkpoint`
    makes training recompute activations to save memory. Raises UserError for an architecture that
    cannot be built."""

    def __init__(
        self,
        spec="f16d32",
        resolution=256,
        ch=128,
        ch_mult=None,
        num_res_blocks=2,
        attn_levels=None,
        groups=None,
        quant_conv=True,
    ):
        super().__init__()
        self.factor, self.channels = parse_vae_spec(spec)
        default_mult, default_attn_levels = VAE_LEVELS[self.factor]
        ch_mult = tuple(ch_mult or default_mult)
        attn_levels = tuple(default_attn_levels if attn_levels is None else attn_levels)
        groups = groups or min(32, max(1, ch // 4))

        num_levels = self.factor.bit_length()  # level i has 1/2^i of the full resolution
        if len(ch_mult) != num_levels:
            raise UserError(
                f"ch_mult {ch_mult} has {len(ch_mult)} levels, but {spec} needs {num_levels}"
            )
        widths = [ch * mult for mult in ch_mult]
        if any(width % groups for width in widths):
            raise UserError(f"VAE widths {widths} must be multiples of the norms' {groups} groups")

        self.config = dict(
            spec=spec,
            ch=ch,
            ch_mult=list(ch_mult),
            num_res_blocks=num_res_blocks,
            attn_levels=list(attn_levels),
            groups=groups,
            quant_conv=quant_conv,
        )
        self.set_resolution(resolution)
        self.grad_checkpoint = False
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, attn_levels, self.channels, groups)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, attn_levels, self.channels, groups)
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()
        if quant_conv:
            self.quant_conv = nn.Conv2d(2 * self.channels, 2 * self.channels, 1)
            self.post_quant_conv = nn.Conv2d(self.channels, self.channels, 1)
        self.register_buffer("latent_mean", torch.zeros(self.channels))
        self.register_buffer("latent_std", torch.ones(self.channels))
        self.register_buffer("decode_std", None, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Convolutions that preserve the variance, and residual branches that start at zero.

        LDM leaves PyTorch's default, which shrinks the signal threefold a layer: after 4,800
        CIFAR-10 pictures it gives 20.9 dB, and this 22.9 dB."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, AttnBlock):
                nn.init.zeros_(module.proj_out.weight)

    def set_resolution(self, resolution):
        """Sets the resolution that the VAE is trained for. The weights do not depend on it."""
        if resolution % self.factor:
            raise UserError(
                f"resolution {resolution} is not divisible by the VAE's factor {self.factor}"
            )
        self.resolution = resolution
        self.latent_size = resolution // self.factor
        self.config["resolution"] = resolution

    def encode(self, x):
        """Images (B,3,H,W) -> mean and logvar (B,C,h,w) of the posterior, fp32, raw units.
        logvar is clamped to [-30,20]."""
        moments = self.quant_conv(self.encoder(x, self.grad_checkpoint))  # (B,2C,h,w)
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    @staticmethod
    def sample(mean, logvar, noise):
        """A sample z (B,C,h,w) of the posterior. noise: standard normal, of the same shape."""
        return mean + torch.exp(0.5 * logvar) * noise

    def decode(self, z):
        """Raw latents (B,C,h,w) -> images (B,3,H,W), fp32, about [-1,1] (not clamped)."""
        return self.decoder(self.post_quant_conv(z), self.grad_checkpoint).float()

    def normalize(self, z):
        """Raw latents (B,C,h,w) -> latents with mean 0 and std 1 in each channel."""
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, z):
        """The inverse of normalize, or nearly so where decode_std is set."""
        std = self.latent_std if self.decode_std is None else self.decode_std
        return z * std[:, None, None] + self.latent_mean[:, None, None]

    def set_statistics(self, mean, std, decode_std=None):
        """Sets the statistics of the latents: lists of numbers or tensors (C,)."""
        self.latent_mean.copy_(torch.as_tensor(mean))
        self.latent_std.copy_(torch.as_tensor(std))
        self.decode_std = None
        if decode_std is not None:
            self.decode_std = torch.as_tensor(decode_std).to(self.latent_std)


# --------------------------------------------------------------------------------------------------
# Mapper: Send-VAE's h, from noised latents to the tokens of a vision foundation model


class MapperBlock(nn.Module):
    """A pre-norm ViT block."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, "none")

    def forward(self, x):  # (B,N,D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Mapper(nn.Module):
    """Batch norm -> noise -> patch embedding + positions -> ViT blocks -> MLP (paper, section 3).

    channels, latent_size   of the latents
    patch                   side of the latents' square that becomes one token
    dim                     width of the VFM's tokens, which it predicts
    depth                   number of ViT blocks; 0 is the paper's MLP-only ablation
    width, hidden           width of the tokens inside (default: dim), and of the MLP
    init                    "xavier": matrices start as in REPA-E's modules, Xavier uniform with
                            zero biases; "torch": as PyTorch initialises them
    norm                    what training normalises latents with, "batch": the batch's own mean and
                            variance; "running": their averages over past batches, as constants,
                            which is how REPA-E aligns its VAE

    The batch norm has no scale, as in REPA-E. It gives every channel unit variance, so that the
    noise means the same for any VAE."""

    def __init__(
        self,
        channels,
        latent_size,
        patch,
        dim,
        heads,
        depth=1,
        width=None,
        hidden=2048,
        init="xavier",
        norm="batch",
    ):
        super().__init__()
        if latent_size % patch:
            raise UserError(
                f"a latent of {latent_size}x{latent_size} cannot be cut into patches of {patch}"
            )
        width = width or dim
        self.uses_running_statistics = norm == "running"
        positions = sincos_positions(width, latent_size // patch)
        self.norm = nn.BatchNorm2d(channels, eps=1e-4, momentum=0.1, affine=False)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(MapperBlock(width, heads) for _ in range(depth))
        self.head = projector(width, dim, hidden)
        if init == "xavier":
            self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.embed.weight.flatten(1))
        nn.init.zeros_(self.embed.bias)

    def normalize(self, z):
        """Raw latents (B,C,h,w) -> about mean 0 and variance 1 in each channel."""
        if not (self.training and self.uses_running_statistics):
            return self.norm(z)
        with torch.no_grad():
            self.norm(z)  # updates the averages
        mean = self.norm.running_mean[:, None, None].clone()
        variance = self.norm.running_var[:, None, None] + self.norm.eps
        return (z - mean) * variance.rsqrt()

    def forward(self, z, t=None, noise=None):
        """Raw latents z (B,C,h,w) -> predicted VFM tokens (B,N,dim). With times t (B,) and standard
        normal noise (B,C,h,w) the latents are noised; without either they are not."""
        z = self.normalize(z)  # (B,C,h,w)
        if t is not None:
            t = t.view(-1, 1, 1, 1)
            z = (1 - t) * z + t * noise  # z_t
        x = self.embed(z).flatten(2).transpose(1, 2)  # (B,N,width)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # (B,N,dim)


# --------------------------------------------------------------------------------------------------
# SiT: the published network (Ma et al. 2024), its parameter names and initialisation, with REPA's
# projector

# {size: (depth, width, heads)}
SIT_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


def modulate(x, shift, scale):
    """Tokens x (B,N,D), shift and scale (B,D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """Times t (B,) in [0,1] -> (B,width). The frequencies are DiT's, 1 to 1/10000. As in SiT, t is
    not scaled up to DiT's 1000 steps."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        omega = torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, t):  # (B,)
        angle = t[:, None].float() * self.omega  # (B,128)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # (B,256)
        return self.mlp(waves)  # (B,width)


class SiTBlock(nn.Module):
    """A transformer block whose shift, scale and gate come from the condition c (adaLN-zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = mlp(width, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):  # (B,N,D), (B,D)
        modulation = self.adaLN_modulation(c)  # (B,6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens -> the pixels of their patches."""

    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):  # (B,N,D), (B,D)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # each (B,D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B,N,out)


class SiT(nn.Module):
    """Velocity network on normalised latents.

    size                    S, B, L or XL; depth, width and heads override what it stands for
    patch                   side of the latents' square that becomes one token
    channels, latent_size   of the latents
    num_classes             labels are 0 to num_classes - 1, and num_classes is the null label
    vfm_dim                 width of the VFM's tokens for REPA; None: no projector
    repa_block              the block, counted from 1, whose tokens REPA projects

    `config` holds the arguments that build the same network again. `grad_checkpoint` makes training
    recompute activations to save memory. Raises UserError for impossible arguments."""

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
        default_depth, default_width, default_heads = SIT_SIZES[size]
        depth = depth or default_depth
        width = width or default_width
        heads = heads or default_heads
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
        self.patch = patch
        self.channels = channels
        self.latent_size = latent_size
        self.num_classes = num_classes
        self.repa_block = repa_block
        self.grid = latent_size // patch
        self.grad_checkpoint = False

        self.x_embedder = named(proj=nn.Conv2d(channels, width, patch, stride=patch))
        self.t_embedder = TimestepEmbedder(width)
        # The last row of the table is the null label's.
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, self.grid))
        self.blocks = nn.ModuleList(SiTBlock(width, heads) for _ in range(depth))
        # REPA's weights call the projector projectors.0.
        self.projectors = nn.ModuleList()
        if vfm_dim:
            self.projectors.append(projector(width, vfm_dim))
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.init_weights()

    def init_weights(self):
        """As published by DiT and SiT. adaLN and the output start at zero, so that every block
        starts as the identity and the velocity as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zero_layers = [block.adaLN_modulation[1] for block in self.blocks]
        zero_layers += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, tokens=False):
        """Noised latents x (B,C,h,w), times t (B,) and labels y (B,) -> velocity v (B,C,h,w), fp32.
        With `tokens` -> (v, REPA's prediction of the VFM tokens (B,N,vfm_dim))."""
        B, C, p, g = x.shape[0], self.channels, self.patch, self.grid
        c = self.t_embedder(t) + self.y_embedder(y)  # (B,D)
        x = self.x_embedder(x).flatten(2).transpose(1, 2)  # (B,N,D)
        x = x + self.pos_embed
        for i, block in enumerate(self.blocks, 1):
            x = maybe_checkpoint(self.grad_checkpoint, block, x, c)
            if tokens and i == self.repa_block:
                projected = self.projectors[0](x)  # (B,N,vfm_dim)
        x = self.final_layer(x, c).float()  # (B,N,p*p*C)
        x = x.view(B, g, g, p, p, C).permute(0, 5, 1, 3, 2, 4)  # (B,C,g,p,g,p)
        v = x.reshape(B, C, g * p, g * p)  # (B,C,h,w)
        if tokens:
            return v, projected
        return v


# --------------------------------------------------------------------------------------------------
# VFM: a frozen vision foundation model through timm, which is imported only where it is needed: no
# other import takes as long.

VFM_NAMES = {
    "dinov2-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov3-b": "vit_base_patch16_dinov3.lvd1689m",
    "mae-l": "vit_large_patch16_224.mae",
    # OpenAI trained it with an approximation of GELU, which timm has under this name only.
    "clip-l": "vit_large_patch14_clip_quickgelu_224.openai",
    "siglip-b": "vit_base_patch16_siglip_256.webli",
    "ijepa-h": "vit_huge_patch14_gap_224.in1k_ijepa",
}

# Of these, REPA takes the tokens before the final norm.
VFMS_WITHOUT_NORM = (VFM_NAMES["mae-l"], VFM_NAMES["clip-l"])


class VFM(nn.Module):
    """Frozen features of any timm model as tokens.

    name         one of VFM_NAMES, or any name that timm knows
    weights      local file in timm's key names; None: timm's own from the hub (never random ones)
    image_size   side of the square pictures, which sets the default of grid: image_size/16
    grid         side of the square of tokens. Pictures are resized (bicubic, as in REPA) so that it
                 comes out: at 256 px to 224 for a /14 transformer, and to 256 for a /16 one
    stride       take a CNN's feature map at this stride, instead of its last one
    norm         whether a transformer's patch tokens are those after its final norm; None: as the
                 published code has it, which is yes but for VFMS_WITHOUT_NORM

    Class and register tokens are left out. `dim` is the width of the tokens. `norm` is what came of
    the argument; it is None for a model without a final norm, such as a CNN. Raises UserError for a
    model that timm does not know, for unreadable weights, and for a model that cannot give this
    grid."""

    def __init__(self, name, weights=None, image_size=256, grid=None, stride=None, norm=None):
        super().__init__()
        import timm

        name = VFM_NAMES.get(name, name)
        plan = plan_timm_model(name)
        strides = [feature["reduction"] for feature in plan.feature_info]
        self.norm = choose_norm(name, plan, norm)
        self.stage = None  # the number of the feature map to take; None: the network's output
        if stride:
            self.stage = last_stage_at(stride, strides, name)
        elif self.norm is False:
            self.stage = len(strides) - 1
        self.grid = grid or image_size // 16
        self.input_size = self.grid * (stride or strides[-1])
        self.num_prefix_tokens = getattr(plan, "num_prefix_tokens", 0)
        self.model = load_timm_model(name, plan, weights, self.input_size)
        self.eval().requires_grad_(False)
        # In bf16 on a CPU, a CNN takes 551 pictures/s in this format and 366 in contiguous memory.
        self.model.to(memory_format=torch.channels_last)
        data = timm.data.resolve_model_data_config(self.model)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(3, 1, 1), persistent=False)
        self.dim = self.measure_dim(name, image_size)

    def measure_dim(self, name, image_size):
        """The width of the tokens, by running the model on one empty picture."""
        try:
            with torch.no_grad():
                _, num_tokens, dim = self(torch.zeros(1, 3, image_size, image_size)).shape
            if num_tokens != self.grid**2:
                raise ValueError(f"it gives {num_tokens} tokens")
        except Exception as error:
            # A model that was made for one input size fails on another in any of many ways.
            size = f"{self.input_size}x{self.input_size}"
            raise UserError(
                f"{name} takes no {size} picture, which a {self.grid}x{self.grid} grid of tokens "
                f"needs ({first_line(error)}); choose another --vfm or --vfm-stride"
            ) from None
        return dim

    def train(self, mode=True):
        """Stays in eval mode: the model is frozen, its batch norms and dropout included."""
        return super().train(False)

    def forward(self, x):
        """Images (B,3,H,W) in [-1,1] -> tokens (B,grid*grid,dim), fp32."""
        x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic")
        x = ((x + 1) / 2 - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        if self.stage is None:
            x = self.model.forward_features(x)
        else:
            x = self.model.forward_intermediates(
                x,
                indices=[self.stage],
                norm=bool(self.norm),
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )[0]
        if x.ndim == 4:  # the feature map (B,D,grid,grid) of a CNN
            return x.flatten(2).transpose(1, 2).float()
        return x[:, self.num_prefix_tokens :].float()


def plan_timm_model(name):
    """A timm model on the meta device: its attributes without its weights."""
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    except Exception as error:
        known = timm.list_models() + timm.list_pretrained()
        similar = difflib.get_close_matches(name, known, 4, 0.5)
        suggestion = ", ".join(similar) or "none like it"
        raise UserError(
            f"timm cannot build '{name}' ({first_line(error)}); it knows {suggestion}"
        ) from None


def choose_norm(name, plan, norm):
    """Whether the tokens of a timm model are those after its final norm: True, False, or None where
    it has none. norm: the user's choice, or None. plan: the model without weights."""
    final_norm = getattr(plan, "norm", None)
    if not isinstance(final_norm, nn.Module) or isinstance(final_norm, nn.Identity):
        if norm is False:
            raise UserError(f"{name} has no final norm that --no-vfm-norm could leave out")
        return None
    if norm is None:
        return name not in VFMS_WITHOUT_NORM
    return norm


def last_stage_at(stride, strides, name):
    """The number of the last of a model's feature maps that has this stride.
    strides: those of all its feature maps, in order."""
    stages = [i for i, candidate in enumerate(strides) if candidate == stride]
    if not stages:
        raise UserError(
            f"{name} has no feature map at stride {stride}, only {sorted(set(strides))}"
        )
    return stages[-1]


def load_timm_model(name, plan, weights, input_size):
    """The timm model with its weights from a local file, or from the hub where `weights` is None.
    plan: the same model without weights."""
    import timm

    options = {}
    if hasattr(plan, "num_prefix_tokens"):  # a transformer, whose positions depend on the size
        options["img_size"] = input_size
    content = f"{name}'s weights in timm's key names; a local file is given with --vfm-weights"
    with reading(weights or "the hub", content):
        if weights:
            state, _ = read_weights(weights)
            # Where its record of the weights and the model differ in the number of classes, timm
            # loads whatever fits and ignores the rest. So both get the number that the file has.
            num_classes = count_classes(state, plan)
            options["num_classes"] = num_classes
            options["pretrained_cfg_overlay"] = dict(state_dict=state, num_classes=num_classes)
        return timm.create_model(name, pretrained=True, **options)


def count_classes(state, plan):
    """The number of outputs of the classifier in a state dict with timm's key names; 0 if it has no
    classifier."""
    classifiers = plan.pretrained_cfg.get("classifier") or ()
    if isinstance(classifiers, str):
        classifiers = (classifiers,)
    for classifier in classifiers:
        key = f"{classifier}.weight"
        if key in state:
            return len(state[key])
    return 0


# --------------------------------------------------------------------------------------------------
# LPIPS and the patch discriminator: the perceptual and adversarial parts of the VAE's loss

LPIPS_URL = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
    "vgg.pth"
)

# The layers of VGG16 whose outputs LPIPS compares: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
LPIPS_LAYERS = (3, 8, 15, 22, 29)


class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018).

    weights: local files that together hold VGG16's convolutions (torchvision's vgg16-397923af.pth,
    or the whole network of the `lpips` package) and the five linear layers (that package's
    vgg.pth). What they lack is downloaded once; UserError if that fails, or if a file does not fit.
    rescale: scale images from [0,1] to [-1,1], although they are in [-1,1] already, which is what
    happens in REPA-E's loss.
    """

    def __init__(self, weights=(), rescale=False):
        super().__init__()
        from torchvision.models import vgg16

        state = read_lpips_weights(weights)
        download_missing_lpips_weights(state)
        # The meta device saves the time of random initial weights, which would be overwritten.
        with torch.device("meta"):
            features = vgg16().features[: LPIPS_LAYERS[-1] + 1]
        self.features = features.to_empty(device="cpu")
        for module in self.features:
            if isinstance(module, nn.ReLU):
                # A layer in place would overwrite an output that is still to be compared.
                module.inplace = False
        for i, layer in enumerate(LPIPS_LAYERS):
            width = self.features[layer - 1].out_channels  # of the convolution before the ReLU
            self.register_buffer(f"lin{i}", torch.zeros(1, width, 1, 1))
        needed = {key: state[key] for key in self.state_dict() if key in state}
        load_strictly(self, needed, "what LPIPS's weight files hold")
        # ImageNet's mean and std for inputs in [-1,1], as the package has them.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.rescale = rescale
        self.requires_grad_(False)

    def forward(self, a, b):
        """The distance (B,), fp32, between images a and b (B,3,H,W) in [-1,1]."""
        if self.rescale:
            a = 2 * a - 1
            b = 2 * b - 1
        a = (a - self.shift) / self.scale
        b = (b - self.shift) / self.scale
        weights = [self.lin0, self.lin1, self.lin2, self.lin3, self.lin4]  # each (1,D,1,1)
        distance = 0
        for i, layer in enumerate(self.features):
            a = layer(a)  # (B,D,h,w)
            b = layer(b)
            if i in LPIPS_LAYERS:
                weight = weights[LPIPS_LAYERS.index(i)]
                unit_a = F.normalize(a.float(), dim=1, eps=1e-10)
                unit_b = F.normalize(b.float(), dim=1, eps=1e-10)
                error = (unit_a - unit_b).square() * weight  # (B,D,h,w)
                distance = distance + error.sum(1).mean((1, 2))  # (B,)
        return distance


def read_lpips_weights(files):
    """All tensors of these files, VGG16's as features.<layer>.* and the linear layers as lin<i>."""
    state = {}
    for path in files:
        tensors, _ = read_weights(path)
        for key, value in tensors.items():
            # The lpips package puts VGG16's layers into slices, and calls the linear layers
            # lin0.model.1.weight or lins.0.model.1.weight.
            key = re.sub(r"^net\.slice\d\.", "features.", key)
            key = re.sub(r"^lins?\.?(\d)\.(?:model\.)?1\.weight$", r"lin\1", key)
            if torch.is_tensor(value):
                state[key] = value
    return state


def download_missing_lpips_weights(state):
    """Adds to the state dict the convolutions and the linear layers that it lacks."""
    from torchvision.models import VGG16_Weights

    try:
        if "features.0.weight" not in state:
            vgg = VGG16_Weights.IMAGENET1K_V1.get_state_dict(
                progress=True, check_hash=True, weights_only=True
            )
            state.update(vgg)
        if "lin0" not in state:
            linear = torch.hub.load_state_dict_from_url(
                LPIPS_URL,
                # With check_hash, the name's last part is the start of the file's sha256.
                file_name="lpips-vgg-a78928a0.pth",
                check_hash=True,
                map_location="cpu",
                weights_only=True,
            )
            for i in range(len(LPIPS_LAYERS)):
                state[f"lin{i}"] = linear[f"lin{i}.model.1.weight"]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download LPIPS's weights ({error}); give the files vgg16-397923af.pth and "
            f"{LPIPS_URL} with --lpips-weights, or switch the term off with --lpips 0"
        ) from None


class PatchDiscriminator(nn.Module):
    """PatchGAN of pix2pix (Isola et al. 2017), as LDM uses it and under its parameter names."""

    def __init__(self):
        super().__init__()
        modules = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for cin, cout, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            modules.append(nn.Conv2d(cin, cout, 4, stride, 1, bias=False))
            modules.append(nn.BatchNorm2d(cout))
            modules.append(nn.LeakyReLU(0.2))
        modules.append(nn.Conv2d(512, 1, 4, 1, 1))
        self.main = nn.Sequential(*modules)
        self.init_weights()

    def init_weights(self):
        """As published: normal with std 0.02, around 0 for convolutions and 1 for batch norms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        """Images (B,3,H,W) in [-1,1] -> logits (B,1,H/8-2,W/8-2), fp32, high for real patches."""
        return self.main(x).float()


# --------------------------------------------------------------------------------------------------
# Compilation


def compile_network(network):
    """Has torch.compile translate a network, in place, when it is first called: block by block
    where it repeats blocks, else as a whole. Equal blocks share one translation, so that a SiT-XL
    waits for 1 block instead of 28. The code is for the sizes that it meets, since code for any
    size is slower."""
    # The blocks of a VAE have more sizes than the 8 that torch allows a function by default. (The
    # limit is called recompile_limit since torch 2.7, which knows the older name too.)
    torch._dynamo.config.cache_size_limit = 64
    # Gradients of a block are sent while others are computed. Under DistributedDataParallel torch
    # would cut the code of each block once more for that.
    torch._dynamo.config.optimize_ddp = False
    for part in repeated_blocks(network) or [network]:
        part.compile(dynamic=False)


def repeated_blocks(network):
    """The residual, attention and transformer blocks in a network, a list; [] if it has none that
    we know."""
    blocks = []
    for module in network.modules():
        if isinstance(module, (ResnetBlock, AttnBlock, MapperBlock, SiTBlock)):
            blocks.append(module)
        if isinstance(module, VFM):
            blocks += transformer_blocks(module.model)
    return blocks


def transformer_blocks(model):
    """The blocks of a timm vision transformer; [] for a network of stages, such as a CNN."""
    blocks = getattr(model, "blocks", ())
    kinds = {type(block) for block in blocks}
    return list(blocks) if len(kinds) == 1 and nn.Sequential not in kinds else []
