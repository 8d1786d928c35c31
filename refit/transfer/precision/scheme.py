"""Which tensors an engine stores quantized, and how: read off the header of the checkpoint that it was started from.

The header is the engine's own ignore list as it took effect: a router, norm, embedding or head that is not quantized
has no scales there. So neither side keeps a list of names that could disagree with the other's.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor

from refit.plan import canonical, hf_name
from refit.transfer.precision.codecs import CODECS, codec_of, quantize
from refit.transfer.precision.formats import WEIGHT, Format, PrecisionError

type HfShapes = Mapping[str, tuple[tuple[int, ...], str]]
"""HF tensor name -> (shape, dtype name), as a checkpoint's headers say."""

type Scheme = Mapping[str, str]
"""Canonical name of a quantized tensor -> name of its format. Tensors that are not in it stay as they are."""

_QUANTIZED_DTYPES = frozenset(part.dtype for codec in CODECS.values() for part in codec.format.parts[:1])


def scheme_of(hf_shapes: HfShapes) -> dict[str, str]:
    """The scheme of a checkpoint. Raises PrecisionError, naming all, for quantized tensors in an unknown form."""
    scheme: dict[str, str] = {}
    unknown: list[str] = []
    for name, (shape, dtype) in hf_shapes.items():
        if not name.endswith(f".{WEIGHT}") or dtype not in _QUANTIZED_DTYPES:
            continue
        formats = [c.format.name for c in CODECS.values() if _is_in(hf_shapes, name, c.format)]
        if len(formats) == 1:
            scheme[canonical(name)[0]] = formats[0]
        else:
            unknown.append(f"{name} ({dtype} {list(shape)})")
    if unknown:
        raise PrecisionError(
            f"{len(unknown)} quantized tensors have scales of no supported format ({', '.join(CODECS)}): "
            f"{', '.join(unknown[:3])}; quantize the checkpoint in one of them, or leave these out"
        )
    return scheme


def _is_in(hf_shapes: HfShapes, name: str, form: Format) -> bool:
    """Whether all parts of this format, and only they, stand beside the tensor, in the right dtypes and shapes."""
    shape, dtype = hf_shapes[name]
    if dtype != form.parts[0].dtype:
        return False
    matrix = (*shape[:-1], shape[-1] * form.parts[0].cell[1])
    return (
        len(matrix) == 2
        and all(hf_shapes.get(part.name(name)) == (part.shape(matrix), part.dtype) for part in form.parts)
        and _num_scales(hf_shapes, name) == len(form.parts) - 1
    )


def _num_scales(hf_shapes: HfShapes, name: str) -> int:
    return sum(f"{name}_{suffix}" in hf_shapes for suffix in ("scale_inv", "scale", "scale_2"))


def without_parts(names: Collection[str], scheme: Scheme) -> tuple[str, ...]:
    """The tensors that must be known to make `names`, each once, in order.

    `names` are HF names as an engine knows them: the parts in place of each quantized tensor.
    """
    whole_of = {part: name for name, form in scheme.items() for part in codec_of(form).format.names(name)}
    found: dict[str, None] = {}
    for name in names:
        tensor, expert = canonical(name)
        found[hf_name(whole_of.get(tensor, tensor), expert)] = None
    return tuple(found)


def quantized(tensors: Iterable[tuple[str, Tensor]], scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """Full HF tensors with every tensor of the scheme replaced by its parts. Raises PrecisionError on a bad size."""
    for name, tensor in tensors:
        form = scheme.get(canonical(name)[0])
        if form is None:
            yield name, tensor
        else:
            yield from zip(codec_of(form).format.names(name), quantize(form, tensor), strict=True)
