"""A report card of any VAE: what can be measured in minutes, without a diffusion model, and what it
says about how well one will generate from the VAE's latents.

    python -m study.card --vae runs/vae --data data/cifar10            # beside the study's VAEs
    python -m study.card --vae A B hf:owner/name --data my_pictures    # a column for each
    python -m study.card ... --features inception                      # a pretrained network

--data is a folder with train/ and val/ or test/, each with a folder for each class. On CIFAR-10
each measure stands beside those of the study's VAEs (study/scale.json), and the distance of a small
SiT's samples is predicted from them. On other data there is no such scale, and VAEs can be compared
with each other only.

It prints a table and writes card.json, card.png and pictures/ into --out (runs/card).
"""

import argparse
import os

import torch
from torch import nn

from common.files import UserError, state_hash, write_json
from common.flags import parse_flags, positive, two_or_more
from common.processes import run_main, say, setup, world
from common.runs import lock, provenance
from common.weights import load_vae
import fid
from probing.correlation import short_name
from probing.tables import slug
from study import figures, judge, measures, scale
from study.attributes import CLASSES

CLASSIFIER = os.path.join(os.path.dirname(__file__), "classifier.safetensors")
# Test pictures at this distance from the study's are the same: as far as JPEG of quality 95 moves
# them. The smallest floor is 0.24.
SAME_PICTURES = 0.005
# Larger pictures are reduced to so many pixels for a classifier.
CLASSIFIER_SIDE = 64

# {measure: (title, whether higher is better, format of its numbers)}
MEASURES = {
    "psnr": ("PSNR, dB", True, ".2f"),
    "ssim": ("SSIM", True, ".3f"),
    "rfid": ("rFID, of the same pictures", False, ".3f"),
    "floor": ("floor: distance from training pictures", False, ".3f"),
    "class probe": ("class probe, accuracy", True, ".3f"),
    "attribute F1": ("attribute probe, F1", True, ".3f"),
    "dci disentanglement": ("DCI disentanglement", True, ".3f"),
    "dci completeness": ("DCI completeness", True, ".4f"),
    "dci informativeness": ("DCI informativeness", True, ".3f"),
    "gini": ("Gini of density", False, ".3f"),
    "ifid": ("iFID", False, ".3f"),
    "leakage": ("leakage of edits", False, ".3f"),
}
# The step of {measure: ...} that its seconds are noted under, where it has another name.
STEPS = {
    "psnr": "reconstruction",
    "ifid": "interpolation",
    "dci disentanglement": "DCI",
}
# VAEs of the study that have columns of their own.
SHOWN = ("plain", "send")
# Distances that are predicted. The table has the correlations with the last.
DISTANCES = ("distance 750", "distance 2000")


def parse_arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--vae", nargs="+", required=True, help="files, run folders or published VAEs, any format"
    )
    p.add_argument("--data", default="data/cifar10", help="folder with train/ and val/ or test/")
    p.add_argument(
        "--classifier",
        help="of study.judge, whose features are compared (default: the study's own for CIFAR-10, "
        "else one is trained on --data)",
    )
    p.add_argument("--features", help="timm model, or inception, instead of a classifier")
    p.add_argument("--features-weights", help="local file of its weights (default: downloaded)")
    p.add_argument("--leakage", action="store_true", help="also edit attributes (a minute)")
    p.add_argument(
        "--size",
        type=positive,
        help="side of the pictures (default: the VAE's resolution, or the pictures' if smaller)",
    )
    p.add_argument(
        "--num", type=two_or_more, default=measures.HELD_OUT, help="held-out pictures, at most"
    )
    p.add_argument(
        "--train-images",
        type=two_or_more,
        default=50000,
        help="training pictures, at most; the probes take 10,000 of them",
    )
    p.add_argument("--out", default="runs/card")
    p.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    p.add_argument("--workers", type=int, default=1, help="loader processes")
    return parse_flags(p, argv)


# --------------------------------------------------------------------------------------------------
# The network whose features are compared


class ClassifierFeatures(nn.Module):
    """The pooled features of study/judge.py's classifier, as a feature network of fid.py."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier
        self.reference = classifier.reference
        self.dims = {"pool": classifier.head.in_features}
        self.about = {
            "name": "classifier",
            "weights": state_hash(classifier.state_dict()),
            "trained": classifier.trained,
            "published": False,
            "resize": f"area, to {CLASSIFIER_SIDE} pixels if larger",
        }

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B,3,H,W) -> pool (B,128)."""
        if images.shape[-1] > CLASSIFIER_SIDE:
            images = nn.functional.adaptive_avg_pool2d(images.float(), CLASSIFIER_SIDE)
        return {"pool": self.classifier(images)[1]}


def feature_network(args, bench):
    """The network of --features or --classifier; without either the study's classifier for pictures
    of CIFAR-10's classes, and for others one that is trained on them and kept under runs/cache.
    Raises UserError if they are of one class."""
    if args.features == "inception":
        return fid.Inception(args.features_weights)
    if args.features:
        return fid.TimmFeatures(args.features, args.features_weights)
    path = args.classifier
    if path is None and bench.classes == CLASSES:
        path = CLASSIFIER
    if path is None:
        path = trained_classifier(bench)
    return ClassifierFeatures(judge.load_classifier(path))


def trained_classifier(bench):
    """-> the file of a classifier of the training pictures, which is trained if it is not there
    yet."""
    pictures = bench.training.set
    if len(bench.classes) < 2:
        raise UserError(
            f"{bench.training.path} has one class, which no classifier can be trained on; name "
            "another network for the distances with --features, such as inception"
        )
    size = min(bench.training.size, CLASSIFIER_SIDE)
    path = os.path.join("runs", "cache", f"classifier-{size}-{pictures.fingerprint[:12]}.pt")
    if not os.path.exists(path):
        say(f"training  a classifier on {bench.training.path}, kept as {path}")
        judge.train_classifier(pictures, bench.held_out.path, size, path, bench.args.workers)
    return path


def size_of(args, vaes):
    """The side of the pictures, in pixels: --size, or the smallest resolution of the VAEs, or that
    of the pictures where all of them are smaller."""
    if args.size:
        return args.size
    _, held_out = measures.splits(args.data)
    size = min(vae.resolution for vae in vaes)
    largest = judge.ImageSet(held_out).largest
    if largest < size:
        factor = max(vae.factor for vae in vaes)
        size = largest // factor * factor
    return size


# --------------------------------------------------------------------------------------------------
# The scale


def difference_of_pictures(found, bench):
    """Why the held-out pictures are not those of the study's Scale, or "".

    The study's files are JPEG. Other files with nearly the same pixels do as well, which their
    features show; those of all pictures are compared, in any order."""
    if bench.held_out.set.fingerprint == found.data:
        return ""
    reference = getattr(bench.network, "reference", None)
    if reference is None or bench.classes != CLASSES:
        return "the pictures are not those of the study"
    pictures = fid.Pictures(bench.held_out.path, None, bench.held_out.size)
    got = fid.cached_statistics(bench.network, pictures, 0, bench.args.workers)
    distance = fid.frechet_distance(got["mu"].cpu(), got["sigma"].cpu(), *reference)
    if distance <= SAME_PICTURES:
        return ""
    return (
        f"the test pictures are at distance {distance:.2g} from the study's, which are CIFAR-10 as "
        "JPEG of quality 75 (docs/probing.md says how to make them)"
    )


def reasons_against(found, bench):
    """Why the study's Scale, or None, does not apply to what was measured: a list of texts, empty
    if it does."""
    if found is None:
        return ["there is no study/scale.json; `python -m study.run --report` writes it"]
    reasons = [difference_of_pictures(found, bench)]
    if bench.network.about.get("trained") != found.classifier:
        reasons.append("the features are not those of the study's classifier")
    for name, number in bench.settings.items():
        expected = found.settings.get(name, number)
        if number != expected:
            reasons.append(f"{name} is {number}, where the study has {expected}")
    return [reason for reason in reasons if reason]


def scale_without(found, vaes):
    """The Scale without those of its own VAEs that are measured, {path: VAE}."""
    for path, vae in vaes.items():
        kept = found.without(vae.info["hash"])
        if len(kept.vaes) < len(found.vaes):
            names = ", ".join(sorted(found.vaes.keys() - kept.vaes.keys()))
            say(f"note: {path} is the study's {names}, which is left out of the scale")
        found = kept
    return found


def has_its_latents(card, found):
    """Whether the latents of a card's VAE are of the side that the scale's have."""
    side = card["latents"].split("x")[1]
    return side == str(found.settings.get("latent size", side))


def verdicts(found, card):
    """{distance: Prediction} for the VAE of a card, as far as there are any."""
    predictions = {}
    if not has_its_latents(card, found):
        return predictions
    values = card["measures"]
    for distance in DISTANCES:
        prediction = scale.predict(found, values, distance)
        if prediction is not None:
            predictions[distance] = prediction
    return predictions


# --------------------------------------------------------------------------------------------------
# The table


def aligned(lines):
    """Rows of texts -> lines of text, the columns of which are aligned."""
    widths = [max(len(row[k]) for row in lines) for k in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    texts = []
    for row in [lines[0], rule, *lines[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        texts.append("| " + " | ".join(cells) + " |")
    return texts


def cell_of(card, name, found, applies):
    """A number of a VAE and, if the Scale applies, how many of its VAEs are worse."""
    _, higher_is_better, form = MEASURES[name]
    value = card["measures"].get(name)
    if value is None:
        return "-"
    text = format(value, form)
    if applies and found.known(name):
        worse, count = scale.better_than(found, name, value, higher_is_better)
        text += f", better than {worse} of {count}"
    return text


def scale_cells(found, name):
    """The cells of a row about the study's VAEs: some by name, the best and the worst."""
    _, higher_is_better, form = MEASURES[name]
    known = found.known(name)
    cells = [format(found.vaes[vae][name], form) if vae in known else "-" for vae in SHOWN]
    if not known:
        return [*cells, "-", "-"]
    order = sorted(found.numbers(known, name), reverse=higher_is_better)
    return [*cells, format(order[0], form), format(order[-1], form)]


def correlation_cell(found, name):
    correlation = scale.correlation(found, name, DISTANCES[-1])
    if correlation is None:
        return "-"
    (value, low, high), count = correlation
    return f"{value:.2f} [{low:.2f}, {high:.2f}] ({count})"


def table(cards, found, applies):
    """The lines of the table. cards: {VAE: its card}. found: the Scale, or None. applies: whether
    the numbers can be compared with it; if not, it still says what follows the distance."""
    step = DISTANCES[-1].split()[1]
    head = ["measure", *(short_name(vae) for vae in cards)]
    if applies:
        head += [*SHOWN, "best", "worst"]
    if found is not None:
        head.append(f"study: r with the distance at {step} steps")
    lines = [[*head, "seconds"]]
    for name, (title, _, _) in MEASURES.items():
        if all(name not in card["measures"] for card in cards.values()):
            continue
        row = [title, *(cell_of(card, name, found, applies) for card in cards.values())]
        if applies:
            row += scale_cells(found, name)
        if found is not None:
            row.append(correlation_cell(found, name))
        spent = [card["seconds"].get(STEPS.get(name, name)) for card in cards.values()]
        spent = [f"{seconds:.0f}" for seconds in spent if seconds is not None]
        lines.append([*row, " ".join(spent)])
    return aligned(lines)


def verdict_lines(vae, card, found):
    """What the scale says about a VAE, a sentence for each distance."""
    lines = []
    for distance, prediction in card["predictions"].items():
        titles = " and ".join(MEASURES[name][0] for name in prediction["measures"])
        measured = found.numbers(found.known(distance), distance)
        line = (
            f"{short_name(vae)}: predicted {distance.replace(' ', ' at SiT step ')}: "
            f"{prediction['value']:.1f}, {scale.CONFIDENCE:.0%} interval [{prediction['low']:.1f}, "
            f"{prediction['high']:.1f}], from {titles}; the study's VAEs have "
            f"{measured.min():.1f} to {measured.max():.1f}"
        )
        if prediction["outside"]:
            beyond = " and ".join(MEASURES[name][0] for name in prediction["outside"])
            line += f" (beyond the study's VAEs in {beyond}: do not rely on it)"
        lines.append(f"{line}.")
    if not lines:
        lines.append(f"{short_name(vae)}: no prediction, because {why_no_prediction(card, found)}.")
    return lines


def why_no_prediction(card, found):
    if has_its_latents(card, found):
        return f"too few of the study's {len(found.vaes)} VAEs have a distance and these measures"
    return (
        f"its latents are {card['latents']}, and those of the study's VAEs are "
        f"{found.settings['latent size']} a side"
    )


def caution(found):
    return (
        f"The scale is {len(found.vaes)} VAEs of one small design on CIFAR-10 at 32 pixels, and a "
        "small SiT. A place on it is no promise for other data, resolutions or longer training."
    )


# --------------------------------------------------------------------------------------------------
# The command


def load_vaes(args, device):
    """{path: VAE}, all brought to one resolution. Raises UserError for two of one name."""
    vaes = {path: load_vae(path, device) for path in args.vae}
    if len({slug(short_name(path)) for path in vaes}) < len(args.vae):
        raise UserError(
            "--vae: two VAEs have the same last part in their path, which names their files; give "
            "one of them another name, or a link"
        )
    size = size_of(args, vaes.values())
    for vae in vaes.values():
        vae.set_resolution(size)
    return vaes, size


def card_of(bench, vae, path, picture):
    values, seconds = measures.measure(bench, vae, short_name(path), picture)
    return {
        "hash": vae.info["hash"],
        "latents": f"{vae.channels}x{vae.latent_size}x{vae.latent_size}",
        "measures": values,
        "seconds": seconds,
        "predictions": {},
    }


def main():
    args = parse_arguments()
    device = setup(args.device)
    if world() > 1:
        raise UserError("a report card is made by one process: start it with python, not torchrun")
    # setup allows TF32 for training; measures are taken in full float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    vaes, size = load_vaes(args, device)
    # A folder that cannot be written to is refused here, before minutes of work.
    lock(args.out)
    can_draw = figures.is_available()
    bench = measures.Bench(args, size, device)
    bench.compare_in(feature_network(args, bench).to(device))
    found = scale.read_scale(scale.PATH)
    reasons = reasons_against(found, bench)

    if found is not None:
        found = scale_without(found, vaes)
    cards = {}
    pictures = {}
    for path, vae in vaes.items():
        say(f"VAE       {path}, {vae.channels} channels at 1/{vae.factor}, {size} pixels")
        pictures[path] = os.path.join(args.out, "pictures", f"{slug(short_name(path))}.png")
        card = card_of(bench, vae, path, pictures[path])
        if not reasons:
            for distance, prediction in verdicts(found, card).items():
                card["predictions"][distance] = prediction._asdict()
        cards[path] = card

    say("\n".join(table(cards, found, applies=not reasons)))
    if reasons:
        say(f"No scale beside it: {'; '.join(reasons)}.")
    else:
        for path, card in cards.items():
            say("\n".join(verdict_lines(path, card, found)))
        say(caution(found))
    result = {
        "vaes": cards,
        "no scale because": reasons,
        "data": bench.held_out.set.fingerprint,
        "network": bench.network.about,
        "settings": bench.settings,
        "arguments": vars(args),
        "provenance": provenance(),
    }
    write_json(os.path.join(args.out, "card.json"), result)
    if can_draw:
        draw(os.path.join(args.out, "card.png"), cards, pictures, None if reasons else found)
    say(f"done      {args.out}/card.json")


def draw(path, cards, pictures, found):
    """Draws card.png. pictures: {VAE: path of its picture}. found: the Scale, or None."""
    strips = []
    for name, (title, higher_is_better, _) in MEASURES.items():
        own = {short_name(vae): card["measures"].get(name) for vae, card in cards.items()}
        own = {vae: value for vae, value in own.items() if value is not None}
        if own:
            others = []
            if found is not None:
                known = found.known(name, DISTANCES[-1])
                others = [(found.vaes[v][name], found.vaes[v][DISTANCES[-1]]) for v in known]
            strips.append((title, higher_is_better, own, others))
    figures.draw_card(path, strips, {short_name(vae): file for vae, file in pictures.items()})


if __name__ == "__main__":
    run_main(main)
