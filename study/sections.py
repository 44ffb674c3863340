"""The numbered sections of RESULTS.md: what each compares, and remarks on the numbers, written by
hand."""

from typing import NamedTuple


class Section(NamedTuple):
    title: str
    # The VAEs of its table, each with the paper's gFID or None. <VAE>-repa: SiTs with the REPA
    # loss.
    paper_gfid: dict
    # What the paper's numbers are of.
    paper_setting: str
    # Pairs of VAEs (smaller distance, larger distance), as the paper finds them or, where it has no
    # such comparison, as its claim implies.
    pairs: list


SECTIONS = {
    1: Section(
        "With and without alignment",
        {"plain": 11.40, "send": 7.57},
        "VA-VAE without and with alignment; SiT-B/1 with REPA, 80 epochs, here and in all "
        "sections below",
        [("send", "plain")],
    ),
    2: Section(
        "Noise injection",
        {"no_noise": 8.42, "send": 7.57},
        "noise injection off and on",
        [("send", "no_noise")],
    ),
    3: Section(
        "Mapper depth 0, 1 and 2, and an MLP with as many parameters as depth 1",
        {"depth0": 9.20, "send": 8.42, "depth2": 9.47, "mlp": None},
        "depth 0, 1 and 2, all without noise injection, which our VAEs have",
        [("send", "depth0"), ("send", "depth2"), ("send", "mlp")],
    ),
    4: Section(
        "Vision model: none, random weights, pre-trained",
        {"plain": 11.40, "random_teacher": None, "send": 7.57},
        "no vision model, and DINOv2",
        [("send", "random_teacher")],
    ),
    5: Section(
        "Latent channels: 8, 16, 32",
        {
            "plain_d8": 13.85,
            "send_d8": 7.02,
            "plain": 17.43,
            "send": 8.25,
            "plain_d32": 26.27,
            "send_d32": 10.99,
        },
        "IN-VAEs with 16, 32 and 64 channels, beside our 8, 16 and 32",
        [("send_d8", "plain_d8"), ("send", "plain"), ("send_d32", "plain_d32")],
    ),
    6: Section(
        "Trained from scratch or tuned",
        {"scratch_plain": None, "scratch_send": None, "send": None},
        "no such comparison",
        [("scratch_send", "scratch_plain"), ("send", "scratch_send")],
    ),
    7: Section(
        "Alignment weight 0.1, 0.5, 1 (`send`) and 2; noise of constant level, t = 0.5",
        {
            "weight0.1": None,
            "weight0.5": None,
            "send": None,
            "weight2": None,
            "constant_noise": None,
        },
        "it uses weight 1 and uniform t, and gives no numbers for other choices",
        [
            ("send", "weight0.1"),
            ("send", "weight0.5"),
            ("send", "weight2"),
            ("send", "constant_noise"),
        ],
    ),
    10: Section(
        "Is it the semantics? Targets shuffled between pictures; `plain` with `send`'s PSNR; the "
        "VAE before tuning",
        {"plain": None, "plain_short": None, "base": None, "shuffled": None, "send": None},
        "no such comparison",
        [("send", "shuffled"), ("send", "plain_short"), ("send", "base")],
    ),
    11: Section(
        "VA-VAE's loss instead of the mapper",
        {"vavae": 11.40, "send": 7.57},
        "VA-VAE as published, and Send-VAE tuned from it",
        [("send", "vavae")],
    ),
    12: Section(
        "The REPA loss in stage 2",
        {"plain": None, "plain-repa": 11.40, "send": None, "send-repa": 7.57},
        "every SiT is trained with REPA",
        [("plain-repa", "plain"), ("send-repa", "send"), ("send-repa", "plain-repa")],
    ),
}

# Section (also "machine" for the page's head): what the numbers may mean. Where a direction does
# not agree or is undecided: a guess at the cause, and the next experiment.
REMARKS = {
    1: "`send` is behind at 250 steps in the classifier's features (in the target's the two are "
    "level) and ahead from 500 steps on. Section 13 looks into the cause: most of it seems to be "
    "the averaged weights.",
    2: "At step 2000 noise lowers the distance by 0.45, a tenth of it, as in the paper; the "
    "interval is over three seeds of both VAEs. At step 750 nothing is decided, because the "
    "seeds of the VAE differ by more: `send` has 6.7 to 7.7 and `no_noise` 6.1 to 7.1. Two "
    "of the three seeds of `no_noise` have one SiT each. Next: two more SiTs on these, and "
    "`no_noise` at a weight that gives it `send`'s PSNR.",
    3: "At step 750 depths 0 and 2 are ahead of depth 1, and for depth 0 that is decided over "
    "three seeds of both VAEs. At step 2000 depth 1 has the smallest distance, as in the "
    "paper, but only by 0.04 to 0.24. Over VAE seeds the difference from depth 2 is "
    "decided, those from depth 0 and from the MLP are not. So the depth of the mapper "
    "matters little at this size, and so does its attention. The paper's runs are without "
    "noise and ours have it. A guess: a deeper mapper can remove some noise before it "
    "predicts, so that the encoder need not. Next: the depths without noise.",
    5: "With 8 channels `send_d8` improves little from step 750 to step 2000. Its "
    "reconstructions alone have half of that distance (floor), so little of alignment's "
    "gain can be seen. Next: a base of 8 channels trained several times as long.",
    6: "From scratch, alignment gives the best probe of all. The latents of this VAE are "
    "behind `send`'s at step 750 and level with them at step 2000; over VAE seeds both are "
    "undecided. They were aligned for all 9,400 steps rather than 5,000, so the two are not "
    "matched in alignment. Next: longer SiT training.",
    7: "More weight helps up to 1. From 1 to 2 the probe still rises and the distance in the "
    "target's features still falls, but reconstruction suffers (PSNR, floors), and at step "
    "2000 the distance in the classifier's features is 0.31 larger. At step 750 the weights "
    "0.5, 1 and 2 are not told apart. Noise of constant level is undecided at both steps. "
    "Next: weight 2 with longer tuning, and a second seed of its VAE.",
    8: "Over all VAEs both probes follow the distance, more closely at step 2000 than at step "
    "750, mostly because they separate plain latents from aligned ones, and more closely "
    "than any other measure here. Neither ranks the aligned VAEs: `vavae` has one of the "
    "highest probes and, of those with 16 channels and weight 1, the largest distance. "
    "Among the aligned VAEs at step 2000 every interval contains 0. The seeds of the SiTs "
    "are not the reason: they agree on how these VAEs rank (section 16). Next: aligned VAEs "
    "that differ more.",
    9: "Alignment costs 1.42 dB where the paper reports 0.34. The guess that it costs less "
    "from a base that has converged is wrong: `base_long` was trained until its PSNR is "
    "flat (validation PSNR rises by 0.19 dB in 5,000 more steps, for `plain_long`, and by "
    "3.1 dB for `plain`), and from it alignment costs 3.02 dB. In squared error the cost is "
    "much the same in all of these and in the paper, 1.0 to 1.8e-4. A given error weighs "
    "more in dB where the reconstruction is better, and our VAEs of factor 4 are at 34 to "
    "40 dB, the paper's of factor 16 at 28 dB. The gain does not depend on the base: at "
    "step 2000 the distances of the pair from `base_long` are 7.05 and 4.50, 36% apart. "
    "Next: a VAE of factor 16 with 28 dB, where the same error should cost 0.3 dB.",
    10: "Shuffling the targets between pictures, with the same mapper, noise and weight, leaves "
    "the latents like `plain`'s in every measure. A teacher with random weights (section 4) "
    "smooths them (neighbour correlation) but gains nothing. Tuning without a teacher to "
    "`send`'s PSNR gains 0.08 at step 2000, where alignment gains 2.80. (At step 750 it "
    "gains 0.65 of 3.01, less than `plain`'s SiTs differ by.) So neither the pull on the "
    "encoder nor a softer reconstruction explains the gain. At step 750 the seeds of `send` "
    "differ by 1.1, more than its SiTs do; at step 2000 by 0.1.",
    11: "VA-VAE's loss gives a higher probe and a lower PSNR than the mapper, yet a larger "
    "distance at step 2000 (at step 750 this is undecided). That is what the paper argues "
    "against tying latents to features directly. The weights of the two losses are not "
    "matched. Next: `vavae` at the weight that gives it `send`'s PSNR.",
    12: "REPA changes the distance by less than the seeds do. Alignment of the VAE gives as much "
    "with REPA as without. A guess: 750 steps of a SiT with 4 million parameters are too few for "
    "a loss on its features to matter, and the teacher is a small CNN. Next: 2,000 steps and "
    "more, and REPA at another block.",
    13: "Three SiTs each. Most of the early lag is the average, which still holds initial "
    "weights; these hurt more on aligned latents. At a learning rate of 1e-3, drawn from "
    "the average, `send` is behind by 15 at steps 100 and 200 and level at 400. Drawn from "
    "the weights themselves it is behind by 3 at steps 100 and 200, which is undecided, and "
    "ahead by 2.6 at 400, which is not. At 3e-4 everything comes later: from the average "
    "`send` is still behind by 7.5 at step 400, and from the weights themselves nothing is "
    "decided. `train_sit.py` warms its average up by default; the study does not. Next: the "
    "same with that default.",
    14: "Among the VAEs of 16 channels from `base` or from scratch, iFID is 1.3 to 2.3 for the "
    "aligned ones and 2.5 to 4.0 for the others, and `weight0.1` and `vavae`, the aligned "
    "ones with the largest distances at step 2000, have the largest iFIDs. But iFID also "
    "falls with better reconstruction, which the distance of samples does not: with 8, 16 "
    "and 32 channels `plain` has an iFID of 4.3, 2.9 and 2.5 and a distance of 6.3, 7.1 and "
    "8.5 at step 2000, and `plain_long`, with 40 dB, has a lower iFID than `no_noise`, "
    "`weight0.1` and `vavae`, and a distance like `plain`'s. So iFID compares VAEs that "
    "reconstruct alike. rFID alone says nothing, or the opposite; that is the paper's "
    "point. The pictures say what iFID sees. `plain`'s neighbours have the layout and "
    "colours of a picture but are other things (for airplanes: a ship, a squirrel, a "
    "lorry), and the middle is one picture on top of the other. `send`'s neighbours are "
    "mostly airplanes in the same pose, and the middle is nearly a picture again.",
    15: "The edits of *wheels* change the colours: from warm and dark to cold and bright, as "
    "most pictures of machines are brighter and bluer than those of animals. No wheel "
    "appears. The classifier of pictures calls that *wheels* all the same, and everything "
    "that goes with it, so leakage is nearly the same share (0.57 to 0.61) of the own "
    "change in all VAEs, with alignment and without. Both are smaller with alignment. A "
    "guess: aligned latents spread over more directions, so that three standard deviations "
    "along one of them change a picture less. DCI's informativeness is the probe in another "
    "form. Its disentanglement is 0.26 for `plain` and less for most aligned VAEs, 0.09 for "
    "`no_noise`, whose attribute probe is one of the best: a probe that uses many codes a "
    "little scores low. Completeness, SAP and MIG are near 0, since spatial latents share "
    "every attribute among many positions.",
    16: "Over 28 or 29 VAEs, 25 of them with three SiTs, probes follow the distance at step "
    "2000 (class probe: Pearson -0.91), and so does how far an edit moves the judge (0.93); "
    "iFID follows it less (0.76; 0.89 without the VAEs of other numbers of channels), then "
    "the Gini coefficient (0.67). Reconstruction says little (PSNR 0.36, rFID -0.22), and "
    "DCI's disentanglement has the wrong sign (0.57): the more disentangled latents are "
    "worse. At step 750 probes, edits and iFID are weaker, and PSNR and rFID stronger. Most "
    "of this is the gap between aligned VAEs and others. **Among the aligned ones**, at "
    "step 2000, iFID is the only measure of 18 whose interval of Pearson's correlation does "
    "not contain 0 (0.61, [0.34, 0.87]), and no Spearman interval is clear of 0. Noise of "
    "the SiTs is not the reason: two SiTs on the same VAEs agree by 0.94 (Spearman: 0.82), "
    "so there are differences to be predicted, and nothing here predicts them well. At step "
    "750 PSNR, rFID, DCI's completeness and the mixture are clear of 0 instead. For an "
    "unseen family the edits' leakage is the best single measure (error 0.52, the mean of "
    "the others 1.45), and it stays the choice when the choice is left to the others; a "
    "pair is better only when it is chosen with hindsight. Among the aligned ones iFID is "
    "best (0.54 of 0.59), and with DCI's completeness the best pair (0.49), but chosen anew "
    "nothing beats the mean at step 2000. Next: aligned VAEs that differ more, for instance "
    "in their teacher.",
    17: "`send` is better after 2,000 steps than `plain` after 5,000. The gap narrows from 3.07 "
    "to 1.96, or from 42% to 37%, while both improve. The controls stay with `plain`. The "
    "training was meant to go on to 20,000 steps. It ended with the time on the GPU, of "
    "which judging, on the CPU then, took 75 s for each set. `study.gpu` judges on the GPU "
    "now, which has not been tried on one. Next: to 20,000 steps, with guidance.",
    18: "At step 2000 the distances are those of the first training to 0.16 (root mean square), "
    "and all 18 differences keep their sign; those above 2 are within 0.4 of what they "
    "were. At step 750 the distances agree to 0.6. The small differences (noise, the MLP, "
    "weight 2) change their sign there, and those of `send` from `plain`, `plain_short`, "
    "`base` and `shuffled` are smaller by 0.7 to 1.3. `send_s1` is 2.0 higher than it was. "
    "The probe of the pixels depends on no VAE, and not on the code either: that of the "
    "earlier training gives the same 38.8% on the files at hand (JPEG of quality 75), where "
    "39.4% was found then. So the files of CIFAR-10 are others. The files or the code do "
    "not explain PSNR, though: `scratch_plain` has its PSNR of then (-0.02 dB), and 400 "
    "steps from scratch on the files at hand end at 22.74 dB with the earlier code and at "
    "22.77 dB with today's. `base` is 0.17 dB better, and `plain` and `send`, which are "
    "tuned from it, 0.46 and 0.42 dB. A guess: `base` ended elsewhere, as another seed of "
    "it would, and what is tuned from it shares its luck. Seeds of the tuning, which differ "
    "by 0.01 dB, do not show this. The difference between `plain` and `send` is kept: -1.42 "
    "dB now, -1.38 dB then. `scratch_send` has 0.80 dB less than then, and its two other "
    "seeds have as little; the cause is not known. Next: two more seeds of `base`.",
    "machine": "The SiTs of seed 0 ran on the GPU, but for those of `plain_s1`, `send_s1` and "
    "`send_long` and for sections 12 and 13. All others ran on the CPU. Thirteen of those "
    "of seed 0 had run there before, to step 750: the distances differ by -1.2% to +1.7%, "
    "by -0.1% in the mean, so the machines are not told apart below.",
}
