"""The demo's stand-in for a vision foundation model: a small timm network, trained on its pictures instead of downloaded."""

import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common.files import writing
from common.pictures import from_uint8

NAME, STRIDE = "test_resnet", 8  # a tiny timm CNN; its map at stride 8 is the token grid
SIDE = 64  # of its input: 8 x 8 tokens


def load_all(data, size):
    """ImageSet -> pictures uint8 (N,3,size,size) and the attributes (N,A), 0 or 1, of a list in CelebA's format beside the
    folder; A is 0 where there is none."""
    pictures = data.stack(range(len(data)), size)
    parent, split = os.path.split(data.root)
    path = os.path.join(parent, "list_attr_celeba.txt")
    if not os.path.exists(path):
        return pictures, torch.zeros(len(data), 0)
    with open(path) as file:
        rows = dict(line.split(maxsplit=1) for line in file.readlines()[2:])
    names = [f"{split}/{os.fsdecode(name)}" for name in data.names]
    return pictures, torch.tensor([[float(v == "1") for v in rows[name].split()] for name in names])


def build(classes):
    """-> timm model, index of the feature map that serves as tokens, its width."""
    import timm

    model = timm.create_model(NAME, pretrained=False, num_classes=classes)
    layer = [f["reduction"] for f in model.feature_info].index(STRIDE)
    return model, layer, model.feature_info[layer]["num_chs"]


def forward(model, layer, x):
    """uint8 (B,3,S,S) -> features of the last layer (B,E), mean token (B,D); test_resnet's inputs are in [-1,1]."""
    x = F.interpolate(from_uint8(x), (SIDE, SIDE), mode="bicubic")
    x, (tokens,) = model.forward_intermediates(x, indices=[layer], norm=False, output_fmt="NCHW")
    return model.forward_head(x, pre_logits=True), tokens.mean((2, 3))


def fit(train, val, size, path, steps=300, batch=64, peak=4e-3):
    """Trains the stand-in to tell classes and attributes, also from its mean token, so that tokens hold what pictures
    differ in (one class without attributes: to tell quarter turns), and writes its weights in timm's own key names."""
    x, attributes = load_all(train, size)
    y, classes = torch.from_numpy(train.labels), len(train.classes)
    if classes == 1 and attributes.shape[1] == 0:
        x, y, classes = (
            torch.cat([x.rot90(k, (2, 3)) for k in range(4)]),
            torch.arange(4).repeat_interleave(len(x)),
            4,
        )
        attributes = torch.zeros(len(x), 0)
    torch.manual_seed(0)
    model, layer, width = build(classes)
    heads = nn.ModuleList(
        nn.Linear(n, classes + attributes.shape[1]) for n in (model.head_hidden_size, width)
    )
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *heads.parameters()], weight_decay=0.02, fused=True
    )
    order = torch.cat([torch.randperm(len(x)) for _ in range(steps * batch // len(x) + 1)])
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * min(
            (step + 1) / 60, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        )
        rows = order[step * batch : (step + 1) * batch]
        pooled, token = forward(model, layer, x[rows])
        loss = F.cross_entropy(model.get_classifier()(pooled), y[rows])
        for guess in (heads[0](pooled), heads[1](token)):
            loss = loss + F.cross_entropy(guess[:, :classes], y[rows])
            if attributes.shape[1]:
                loss = loss + 3 * F.binary_cross_entropy_with_logits(
                    guess[:, classes:], attributes[rows]
                )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(
                f"stand-in {NAME}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True
            )
    with writing(path) as file:
        save_file(model.state_dict(), file.name)
    share = accuracy(path, val.stack(range(len(val)), size), torch.from_numpy(val.labels), classes)
    print(f"stand-in: tells the class of {share:.1%} of the {len(val)} pictures in {val.root}")


@torch.no_grad()
def accuracy(path, pictures, labels, classes):
    """Share of uint8 pictures (N,3,S,S) whose class the stand-in gives as their label (N,)."""
    model, layer, _ = build(classes)
    model.load_state_dict(load_file(path))
    model.eval()
    logits = torch.cat(
        [model.get_classifier()(forward(model, layer, part)[0]) for part in pictures.split(256)]
    )
    return (logits.argmax(1) == labels).float().mean().item()
