"""The adapters of a model, and the choice among them that a call goes by.

A record is a hook before and after the model's own forward. What may change, adapters and the default choice, is one
immutable state, put in place by one assignment. A call resolves its choice once, and its layers find what that came to
in slots of the thread: nothing that is shared is written during a call.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from . import running
from .backward import keep_for_backward, next_node, resolved_of_backward
from .choice import BASE, Choice, Mixture, checked_scale, entry_of, read_choice, without_choice
from .images import batch_size, images_of_call
from .layers import accelerator_of
from .resolved import CHANGES, NOTHING, SWAP, Adapter, Added, Layout, Resolved, resolve

if TYPE_CHECKING:
    from .coefficients import LayerCoefficients

GUARD = "_coeff_guard"  # attribute of a layer, out of sight of `named_modules` and `state_dict`: what was put on it

_numbers = itertools.count()
_records: WeakValueDictionary[str, ModelRecord] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class State:
    """The adapters of a model by name, and the choice of calls that make none.

    Args:
        adapters: never changed.
        default: what `set_coeff_adapters` chose.
        enabled: whether it takes part.
        resolved: what that comes to.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    default: Choice = BASE
    enabled: bool = True
    resolved: Resolved = NOTHING

    @property
    def choice(self) -> Choice:
        return self.default if self.enabled else BASE


@dataclass(frozen=True, eq=False)
class Call:
    """A forward pass of a record's model that is running in this thread.

    Args:
        first_node: the number of the first node that its graph may have.
        outside: whether it was begun outside of what is compiled.
    """

    key: str
    resolved: Resolved
    before: Call | None
    first_node: int | None
    outside: bool


class _Slots(threading.local):
    """What torch.compile reads in the thread that calls, as an attribute of the object, whose changes it notes."""

    def __init__(self) -> None:
        self.call: Call | None = None


class _Steps(threading.local):
    """What a record has come to in this thread.

    `choice` is one, and what it came to, for the next step is likely to make the same; `laid_out` is what the slots of
    its layers hold.
    """

    def __init__(self) -> None:
        self.choice: tuple[Any, Resolved] | None = None
        self.laid_out: Resolved | None = None


_slots = _Slots()


@dataclass(frozen=True, eq=False)
class Attention:
    """A model's attention layers, as they were found.

    Args:
        children: ids of the model's.
        layers: by path.
        heads: of each, by path.
        steps: to them, from module to module: modules of one, name, module.
    """

    children: list[int]
    layers: dict[str, Any]
    heads: dict[str, int]
    steps: list[tuple[dict[str, Any], str, Any]]


class ModelRecord:
    """The coefficients of a model by module path, its adapters, and the hooks of its calls.

    Those of layers that belong to no model yet have a record of their own, without a model.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.copied: set[str] = set()  # layers of which the host has taken one copy, without coefficients
        self.layers: dict[str, LayerCoefficients] = {}
        self.paths: dict[str, LayerCoefficients] = {}  # of all that were ever put on a layer here
        self.numbered: tuple[LayerCoefficients, ...] = ()
        self.state = State()
        self.older: list[Any] = []  # frames of calls that began before there was this record
        self.entered = False  # whether a thread or a task has ever made a choice of its own
        self.attention: Attention | None
        self.store: Any = None
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("key", "steps", "attention", "older")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.steps, self.attention, self.older = _Steps(), None, []
        self.key = f"{next(_numbers)}"  # of each copy its own
        _records[self.key] = self

    # A call of the model

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling():
            kwargs = self.begin(args, kwargs)
        else:
            _before_trace(self.key)
            stated, scale, _ = without_choice(kwargs)
            if stated or scale is not None or (self.entered and not self.is_begun_outside()):
                kwargs = _begin_untraced(self.key, args, kwargs)
        self.check(model)
        return args, kwargs

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Ends a call, also one whose model raised."""
        call = _slots.call
        if call is None or call.key != self.key or call.outside:
            return
        _slots.call = call.before
        if call.first_node is not None and not torch.compiler.is_compiling():
            keep_for_backward(self.key, call.resolved, call.first_node, output)

    def begin(self, args: Any, kwargs: dict[str, Any], outside: bool = False) -> dict[str, Any]:
        """Resolves the choice of adapters for a call; returns the kwargs without it."""
        if self.is_begun_outside():
            return kwargs
        stated, scale, kwargs = without_choice(kwargs)
        factor = 1.0 if scale is None else checked_scale(scale)
        choice = read_choice(stated[0]) if stated else None
        with self._loaded(choice), SWAP:
            resolved = self._resolve(choice, factor, args, kwargs)
        if self.steps.laid_out is not resolved:
            self.steps.laid_out = None
            for coefficients in self.numbered:
                coefficients.slot.added = resolved.at(coefficients.number)
            self.steps.laid_out = resolved
        first_node = next_node() if torch.is_grad_enabled() else None
        _slots.call = Call(self.key, resolved, _running_call(None if outside else self.key), first_node, outside)
        return kwargs

    def is_begun_outside(self) -> bool:
        call = _slots.call
        return call is not None and call.key == self.key and call.outside

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What torch.compile made of the model's call, begun and ended outside of it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before = _slots.call
            try:
                return call(*args, **self.begin(args, kwargs, outside=True))
            finally:
                _slots.call = before

        run.record, run.call = self, call  # type: ignore[attr-defined]
        return run

    # What layers ask for

    def added(self, coefficients: LayerCoefficients) -> Added | None:
        """What a layer adds now; `None` if it runs as in the base model."""
        call = _slots.call
        if call is not None and call.key == self.key:
            return coefficients.slot.added
        if torch.compiler.is_compiling():
            return self.state.resolved.at(coefficients.number)
        resolved = resolved_of_backward(self.key) or self._outside_of_calls()
        return resolved.at(coefficients.number)

    def _outside_of_calls(self) -> Resolved:
        entry = entry_of(self)
        if entry is not None and entry.choice.per_image:
            raise RuntimeError(
                "within coeff_per_sample the model's layers ran, but not by a call of the model: call the model, and "
                "not its forward or its layers"
            )
        with SWAP:
            return self._resolve(None, 1.0, (), {})

    # Choices

    @contextmanager
    def _loaded(self, choice: Choice | None) -> Iterator[None]:
        """Inside, no other call drives out of the store what this one names. A pipeline's call asks once a name."""
        store = self.store
        if store is None:
            yield
            return
        entry = entry_of(self)
        names = choice.names if choice is not None else [] if entry is None else entry.choice.names
        session = running.session()
        asked = set() if session is None else session.asked.setdefault(self.key, set())
        new = [name for name in names if name not in asked]
        with CHANGES if new else nullcontext():
            if new:
                store.load(new)
                asked.update(new)
            yield

    def _resolve(self, stated: Choice | None, scale: float, args: Any, kwargs: dict[str, Any]) -> Resolved:
        state = self._state_of_call()
        entry = None if stated is not None else entry_of(self)
        choice = stated or (state.choice if entry is None else entry.choice)
        missing = [name for name in choice.names if name not in state.adapters]
        if missing and state is not self.state and all(name in self.state.adapters for name in missing):
            state = replace(state, adapters={**self.state.adapters, **state.adapters})
            if (session := running.session()) is not None:
                session.states[self.key] = state  # so that the next step finds it, too
        if stated is not None:
            self._check_known(state, stated)
        elif entry is not None:
            self._check_not_deleted(state, choice, entry.records)
        if scale == 0.0:
            return NOTHING
        images: Sequence[Mixture] = choice.mixtures
        times = 0  # for all samples alike
        if choice.per_image:
            images = images_of_call(images, None if entry is None else entry.model)
            times = self._times(len(images), batch_size(args, kwargs))
        used = [state.adapters[name] for image in images for name, _ in image if name in state.adapters]
        trains = any(adapter.coeff is not None for adapter in used)
        training = self.model is None or self.model.training
        live = trains and (torch.is_grad_enabled() or (training and any(adapter.config.dropout for adapter in used)))
        if choice is state.choice and scale == 1.0 and live == bool(state.resolved.terms):
            return state.resolved
        device = _device_of(args, kwargs)
        step = list(images), used, times, scale, device, torch.is_inference_mode_enabled()
        before = self.steps.choice
        if not trains and before is not None and before[0] == step:
            return before[1]
        resolved = resolve(state.adapters, images, times, scale, live).to(device)
        self.steps.choice = None if trains else (step, resolved)
        return resolved

    def _times(self, images: int, batch: int) -> int:
        if batch % images:
            raise ValueError(
                f"{type(self.model).__name__} was called with a batch of {batch}, which is no multiple of the "
                f"{images} images that have adapters of their own"
            )
        return batch // images

    def _state_of_call(self) -> State:
        """The state that the running call began with, if another has been put in its place since."""
        session = running.session()
        if session is None:
            return self.state
        if self.model is not None and not any(part is self.model for part in session.models):
            session.models.append(self.model)  # which the pipeline has not among its parts
        if self.older:
            running_still = {id(frame) for frame in running.all_frames()}
            self.older = [frame for frame in self.older if id(frame) in running_still]
            if any(id(frame) == session.frame for frame in self.older):
                session.states.setdefault(self.key, State())
        state: State = session.states.get(self.key, self.state)
        return state

    def _check_known(self, state: State, choice: Choice) -> None:
        unknown = [name for name in choice.names if name not in state.adapters]
        if unknown:
            raise ValueError(f"{type(self.model).__name__} has no adapter {unknown}; it has {list(state.adapters)}")
        for name in choice.names:
            if state.adapters[name].elsewhere:
                raise ValueError(
                    f"adapter {name!r} is on {', '.join(state.adapters[name].elsewhere)}, too, which a call's "
                    "attention kwargs do not reach: choose it by coeff_adapters or set_coeff_adapters"
                )

    def _check_not_deleted(self, state: State, choice: Choice, records: Sequence[ModelRecord]) -> None:
        gone = [
            name
            for name in choice.names
            if name not in state.adapters and not any(name in record.state.adapters for record in records)
        ]
        if gone:
            raise ValueError(f"the adapters {gone} were deleted since they were chosen here")

    # States

    def having(
        self, adapters: Mapping[str, Adapter], default: Choice | None = None, enabled: bool | None = None
    ) -> State:
        """A state of these adapters. Of a default, what they leave of it."""
        mixture = (default or self.state.default).mixtures[0]
        chosen = Choice((tuple((name, weight) for name, weight in mixture if name in adapters),))
        state = State(adapters, chosen, self.state.enabled if enabled is None else enabled)
        with torch.inference_mode(False):  # others may use it outside of that mode
            resolved = resolve(adapters, state.choice.mixtures, live=True).to(self.device())
        return replace(state, resolved=resolved)

    def make_parameters(self, name: str) -> Adapter:
        """Has an adapter train by parameters from now on, if it does not yet."""
        with SWAP:
            adapter = self.state.adapters[name]
            if adapter.coeff is None:
                adapter.make_parameters()
                self.state = self.having(self.state.adapters)
            return adapter

    def frozen(self) -> State:
        """The state, with values that nothing changes later."""
        with torch.inference_mode(False):
            adapters = {name: adapter.frozen() for name, adapter in self.state.adapters.items()}
            resolved = resolve(adapters, self.state.choice.mixtures).to(self.device())
        return replace(self.state, adapters=adapters, resolved=resolved)

    # Layers

    def take(self, coefficients: LayerCoefficients) -> None:
        """Numbers coefficients, with the adapters that they have had alone, unless they belong to a model already."""
        alone = coefficients.record
        if alone is self or alone.model is not None:
            return
        self.numbered = (*self.numbered, coefficients)
        coefficients.record, coefficients.number = self, len(self.numbered) - 1
        adapters = dict(self.state.adapters)
        for name, adapter in alone.state.adapters.items():
            before, number = adapters.get(name), coefficients.number
            coeff = {**(before.coeff or {} if before else {}), number: adapter.delta(0)}
            sides = {**(before.layout.sides if before else {}), number: coefficients.num_heads}
            adapters[name] = Adapter(adapter.config, Layout(sides), coeff=coeff)  # type: ignore[arg-type]
        if alone.state.adapters:
            self.state = self.having(adapters, self.state.default if self.state.adapters else alone.state.default)

    def layout(self, numbers: Sequence[int]) -> Layout:
        """Of these layers; that of the adapter added last, if it is the same."""
        sides = {number: self.numbered[number].num_heads for number in numbers}
        last = next(reversed(self.state.adapters.values()), None)  # type: ignore[call-overload]
        return last.layout if last is not None and list(last.layout.sides) == list(sides) else Layout(sides)

    def device(self) -> torch.device | None:
        """The accelerator that the first of its layers is on."""
        path = next(iter(self.layers), None)
        layer = None if self.model is None or path is None else module_at(self.model, path)
        return None if layer is None else accelerator_of(layer)

    def check(self, model: nn.Module) -> None:
        """Raises RuntimeError if a layer whose coefficients take part is another module by now, or gone."""
        rebuilt = self.rebuilt(model)
        lost = [path for path in rebuilt if rebuilt[path].takes_part]
        if lost:
            raise RuntimeError(
                f"{len(lost)} of {len(self.layers)} layers with coefficients are other modules by now, without them, "
                f"the first is {lost[0]!r}: set_coeff_adapters(model, names) puts the coefficients on them, "
                "unload_coeff_weights(model) gives them up"
            )

    def rebuilt(self, model: nn.Module) -> dict[str, LayerCoefficients]:
        """Path -> coefficients, of those whose layer is not the one that they were put on."""
        found = {}
        for path, coefficients in self.layers.items():  # a loop that torch.compile can trace
            guard = getattr(module_at(model, path), GUARD, None)
            if guard is None or guard.coefficients is not coefficients:
                found[path] = coefficients
        return found

    def move(self, model: nn.Module) -> None:
        """Moves Delta to the accelerators that its layers are on."""
        for path, coefficients in self.layers.items():
            device = accelerator_of(module_at(model, path))
            if device is not None:
                coefficients.move(device)
        with SWAP:
            self.state = replace(self.state, resolved=self.state.resolved.to(self.device()))


def put_states(changes: Mapping[ModelRecord, State]) -> None:
    """Puts states in place, all or none. Calls that run in other threads go on with those that they began with."""
    with SWAP:
        before = {record: record.state for record in changes}
        try:
            for record in before:
                sessions = running.other_sessions(record.model) if record.model is not None else []
                frozen = record.frozen() if sessions else None
                for session in sessions:
                    session.states.setdefault(record.key, frozen)
            here = running.session()
            for record, state in changes.items():
                record.state = state
                if here is not None:
                    here.states.pop(record.key, None)  # what a call changes itself counts from its next step on
        except BaseException:
            for record, state in before.items():
                record.state = state
            raise


def module_at(model: nn.Module, path: str) -> Any:
    """The module at `path`, also where modules on the way are wrapped; `None` if there is none."""
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _device_of(args: Any, kwargs: Any) -> torch.device | None:
    """Where a model computes: the device of the first tensor that it is given."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    return None


def _running_call(beginning: str | None) -> Call | None:
    """The innermost call that is running in this thread, without those that ended by a KeyboardInterrupt.

    torch runs no hook after those, always called or not.

    Args:
        beginning: the key of the call that begins here, if torch has called its model already.
    """
    call = _slots.call
    while call is not None and not call.outside:
        record = _records.get(call.key)
        if record is not None and running.calls_here(record.model) > (call.key == beginning):
            break
        call = call.before
    return call


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _before_trace(key: str) -> bool:
    """Moves Delta to its layers, so that nothing compiled copies it each time.

    Run for its effect while torch.compile traces the model, once. Older releases take nothing but constants here.
    """
    record = _records[key]
    if record.model is not None:
        record.move(record.model)
    return True


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin_untraced(key: str, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Begins a call whose choice is known to its thread alone, with a break in the graph."""
    return _records[key].begin(args, kwargs)


def model_record(model: nn.Module) -> ModelRecord:
    """The model's own, hooked before and after its forward."""
    record = known_record(model)
    if record is None:
        record = ModelRecord(model)
        record.older = running.all_frames(but=threading.get_ident())
        hook_record(model, record)
    return record


def hook_record(model: nn.Module, record: ModelRecord) -> None:
    model.register_forward_hook(record.after, always_call=True)
    model.register_forward_pre_hook(record, with_kwargs=True)


def known_record(model: nn.Module) -> ModelRecord | None:
    hooks = list(model._forward_pre_hooks.values())  # at once, for other threads may add some
    return next((hook for hook in hooks if isinstance(hook, ModelRecord)), None)


def remove_record(model: nn.Module) -> None:
    hooks: list[dict[int, Any]] = [model._forward_pre_hooks, model._forward_hooks]
    for held in hooks:
        for key in [key for key, hook in held.items() if isinstance(getattr(hook, "__self__", hook), ModelRecord)]:
            del held[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)
    model._compiled_call_impl = getattr(model._compiled_call_impl, "call", model._compiled_call_impl)


def begin_outside(model: Any, part: nn.Module) -> None:
    """Has calls begin outside of what torch.compile has made of a model, where their thread's choice is known.

    Args:
        model: what is called: `part`, or what it is wrapped in.
        part: the model that has the record.
    """
    record = known_record(part)
    if record is None:
        return
    while model is not part and model is not None:
        if hasattr(model, "_orig_mod") and getattr(model.forward, "record", None) is not record:
            vars(model)["forward"] = record.around(getattr(model.forward, "call", model.forward))
        model = getattr(model, "_orig_mod", getattr(model, "module", None))
    run = part._compiled_call_impl  # by model.compile()
    if run is not None and getattr(run, "record", None) is not record:
        part._compiled_call_impl = record.around(getattr(run, "call", run))
