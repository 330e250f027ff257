"""The first steps of every member: check the arguments, then the mode, then the rate, and only then draw a mask."""

from collections.abc import Callable
from typing import Any, NamedTuple, Required, TypedDict, Unpack

from jax import Array

from jdrop._axes import as_axes
from jdrop._checks import as_bool, as_rate, check_choice, check_key, is_zero
from jdrop._mask import Mask, draw_mask
from jdrop._sharding import check_key_varies, check_sharded_as, tile_axes, whole_array
from jdrop._types import GENERATORS, Generator, Rate, RateLike, Shard

Shape = tuple[Any, ...]


class Arguments(NamedTuple):
    """The checked arguments of a call, for data of one shape."""

    function: str
    key: Array | None
    data: Any
    """The data: an array, or a pytree of arrays."""
    shape: Shape
    rate: Rate
    train: bool
    mask_shape: Callable[[Shape], Shape]
    """Function from the shape of the data to the shape of the decisions."""
    generator: Generator
    shard: Shard
    tile_axes: tuple[tuple[str, ...], ...]
    """The mesh axes over which ``shard`` splits each axis of the data."""
    key_argument: str
    """The name of the key in the function."""

    @property
    def is_identity(self) -> bool:
        """Whether nothing random happens: in evaluation, or at a concrete rate of 0."""
        return not self.train or is_zero(self.rate)

    def draw(
        self, *, one_for_all_tiles: bool = False, random_access: bool = False, mask_shape: Shape | None = None
    ) -> Mask:
        """Consume the key, and return the mask.

        Args:
          one_for_all_tiles: whether ``shard`` only says that all tiles share decisions.
          random_access: whether decisions are drawn by index.
          mask_shape: shape of the decisions, if it does not follow from the data.
        """
        key = require_key(self.function, self.key, self.key_argument)
        check_key_varies(self.function, key, self.shard, self.key_argument, data=self.data)
        shape, start = whole_array(self.shape, () if one_for_all_tiles else self.tile_axes)
        return draw_mask(
            self.function,
            key,
            self.rate,
            self.mask_shape(shape) if mask_shape is None else mask_shape,
            self.generator,
            start=start,
            random_access=random_access,
            key_argument=self.key_argument,
        )


def check_arguments(
    function: str,
    key: Array | None,
    data: Any,
    rate: RateLike,
    *,
    train: bool,
    shape: Shape | None = None,
    shared_axes: Any = (),
    mask_shape: Callable[[Shape], Shape] | None = None,
    generator: Generator = "fast",
    shard: Shard = None,
    rate_argument: str = "rate",
    highest_rate: float = 1.0,
    key_argument: str = "key",
    static_rate: bool = False,
) -> Arguments:
    """Check the arguments that members share.

    ``data`` is an array, or a pytree of arrays with ``shape``. The shape of the decisions is that of the data with 1 on
    shared axes, unless ``mask_shape`` returns another one. ``rate_argument``, ``highest_rate`` and ``key_argument`` are
    for members whose arguments have other names. ``static_rate`` is for rates that determine a shape.
    """
    shape = data.shape if shape is None else shape
    train = as_bool(function, "train", train, None if static_rate else rate_argument)
    check_choice(function, "generator", generator, GENERATORS)
    if mask_shape is None:
        mask_shape = shared_shape(as_axes(function, "shared_axes", shared_axes, len(shape)))
    checked_rate = as_rate(function, rate, mask_shape(shape), rate_argument, highest_rate)
    if isinstance(data, Array):
        check_sharded_as(function, rate_argument, checked_rate, data)
    axes = tile_axes(function, shape, shard)
    if key is not None:
        check_key(function, key, key_argument)
    return Arguments(function, key, data, shape, checked_rate, train, mask_shape, generator, shard, axes, key_argument)


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`check_arguments`."""

    train: Required[bool]
    shape: Shape | None
    shared_axes: Any
    mask_shape: Callable[[Shape], Shape] | None
    generator: Generator
    shard: Shard
    rate_argument: str
    highest_rate: float
    key_argument: str
    static_rate: bool


def prepare(function: str, key: Array | None, data: Any, rate: RateLike, **options: Unpack[Options]) -> Mask | None:
    """Check the arguments of :func:`check_arguments`, and return the mask, or ``None`` if nothing random happens."""
    arguments = check_arguments(function, key, data, rate, **options)
    return None if arguments.is_identity else arguments.draw()


def shared_shape(axes: tuple[int, ...]) -> Callable[[Shape], Shape]:
    """Return the function from a shape to the same shape with 1 on some axes."""
    if not axes:
        return tuple
    return lambda shape: tuple(1 if axis in axes else n for axis, n in enumerate(shape))


def require_key(function: str, key: Array | None, argument: str = "key") -> Array:
    """Require a key, because something is dropped."""
    if key is None:
        raise TypeError(
            f"{function}: {argument} must be a PRNG key when something is dropped, got None; "
            "pass a key, or train=False, or rate=0."
        )
    return key
