"""What outlives a call of `Engine.generate` where steps are captured: buffers and captured steps, which later calls use
again."""

import warnings
from dataclasses import replace

import torch

from sslr1.rollout.cache import Storage
from sslr1.rollout.wave import Graphs, Wave

ROUND = 256  # tokens to which the longest prompt is rounded up: one a little longer finds room


def rounded(longest) -> int:
    return -(-longest // ROUND) * ROUND


class Kept:
    """A wave for each group size, all in one storage, in which they take turns; and the steps captured of them, which
    hold only as long as nothing that they read or write moves.

    A wave that is too small for a call is made anew, its shape grown; where the storage is too small for it, all of
    them are, and the storage is made for all shapes so far, wherever there is room. expected: a Shape that counts among
    them before it is asked for.
    """

    def __init__(self, *expected):
        self.shapes = {shape.group_size: replace(shape, longest=rounded(shape.longest)) for shape in expected}
        self.waves, self.storage, self.found, self.pool = {}, None, None, None

    @property
    def bytes(self) -> int:
        """On the device, small tensors aside."""
        graphs = sum(wave.graphs.bytes for wave in self.waves.values())
        return graphs + (self.storage.nbytes if self.storage else 0)

    def release(self) -> None:
        """Let go of all of it; what is asked for next is made anew, in the shapes that have been asked for so far."""
        self.waves.clear()
        self.storage = self.pool = None

    def wave(self, model, shape, room, check, **settings) -> Wave:
        """One that covers the shape. room(shape, extent): whether there is room on the device for a rollout of this
        shape in a `Storage` of that extent; check(shape): raises UserError where there is none even for what this
        call needs; settings: what a Wave takes besides, and what must not change under a captured step."""
        self._look_for_changes(model, settings)
        shape = replace(shape, longest=rounded(shape.longest))
        G = shape.group_size
        if G in self.waves and self.shapes[G].covers(shape):
            return self.waves[G]
        self.waves.pop(G, None)
        grown = self.shapes[G].joined(shape) if G in self.shapes else shape
        if not self.storage or not _within(grown.extent, self.storage.extent):
            self.release()
            wider = tuple(map(max, zip(*(each.extent for each in (*self.shapes.values(), grown)))))
            trials = (grown, wider), (grown, grown.extent), (shape, shape.extent)
            grown, extent = next((trial for trial in trials if room(*trial)), trials[-1])
            if not room(grown, extent):
                check(shape)
            self.storage = Storage(model.config.text_config, extent, model.dtype, model.device)
            self.pool = torch.cuda.graph_pool_handle()
        self.shapes[G] = grown
        self.waves[G] = Wave(model, grown, graphs=Graphs(self.pool), storage=self.storage, **settings)
        return self.waves[G]

    def _look_for_changes(self, model, settings):
        """A captured step reads the weights where they were, and draws as it did."""
        found = addresses(model), str(settings)
        if self.found and self.waves and found != self.found:
            if found[0] != self.found[0]:
                moved = [name for name in found[0] | self.found[0] if found[0].get(name) != self.found[0].get(name)]
                warnings.warn(
                    f"{len(moved)} of the sampler's weights have moved since steps were captured, {moved[0]} among "
                    "them: the steps are captured anew. An update that keeps weights where they are "
                    "(SamplerWeights.refresh does) spares that",
                    stacklevel=4,
                )
            self.release()
        self.found = found


def _within(tokens, room) -> bool:
    return all(n <= most for n, most in zip(tokens, room))


def addresses(model) -> dict:
    """{name: where it lies} of parameters and buffers."""
    return {name: x.data_ptr() for part in (model.named_parameters(), model.named_buffers()) for name, x in part}
