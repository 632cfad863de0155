"""Modules whose experts stay on the disk: they run on slots that a pager fills before they are called.

A slot is an expert to all kernels. What a module computes for a token and an expert does not depend on where the
expert lies, nor on what else is computed with it: output is that of the resident model, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq.engine import ops
from tq.engine.model.layers import QuantSwitchLinear
from tq.engine.quantize import PackedTensor
from tq.engine.stream.pager import Pager


class StreamedExperts(nn.Module):
    """A SwitchGLU or SwitchMLP over slots.

    Args:
        experts: That module. Its matrices hold as many experts as there are slots.
        number: Of the layer, in the pager.
        most: Experts that may be computed with at once.
        waiting: Results of all layers that read slots and may not have been computed yet.

    Attributes:
        asleep: It reads nothing, and gives something else: until ``awaken``, while the modules around it are examined.
        listened: Experts that it was last asked for in its sleep.
    """

    def __init__(self, experts: nn.Module, pager: Pager, number: int, most: int, waiting: list[mx.array]):
        super().__init__()
        self.network = experts
        stored = pager.layers[number].stored
        self.num_experts = stored.n_experts
        self.output_dims = list(stored.matrices.values())[-1].form.rows
        self.asleep = True
        self.listened: mx.array | None = None
        self.streaming = _Streaming(pager, number, min(most, pager.most(number)), waiting)

    def __call__(self, x: mx.array, indices: mx.array, residual: mx.array | None = None) -> mx.array:
        """x: (..., in), indices: (..., k) -> (..., k, out).

        Args:
            residual: What x is the norm of, where that is known: the next layer's choice is guessed from it.
        """
        if self.asleep:
            self.listened = indices
            return self._placeholder(x, indices)
        pager, number, most = self.streaming.pager, self.streaming.number, self.streaming.most
        waiting = self.streaming.waiting
        guessed = self._guess(x, residual) if indices.size == indices.shape[-1] and pager.guesses(number + 1) else None
        mx.eval(indices, waiting, guessed)
        waiting.clear()
        chosen = np.asarray(indices.astype(mx.uint32))
        experts = np.unique(chosen)
        if pager.recorder is not None:
            pager.recorder.add(number, chosen)
        pager.use(number, experts, n_tokens=prod(chosen.shape[:-1]))
        if len(experts) > most:
            y = self._in_groups(x, chosen, experts)
        else:
            pager.bring(number, experts)
            if guessed is not None:
                pager.ahead(number + 1, np.unique(np.asarray(guessed)), number, experts)
            y = self.network(x, mx.array(pager.table(number)[chosen].astype(np.uint32)))
        waiting.append(y)
        return y

    def _placeholder(self, x: mx.array, indices: mx.array) -> mx.array:
        """Of the right shape, and of a token and its experts like the result: for those who look at what is around."""
        like = x if x.shape[-1] == self.output_dims else mx.mean(x, axis=-1, keepdims=True)
        y = like[..., None, :] * mx.cos(indices.astype(mx.float32))[..., None].astype(x.dtype)
        return mx.broadcast_to(y, (*indices.shape, self.output_dims))

    def _guess(self, x: mx.array, residual: mx.array | None) -> mx.array | None:
        """The experts that the next layer with experts would choose if nothing came between."""
        following = self.streaming.following
        if following is None:
            return None
        if following.choose is not None:
            return None if residual is None else following.choose(residual)
        experts, block = following.experts, following.block
        experts.asleep, experts.listened = True, None
        try:
            block(x)
        except (TypeError, ValueError):  # a block that wants something else: nothing is guessed from now on
            self.streaming.following = None
        finally:
            experts.asleep = False
            guessed, experts.listened = experts.listened, None
        return guessed

    def _in_groups(self, x: mx.array, chosen: np.ndarray, experts: np.ndarray) -> mx.array:
        """Experts that do not fit at once, one group after another: first those that are there."""
        pager, number, most = self.streaming.pager, self.streaming.number, self.streaming.most
        k = chosen.shape[-1]
        rows, pairs = mx.broadcast_to(x, (*chosen.shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1]), chosen.reshape(-1)
        there = pager.table(number)[experts] >= 0
        experts = np.concatenate([experts[there], experts[~there]])
        results, places = [], []
        for first in range(0, len(experts), most):
            group = np.sort(experts[first : first + most])
            pager.bring(number, group)
            at = np.flatnonzero(np.isin(pairs, group))
            slots = mx.array(pager.table(number)[pairs[at]].astype(np.uint32))
            y = self.network(rows[mx.array(at // k)], slots[:, None]).squeeze(-2)
            mx.eval(y)  # before its slots are given away
            results.append(y)
            places.append(at)
        order = np.argsort(np.concatenate(places))
        return mx.concatenate(results)[mx.array(order)].reshape(*chosen.shape, -1)


@dataclass(eq=False)
class Following:
    """The next layer with experts, as one that guesses what it will choose.

    Attributes:
        experts: Its experts.
        block: The module that chooses and calls them.
        choose: The same choice by a kernel from what the block's norm reads: (..., hidden) -> (tokens, k).
    """

    experts: "StreamedExperts"
    block: nn.Module
    choose: Callable[[mx.array], mx.array] | None = None


@dataclass(eq=False)
class _Streaming:
    """What ``parameters()`` must not list."""

    pager: Pager
    number: int
    most: int
    waiting: list[mx.array]
    following: Following | None = None


class CompactSwitchLinear(QuantSwitchLinear):
    """For the reference, which decodes a whole matrix: only the slots that are used are given to it."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        slots, inverse = np.unique(np.asarray(indices), return_inverse=True)
        used, places = mx.array(slots), mx.array(inverse.reshape(indices.shape).astype(np.uint32))
        packed, bias = self.packed, self.added_bias
        stored = {name: packed.arrays[name][used] for name in packed.per_matrix_arrays}
        few = PackedTensor(packed.spec, (len(slots), *packed.shape[1:]), packed.arrays | stored)
        few_bias = None if bias is None else bias[used]
        return ops.gather_matmul(self.rotate(x), few, places, sorted_indices, few_bias)


def awaken(model: nn.Module) -> None:
    """From now on, experts are read, and each layer knows the next one."""
    modules = dict(model.named_modules())
    paths = sorted((path for path, module in modules.items() if isinstance(module, StreamedExperts)), key=in_order)
    kernels = [vars(module)["kernel"] for module in modules.values() if "kernel" in vars(module)]
    choosers = {id(kernel.experts): kernel.choose for kernel in kernels if kernel.experts is not None}
    for path in paths:
        modules[path].asleep = False
    for path, following in pairwise(paths):
        block, experts = modules[following.rpartition(".")[0]], modules[following]
        modules[path].streaming.following = Following(experts, block, choosers.get(id(experts)))


def in_order(path: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
