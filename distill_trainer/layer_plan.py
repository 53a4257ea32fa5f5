"""Which layers of student and teacher are compared, and which of the teacher's are re-routed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from distill_trainer.errors import ConfigurationError

# Pairs of layers that a uniform map gives the layer-wise loss.
LAYERWISE_PAIRS = 4


def uniform_layer_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """For every student layer the teacher layer at the same relative depth; the last maps to the last."""
    return [
        max(round((layer + 1) * num_teacher_layers / num_student_layers) - 1, 0) for layer in range(num_student_layers)
    ]


@dataclass(frozen=True)
class LayerPairs:
    """Layers of student and teacher that are compared, as `(student, teacher)` indices from the bottom up."""

    feature: tuple[tuple[int, int], ...] = ()
    layerwise: tuple[tuple[int, int], ...] = ()
    attention: tuple[tuple[int, int], ...] = ()

    @classmethod
    def plan(
        cls,
        num_student_layers: int,
        num_teacher_layers: int,
        *,
        layer_map: str | list[str],
        feature_layers: list[int] | None,
        attention_layers: list[int] | None,
    ) -> "LayerPairs":
        """Pairs from the user's choice of teacher layers.

        Args:
            num_student_layers: Layers of the student.
            num_teacher_layers: Layers of the teacher.
            layer_map: `uniform` pairs layers of the same relative depth, or a list of `student:teacher` indices.
                The layer-wise loss uses the whole list, or `LAYERWISE_PAIRS` evenly spaced pairs.
            feature_layers: Teacher layers of the feature loss, each compared with the student's layer whose own in the
                map is the nearest. None compares the last layers.
            attention_layers: Likewise of the attention loss.

        Raises:
            ConfigurationError: If a layer does not exist.
        """
        if layer_map == "uniform":
            mapped = list(enumerate(uniform_layer_map(num_student_layers, num_teacher_layers)))
            count = min(LAYERWISE_PAIRS, num_student_layers)
            layerwise = [mapped[(i + 1) * num_student_layers // count - 1] for i in range(count)]
        else:
            split = [pair.split(":") for pair in layer_map]
            mapped = layerwise = sorted((int(student), int(teacher)) for student, teacher in split)

        def checked(name: str, pairs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
            for student, teacher in pairs:
                if not (0 <= student < num_student_layers and 0 <= teacher < num_teacher_layers):
                    raise ConfigurationError(
                        f"{name} must name layers below {num_student_layers} of the student and below "
                        f"{num_teacher_layers} of the teacher, got {student}:{teacher}."
                    )
            return tuple(pairs)

        def nearest(name: str, layers: list[int] | None) -> list[tuple[int, int]]:
            if layers is None:
                return [(num_student_layers - 1, num_teacher_layers - 1)]
            if unknown := [layer for layer in layers if not 0 <= layer < num_teacher_layers]:
                raise ConfigurationError(
                    f"{name} must name layers of the teacher below {num_teacher_layers}, got {unknown[0]}."
                )
            # The highest student layer among those mapped to the nearest teacher layer.
            return [
                (min(reversed(mapped), key=lambda pair: abs(pair[1] - layer))[0], layer) for layer in sorted(layers)
            ]

        return cls(
            # First, because the others are chosen from the map.
            layerwise=checked("layer_map", layerwise),
            feature=tuple(nearest("feature_layers", feature_layers)),
            attention=tuple(nearest("attention_layers", attention_layers)),
        )

    def used_by(self, weights: Mapping[str, float]) -> "LayerPairs":
        """The pairs of the losses whose weight is above 0."""
        return LayerPairs(**{f.name: getattr(self, f.name) if weights[f.name] > 0 else () for f in fields(self)})


@dataclass(frozen=True)
class RoutedLayers:
    """Layers with experts that the student-aware router re-routes, by index from the bottom up.

    Attributes:
        depth: Their mixtures go on through the layers above to the head.
        targets: Re-routed each on its own, as targets of the feature and layer-wise losses; nothing above sees it.
    """

    depth: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()

    @property
    def all(self) -> tuple[int, ...]:
        """Both, each once."""
        return tuple(sorted({*self.depth, *self.targets}))

    @classmethod
    def plan(cls, choice: str | list[str], layers: list[int]) -> "RoutedLayers":
        """The layers that a user's choice means.

        Args:
            choice: `last`, `last:N`, `all`, or a list of layer indices, which are targets beside the last.
            layers: Layers with experts, at least one.

        Raises:
            ConfigurationError: If a layer has no experts.
        """
        if isinstance(choice, list):
            named = sorted({int(layer) for layer in choice})
            unknown = [layer for layer in named if layer not in layers]
            if unknown:
                raise ConfigurationError(
                    f"router_layers must name layers with experts, from {layers[0]} to {layers[-1]}, got {unknown[0]}."
                )
            return cls((layers[-1],), tuple(layer for layer in named if layer != layers[-1]))
        count = {"last": 1, "all": len(layers)}.get(choice) or int(choice.removeprefix("last:"))
        if count > len(layers):
            raise ConfigurationError(
                f"router_layers must be at most last:{len(layers)}, the teacher's layers with experts, got {choice}."
            )
        return cls(tuple(layers[-count:]))
