"""Which neighbours of a tensor can take in a factor or an offset per channel, and the taking in.

All arithmetic is float64; weights are rounded to the type of the graph once, at the end.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from van_deploy.errors import ConversionError

__all__ = ["Absorber"]

Floats = npt.NDArray[np.float64]


class Absorber:
    """The graph surgery behind :mod:`van_deploy.precision.equalize`.

    Args:
        model: the graph, changed in place by :meth:`finished` and :meth:`insert_affine_`.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = {node.name: node for node in model.graph.node}
        self.maker = {name: node for node in model.graph.node for name in node.output}
        self.stored = {t.name: t for t in model.graph.initializer}
        self.users: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.weights: dict[str, Floats] = {}
        self.biases: dict[str, Floats] = {}
        self.outputs = {value.name for value in model.graph.output}

    # --- reading ---------------------------------------------------------------------------

    def inputs_of(self, nodes: Collection[str]) -> list[str]:
        """Return the tensors that ``nodes`` read, in the graph's order, each once."""
        return list(dict.fromkeys(n.input[0] for n in self.nodes.values() if n.name in nodes))

    def readers(self, tensor: str) -> list[NodeProto]:
        """Return the convolutions that read ``tensor``."""
        return [node for node in self.users.get(tensor, []) if node.op_type == "Conv"]

    def weight(self, node: NodeProto) -> Floats:
        """Return the weight of a convolution as it is by now, ``(O, I/g, kh, kw)``."""
        if node.name not in self.weights:
            if node.input[1] not in self.stored:
                raise ConversionError(
                    f"The weights of '{node.name}' are computed in the graph, not stored in it.",
                    "Export the network again with van-deploy.",
                )
            array = numpy_helper.to_array(self.stored[node.input[1]])
            self.weights[node.name] = array.astype(np.float64)
        return self.weights[node.name]

    def divider(self, tensor: str) -> NodeProto | None:
        """Return the convolution whose outputs may be divided instead of ``tensor``, if any.

        That is the one that makes it, or makes one factor of it; and every
        reader must be a convolution, to multiply again.
        """
        maker = self.maker.get(tensor)
        if maker is None or tensor in self.outputs or not self._only_read_by_convolutions(tensor):
            return None
        if maker.op_type == "Mul":
            return next((c for c in map(self._branch, maker.input) if c is not None), None)
        return maker if maker.op_type == "Conv" else None

    def subtractor(self, tensor: str) -> NodeProto | None:
        """Return the convolution in whose bias an offset of ``tensor`` may be subtracted, if any.

        Every reader must be able to return the offset: an unpadded 1x1
        convolution in its own bias, an addition in its other branch's.
        """
        if tensor in self.outputs or tensor not in self.maker:
            return None
        if any(self._returner(tensor, user) is None for user in self.users.get(tensor, [])):
            return None
        maker = self.maker[tensor]
        if maker.op_type == "Conv":
            return maker
        return self._added_branch(maker) if maker.op_type == "Add" else None

    def open_ended(self, tensor: str) -> bool:
        """Return whether nodes may stand between ``tensor`` and its only reader, a 1x1 conv."""
        users = self.users.get(tensor, [])
        return len(users) == 1 and tensor not in self.outputs and _is_unpadded_1x1(users[0])

    def _only_read_by_convolutions(self, tensor: str) -> bool:
        return all(
            user.op_type == "Conv" and user.input[0] == tensor for user in self.users[tensor]
        )

    def _branch(self, tensor: str) -> NodeProto | None:
        """Return the convolution that makes ``tensor``, if nothing else reads it twice."""
        maker = self.maker.get(tensor)
        single = len(self.users.get(tensor, [])) == 1 and tensor not in self.outputs
        return maker if single and maker is not None and maker.op_type == "Conv" else None

    def _added_branch(self, add: NodeProto) -> NodeProto | None:
        """Return the convolution at the end of an addition's branch: the later of the two."""
        found = [branch for branch in map(self._branch, add.input) if branch is not None]
        return found[-1] if found else None

    def _returner(self, tensor: str, user: NodeProto) -> NodeProto | None:
        if _is_unpadded_1x1(user) and user.input[0] == tensor:
            return user
        if user.op_type != "Add":
            return None
        branch = self._added_branch(user)
        return branch if branch is not None and branch.output[0] != tensor else None

    # --- changing --------------------------------------------------------------------------

    def divide_(self, tensor: str, scale: Floats) -> None:
        """Make ``tensor`` smaller by ``scale (C,)``, and its readers' weights larger."""
        source = self.divider(tensor)
        if source is None:
            raise ValueError(f"nothing can divide '{tensor}'")
        self.weights[source.name] = self.weight(source) / scale[:, None, None, None]
        if self._has_bias(source):
            self.biases[source.name] = self._bias(source) / scale
        for reader in self.readers(tensor):
            weight = self.weight(reader)
            groups = len(scale) // weight.shape[1]
            by_group = weight.reshape(groups, -1, *weight.shape[1:])
            factor = scale.reshape(groups, 1, -1, 1, 1)
            self.weights[reader.name] = (by_group * factor).reshape(weight.shape)

    def subtract_(self, tensor: str, centre: Floats) -> None:
        """Make ``tensor`` smaller by ``centre (C,)``, and what reads it add that again."""
        source = self.subtractor(tensor)
        if source is None:
            raise ValueError(f"nothing can subtract from '{tensor}'")
        self.biases[source.name] = self._bias(source) - centre
        for user in self.users[tensor]:
            self._return_(tensor, user, centre)

    def insert_affine_(self, tensor: str, centre: Floats, scale: Floats) -> int:
        """Make its only reader read ``(tensor - centre) / scale``, both ``(C,)``; return the nodes.

        One Mul and one Add at most: neither stands for nothing to multiply or to add.
        """
        (reader,) = self.users[tensor]
        dtype = helper.tensor_dtype_to_np_dtype(self.stored[reader.input[1]].data_type)
        factor, offset = (1.0 / scale).astype(dtype), (-centre / scale).astype(dtype)
        name, added = tensor, 0
        for operator, word, values, idle in (
            ("Mul", "stretch", factor, 1.0),
            ("Add", "shift", offset, 0.0),
        ):
            if (values == idle).all():
                continue
            made, constant = f"{tensor}.{word}ed", f"{tensor}.{word}"
            self.model.graph.initializer.append(
                numpy_helper.from_array(values.reshape(1, -1, 1, 1), constant)
            )
            position = list(self.model.graph.node).index(reader)
            node = helper.make_node(operator, [name, constant], [made], made)
            self.model.graph.node.insert(position, node)
            name, added = made, added + 1
        # what was stored, not what was meant: the reader takes in the rounded numbers
        stretch, shift = factor.astype(np.float64), offset.astype(np.float64)
        self.weights[reader.name] = self.weight(reader) / stretch[:, None, None]
        self._return_(tensor, reader, -shift)
        reader.input[0] = name
        return added

    def finished(self) -> ModelProto:
        """Return the graph with every change written into its stored tensors."""
        for name, weight in self.weights.items():
            _store_(self.stored[self.nodes[name].input[1]], weight)
        for name, bias in self.biases.items():
            self._store_bias_(self.nodes[name], bias)
        return self.model

    def _return_(self, tensor: str, user: NodeProto, centre: Floats) -> None:
        returner = self._returner(tensor, user)
        if returner is None:
            raise ValueError(f"'{user.name}' cannot return an offset of '{tensor}'")
        offset = self._response(user, centre) if returner is user else centre
        self.biases[returner.name] = self._bias(returner) + offset

    def _response(self, conv: NodeProto, centre: Floats) -> Floats:
        """Return what a 1x1 convolution makes of ``centre (C,)``, without its bias."""
        weight = self.weight(conv)[:, :, 0, 0]
        groups = len(centre) // weight.shape[1]
        by_group = weight.reshape(groups, -1, weight.shape[1])
        return np.asarray(np.einsum("goi,gi->go", by_group, centre.reshape(groups, -1)).reshape(-1))

    def _has_bias(self, node: NodeProto) -> bool:
        return node.name in self.biases or (len(node.input) > 2 and bool(node.input[2]))

    def _bias(self, node: NodeProto) -> Floats:
        if node.name in self.biases:
            return self.biases[node.name]
        if len(node.input) > 2 and node.input[2]:
            return numpy_helper.to_array(self.stored[node.input[2]]).astype(np.float64)
        return np.zeros(len(self.weight(node)))

    def _store_bias_(self, node: NodeProto, bias: Floats) -> None:
        if len(node.input) > 2 and node.input[2]:
            _store_(self.stored[node.input[2]], bias)
            return
        dtype = helper.tensor_dtype_to_np_dtype(self.stored[node.input[1]].data_type)
        name = f"{node.name}.bias"
        self.model.graph.initializer.append(numpy_helper.from_array(bias.astype(dtype), name))
        del node.input[2:]
        node.input.append(name)


def _is_unpadded_1x1(node: NodeProto) -> bool:
    if node.op_type != "Conv":
        return False
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return all(side == 1 for side in found.get("kernel_shape", [0])) and not any(
        found.get("pads", [0])
    )


def _store_(tensor: TensorProto, values: Floats) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, dtype), tensor.name))
