"""The demo's small vision networks, trained on the demo's own pictures because nothing is
downloaded: the stand-in for a vision foundation model, and the judge of the samples."""

import math
import os
import time

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from common.files import reading, writing
from common.pictures import from_uint8

# A tiny CNN of timm. Its feature map at stride 8 is the grid of patch tokens, 4 x 4 of a 32 x 32
# picture.
NAME = "test_resnet"
STRIDE = 8

# The judge is another network from another start, and no VAE is aligned to it.
JUDGE = "test_byobnet"

# --------------------------------------------------------------------------------------------------
# Data and networks


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


def build(name, classes):
    """-> timm model without weights, in the memory format that is faster on a CPU."""
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=classes)
    return model.to(memory_format=torch.channels_last)


def save(model, path, data):
    """Writes a model's weights under timm's own names, and the fingerprint of the ImageSet that it
    was trained on."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with writing(path) as file:
        save_file(state, file.name, {"data": data.fingerprint})


def trained_on(path):
    """-> the fingerprint of the ImageSet that a network was trained on, None if its file does not
    say."""
    with reading(path, "the weights of a network"), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return metadata.get("data")


def as_input(pictures):
    """Pictures, uint8 (B,3,S,S) -> what the networks take, values in [-1,1]."""
    return from_uint8(pictures).contiguous(memory_format=torch.channels_last)


def token_layer(model):
    """-> the index of the feature map that serves as patch tokens, and its width D."""
    layer = [f["reduction"] for f in model.feature_info].index(STRIDE)
    return layer, model.feature_info[layer]["num_chs"]


def features(model, layer, pictures):
    """Pictures, uint8 (B,3,S,S) -> features of the last layer (B,E), mean patch token (B,D)."""
    x, [tokens] = model.forward_intermediates(
        as_input(pictures), indices=[layer], norm=False, output_fmt="NCHW"
    )
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


def train(modules, loss_of, count, report, steps, batch, peak):
    """Trains modules for `steps` steps with AdamW, a warm-up and a cosine.

    loss_of(indices (b,) of a batch) -> scalar. count: of the pictures. peak: the highest learning
    rate. report(share of the steps that are done, words) is called at the first step and then once
    a second."""
    parameters = list(nn.ModuleList(modules).parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02, fused=True)
    epochs = steps * batch // count + 1
    order = torch.cat([torch.randperm(count) for _ in range(epochs)])
    next_report = time.time()
    for step in range(steps):
        warmup = (step + 1) / 60
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = peak * min(warmup, cosine)
        loss = loss_of(order[step * batch : (step + 1) * batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if time.time() >= next_report:
            next_report = time.time() + 1
            report((step + 1) / steps, f"step {step + 1} of {steps}: loss {loss.item():.3f}")


def fit(data, size, path, report, steps=400, batch=64, peak=4e-3):
    """Trains the stand-in on an ImageSet and writes its weights. report: see train.

    It learns to predict classes and attributes, from its mean patch token too, so that the tokens
    hold what pictures differ in. With one class and no attributes it predicts quarter turns."""
    pictures, attributes = load_all(data, size)
    labels = torch.from_numpy(data.labels)
    classes = len(data.classes)
    if classes == 1 and attributes.shape[1] == 0:
        labels = torch.arange(4).repeat_interleave(len(pictures))
        pictures = torch.cat([pictures.rot90(k, (2, 3)) for k in range(4)])
        classes = 4
        attributes = torch.zeros(len(pictures), 0)

    torch.manual_seed(0)
    model = build(NAME, classes).train()
    layer, width = token_layer(model)
    outputs = classes + attributes.shape[1]
    pooled_head = nn.Linear(model.head_hidden_size, outputs)
    token_head = nn.Linear(width, outputs)

    def loss_of(index):
        pooled, token = features(model, layer, pictures[index])
        loss = F.cross_entropy(model.get_classifier()(pooled), labels[index])
        loss = loss + prediction_loss(pooled_head(pooled), labels[index], attributes[index])
        return loss + prediction_loss(token_head(token), labels[index], attributes[index])

    modules = [model, pooled_head, token_head]
    train(modules, loss_of, len(pictures), report, steps, batch, peak)
    save(model, path, data)


def bend(pictures, amount=0.04):
    """Bends pictures, uint8 (B,3,S,S), at random: 5 x 5 points of each are moved, by normal
    draws of `amount` half sides, and what is between them follows. -> uint8 (B,3,S,S)"""
    count, _, size, _ = pictures.shape
    moves = amount * torch.randn(count, 2, 5, 5)
    moves = F.interpolate(moves, (size, size), mode="bilinear", align_corners=True)
    places = F.affine_grid(torch.eye(2, 3).repeat(count, 1, 1), pictures.shape, align_corners=False)
    places = places + moves.permute(0, 2, 3, 1)  # (B,S,S,2), in -1..1
    bent = F.grid_sample(pictures.float(), places, padding_mode="border", align_corners=False)
    return bent.round().to(torch.uint8)


def fit_judge(data, held_out, size, path, report, steps=400, batch=64, peak=4e-3):
    """Trains the judge on the classes of an ImageSet, and writes its weights. report: see train.

    It sees the pictures bent, since it is to judge samples whose lines are not quite straight. One
    that was trained on the demo's pictures as they are takes such squares for discs.
    -> the share of the ImageSet `held_out` that it classifies correctly"""
    pictures = data.stack(range(len(data)), size)
    labels = torch.from_numpy(data.labels)
    torch.manual_seed(1)
    model = build(JUDGE, len(data.classes)).train()

    def loss_of(index):
        return F.cross_entropy(model(as_input(bend(pictures[index]))), labels[index])

    train([model], loss_of, len(pictures), report, steps, batch, peak)
    save(model, path, data)
    originals = held_out.stack(range(len(held_out)), size)
    return accuracy(path, originals, torch.from_numpy(held_out.labels), len(data.classes))


@torch.no_grad()
def accuracy(path, pictures, labels, classes):
    """Share of pictures, uint8 (N,3,S,S), that the judge classifies as their labels (N,)."""
    model = build(JUDGE, classes)
    model.load_state_dict(load_file(path))
    model.eval()
    logits = torch.cat([model(as_input(part)) for part in pictures.split(256)])
    return (logits.argmax(1) == labels).float().mean().item()
