"""Editing pictures by their attributes, for probe.py: latents are moved along an attribute's
direction and decoded, and a classifier on pictures, which knows nothing of the VAE, says which
attributes that changed.

N pictures have D latents z (flattened, normalised) and A attributes. A linear probe gives the score
s_a = w_a z + b_a of attribute a.
"""

import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.files import UserError, load_strictly, read_weights, writing
from common.pictures import from_uint8, save_grid
from probing.multilabel import f1_scores
from probing.tables import slug, write_lines

# Columns of a picture: by how many standard deviations the latents are moved.
STEPS = (-3, -2, -1, 0, 1, 2, 3)
# The leakage is measured on so many held-out pictures, of which the first are drawn.
JUDGED_PICTURES = 128
DRAWN_PICTURES = 8
PICTURES_AT_ONCE = 64
# Of the training split; directions and judge are taken from at most so many.
TRAINING_PICTURES = 10000
# Side of the pictures that the judge sees, in pixels.
JUDGE_SIZE = 64


# --------------------------------------------------------------------------------------------------
# Directions


def edit_directions(weight, latents, kind, orthogonal):
    """A direction for each attribute, as long as one standard deviation of the latents along it.

    kind "pattern": the covariance of the latents with the attribute's score (Haufe et al.,
    NeuroImage 2014), so that z moves as it does, on average, among pictures with a higher score.
    kind "weight": w_a, the shortest way to a higher score. With `orthogonal`, it is the combination
    of all attributes' directions along which the scores of the others stay as they are.

    weight: float32 (D,A). latents: (N,D), as they come. -> (A,D)"""
    latents = latents - latents.mean(0)
    directions = weight
    if kind == "pattern":
        directions = latents.T @ (latents @ weight)  # (D,A)
    if orthogonal:
        # How much each score rises along each direction, (A,A). Scores that always move together
        # cannot be told apart: their singular values are dropped.
        gain = (weight.T @ directions).double()
        directions = directions @ torch.linalg.pinv(gain, rtol=1e-6).float()
    directions = F.normalize(directions, dim=0)
    deviation = (latents @ directions).std(0, correction=0)
    return (directions * deviation).T


# --------------------------------------------------------------------------------------------------
# The judge: a classifier on pictures


def build_judge(attributes):
    """A small convolutional network: pictures (B,3,s,s) in [-1,1] -> logits (B,A)."""
    layers = []
    width = 3
    for next_width, stride in ((24, 1), (48, 2), (96, 2), (128, 2)):
        layers += [
            nn.Conv2d(width, next_width, 3, stride, 1),
            nn.GroupNorm(8, next_width),
            nn.SiLU(),
        ]
        width = next_width
    # Positions are kept to 2 x 2, since where an object is may be an attribute.
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, attributes)
    )


def judge_input(pictures, device):
    """uint8 (B,3,S,S) -> float (B,3,s,s) in [-1,1], of at most JUDGE_SIZE pixels a side."""
    pictures = from_uint8(pictures.to(device))
    side = min(pictures.shape[-1], JUDGE_SIZE)
    return F.adaptive_avg_pool2d(pictures, side)


def train_judge(pictures, targets, seed, device, steps, batch=64):
    """pictures: uint8 (N,3,S,S). targets: int8 (N,A) of 1, 0, and -1 for unknown.
    -> the judge, in eval mode"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = build_judge(targets.shape[1]).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    targets = torch.as_tensor(targets)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        picked = rng.integers(0, len(pictures), batch)
        target = targets[picked].to(device)
        logits = judge(judge_input(pictures[picked], device))
        loss = F.binary_cross_entropy_with_logits(logits, (target == 1).float(), reduction="none")
        loss = (loss * (target >= 0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def cached_judge(pictures, targets, seed, device, steps, cache):
    """train_judge(...), or what an earlier call with the same pictures, targets, seed and steps
    kept in the folder `cache`. It does not depend on the VAE, so several VAEs share one."""
    digest = hashlib.sha256(pictures.numpy().tobytes())
    digest.update(np.ascontiguousarray(targets).tobytes())
    digest.update(f"{targets.shape} {seed} {steps} {torch.device(device).type}".encode())
    path = os.path.join(cache, f"judge-{digest.hexdigest()[:16]}.pt")
    if os.path.exists(path):
        judge = build_judge(targets.shape[1]).to(device).eval()
        try:
            load_strictly(judge, read_weights(path)[0], path)
        except UserError as error:
            raise UserError(f"{error}; remove it to have this judge trained again") from None
        return judge
    judge = train_judge(pictures, targets, seed, device, steps)
    with writing(path) as file:
        torch.save(judge.state_dict(), file)
    return judge


@torch.no_grad()
def probabilities(judge, pictures, device):
    """uint8 pictures (N,3,S,S) -> the judge's probabilities, (N,A)."""
    blocks = []
    for block in pictures.split(PICTURES_AT_ONCE):
        blocks.append(judge(judge_input(block, device)).sigmoid().cpu())
    return torch.cat(blocks).numpy()


# --------------------------------------------------------------------------------------------------
# Edits, and what they change


def edited_pictures(latents, displacement, decode):
    """latents: (M,D). displacement: (D,). decode: latents (b,D) -> uint8 (b,3,S,S).
    -> uint8 (M,3,S,S)"""
    blocks = (latents + displacement).split(PICTURES_AT_ONCE)
    return torch.cat([decode(block) for block in blocks])


def summary(leakage):
    """leakage: (A,A), see edit_attributes. -> {measure: [value]}"""
    edited = np.abs(leakage.diagonal())
    others = ~np.eye(len(leakage), dtype=bool)
    values = {"edit: own change": [float(edited.mean())]}
    if len(leakage) > 1:
        values["edit: leakage"] = [float(np.abs(leakage)[others].mean())]
    return values


def edit_attributes(benchmark, label, weight, latents, decode, size, args, device, judge_steps=600):
    """Edits held-out pictures by every attribute that both occurs and is absent in the training
    split. Writes to args.out, for each attribute, edits/<benchmark>-<label>/<attribute>.png (a
    row for each picture, a column for each of STEPS) and one leakage.csv. Keeps the judge in
    args.cache.

    The leakage of attribute a on attribute b is how much the judge's probability of b rises from
    the first of STEPS to the last, a mean over the pictures.

    weight: (D,A), the probe's. latents: (N,D), an array of all pictures of the benchmark. decode:
    latents (b,D) -> uint8 (b,3,size,size).
    -> {measure: [value]}, and what result.json records about it"""
    training, _, test = benchmark.parts
    targets = benchmark.targets
    varied = (targets[training] == 1).any(0) & (targets[training] == 0).any(0)
    chosen = np.flatnonzero(varied)
    names = [benchmark.attributes[a] for a in chosen]
    rng = np.random.default_rng(args.seed)

    picked = np.sort(rng.permutation(np.arange(training.stop))[:TRAINING_PICTURES])
    judge = cached_judge(
        benchmark.load(picked, size),
        targets[np.ix_(picked, chosen)],
        args.seed,
        device,
        judge_steps,
        args.cache,
    )
    held_out = rng.permutation(np.arange(test.start, test.stop))[:JUDGED_PICTURES]
    # The judge's own quality, on the originals.
    originals = probabilities(judge, benchmark.load(held_out, size), device)
    judge_f1, _, _ = f1_scores(originals, targets[np.ix_(held_out, chosen)], 0.5)

    directions = edit_directions(
        torch.as_tensor(weight[:, chosen]).cpu(),
        torch.as_tensor(latents[picked].astype(np.float32)),
        args.edit_direction,
        args.orthogonal,
    )
    start = torch.as_tensor(latents[held_out].astype(np.float32))
    folder = os.path.join(args.out, "edits", f"{slug(benchmark.name)}-{slug(label)}")
    leakage = np.empty((len(chosen), len(chosen)))
    for index, (name, direction) in enumerate(zip(names, directions, strict=True)):
        first = edited_pictures(start, STEPS[0] * direction, decode)
        last = edited_pictures(start, STEPS[-1] * direction, decode)
        rise = probabilities(judge, last, device) - probabilities(judge, first, device)
        leakage[index] = rise.mean(0)
        drawn = start[:DRAWN_PICTURES]
        columns = [edited_pictures(drawn, step * direction, decode) for step in STEPS]
        rows = torch.stack(columns, 1)  # (8,7,3,S,S)
        save_grid(os.path.join(folder, f"{slug(name)}.png"), list(rows))
    write_leakage(os.path.join(folder, "leakage.csv"), names, leakage)
    about = {
        "direction": args.edit_direction,
        "orthogonal": args.orthogonal,
        "steps": list(STEPS),
        "pictures": len(held_out),
        "judge_f1_macro": float(judge_f1),
        "attributes": names,
        "leakage": leakage.round(4).tolist(),
    }
    return summary(leakage), about


def write_leakage(path, names, leakage):
    """Writes the matrix (A,A): a line for each edited attribute, a column for each judged one."""
    lines = []
    for name, row in zip(names, leakage, strict=True):
        lines.append([name, *(f"{value:.4f}" for value in row)])
    write_lines(path, ["edited", *names], lines)
