"""Learning rate, EMA, and the guard against steps that are not finite."""

import math

import torch
import torch.distributed as dist
import torch.nn as nn

from common.files import UserError
from common.processes import world
from common.runs import list_checkpoints


def learning_rate(args, step, total):
    """--lr after --warmup steps, and with --lr-schedule cosine down to 0 at the end."""
    rate = args.lr * min(
        1.0, (step + 1) / max(args.warmup, 1)
    )  # a Python float: checkpoints hold no NumPy scalars
    return (
        rate * 0.5 * (1 + math.cos(math.pi * step / total))
        if args.lr_schedule == "cosine"
        else rate
    )


class Guard:
    """Steps an optimiser; a step whose losses or gradient norms (one a group of parameters) are not finite changes neither
    weights nor the statistics of batch norms. It is counted on the device: nothing waits for it."""

    def __init__(self, module, optimizer, limit):
        self.optimizer, self.limit = optimizer, limit
        self.statistics = [
            b
            for m in module.modules()
            if isinstance(m, nn.BatchNorm2d)
            for b in (m.running_mean, m.running_var)
        ]
        self.good = [b.clone() for b in self.statistics]
        self.row = self.most = self.last = torch.zeros(
            (), device=optimizer.param_groups[0]["params"][0].device
        )

    def step(self, losses, step):
        """Clips the gradient norms, steps and clears; losses (n,) -> the first group's norm before clipping, a tensor.
        finite: whether the step counts; row, most: bad steps in a row until now, and ever; last: number, losses and norm of
        the last bad one."""
        norms = torch.stack(
            [
                nn.utils.clip_grad_norm_(group["params"], self.limit).to(losses)
                for group in self.optimizer.param_groups
            ]
        )
        finite = torch.isfinite(torch.cat([losses, norms])).all().float()
        if world() > 1:  # a loss is not finite on one process: all must skip the step
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        self.optimizer.found_inf = (
            1 - finite
        )  # read by the fused kernels, as torch.amp.GradScaler sets it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.finite = finite.bool()
        for statistic, good in zip(self.statistics, self.good):
            good.copy_(torch.where(self.finite, statistic, good))
            statistic.copy_(good)
        self.row = (self.row + 1) * (1 - finite)
        self.most = torch.maximum(self.most, self.row)
        self.last = torch.where(
            self.finite, self.last, torch.cat([losses.new_full((1,), step), losses, norms[:1]])
        )
        return norms[0]

    def look(self, args, names, final):
        """Whether the last step was bad. Raises if more than --max-bad-steps in a row ever were, or the `final` step was."""
        row, most = int(self.row), int(self.most)
        if most > args.max_bad_steps or final and row:
            step, *values = self.last.tolist()
            terms = [k for k, v in zip(names, values) if not math.isfinite(v)] or [
                "on another process"
            ]
            good = (list_checkpoints(args.out) or ["none yet"])[-1]
            raise UserError(
                f"{most if most > args.max_bad_steps else row} steps in a row, the last one {step:.0f}, were not finite "
                f"({', '.join(terms)}) and did not enter the weights; the last good checkpoint is {good}; lower --lr, "
                "or try --precision fp32"
            )
        return row > 0


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay ema + (1 - decay) model for the parameters, a copy for the buffers; two modules of one shape."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), model.buffers()):
        a.copy_(b)
