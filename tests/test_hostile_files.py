"""Files from strangers, names that would leave their folder, and writing that is interrupted.

tests/fuzz makes such files by the thousand; here is one of each kind that once did harm.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.fuzz import Bench, run
from fuzz.mutants import Good, join
from hosts import HOSTS, randomise
from safetensors.torch import save_file

from coeff_diffusers import (
    add_coeff_adapter,
    coeff_file,
    load_coeff_weights,
    merge_coeff_files,
    read_coeff_metadata,
    save_coeff_weights,
)
from coeff_diffusers.arithmetic import read_checked
from coeff_diffusers.checkpoint import coeff_state_dict
from coeff_diffusers.cli import main
from coeff_diffusers.coeff_file import all_usable, read_file
from coeff_diffusers.files import check_file_name, printable, whole_file
from coeff_diffusers.resolved import joined

NAME = "pytorch_coeff_weights.safetensors"
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs named pipes, limits or locks of POSIX")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with an adapter, and its file; no test changes either."""
    model = HOSTS["unet"].build().eval()
    add_coeff_adapter(model)
    randomise(model)
    return model, save_coeff_weights(model, tmp_path_factory.mktemp("saved"), metadata={"instance_prompt": "a dog"})


@pytest.fixture
def good(saved):
    return Good(saved[1].read_bytes())


@pytest.fixture
def refused(saved, tmp_path, capsys):
    """Writes a file, and has everything refuse it with `reason`, by name, in one voice."""
    model, path = saved[0], tmp_path / "mutant.safetensors"

    def check(data: bytes, reason: str) -> None:
        path.write_bytes(data)
        for options in ({}, {"strict": False}, {"allow_large_values": True}, {"hotswap": True}):
            name = "default" if "hotswap" in options else "mutant"
            with pytest.raises(ValueError, match=f"mutant.safetensors.*{reason}"):
                load_coeff_weights(model, path, adapter_name=name, **options)
        with pytest.raises(ValueError, match=f"mutant.safetensors.*{reason}"):
            read_coeff_metadata(path)
        assert main(["check", str(path), "--model", "/nowhere"]) == 2
        assert "mutant.safetensors" in capsys.readouterr().err

    return check


def described(good: Good, description: object) -> bytes:
    header = good.header()
    text = description if isinstance(description, str) else json.dumps(description)
    header["__metadata__"]["coeff_diffusers"] = text
    return join(header, good.values)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
def test_a_seeded_run_of_the_fuzzer_finds_nothing(tmp_path) -> None:
    bench = Bench(tmp_path)
    run(bench, seed=1, indices=range(16, 48), folder=tmp_path)
    assert bench.found == []
    assert bench.outcomes["load: done"] > 3
    assert bench.outcomes["load: refused"] > 20


# ---- what a file holds ----


@pytest.mark.parametrize("value", [1e300, 1e18, 10_001.0])
def test_values_that_give_no_image_are_refused_layer_by_layer(saved, tmp_path, capsys, value) -> None:
    model, path = saved
    tensors = {key: delta.double() for key, delta in coeff_state_dict(model).items()}
    tensors[f"{LAYER}.coeff"][0, 1] = value
    file = tmp_path / "large.safetensors"
    save_file(tensors, file, Good(path.read_bytes()).header()["__metadata__"])
    reason = "has 1 values that are not finite" if value == 1e300 else "has values up to .*, more than 10,000"
    for source in (file, tensors):
        for options in ({"adapter_name": "large"}, {"hotswap": True}):
            with pytest.raises(ValueError, match=f"{LAYER}.coeff: {reason}"):
                load_coeff_weights(model, source, **options)
        fresh = HOSTS["unet"].build()
        assert list(load_coeff_weights(fresh, source, strict=False)) == [f"{LAYER}.coeff"]
    assert main(["info", str(file), "--json"]) == 2
    assert capsys.readouterr().out == ""  # and no Infinity, which is no JSON
    with pytest.raises(ValueError, match=rf"large.safetensors is damaged:\n  {LAYER}.coeff: {reason}"):
        merge_coeff_files([path, file], tmp_path / "out.safetensors")
    fresh = HOSTS["unet"].build()
    if value == 1e300:
        with pytest.raises(ValueError, match="not finite"):
            load_coeff_weights(fresh, file, allow_large_values=True)
    else:
        load_coeff_weights(fresh, file, allow_large_values=True)
        assert coeff_state_dict(fresh)[f"{LAYER}.coeff"][0, 1] == value
        with pytest.raises(ValueError, match=r"loading refuses the values of 1 .*\(allow_large_values=True writes"):
            save_coeff_weights(fresh, tmp_path)
        save_coeff_weights(fresh, tmp_path, allow_large_values=True)


@pytest.mark.parametrize("weights", [[3e38, 3e38], [1e300, 1.0], [1e6, 1.0]])
def test_a_sum_that_loading_would_refuse_is_not_written(saved, tmp_path, weights) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"out.safetensors was not written, for loading would refuse it:\n  unet"):
        merge_coeff_files([saved[1]] * 2, out, weights)
    assert not out.exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.ones((2, 2), np.float32), "must be a tensor, got ndarray"),
        ([[0.0, 1.0], [1.0, 0.0]], "must be a tensor, got list"),
        (None, "must be a tensor, got NoneType"),
        (torch.ones(2, 2, device="meta"), "must be a dense tensor with values, got meta"),
        (torch.ones(2, 2).to_sparse(), "must be a dense tensor with values, got torch.sparse_coo"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "must be floating point .*, got torch.float8_e4m3fn"),
        (torch.ones(2, 2, dtype=torch.complex64), "must be floating point .*, got torch.complex64"),
    ],
    ids=["numpy", "list", "None", "meta", "sparse", "float8", "complex"],
)
def test_what_a_state_dict_may_not_hold(saved, value, reason) -> None:
    model = saved[0]
    state = coeff_state_dict(model) | {f"{LAYER}.coeff": value}
    for options in ({"adapter_name": "x"}, {"hotswap": True}):
        with pytest.raises(ValueError, match=f"{LAYER}.coeff: {reason}"):
            load_coeff_weights(model, state, **options)
    with pytest.raises(ValueError, match=r"keys of a state dict must be strings, .* got \[5\]"):
        load_coeff_weights(model, state | {5: torch.ones(2, 2)}, adapter_name="x")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F8_E4M3"}, r"attn1.coeff: has the type 'F8_E4M3'; F64, F32, F16, BF16 are read"),
        ({"dtype": 4}, "attn1.coeff: has the type 4"),
        ({"shape": [4]}, r"attn1.coeff: must have two dimensions from 1 to 1,024, got \[4\]"),
        ({"shape": [True, 4]}, r"must have two dimensions from 1 to 1,024, got \[True, 4\]"),
        ({"shape": [20_000, 20_000]}, r"must have two dimensions from 1 to 1,024"),
        ({"shape": [2, 3]}, r"attn1.coeff: \[2, 3\] of F32 do not fill the bytes from \d+ to \d+"),
        ({"data_offsets": [-4, 12]}, r"must have two offsets of bytes, got \[-4, 12\]"),
        ({"data_offsets": [4, 20]}, "begins at byte"),
        ({"data_offsets": [0.0, 16]}, "must have two offsets of bytes"),
        ({"more": 1}, "must be described by dtype, shape and data_offsets"),
    ],
    ids=str,
)
def test_headers_that_lie_are_refused(good, refused, changes, reason) -> None:
    header = good.header()
    header[f"{LAYER}.coeff"] |= changes
    refused(join(header, good.values), reason)


def test_values_that_nothing_names_and_values_that_are_not_there(good, refused) -> None:
    refused(good.data + b"more", "its values take 224 bytes, and there are 228")
    refused(good.data[:-1], "its values take 224 bytes, and there are 223")
    refused(good.data[:100], "it ends before what its header says")
    refused(b"1234567", "it ends before what its header says")
    refused((2**20 + 1).to_bytes(8, "little") + good.data[8:], "its header has 1,048,577 bytes, .* at most 1,048,576")


@pytest.mark.parametrize("what", ["tensor", "metadata", "description"])
def test_a_key_that_is_there_twice_is_refused(good, refused, what) -> None:
    header = good.header()
    text = json.dumps(header)
    if what == "tensor":
        key = f"{LAYER}.coeff"
        refused(join(f'{{"{key}": {json.dumps(header[key])}, {text[1:]}', good.values), "is there twice")
    elif what == "metadata":
        refused(
            join(text.replace('"format": "pt"', '"format": "pt", "format": "pt"'), good.values), "'format' is there"
        )
    else:
        inner = header["__metadata__"]["coeff_diffusers"]
        refused(described(good, inner.replace('"base":', '"base": {}, "base":', 1)), "'base' is there twice")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"format_version": NaN}', "not JSON compliant"),
        ('{"format_version": 1e999}', "not JSON compliant"),
        ('{"format_version": true}', "format_version must be the number 1, got True"),
        ('{"format_version": 1.0}', "format_version must be the number 1, got 1.0"),
        ('{"format_version": "1"}', "format_version must be the number 1, got '1'"),
        ('{"format_version": 2}', "has format version 2, this release reads 1: update the package"),
        (
            '{"format_version": 1, "base": {"vae": 5, "unet": 5}}',
            "'vae' must be a component's name with an object, got 5",
        ),
        ('{"format_version": 1, "base": {"unet": {"class": ["x"]}}}', r"'unet'.class must be .* got \['x'\]"),
        ('{"format_version": 1, "base": {"unet": {"class": 5, "heads": null}}}', "'unet'.class must be .* got 5"),
        ('{"format_version": 1, "base": {"unet": {"class": "X", "heads": null}}}', "'unet'.heads must be an object"),
        ('{"format_version": 1, "base": {"unet": {"class": "X", "name": 5}}}', "'unet'.name must be a string, got 5"),
        ('{"format_version": 1, "base": {"unet": {"class": "X", "heads": {"a": 0}}}}', "1,024 heads, got 0 for 'a'"),
        ('{"format_version": 1, "base": {"unet": {"class": "X", "heads": {"a": true}}}}', "heads, got True for 'a'"),
        ('{"format_version": 1, "config": 5}', "config must be an object, got 5"),
        ('{"format_version": 1, "base": {}, "x": "\\ud800"}', "surrogates not allowed"),
    ],
    ids=lambda text: text[:70],
)
def test_descriptions_are_held_to_one_schema(good, refused, text, reason) -> None:
    refused(described(good, text), reason)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"__metadata__": 5}', "\ufeff{}", '{"\\ud800": {}}', "{} x"])
def test_headers_that_are_none(refused, text) -> None:
    refused(join(text, b""), "is no readable .safetensors file")


def test_hidden_characters_reach_no_terminal(saved, good, tmp_path, capsys) -> None:
    """Escape sequences, line ends and half surrogates, in keys, names, metadata and file names."""
    evil = "\x1b[2J\nok: it fits\r\u202e"
    header = good.header()
    header["__metadata__"]["instance_prompt"] = evil
    description = good.description()
    description["base"]["unet"]["name"] = evil
    header["__metadata__"]["coeff_diffusers"] = json.dumps(description)
    path = tmp_path / f"{evil}.safetensors"
    path.write_bytes(join(header, good.values))
    saved[0].save_config(tmp_path / "model")
    for command in (
        ["info", path],
        ["check", path, "--model", tmp_path / "model"],
        ["check", path, "--model", evil],
        ["diff", path, saved[1]],
        ["merge", path, saved[1], "-o", tmp_path / "out.safetensors"],
        ["merge", path, path, "-o", tmp_path / f"{evil}.safetensors"],
        ["prune", path, "-o", tmp_path / "out.safetensors", "--layers", "1"],
        ["info", tmp_path / f"no{evil}.safetensors"],
    ):
        main([str(argument) for argument in command])
        printed = capsys.readouterr()
        for line in (printed.out + printed.err).splitlines():
            assert line.isprintable(), line
            assert not line.startswith("ok: it fits")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_coeff_weights(saved[0], {f"unet.{evil}.coeff": torch.ones(2, 2)}, adapter_name="x")
    assert all(line.isprintable() for line in str(error.value).split("\n"))
    path.write_bytes(join({f"unet.{evil}.coeff": header.popitem()[1], **header}, good.values))
    with pytest.raises(ValueError, match="is the name of no layer"):
        load_coeff_weights(saved[0], path, adapter_name="x")


def test_half_a_surrogate_pair_is_no_adapter_s_name_and_no_metadata(saved, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"adapter_name must be text that UTF-8 can write, got 'a\\ud800'"):
        add_coeff_adapter(saved[0], adapter_name="a\ud800")
    with pytest.raises(ValueError, match="metadata 'note' must be text that UTF-8 can write"):
        save_coeff_weights(saved[0], tmp_path, metadata={"note": "\udcff"})
    assert printable("a\ud800\n\x1bb\\狐") == "a\\ud800\\n\\x1bb\\狐"


# ---- what a file is ----


@POSIX
def test_what_is_no_file_is_refused_by_name_and_at_once(saved, tmp_path) -> None:
    path = tmp_path / NAME
    for make, what in (
        (lambda: os.mkfifo(path), f"{NAME} is a named pipe, no file"),
        (path.mkdir, f"{NAME} is a folder, no file"),
        (lambda: path.symlink_to("/dev/zero"), f"{NAME} is a device, no file"),
        (lambda: path.symlink_to(NAME), NAME),
    ):
        make()
        for source in {path, tmp_path} if what != f"{NAME} is a folder, no file" else {tmp_path}:
            with pytest.raises((ValueError, OSError), match=what):
                load_coeff_weights(saved[0], source, adapter_name="x")
            with pytest.raises((ValueError, OSError), match=what):
                read_coeff_metadata(source)
        path.rmdir() if path.is_dir() else path.unlink()


@POSIX
def test_a_file_that_is_too_large_is_not_read(good, saved, tmp_path) -> None:
    import resource

    header, path = good.header(), tmp_path / "sparse.safetensors"
    begin = len(good.values)
    header["unet.extra.coeff"] = {
        "dtype": "F32",
        "shape": [20_000, 20_000],
        "data_offsets": [begin, begin + 16 * 10**8],
    }
    path.write_bytes(join(header, good.values))
    os.truncate(path, path.stat().st_size + 16 * 10**8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="sparse.safetensors .* it has 1,600,0.* bytes, .* at most 268,435,456"):
        load_coeff_weights(saved[0], path, adapter_name="x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@POSIX
def test_a_file_changed_while_it_is_read_is_read_once(saved, good, tmp_path, monkeypatch) -> None:
    """Cut off in its place it is refused; values that come after they were read have no part."""
    path, fresh, read = tmp_path / "changing.safetensors", HOSTS["unet"].build(), coeff_file._read

    def cut_off(file, count):
        if file.tell() > 8:
            os.truncate(path, len(good.data) - 50)
        return read(file, count)

    path.write_bytes(good.data)
    monkeypatch.setattr(coeff_file, "_read", cut_off)
    monkeypatch.setattr(coeff_file, "_open", lambda file: file.open("rb", buffering=0))  # as a large file is read
    with pytest.raises(ValueError, match="changing.safetensors .* it ends before"):
        load_coeff_weights(fresh, path)
    monkeypatch.undo()
    path.write_bytes(good.data)
    tensors, _ = coeff_file.read_file(path)
    path.write_bytes(b"\xff" * len(good.data))  # in its place: a memory map would show it
    torch.testing.assert_close(tensors, coeff_state_dict(saved[0]), rtol=0, atol=0)


# ---- names ----


HOSTILE = ["../evil", "/tmp/evil", "sub/../../x", "..\\evil", "C:evil", "C:\\evil", "sub/x", "con", "NUL.x", "com1",
           "lpt¹", "conin$", "a\nb", "a\0b", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_stay_in_their_folder_on_every_system(saved, tmp_path, name) -> None:
    folder = tmp_path / "d"
    for call in (
        lambda: save_coeff_weights(saved[0], folder, weight_name=f"{name}.safetensors"),
        lambda: load_coeff_weights(saved[0], tmp_path, weight_name=f"{name}.safetensors", adapter_name="x"),
        lambda: read_coeff_metadata("someone/dog", weight_name=f"{name}.safetensors"),
    ):
        with pytest.raises(ValueError, match="weight_name must be a plain name, which stays in its folder"):
            call()
    assert os.listdir(tmp_path) == []
    if name != "sub/x":
        for source in (tmp_path, "someone/dog"):
            with pytest.raises(ValueError, match="subfolder .* must be a plain name, which stays in its folder"):
                load_coeff_weights(saved[0], source, subfolder=name, adapter_name="x")


def test_plain_names_are_no_devices() -> None:
    for name in ("console", "com", "com10", "nul-dog", "a con.safetensors", ".hidden", "狐"):
        check_file_name(name, "name")


def test_the_longest_name_that_the_file_system_takes_can_be_written(saved, tmp_path) -> None:
    name = "x" * 243 + ".safetensors"
    assert save_coeff_weights(saved[0], tmp_path, weight_name=name).name == name
    with pytest.raises(OSError, match="x" * 244):
        save_coeff_weights(saved[0], tmp_path, weight_name=f"x{name}")
    assert os.listdir(tmp_path) == [name]


def test_metadata_that_could_not_be_read_is_not_written(saved, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{NAME} was not written: .* 60.,... bytes, .* the longest entry is 'note'"):
        save_coeff_weights(saved[0], tmp_path, metadata={"note": "x" * 601_000, "other": "x"})
    assert os.listdir(tmp_path) == []


# ---- writing ----


@POSIX
def test_a_full_disk_leaves_the_older_file_and_names_the_new_one(saved, tmp_path, capsys) -> None:
    import resource

    old = save_coeff_weights(saved[0], tmp_path)
    before = old.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # stands in for it; Python ignores the signal
    try:
        with pytest.raises(OSError, match=rf"cannot be written, and is as it was: File too large: .*{NAME}"):
            save_coeff_weights(saved[0], tmp_path)
        assert main(["merge", str(old), str(old), "-o", str(tmp_path / "out.safetensors")]) == 2
        assert "out.safetensors" in capsys.readouterr().err
        assert main(["prune", str(old), "-o", str(old), "--layers", "1"]) == 2
        assert NAME in capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert old.read_bytes() == before
    assert os.listdir(tmp_path) == [NAME]


@POSIX
def test_what_a_kill_left_behind_goes_with_the_next_save_of_the_name(tmp_path) -> None:
    """And what another, that is still there, is writing stays."""
    child = os.fork()
    if child == 0:
        with whole_file(tmp_path / "a.txt") as torn:
            Path(torn).write_text("torn")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 1
    with whole_file(tmp_path / "b.txt"):
        assert set(left) < set(os.listdir(tmp_path))  # of another name
    with whole_file(tmp_path / "a.txt") as first:
        Path(first).write_text("first")
        with whole_file(tmp_path / "a.txt") as second:
            Path(second).write_text("second")
            assert sorted(os.listdir(tmp_path)) == sorted(["b.txt", Path(first).name, Path(second).name])
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]
    assert (tmp_path / "a.txt").read_text() == "first"


@POSIX
def test_saving_leaves_the_process_s_umask_alone(saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "umask", None)  # another thread would make files of another mode meanwhile
    path = save_coeff_weights(saved[0], tmp_path)
    with open(tmp_path / "plain", "w"):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_threads_that_save_one_name_leave_one_whole_file(saved, tmp_path) -> None:
    failures = []

    def save() -> None:
        try:
            for _ in range(5):
                save_coeff_weights(saved[0], tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(tmp_path) == [NAME]
    assert load_coeff_weights(HOSTS["unet"].build(), tmp_path) == {}


def test_a_traceback_is_no_answer(saved, monkeypatch, capsys) -> None:
    """1 is `does not fit`; a fault of the program's own ends with 2, and a config that is none with a line."""
    monkeypatch.setattr("coeff_diffusers.commands.coeff_files.differences", lambda *_: {}["no"])
    monkeypatch.setattr("coeff_diffusers.commands.coeff_files.skeleton", lambda _: saved[0])
    assert main(["check", str(saved[1]), "--model", "m"]) == 2
    assert "KeyError" in capsys.readouterr().err


def test_a_model_s_config_that_is_none_is_refused_in_a_line(saved, tmp_path, capsys) -> None:
    for config in (
        '{"_class_name": "UNet2DConditionModel", "block_out_channels": 5}',
        "[" * 100_000,
        '{"_class_name": 5}',
    ):
        (tmp_path / "config.json").write_text(config)
        assert main(["check", str(saved[1]), "--model", str(tmp_path)]) == 2
        printed = capsys.readouterr().err
        assert str(tmp_path) in printed
        assert "Traceback" not in printed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_files_of_every_type_that_is_read_have_their_sums_in_float32(saved, tmp_path, capsys, dtype) -> None:
    """Squares of 9,984 are infinite in float16; matplotlib knows no bfloat16."""
    tensors = {key: torch.full_like(delta, 9984.0, dtype=dtype) for key, delta in coeff_state_dict(saved[0]).items()}
    path, out = tmp_path / "typed.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, path, Good(saved[1].read_bytes()).header()["__metadata__"])
    assert main(["prune", str(path), "-o", str(out), "--layers", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["squared_norm_kept"] == 1.0
    tensors, _ = read_checked(path)
    assert {delta.dtype for delta in tensors.values()} == {torch.float32}
    assert load_coeff_weights(HOSTS["unet"].build(), path) == {}


def test_values_of_several_types_may_begin_at_any_byte(good, tmp_path) -> None:
    values = {"half": torch.tensor([[0.5]], dtype=torch.float16), "whole": torch.tensor([[1.0, -2.0], [3.0, 4.0]])}
    entries, body = {"__metadata__": good.header()["__metadata__"]}, b""
    for key, value in values.items():
        data = value.numpy().tobytes()
        entries[key] = {
            "dtype": "F16" if value.dtype == torch.float16 else "F32",
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    path = tmp_path / "types.safetensors"
    path.write_bytes(join(json.dumps(entries).encode(), body))
    tensors, _ = read_file(path)
    assert {key: value.tolist() for key, value in tensors.items()} == {key: v.tolist() for key, v in values.items()}
    assert all_usable({"whole": tensors["whole"]})


def test_all_values_are_looked_at_where_they_lie_one_after_another_and_where_not() -> None:
    good, bad = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    bad[2, 3, 3] = float("nan")
    for order in ([0, 1, 2], [2, 0, 1], [0, 2]):
        assert all_usable({str(n): good[n] for n in order})
        assert not all_usable({str(n): bad[n] for n in order})
    assert not all_usable({"0": bad[0], "1": bad[2].T})
    assert joined([good[0, 0], good[0, 1]]).shape == (8,)
    assert joined([good[2, 3], torch.ones(4)]).tolist() == [0.0] * 4 + [1.0] * 4


def test_every_promise_has_its_test() -> None:
    here = Path(__file__).parent
    promised = set(re.findall(r"`(test_\w+)`", (here.parent / "docs" / "security.md").read_text(encoding="utf-8")))
    written = "".join(path.read_text(encoding="utf-8") for path in here.rglob("test_*.py"))
    assert len(promised) > 20
    assert [name for name in promised if f"def {name}(" not in written] == []
