"""The trained weights as the optimizer has them: the networks' own parameters, or, on an accelerator, float32
masters of them joined into a few arrays.

There a kernel costs the host a good part of what it takes to compute: an update of a thousand parameters one
by one is thousands of them. And a product in float16 wants its weights in float16; with masters they are cast
once an update (Micikevicius et al. 2018, section 3.1), not in every pass, and gradients come in float16, too.
"""

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.ops.auto_generate import InplaceCopy, SplitWithSize

from ldm.device import has_newer_kernels
from ldm.networks.layers import set_dtype

LARGEST = 64 << 20  # values of a joined array, about: what an update needs beside the weights is of its size
MOST = 120  # members of one: MindSpore's compiler gives up on a split into hundreds of parts

# loops over hundreds of parameters are maps: MindSpore unrolls a `for` into nested calls of limited depth
_pick = ops.MultitypeFuncGraph("pick")
put = ops.MultitypeFuncGraph("put")


@_pick.register("Tuple", "Number")
def _pick_one(gradients, place):
    return gradients[place]


@put.register("Function", "Tensor", "Tensor")
def _put_one(kernel, place, values):
    return kernel(place, values)


def in_place():
    """The kernel that puts values into a parameter."""
    return InplaceCopy() if has_newer_kernels() else ops.Assign()


def has_weight_decay(name: str) -> bool:
    """Norms and biases are not decayed, nor is the embedding of a word that is trained apart."""
    return not name.endswith((".gamma", ".beta", ".bias", ".word_embedding"))


class Masters(nn.Cell):
    """What the optimizer trains, and how it hangs together with the networks' parameters.

    Parameters whose shapes differ in their first side only are joined along it, so that nothing is reshaped;
    of one dtype, and decayed or not. In the order in which the backward pass comes by.

    Args:
        parameters: of the networks, in that order.
        joins: otherwise the networks' own parameters are trained, and all methods hand through.
        halved: which parameters the networks take in `dtype`: their dtype changes.
        dtype: float32, float16 or bfloat16.
        kinds: of each parameter: only those of one kind are joined. None: all are.
        trained: the masters, where they are there already.

    Attributes:
        trained: the arrays to train, float32.
        decayed: for each, whether it has weight decay.
        gradient_dtypes: for each, of its gradient.
    """

    def __init__(  # noqa: PLR0913
        self, parameters: Sequence[Parameter], joins: bool, halved: Sequence[Parameter] = (),
        dtype=ms.float32, kinds: Sequence | None = None, trained: Sequence[Parameter] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        self.joins, self.own = joins, ParameterTuple(parameters)
        self.kinds = kinds or [0] * len(parameters)
        ids = {id(parameter) for parameter in halved} if joins and dtype != ms.float32 else set()
        dtypes = [dtype if id(parameter) in ids else ms.float32 for parameter in parameters]
        self.halved, self.dtype = [parameter for parameter in parameters if id(parameter) in ids], dtype
        self.groups = [[place] for place in range(len(parameters))]
        if joins:
            self.groups = joined(parameters, dtypes, self.kinds)
        self.gradient_dtypes = tuple(dtypes[group[0]] for group in self.groups)
        self.decayed = tuple(has_weight_decay(parameters[group[0]].name) for group in self.groups)
        self.trained = ParameterTuple(parameters)
        if not joins:
            return
        masters = trained or [self._master(number, group) for number, group in enumerate(self.groups)]
        self.trained = ParameterTuple(masters)
        for parameter, its_dtype in zip(parameters, dtypes):
            set_dtype(parameter, its_dtype)
        self.members = tuple(ParameterTuple([parameters[place] for place in group]) for group in self.groups)
        self.sizes = tuple(tuple(parameters[place].shape[0] for place in group) for group in self.groups)
        self.places = tuple(map(tuple, self.groups))
        self.split, self.map = SplitWithSize(), ops.HyperMap()
        self.copy = in_place()

    def _master(self, number: int, group: list[int]) -> Parameter:
        members = [self.own[place] for place in group]
        shape = (sum(member.shape[0] for member in members), *members[0].shape[1:])
        # parameters without values (of a model that is only compiled) have masters without
        is_empty = any(member.has_init for member in members)
        values = None if is_empty else np.concatenate([member.asnumpy() for member in members])
        value = initializer("zeros", shape, ms.float32) if values is None else Tensor(values, ms.float32)
        return Parameter(value, name=f"master.{number}")

    def part(self, kinds: set) -> tuple["Masters", list[int]]:
        """The same for parameters of some kinds, with their masters; and the places of these in `trained`."""
        own = [place for place, kind in enumerate(self.kinds) if kind in kinds]
        places = [place for place, group in enumerate(self.groups) if self.kinds[group[0]] in kinds]
        found = Masters(
            [self.own[place] for place in own], self.joins, self.halved, self.dtype,
            [self.kinds[place] for place in own], [self.trained[place] for place in places],
        )  # fmt: skip
        return found, places

    def kind(self, place: int):
        """Of an array of `trained`."""
        return self.kinds[self.groups[place][0]]

    def join(self, gradients):
        """Gradients of the networks' parameters as those of `trained`."""
        if not self.joins:
            return gradients
        rows = ()
        for places in self.places:
            members = self.map(ops.partial(_pick, gradients), places)
            rows = rows + (ops.cat(members, 0) if len(places) > 1 else members[0],)
        return rows

    def construct(self):
        """Bring the networks' parameters up to the masters."""
        done = ()
        for number in range(len(self.places)):
            members, sizes = self.members[number], self.sizes[number]
            row = self.trained[number].astype(self.gradient_dtypes[number])
            parts = self.split(row, sizes, 0) if len(sizes) > 1 else (row,)
            done = done + self.map(ops.partial(put, self.copy), members, parts)
        return done

    def follow(self) -> None:
        """From outside of a graph: bring the networks' parameters up to the masters."""
        if self.joins:
            self()

    def named(self, arrays: Sequence[Parameter], prefix: str = "") -> dict[str, Parameter | np.ndarray]:
        """Arrays in the form of `trained` (these, moments, averages) by the names of the networks'
        parameters, after a prefix.
        """
        if not self.joins:
            return {prefix + own.name: array for own, array in zip(self.own, arrays, strict=True)}
        found = {}
        for group, array in zip(self.groups, arrays, strict=True):
            ends = np.cumsum([self.own[place].shape[0] for place in group])[:-1]
            for place, part in zip(group, np.split(array.asnumpy(), ends)):
                found[place] = part
        return {prefix + own.name: found[place] for place, own in enumerate(self.own)}

    def shapes(self, arrays: Sequence[Parameter], prefix: str = "") -> dict[str, tuple[int, ...]]:
        """What `named` gives and `fill` takes."""
        shaped = self.own if self.joins else arrays
        return {prefix + own.name: its.shape for own, its in zip(self.own, shaped)}

    def fill(self, arrays: Sequence[Parameter], values: Mapping[str, np.ndarray], prefix: str = "") -> None:
        """Set arrays in the form of `trained` from values by name; of `trained` itself, the networks' too."""
        for group, array in zip(self.groups, arrays, strict=True):
            parts = [values[prefix + self.own[place].name] for place in group]
            whole = np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])
            array.set_data(Tensor(np.ascontiguousarray(whole, np.float32)))
            if self.joins and arrays is self.trained:
                for place, part in zip(group, parts):
                    own = self.own[place]
                    own.set_data(Tensor(np.ascontiguousarray(part, np.float32), own.dtype))


def joined(parameters: Sequence[Parameter], dtypes: Sequence, own_kinds: Sequence) -> list[list[int]]:
    """Places of parameters that fit together, in groups of at most MOST and about LARGEST values."""
    kinds: dict[tuple, list[list[int]]] = {}
    for place, (parameter, dtype) in enumerate(zip(parameters, dtypes)):
        kind = parameter.shape[1:], str(dtype), has_weight_decay(parameter.name), own_kinds[place]
        groups = kinds.setdefault(kind, [[]])
        size = sum(parameters[other].size for other in groups[-1]) + parameter.size
        if len(groups[-1]) == MOST or (groups[-1] and size > LARGEST):
            groups.append([])
        groups[-1].append(place)
    return sorted((group for groups in kinds.values() for group in groups), key=max)
