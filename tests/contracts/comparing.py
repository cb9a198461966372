"""Two models compared by all that they hold."""

from torch import Tensor, nn


def leaves(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a tensor consists of: itself, or the inner ones of a wrapper subclass, by name."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    found: dict[str, Tensor] = {}
    for inner in tensor.__tensor_flatten__()[0]:
        found |= leaves(f"{name}.{inner}", getattr(tensor, inner))
    return found


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a file holds of a model, and the buffers that none does."""
    found: dict[str, Tensor] = {}
    for name, tensor in {**dict(model.named_buffers()), **model.state_dict()}.items():
        found |= leaves(name, tensor)
    return found


def as_bytes(tensor: Tensor) -> Tensor:
    import torch

    plain = torch.Tensor._make_subclass(Tensor, getattr(tensor, "raw", tensor))
    return plain.detach().contiguous().flatten().view(torch.uint8)


def assert_same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    """The same names, dtypes, shapes and bytes."""
    import torch

    found, expected = held_tensors(ours), held_tensors(theirs)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    differing = [
        name
        for name, tensor in expected.items()
        if (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape)
        or not torch.equal(as_bytes(found[name]), as_bytes(tensor))
    ]
    assert not differing, differing


def relative_error(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())
