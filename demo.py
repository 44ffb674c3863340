import json
import math
import os
import time

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file

# ----------------------------------------------------------------------------------------------------------------------
# Pictures: what can be seen in one, and how it is drawn


def circle(radius):
    angle = np.linspace(0, 2 * math.pi, 49)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def outlines():
    """Name -> (N,2) corners of the shape when upright: x right, y down, reaching about 1 from the centre."""
    spokes = np.arange(10) * math.pi / 5
    star = np.where(np.arange(10) % 2, 0.48, 1.1)[:, None] * np.stack([np.sin(spokes), -np.cos(spokes)], 1)
    a = np.linspace(0, 2 * math.pi, 49)
    heart = np.stack([16 * np.sin(a) ** 3, -13 * np.cos(a) + 5 * np.cos(2 * a) + 2 * np.cos(3 * a) + np.cos(4 * a)], 1)
    b = 0.33  # half the width of the cross's bars
    return {
        "arrow": np.array([(-1, -.3), (.05, -.3), (.05, -.85), (1.05, 0), (.05, .85), (.05, .3), (-1, .3)]),
        "cross": np.array([(-b, -1), (b, -1), (b, -b), (1, -b), (1, b), (b, b), (b, 1), (-b, 1), (-b, b), (-1, b),
                           (-1, -b), (-b, -b)]),
        "disc": circle(0.95),
        "heart": heart / 16 - (0, 0.1),
        "ring": circle(1),  # draw_picture makes the hole
        "square": np.array([(-.82, -.82), (.82, -.82), (.82, .82), (-.82, .82)]),
        "star": star,
        "triangle": np.array([(0, -1), (1, .75), (-1, .75)]),
    }


SHAPES = outlines()
COLOURS = {"Red": (215, 35, 35), "Yellow": (240, 200, 20), "Green": (35, 165, 60), "Cyan": (40, 200, 220),
           "Blue": (45, 70, 220), "Magenta": (205, 50, 185)}
TEXTURES = ["Solid", "Striped", "Dotted"]
BACKGROUNDS = ["Plain_Background", "Gradient_Background", "Checker_Background"]
ATTRIBUTES = [s.capitalize() for s in SHAPES] + list(COLOURS) + TEXTURES + BACKGROUNDS + ["Large", "Left", "Top", "Tilted"]


def muted(rng, low, high):
    """A greyish colour, (3,) in 0..255, whose brightest channel is between low and high."""
    grey = rng.uniform(low, high)
    return grey * (1 - rng.uniform(0, 0.3) * rng.permutation([0, rng.random(), 1]))


def shrink(mask):
    """(4n,4n) picture of 0 and 255 -> (n,n,1) in 0..1, the share of each pixel that is covered."""
    return np.asarray(mask.reduce(4))[..., None] / 255


def draw_picture(shape, size, rng):
    """One object on a background: (size,size,3) uint8, and the set of its attributes' names."""
    colour, texture, background = (list(names)[rng.integers(len(names))] for names in (COLOURS, TEXTURES, BACKGROUNDS))
    large, left, top, tilted = rng.random(4) < 0.5
    tilted = tilted and shape not in ("disc", "ring")  # nobody could see it
    names = {shape.capitalize(), colour, texture, background}
    names |= {name for name, on in zip(("Large", "Left", "Top", "Tilted"), (large, left, top, tilted)) if on}

    # Geometry in pixels of a 32 x 32 picture. Up to 32 degrees: a star looks upright again at 72, a square at 90.
    radius = rng.uniform(10, 12) if large else rng.uniform(6.5, 8)
    x, y = 16 + rng.uniform(2, 15.5 - radius, 2) * np.where([left, top], -1, 1)
    angle = math.radians(rng.choice([-1, 1]) * (rng.uniform(18, 32) if tilted else rng.uniform(0, 3)))
    c, s = math.cos(angle), math.sin(angle)
    scale = 4 * size / 32  # drawn four times too large; averaging 4 x 4 pixels smooths the edges
    mask = Image.new("L", (4 * size, 4 * size))
    for corners, fill in [(SHAPES[shape], 255)] + [(SHAPES["disc"] / 2, 0)] * (shape == "ring"):
        corners = (corners @ [(c, s), (-s, c)] * radius + (x, y)) * scale
        ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=fill)

    # Background: dark or light, but always dark behind the bright colours.
    dark = colour in ("Yellow", "Cyan") or rng.random() < 0.5
    low, high = (25, 95) if dark else (175, 245)
    first = second = muted(rng, low, high)
    right = (np.arange(size) + 0.5) * 32 / size  # pixel centres, (size,), and below each other (size,1)
    down = right[:, None]
    if background == "Gradient_Background":
        first, second = muted(rng, low, low + 15), muted(rng, high - 15, high)
        direction = rng.uniform(0, 2 * math.pi)
        mix = 0.5 + ((right - 16) * math.cos(direction) + (down - 16) * math.sin(direction)) / 40
    elif background == "Checker_Background":
        first, second = muted(rng, low, low + 20), muted(rng, high - 20, high)
        dx, dy = rng.uniform(0, 16, 2)
        mix = ((right + dx) // 8 + (down + dy) // 8) % 2
    else:
        mix = np.zeros((size, size))
    mix = mix.clip(0, 1)[..., None]
    picture = first * (1 - mix) + second * mix

    # Object, and its stripes or dots in a paler or darker tone of its colour: away from the background's.
    colour = np.array(COLOURS[colour], float)
    picture += shrink(mask) * (colour - picture)
    if texture != "Solid":
        mask = np.asarray(mask)
        right = (np.arange(4 * size) + 0.5) / scale
        down = right[:, None]
        across, along = (right - x) * c + (down - y) * s, (down - y) * c - (right - x) * s
        if texture == "Striped":
            marks = along % 5 < 2.5
        else:
            marks = ((across + 2.5) % 5 - 2.5) ** 2 + ((along + 2.5) % 5 - 2.5) ** 2 < 1.7 ** 2
        tone = colour * 0.3 + 255 * 0.7 if dark else colour * 0.35
        picture += shrink(Image.fromarray(mask * marks)) * (tone - colour)
    return picture.round().clip(0, 255).astype(np.uint8), names


def draw_pictures(folder, size=32, per_class=1000, seed=0):
    """A data set of drawn objects: pictures in ImageNet's layout and, about them, CelebA's two text files.

    folder/train/<shape>/<shape>_00000.png (per_class each) and folder/val/... (100 each), size x size RGB;
    list_attr_celeba.txt (1 or -1 for each of ATTRIBUTES) and list_eval_partition.txt (0 train, 1 the last tenth of
    each training class, 2 val). A picture depends on (seed, split, shape, number) alone, not on per_class.
    """
    settings = dict(size=size, per_class=per_class, seed=seed)
    marker = os.path.join(folder, "demo.json")  # written at the start, and marked as complete at the end
    if os.path.exists(marker):
        with open(marker) as f:
            found = json.load(f)
        if found.pop("complete") and found == settings:
            return print(f"pictures: {folder} is complete")
        if found != settings:
            raise SystemExit(f"{folder} holds pictures drawn with {found}, wanted {settings}: name another folder or delete it")
    elif os.path.exists(os.path.join(folder, "train")):
        raise SystemExit(f"{folder}/train exists and was not drawn by demo.py: name another folder")
    os.makedirs(folder, exist_ok=True)
    with open(marker, "w") as f:
        json.dump(dict(settings, complete=False), f)

    attributes, partition = [], []
    for split, (part, count) in enumerate({"train": per_class, "val": 100}.items()):
        for k, shape in enumerate(SHAPES):
            os.makedirs(os.path.join(folder, part, shape), exist_ok=True)
            for i in range(count):
                name = f"{part}/{shape}/{shape}_{i:05d}.png"
                picture, names = draw_picture(shape, size, np.random.default_rng([seed, split, k, i]))
                Image.fromarray(picture).save(os.path.join(folder, name))
                attributes.append(name + "".join("  1" if a in names else " -1" for a in ATTRIBUTES))
                partition.append(f"{name} {2 if part == 'val' else int(i >= 0.9 * count)}")
    with open(os.path.join(folder, "list_attr_celeba.txt"), "w") as f:
        f.write("\n".join([str(len(attributes)), " ".join(ATTRIBUTES), *attributes]) + "\n")
    with open(os.path.join(folder, "list_eval_partition.txt"), "w") as f:
        f.write("\n".join(partition) + "\n")
    with open(marker, "w") as f:
        json.dump(dict(settings, complete=True), f)
    print(f"pictures: {len(attributes)} drawn in {folder}")


# ----------------------------------------------------------------------------------------------------------------------
# Stand-in for the vision foundation model: a small timm network, trained here instead of downloaded


def load_split(data, split, size):
    """data/split/<class>/* -> pictures (N,3,size,size) uint8, classes (N,) int64, class names, names relative to data."""
    classes = sorted(d.name for d in os.scandir(os.path.join(data, split)) if d.is_dir())
    names = [f"{split}/{c}/{f}" for c in classes for f in sorted(os.listdir(os.path.join(data, split, c)))]
    pictures = torch.empty(len(names), 3, size, size, dtype=torch.uint8)
    for i, name in enumerate(names):
        picture = Image.open(os.path.join(data, name)).convert("RGB")
        if picture.size != (size, size):
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        pictures[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return pictures, torch.tensor([classes.index(n.split("/")[1]) for n in names]), classes, names


def load_attributes(data, names):
    """(N,A) of 0. and 1. for the named pictures, from data/list_attr_celeba.txt; A is 0 where there is no such file."""
    path = os.path.join(data, "list_attr_celeba.txt")
    if not os.path.exists(path):
        return torch.zeros(len(names), 0)
    with open(path) as f:
        rows = dict(line.split(maxsplit=1) for line in f.readlines()[2:])
    return torch.tensor([[float(v == "1") for v in rows[n].split()] for n in names])


def train_stand_in(data, out, name="test_byobnet", stride=8, grid=8, steps=900, batch=64, lr=4e-3, seed=0):
    """Train timm's `name` on data/train and write its weights, in timm's own key names, to `out` (safetensors).

    The feature map at `stride` will serve as the tokens, grid x grid of them, so that is how large the pictures get.
    Loss: cross entropy of the classes, plus, where data has an attribute list, that of the attributes. Both are also
    read off the average token, so that the tokens hold what the other stages look for. One class and no attributes:
    the network tells by how many quarter turns each picture was rotated. Returns what was measured on data/val.
    """
    start = time.time()
    x, y, classes, names = load_split(data, "train", 32)
    x_val, y_val, _, names_val = load_split(data, "val", 32)
    attributes, attributes_val = load_attributes(data, names), load_attributes(data, names_val)
    if len(classes) == 1 and attributes.shape[1] == 0:
        classes = ["0", "90", "180", "270"]
        x, y = torch.cat([x.rot90(k, (2, 3)) for k in range(4)]), torch.arange(4).repeat_interleave(len(x))
        x_val, y_val = torch.cat([x_val.rot90(k, (2, 3)) for k in range(4)]), torch.arange(4).repeat_interleave(len(x_val))
        attributes, attributes_val = torch.zeros(len(x), 0), torch.zeros(len(x_val), 0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, num_classes=len(classes)).to(memory_format=torch.channels_last)
        layer = [f["reduction"] for f in model.feature_info].index(stride)
        heads = nn.ModuleList(nn.Linear(n, len(classes) + attributes.shape[1]) for n in
                              (model.head_hidden_size, model.feature_info[layer]["num_chs"]))
        order = torch.cat([torch.randperm(len(x)) for _ in range(steps * batch // len(x) + 1)])
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))

    def forward(x):
        """(B,3,32,32) uint8 -> the model's logits (B,K), the two extra heads' (B,K+A), the average token (B,D)."""
        x = F.interpolate(x / 255, (grid * stride, grid * stride), mode="bicubic")
        x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
        x, (tokens,) = model.forward_intermediates(x, indices=[layer], norm=False, output_fmt="NCHW")
        pooled, token = model.forward_head(x, pre_logits=True), tokens.mean((2, 3))
        return model.get_classifier()(pooled), heads[0](pooled), heads[1](token), token

    # Train. The learning rate rises for a tenth of the steps and then falls to zero along a cosine.
    model.train()
    params = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, weight_decay=0.02)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = order[step * batch:(step + 1) * batch]
        logits, *extra, _ = forward(x[rows])
        loss = F.cross_entropy(logits, y[rows])
        for prediction in extra if attributes.shape[1] else extra[1:]:
            loss = loss + F.cross_entropy(prediction[:, :len(classes)], y[rows])
            if attributes.shape[1]:
                loss = loss + 3 * F.binary_cross_entropy_with_logits(prediction[:, len(classes):], attributes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            print(f"stand-in {name}: step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)

    # Measure: the model itself, and what one linear layer (the second extra head) reads off the average token.
    model.eval()
    with torch.no_grad():
        logits, top, token = (torch.cat(parts) for parts in zip(*(forward(b)[:3] for b in x_val.split(200))))
    accuracy = lambda guess: (guess[:, :len(classes)].argmax(1) == y_val).float().mean().item()
    hits = lambda guess: ((guess[:, len(classes):] > 0) == (attributes_val > 0)).float().mean().item()
    result = dict(vfm=name, stride=stride, grid=grid, input_size=grid * stride, steps=steps, seed=seed,
                  accuracy=accuracy(logits), token_accuracy=accuracy(token))
    if attributes.shape[1]:
        result.update(attribute_accuracy=hits(top), token_attribute_accuracy=hits(token))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out)
    result["seconds"] = round(time.time() - start, 1)
    return result
