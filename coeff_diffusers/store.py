"""A folder, or a repository or collection of the Hub, that stands for the adapters of a model.

    AdapterStore("files", max_resident=200).attach(pipe)
    pipe(["a sks dog", "a sks cat"], cross_attention_kwargs={"coeff": ["dog", "cat"]})

Names are looked up when a call, or a context, asks for them. Those that were not asked for the longest leave.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapters import components, denoisers
from .checkpoint import COEFF_WEIGHT_NAME, load_coeff_weights
from .files import printable
from .record import known_record, model_record, put_states
from .resolved import CHANGES

_NAME = re.compile(r"[\w-][\w -]*")
_COLLECTION = re.compile(r"[^/]+/.+-[0-9a-f]{24}")


class AdapterStore:
    """Adapters by name, loaded when they are asked for.

    A name is that of a file (`dog.safetensors`), or of a folder with a `pytorch_coeff_weights.safetensors`, as
    training of many subjects writes it (`dog/`); of a collection of the Hub, that of a repository (`user/dog`). A file
    that was replaced on disk is loaded again by the next call that asks for it; of the Hub, what was downloaded stays,
    and [`AdapterStore.refresh`] asks again.

    Args:
        source: a folder, a repository of the Hub, or the slug of a collection (`user/pets-` and 24 digits).
        max_resident: how many of its adapters are loaded at a time, at most. The model's default stays.
        hub: `revision`, `token`, `cache_dir`, `local_files_only` of a repository.

    Raises:
        ValueError: if `max_resident` is not positive.
    """

    def __init__(self, source: str | os.PathLike[str], *, max_resident: int = 1000, **hub: Any) -> None:
        if max_resident < 1:
            raise ValueError(f"max_resident must be at least 1, got {max_resident}")
        self.source, self.max_resident, self.hub = source, max_resident, hub
        self.model: Any = None
        self._folder: Path | None = None  # once it was found
        self._resident: OrderedDict[str, tuple[Path, tuple[int, int]]] = OrderedDict()  # the next to leave first
        self._listed: dict[str, str] | None = None  # of the Hub: name -> file, or repository

    def attach(self, model: Any) -> AdapterStore:
        """Has calls of a model, or of a pipeline and those that share its models, find their adapters here.

        Raises:
            ValueError: if the model has a store, or the store a model.
        """
        parts = denoisers(model)
        known = [record for part in parts.values() if (record := known_record(part)) and record.store is not None]
        if known or self.model is not None:
            raise ValueError("a store is for one model, and a model has one store: detach the other first")
        self.model = model
        for part in parts.values():
            model_record(part).store = self
        return self

    def detach(self) -> None:
        """Leaves the model with the adapters that are loaded."""
        with CHANGES:
            for part in components(self.model).values() if self.model is not None else ():
                record = known_record(part)
                if record is not None and record.store is self:
                    record.store = None
            self.model = None
            self._resident.clear()

    def names(self) -> list[str]:
        """All names that can be asked for."""
        folder = self.folder()
        if folder is None:
            return sorted(filter(self.is_name, self._of_hub()))
        files = [path.stem for path in folder.glob("*.safetensors")]
        found = {*files, *(path.parent.name for path in folder.glob(f"*/{COEFF_WEIGHT_NAME}"))}
        return sorted(name for name in found if name in self)

    def __contains__(self, name: str) -> bool:
        return isinstance(name, str) and self.path(name) is not None

    @staticmethod
    def is_name(name: str) -> bool:
        """Whether a subject could have this name: letters, digits, spaces, `_` and `-`."""
        return _NAME.fullmatch(name) is not None

    def refresh(self) -> None:
        """Forgets what the Hub said."""
        self._listed = None

    def load(self, names: Sequence[str]) -> None:
        """Loads those of these names that are not loaded, or whose file is another by now.

        Names of adapters that were loaded otherwise are left to them.

        Raises:
            ValueError: if there is no such name, a file does not fit the model, or they are more than `max_resident`.
        """
        with CHANGES:  # others wait, and find them
            wanted = [name for name in names if name in self._resident or not self._is_held(name)]
            if len(wanted) > self.max_resident:
                raise ValueError(
                    f"{len(wanted)} adapters are asked for at once, and max_resident is {self.max_resident}"
                )
            for name in wanted:
                self._load(name)
            self._leave(wanted)

    def _load(self, name: str) -> None:
        path = self.path(name)
        if path is None:
            self._drop([name])
            known = self.names()
            more = f" and {len(known) - 10} more" if len(known) > 10 else ""
            raise ValueError(f"there is no adapter {name!r} in {self.source}; it has {known[:10]}{more}")
        stat = path.stat()
        version = path, (stat.st_mtime_ns, stat.st_size)
        if self._resident.get(name) == version and self._is_held(name):
            self._resident.move_to_end(name)
            return
        self._drop([name])
        load_coeff_weights(self.model, path, adapter_name=name, activate=False)
        self._resident[name] = version

    def _leave(self, wanted: Sequence[str]) -> None:
        kept = {*wanted, *(name for record in self._records() for name in record.state.default.names)}
        others = [name for name in self._resident if name not in kept]
        self._drop(others[: max(0, len(self._resident) - self.max_resident)])

    def _drop(self, names: Sequence[str]) -> None:
        gone = [name for name in names if self._resident.pop(name, None) is not None]
        if not gone:
            return
        put_states(
            {
                record: record.having({n: a for n, a in record.state.adapters.items() if n not in gone})
                for record in self._records()
            }
        )

    def _is_held(self, name: str) -> bool:
        return any(name in record.state.adapters for record in self._records())

    def _records(self) -> list[Any]:
        return [record for part in components(self.model).values() if (record := known_record(part))]

    def path(self, name: str) -> Path | None:
        """The file of a name; `None` if there is none. Names do not lead out of the folder."""
        if not self.is_name(name):
            return None
        folder = self.folder()
        if folder is not None:
            paths = [folder / f"{name}.safetensors", folder / name / COEFF_WEIGHT_NAME]
            return next((path for path in paths if os.path.isfile(path)), None)  # also of names that are too long
        found = self._of_hub().get(name)
        return None if found is None else self._download(found)

    def folder(self) -> Path | None:
        """The folder; `None` if the source is on the Hub. What was a folder once is never looked for on the Hub."""
        source = Path(self.source)
        if self._folder is None and (source.is_dir() or source.is_absolute()):
            self._folder = source.absolute()
        if self._folder is not None and not self._folder.is_dir():
            raise FileNotFoundError(f"there is no folder {printable(self._folder)} of adapters any more, or yet")
        return self._folder

    def _of_hub(self) -> dict[str, str]:
        """Name -> file of the repository, or repository of the collection."""
        if self._listed is None:
            from huggingface_hub import HfApi

            api, source = HfApi(token=self.hub.get("token")), str(self.source)
            if _COLLECTION.fullmatch(source):
                items = [item.item_id for item in api.get_collection(source).items if item.item_type == "model"]
                self._listed = {item.rpartition("/")[2]: item for item in items}
            else:
                files = [Path(file) for file in api.list_repo_files(source, revision=self.hub.get("revision"))]
                named = {file.stem: file for file in files if len(file.parts) == 1 and file.suffix == ".safetensors"}
                named |= {f.parts[0]: f for f in files if len(f.parts) == 2 and f.name == COEFF_WEIGHT_NAME}
                self._listed = {name: file.as_posix() for name, file in named.items()}
        return self._listed

    def _download(self, found: str) -> Path:
        from huggingface_hub import hf_hub_download

        if _COLLECTION.fullmatch(str(self.source)):
            return Path(hf_hub_download(found, COEFF_WEIGHT_NAME, **self.hub))
        return Path(hf_hub_download(str(self.source), found, **self.hub))
