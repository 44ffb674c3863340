"""The demo's stand-in for a vision foundation model: a small timm network, trained on the demo's
pictures because nothing is downloaded."""

import math
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from common.files import writing
from common.pictures import from_uint8

# A tiny CNN of timm. Its feature map at stride 8 of a 64 x 64 picture is the grid of patch tokens.
NAME = "test_resnet"
STRIDE = 8
INPUT_SIZE = 64

# --------------------------------------------------------------------------------------------------
# Data and network


def load_all(data, size):
    """ImageSet -> its pictures, uint8 (N,3,size,size), and their attributes, float 0 or 1 (N,A).

    The attributes are those of a list in CelebA's format beside the folder; A is 0 without one."""
    pictures = data.stack(range(len(data)), size)
    parent, split = os.path.split(data.root)
    path = os.path.join(parent, "list_attr_celeba.txt")
    if not os.path.exists(path):
        return pictures, torch.zeros(len(data), 0)
    values_of = {}
    with open(path) as file:
        for line in file.readlines()[2:]:
            name, *values = line.split()
            values_of[name] = [float(value == "1") for value in values]
    names = [f"{split}/{os.fsdecode(name)}" for name in data.names]
    return pictures, torch.tensor([values_of[name] for name in names])


def build(classes):
    """-> timm model, the index of the feature map that serves as tokens, and its width D."""
    import timm

    model = timm.create_model(NAME, pretrained=False, num_classes=classes)
    layer = [f["reduction"] for f in model.feature_info].index(STRIDE)
    return model, layer, model.feature_info[layer]["num_chs"]


def forward(model, layer, pictures):
    """Pictures, uint8 (B,3,S,S) -> features of the last layer (B,E), mean patch token (B,D)."""
    # The network takes values in [-1,1], as from_uint8 gives them.
    x = F.interpolate(from_uint8(pictures), (INPUT_SIZE, INPUT_SIZE), mode="bicubic")
    x, [tokens] = model.forward_intermediates(x, indices=[layer], norm=False, output_fmt="NCHW")
    return model.forward_head(x, pre_logits=True), tokens.mean((2, 3))


# --------------------------------------------------------------------------------------------------
# Training


def prediction_loss(predicted, labels, attributes):
    """Predictions (B, classes + A), labels (B,), attributes (B,A) -> scalar, the cross-entropy of
    the classes and three times that of the attributes."""
    classes = predicted.shape[1] - attributes.shape[1]
    loss = F.cross_entropy(predicted[:, :classes], labels)
    if attributes.shape[1] > 0:
        of_attributes = F.binary_cross_entropy_with_logits(predicted[:, classes:], attributes)
        loss = loss + 3 * of_attributes
    return loss


def fit(train, val, size, path, steps=300, batch=64, peak=4e-3):
    """Trains the stand-in on the ImageSet `train` and writes its weights under timm's own names.

    It learns to predict classes and attributes, from its mean patch token too, so that the tokens
    hold what pictures differ in. With one class and no attributes it predicts quarter turns. The
    share of the ImageSet `val` that it classifies correctly is printed."""
    pictures, attributes = load_all(train, size)
    labels = torch.from_numpy(train.labels)
    classes = len(train.classes)
    if classes == 1 and attributes.shape[1] == 0:
        labels = torch.arange(4).repeat_interleave(len(pictures))
        pictures = torch.cat([pictures.rot90(k, (2, 3)) for k in range(4)])
        classes = 4
        attributes = torch.zeros(len(pictures), 0)

    torch.manual_seed(0)
    model, layer, width = build(classes)
    outputs = classes + attributes.shape[1]
    pooled_head = nn.Linear(model.head_hidden_size, outputs)
    token_head = nn.Linear(width, outputs)
    parameters = [*model.parameters(), *pooled_head.parameters(), *token_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02, fused=True)
    epochs = steps * batch // len(pictures) + 1
    order = torch.cat([torch.randperm(len(pictures)) for _ in range(epochs)])

    model.train()
    for step in range(steps):
        warmup = (step + 1) / 60
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = peak * min(warmup, cosine)
        index = order[step * batch : (step + 1) * batch]
        pooled, token = forward(model, layer, pictures[index])
        loss = F.cross_entropy(model.get_classifier()(pooled), labels[index])
        loss = loss + prediction_loss(pooled_head(pooled), labels[index], attributes[index])
        loss = loss + prediction_loss(token_head(token), labels[index], attributes[index])
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
    print(f"stand-in: classifies {share:.1%} of the {len(val)} pictures in {val.root} correctly")


@torch.no_grad()
def accuracy(path, pictures, labels, classes):
    """Share of pictures, uint8 (N,3,S,S), that the stand-in classifies as their labels (N,)."""
    model, layer, _ = build(classes)
    model.load_state_dict(load_file(path))
    model.eval()
    logits = []
    for part in pictures.split(256):
        pooled, _ = forward(model, layer, part)
        logits.append(model.get_classifier()(pooled))
    predicted = torch.cat(logits).argmax(1)
    return (predicted == labels).float().mean().item()
