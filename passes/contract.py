"""What a pass is: typed parameters, the statistics it needs, where it may stand, and what it does to a compilation."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kvcc.errors import PassError
from kvcc.graph import AttentionSpec, Graph, attention_nodes, attention_spec
from kvcc.kernels.layout import Plane, Side
from kvcc.profile import Profile
from kvcc.runtime.plan import HeadPlan, LayerPlan, Plan


class Windows(BaseModel):
    """The exact segments of every layer, and the page size, in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sinks: int = Field(16, ge=0, description="first tokens of a sequence, exact")
    recent: int = Field(64, ge=0, description="last tokens, exact")
    page: int = Field(64, ge=8, multiple_of=8, description="tokens sealed together")
    dtype: Literal["model", "half"] = Field(
        "model", description="type of exact tokens; half: 16 bits where the model has 32"
    )


@dataclass(frozen=True)
class Note:
    """What a pass did to a layer, or why it did nothing."""

    pass_name: str
    layer: int
    fired: bool
    text: str


@dataclass
class Compilation:
    """A model on its way through the passes: its graph, its plan, and the tables that go with the plan."""

    graph: Graph
    profile: Profile | None
    plan: Plan
    tables: dict[str, Tensor] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    value_maps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer: mean [H, D] and basis [H, D, D] of V' = (V - mean) basis, where a pass put that into the weights."""

    def specs(self) -> list[AttentionSpec]:
        """The attention layers as the graph has them now, by layer."""
        return [attention_spec(node) for node in attention_nodes(self.graph.module)]

    def update(self, layer: int, **changes: Any) -> None:
        """Replace fields of one layer's plan. Raises PassError when the result contradicts itself."""
        try:
            changed = LayerPlan.model_validate(
                self.plan.layers[layer].model_copy(update=changes).model_dump()
            )
        except ValueError as error:
            raise PassError(f"layer {layer}: {error}") from error
        layers = (*self.plan.layers[:layer], changed, *self.plan.layers[layer + 1 :])
        self.plan = self.plan.model_copy(update={"layers": layers})

    def need_profile(self, pass_name: str) -> Profile:
        """The profile, or PassError when this compilation has none."""
        if self.profile is None:
            raise PassError(f"pass {pass_name} needs calibration statistics; give a profile (kvcc calibrate)")
        return self.profile


class Pass(BaseModel, ABC):
    """A compression method. Its fields are its parameters; its docstring is its documentation.

    `apply` may rewrite `compilation.graph`, the plan and the tables; it adds one Note a layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...] | None = Field(None, description="layers it is for; default: all")

    name: ClassVar[str]
    needs_profile: ClassVar[bool] = False
    # Passes that this one can follow in a layer; in a recipe they must come earlier.
    after: ClassVar[tuple[str, ...]] = ()
    once: ClassVar[bool] = True

    @abstractmethod
    def apply(self, compilation: Compilation) -> None:
        """Do it. Raises PassError naming layer, reason and remedy."""

    def requires_profile(self) -> bool:
        """Whether these parameters need calibration statistics."""
        return self.needs_profile

    def chosen(self, compilation: Compilation) -> list[tuple[int, LayerPlan]]:
        """The layers that the pass is for, with their plans.

        Raises PassError for one that the model lacks, or that a pass has changed of which this one does not know.
        """
        plans = compilation.plan.layers
        for index in self.layers or ():
            if not 0 <= index < len(plans):
                raise PassError(f"{self.name}: the model has layers 0 to {len(plans) - 1}, not {index}")
        for note in compilation.notes:
            mine = self.layers is None or note.layer in self.layers
            if note.fired and mine and note.pass_name not in (self.name, *self.after):
                raise PassError(
                    f"layer {note.layer}: {self.name} cannot follow {note.pass_name}, whose changes it would undo or "
                    "misread; take one of them, or give them different layers"
                )
        return [(i, plan) for i, plan in enumerate(plans) if self.layers is None or i in self.layers]

    def paged(self, compilation: Compilation) -> list[tuple[int, LayerPlan]]:
        """Of the layers chosen those that have pages; the others use sliding windows, stay exact, and get a Note."""
        for index, layer in self.chosen(compilation):
            if not layer.page:
                text = f"sliding window of {layer.window} tokens stays exact"
                self.note(compilation, index, text, fired=False)
        return [(i, layer) for i, layer in self.chosen(compilation) if layer.page]

    def note(self, compilation: Compilation, layer: int, text: str, fired: bool = True) -> None:
        """Record what this pass did to `layer`, or (fired False) why it did nothing there."""
        compilation.notes.append(Note(self.name, layer, fired, text))


def exact_plan(graph: Graph, windows: Windows) -> Plan:
    """The plan to start from: every token stored exactly, in pages; sliding-window layers as rings."""
    layers = []
    bits = 8 * getattr(torch, graph.model.dtype).itemsize
    for node in attention_nodes(graph.module):
        spec = attention_spec(node)
        shape = {
            "q_heads": spec.q_heads,
            "kv_heads": spec.kv_heads,
            "k_dim": spec.k_dim,
            "v_dim": spec.v_dim,
        }
        if spec.window:
            layers.append(LayerPlan(**shape, sinks=0, recent=0, page=0, window=spec.window))
            continue
        head = HeadPlan(
            k=Side((Plane(bits, spec.k_dim),), "tokens", windows.page),
            v=Side((Plane(bits, spec.v_dim),), "channels", spec.v_dim),
        )
        tokens = windows.model_dump(exclude={"dtype"})
        layers.append(LayerPlan(**shape, **tokens, heads=(head,) * spec.kv_heads))
    narrower = windows.dtype == "half" and graph.model.dtype == "float32"
    return Plan(dtype=graph.model.dtype, window_dtype="float16" if narrower else None, layers=tuple(layers))


def start(graph: Graph, profile: Profile | None, windows: Windows) -> Compilation:
    """A compilation that has seen no pass yet."""
    return Compilation(graph, profile, exact_plan(graph, windows))
