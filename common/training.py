"""What the two training stages do in the same way: the weighted sum of the losses, learning rate,
EMA, and the guard against steps that are not finite. Losses are dicts of scalar tensors, and
everything is keyed by their names.
"""

import contextlib
import gc
import math

import torch
import torch.distributed as dist
from torch import nn

from common.files import UserError
from common.flags import wants_compile
from common.processes import alone, is_out_of_memory, say, world


# The terms that have no flag: the velocity's error, and the discriminator's own loss.
WEIGHT_ONE = ("flow", "disc")


def weight_of(term, args):
    """The weight of a loss term, a number: the flag --<term>-weight or, where there is none, the
    flag --<term>. Raises a ValueError for a term with neither."""
    weight = getattr(args, f"{term}_weight", getattr(args, term, None))
    if term in WEIGHT_ONE:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise ValueError(f"the loss term '{term}' has no weight: add a flag --{term}")
    return weight


def weighted_sum(losses, args):
    """{term: scalar} -> scalar, the sum of weight times term."""
    return sum(weight_of(term, args) * loss for term, loss in losses.items())


def passes(batch, count):
    """Cuts a step's batch on this process, {name: tensor (b,...)}, into `count` parts of b / count
    rows each, one for each forward pass."""
    chunks = {name: tensor.chunk(count) for name, tensor in batch.items()}
    return [{name: chunks[name][i] for name in batch} for i in range(count)]


def add_mean(means, losses, count):
    """Adds to `means` the losses of one of `count` passes, each {term: scalar}, without their
    gradients.
    """
    for term, loss in losses.items():
        means[term] = means.get(term, 0.0) + loss.detach() / count


def schedule(args, step, total):
    """The share of the learning rate at a step, 0 to 1: it rises for --warmup steps, and with
    --lr-schedule cosine it falls to 0 at step `total`."""
    # A Python float, so that checkpoints hold no NumPy scalars.
    share = min(1.0, (step + 1) / max(args.warmup, 1))
    if args.lr_schedule == "cosine":
        share *= 0.5 * (1 + math.cos(math.pi * step / total))
    return share


def count_steps(args, pictures):
    """For a data set of `pictures` pictures: the run's number of steps (--steps, or that of
    --epochs) and the steps in an epoch, a float.
    """
    steps_per_epoch = pictures / args.batch_size
    return args.steps or math.ceil(args.epochs * pictures / args.batch_size), steps_per_epoch


def build_optimizer(networks, args):
    """AdamW without weight decay, with one group of parameters for each network: the Guard clips
    the gradient of each group by itself, and each has its own learning rate, which
    set_learning_rates sets.
    """
    groups = []
    for network in networks:
        groups.append(dict(params=[p for p in network.parameters() if p.requires_grad]))
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def set_learning_rates(optimizer, rates, share):
    """Sets the learning rate of each group of parameters to this share of its own of `rates`."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = share * rate


def ema_decay(args, step):
    """The EMA's decay after a step. Without warm-up, short runs publish their initial weights."""
    if args.ema_warmup:
        return min(args.ema, (1 + step) / (10 + step))
    return args.ema


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay ema + (1 - decay) model for the parameters, and a copy of the buffers; both are
    modules of one shape.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for averaged, current in zip(ema.buffers(), model.buffers(), strict=True):
        averaged.copy_(current)


def batch_norm_statistics(module):
    """The running means and variances of all batch norms in a module, each (C,)."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]


def clip_gradient(parameters, largest):
    """Scales the gradient of all the parameters together down to the norm `largest` where it is
    greater. Returns its norm before, a scalar on their device, which is 0 where none has a
    gradient: clip_grad_norm_ returns a number on the CPU then, and its upload would make the host
    wait for the GPU."""
    if all(parameter.grad is None for parameter in parameters):
        return torch.zeros((), device=parameters[0].device)
    return nn.utils.clip_grad_norm_(parameters, largest)


class Guard:
    """Steps an optimiser, unless a loss or a gradient norm is not finite. Such a bad step changes
    neither weights nor the statistics of batch norms, and counts towards the limit of bad steps in
    a row. All of it happens on the device, so that the host never waits for it; `check` is where
    the host reads the counts.

    finite: whether the last step was good, a bool tensor. good: the same on the host, as of the
    last `check`.
    """

    def __init__(self, module, optimizer, clip):
        """module holds every network that the optimiser trains; clip is the largest norm of a
        parameter group's gradient.
        """
        self.optimizer = optimizer
        self.clip = clip
        self.statistics = batch_norm_statistics(module)
        self.last_good_statistics = [buffer.clone() for buffer in self.statistics]
        device = optimizer.param_groups[0]["params"][0].device
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.good = True
        self.bad_in_a_row = torch.zeros((), device=device)
        self.most_bad_in_a_row = torch.zeros((), device=device)
        self.last_bad_step = torch.zeros((), device=device)
        self.last_bad_values = {}

    def step(self, losses, step):
        """Clips the gradients of each parameter group, steps the optimiser and clears the
        gradients. losses: {term: scalar}. Returns the norm of the first group's gradient before
        clipping, a scalar tensor.
        """
        norms = [clip_gradient(g["params"], self.clip) for g in self.optimizer.param_groups]
        values = dict(losses, grad_norm=norms[0])
        finite = torch.isfinite(torch.stack([*values.values(), *norms[1:]])).all().float()
        if world() > 1:
            # A loss that is not finite on one process must stop the step on all.
            dist.all_reduce(finite, dist.ReduceOp.MIN)

        # The fused kernels read found_inf and leave the weights alone where it is 1, as
        # torch.amp.GradScaler has them do.
        self.optimizer.found_inf = 1 - finite
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.finite = finite.bool()
        self._restore_statistics()
        self._count(finite, values, step)
        return norms[0]

    def _restore_statistics(self):
        for statistic, good in zip(self.statistics, self.last_good_statistics, strict=True):
            good.copy_(torch.where(self.finite, statistic, good))
            statistic.copy_(good)

    def _count(self, finite, values, step):
        self.bad_in_a_row = (self.bad_in_a_row + 1) * (1 - finite)
        self.most_bad_in_a_row = torch.maximum(self.most_bad_in_a_row, self.bad_in_a_row)
        self.last_bad_step = torch.where(self.finite, self.last_bad_step, step)
        zero = torch.zeros_like(finite)
        for term, value in values.items():
            earlier = self.last_bad_values.get(term, zero)
            self.last_bad_values[term] = torch.where(self.finite, earlier, value.detach())

    def check(self, args, newest_checkpoint, final):
        """Reads the counts and sets `good`. Raises a UserError if more than --max-bad-steps in a
        row were ever bad, or if the `final` step was. newest_checkpoint: common.runs' function from
        a folder to a path or None, for the message.
        """
        in_a_row, most = torch.stack([self.bad_in_a_row, self.most_bad_in_a_row]).int().tolist()
        self.good = in_a_row == 0
        if most <= args.max_bad_steps and (self.good or not final):
            return
        count = most if most > args.max_bad_steps else in_a_row
        terms = [term for term, value in self.last_bad_values.items() if not value.isfinite()]
        raise UserError(
            f"{count} steps in a row, the last one {int(self.last_bad_step)}, were not finite "
            f"({', '.join(terms) or 'on another process'}) and did not enter the weights; the last "
            "good checkpoint "
            f"is {newest_checkpoint(args.out) or 'none yet'}; lower --lr, or try --precision fp32"
        )


# --------------------------------------------------------------------------------------------------
# --accum auto: the fewest passes a step that fit into memory

# What run_main advises when memory is short all the same.
FOR_LESS_MEMORY = (
    "pass --accum with a larger number than the line 'training' above shows, --grad-checkpoint, or "
    "a smaller --batch-size"
)

# The share of the memory that the trial keeps free, for fragmentation and what it does not do.
SPARE = 0.02


def memory_limit(device):
    """The memory of this process's GPU in bytes, the smallest of all processes; None on a CPU."""
    if device.type != "cuda":
        return None
    memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    if world() > 1:
        dist.all_reduce(memory, dist.ReduceOp.MIN)
    return int(memory)


def machine_of(args, device):
    """What decides how many passes fit, beside the flags that a resumed run may not change."""
    return dict(
        memory=memory_limit(device),
        processes=world(),
        compiled=wants_compile(args, device),
        grad_checkpoint=args.grad_checkpoint,
    )


def reuse_passes(args, saved, device):
    """Makes --accum auto the number of passes of the run that is resumed, whose flags `saved` are,
    if it ran on such a machine: through the batch norms, their number enters the curve."""
    if args.accum != "auto" or "machine" not in saved:
        return
    if saved["machine"] == machine_of(args, device):
        args.accum = saved["accum"]
        say(f"memory    --accum {args.accum} as before, on a machine like this one")
    else:
        say(f"memory    --accum was {saved['accum']} on another machine, and is measured again")


def settle_passes(args, device, first_batch, backward, trained, optimizer):
    """Makes --accum auto the fewest passes a step that fit into the memory of every process's GPU,
    and 1 on a CPU. They are found by trial, so that it leaves room for all that a pass needs. Also
    notes the machine, for reuse_passes.

    first_batch() -> a batch of this process, {name: tensor (b,...)}; backward(part) does the
    forward and backward pass of a part of it, without averaging gradients; trained holds every
    network that the optimizer trains. Raises a UserError where a single picture does not fit.
    """
    args.machine = machine_of(args, device)
    memory = args.machine["memory"]
    if args.accum != "auto":
        return
    if memory is None:
        args.accum = 1
        return
    batch = {name: value.to(device) for name, value in first_batch().items()}
    count = len(batch["position"])
    for number in pass_counts(count):
        args.accum = number
        parts = passes(batch, number)
        with without_trace(trained, optimizer, device):
            fits = fits_memory(parts, backward, optimizer, int(SPARE * memory), device)
        if fits:
            pictures = f"{count // number} pictures a pass"
            say(f"memory    --accum {number}, the fewest passes that fit: {pictures}")
            return
    raise UserError(
        "not even one picture a pass fits into the memory of every GPU; pass --grad-checkpoint, or "
        "choose smaller networks"
    )


def pass_counts(count):
    """The numbers of passes to try for `count` pictures: divisors of it, each at least twice the
    one before, from 1 on."""
    counts = [1]
    for divisor in range(2, count + 1):
        if count % divisor == 0 and divisor >= 2 * counts[-1]:
            counts.append(divisor)
    return counts


def fits_memory(parts, backward, optimizer, spare, device):
    """Whether the forward and backward passes of `parts` fit into the memory of every process, with
    the optimiser's moments and `spare` bytes beside them."""
    fits_here = succeeds(parts, backward, optimizer, spare, device)
    # What a failed pass left is free once the function that did it has returned.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    fits = torch.tensor(float(fits_here), device=device)
    if world() > 1:
        dist.all_reduce(fits, dist.ReduceOp.MIN)
    if not fits:
        # What was compiled for passes of this size is not needed again.
        torch.compiler.reset()
    return bool(fits)


def succeeds(parts, backward, optimizer, spare, device):
    """Whether the passes fit into the memory of this process. It waits for no other process on the
    way, since one of them may fail."""
    try:
        beside = new_moments(optimizer)
        beside.append(torch.empty(spare, dtype=torch.uint8, device=device))
        with alone():
            # The second pass finds the gradients of the first in memory, and a third is like it.
            for part in parts[:2]:
                backward(part)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def new_moments(optimizer):
    """Tensors like AdamW's two moments of each parameter that has none yet."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [torch.empty_like(p) for p in parameters if p not in optimizer.state for _ in range(2)]


@contextlib.contextmanager
def without_trace(trained, optimizer, device):
    """After this context the networks in `trained` have no gradients, and their buffers, what they
    train, and the random generators are as before."""
    buffers = [buffer.clone() for buffer in trained.buffers()]
    is_trained = [parameter.requires_grad for parameter in trained.parameters()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    optimizer.zero_grad(set_to_none=True)
    for buffer, before in zip(trained.buffers(), buffers, strict=True):
        buffer.copy_(before)
    for parameter, before in zip(trained.parameters(), is_trained, strict=True):
        parameter.requires_grad_(before)
